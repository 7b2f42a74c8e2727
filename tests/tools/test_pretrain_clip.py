"""The tiny CLIP: a few steps run end to end, and the shipped weights know what captions say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from tools.pretrain_clip import (
    CONFIG_PATH,
    GROUP,
    HELD_OUT_STREAM,
    WORDS,
    Recipe,
    build_model,
    captions_of,
    draw_batch,
    draw_stills,
    main,
    pretrain,
    zero_shot_accuracy,
)

SHIPPED = CONFIG_PATH.with_suffix(".safetensors")
CONFIG = json.loads(CONFIG_PATH.read_text())


def load_shipped() -> open_clip.CLIP:
    model = build_model(CONFIG)
    model.load_state_dict({name: value.float() for name, value in load_file(SHIPPED).items()})
    return model.eval()


def test_loss_falls_within_a_few_steps() -> None:
    _, losses = pretrain(CONFIG, Recipe(steps=24, groups=4, warmup_steps=4))
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1


def test_command_writes_weights_that_open_clip_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "tiny.safetensors"
    main(["--weights", str(weights), "--steps", "2", "--groups", "2", "--held-out", "20"])
    model = build_model(CONFIG)
    missing = model.load_state_dict(load_file(weights), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    assert "orientation" in capsys.readouterr().out


def test_the_same_key_draws_the_same_stills_and_another_does_not() -> None:
    first, again, other = (draw_stills((0, 1, k), 8, size=48) for k in (5, 5, 6))
    np.testing.assert_array_equal(first.pictures, again.pictures)
    assert first.captions() == again.captions()
    assert not np.array_equal(first.pictures, other.pictures)


def test_groups_of_a_batch_differ_in_what_they_should() -> None:
    batch = draw_batch((0, 0, 0), 6, size=16)
    by_group = {name: rows.reshape(6, GROUP) for name, rows in batch.labels.items()}
    varies = [{name for name, rows in by_group.items() if len(set(rows[g])) > 1} for g in range(6)]
    assert varies[0] >= {"place", "orientation"} and not varies[0] & {"shape", "colour", "texture"}
    assert varies[1] == {"orientation"} and len(set(by_group["orientation"][1])) == GROUP
    assert varies[2] == {"shape", "texture"}
    assert len(set(batch.captions()[GROUP : 3 * GROUP])) == 2 * GROUP


def test_every_caption_fits_the_context() -> None:
    length = CONFIG["text_cfg"]["context_length"]
    longest = {
        name: np.array([max(range(len(words)), key=lambda i, w=words: len(w[i]))]) for name, words in WORDS.items()
    }
    captions = draw_stills((0, 0, 0), 200, size=16).captions()
    captions += captions_of(longest)
    tokens = SimpleTokenizer(context_length=length)(captions)
    assert (tokens[:, -1] == 0).all()  # the end-of-text token came before the last place


def test_shipped_weights_are_small_and_bf16() -> None:
    assert SHIPPED.stat().st_size <= 8_000_000
    assert {tensor.dtype for tensor in load_file(SHIPPED).values()} == {torch.bfloat16}
    with safe_open(SHIPPED, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == CONFIG
    assert Recipe(**json.loads(metadata["recipe"])) == Recipe()


def test_shipped_weights_read_place_size_and_orientation() -> None:
    stills = draw_stills((99, HELD_OUT_STREAM), 150, size=CONFIG["vision_cfg"]["image_size"])
    accuracies = zero_shot_accuracy(load_shipped(), stills)
    for attribute in ("place", "size", "orientation", "shape", "colour"):
        assert accuracies[attribute] > 0.5, accuracies  # chance is at most 0.2
