"""The extraction program as a user runs it, with the shipped CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.image_text import load_frame_encoder
from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, eval_turns
from pipelines.shards import ShardSet
from tests.sets import make_set
from tools.extract_features import main


def test_features_are_what_the_image_model_makes_of_the_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the manifest names it."""
    packed, features = make_set(tmp_path / "set", [12, 20], splits=("train", "val")), tmp_path / "features"
    clip = ("--name", "tiny-clip", "--pretrained", "shapes", "--workers", "1")
    main([str(packed), str(features), *clip, "--crop", "1", "--every", "2"])
    assert "32 frames of 4 videos (train 2, val 2)" in capsys.readouterr().out
    encoder = load_frame_encoder("tiny-clip", "shapes")
    entry = json.loads((features / "manifest.json").read_bytes())["features"]
    assert encoder.source.items() <= entry.items() and (entry["channels"], entry["crop"]) == ("rgb", 1.0)
    common = {"micro_batch": 2, "size": entry["size"], "options": ClipOptions(num_frames=3, interval=4, eval_crop=1.0)}
    turns = list(eval_turns(2, micro_batch=2, rank=0, world=1))
    with (
        ClipLoader(ShardSet.open(packed, "val"), turns, **common) as online,
        ClipLoader(ShardSet.open(features, "val"), turns, **common) as cached,
    ):
        computed, kept = encoder.embed_frames(next(online).frames.flatten(0, 1)), next(cached).frames.flatten(0, 1)
    assert torch.allclose(computed, kept.float(), rtol=1e-3, atol=1e-3) and kept.shape == (6, entry["width"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "out"), "no such folder"),
        (("set", "set"), "exists"),
        (("set", "out", "--every", "0"), "every 0-th stored frame"),
        (("set", "out", "--name", "tiny-clop"), "unknown model.name 'tiny-clop'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    make_set(tmp_path / "set", [3])
    paths = [str(tmp_path / name) for name in arguments[:2]]
    with pytest.raises((ValueError, OSError), match=message):
        main([*paths, "--name", "tiny-clip", "--pretrained", "shapes", *arguments[2:]])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
