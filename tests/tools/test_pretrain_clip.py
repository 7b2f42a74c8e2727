"""The tiny CLIP: a few steps run end to end, and the shipped weights know what captions say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from tools.pretrain_clip import (
    CONFIG_PATH,
    HELD_OUT_STREAM,
    WORDS,
    Recipe,
    build_model,
    captions_of,
    draw_stills,
    main,
    pretrain,
    word_loss,
    zero_shot_accuracy,
)

SHIPPED = CONFIG_PATH.with_suffix(".safetensors")
CONFIG = json.loads(CONFIG_PATH.read_text())


def load_shipped() -> open_clip.CLIP:
    model = build_model(CONFIG)
    model.load_state_dict({name: value.float() for name, value in load_file(SHIPPED).items()})
    return model.eval()


def test_loss_falls_within_a_few_steps() -> None:
    _, losses = pretrain(CONFIG, Recipe(steps=18, batch=32, warmup_steps=4))
    assert len(losses) == 18
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1


def test_command_writes_weights_that_open_clip_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "tiny.safetensors"
    main(["--weights", str(weights), "--steps", "2", "--batch", "16", "--held-out", "20"])
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


def test_word_loss_is_small_only_for_the_right_words() -> None:
    labels = draw_stills((0, 0, 0), 8, size=16).labels
    right = torch.cat([F.one_hot(torch.from_numpy(labels[name]), len(words)) for name, words in WORDS.items()], dim=1)
    assert word_loss(20.0 * right, labels) < 1e-3
    assert word_loss(-20.0 * right, labels) > 10


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
