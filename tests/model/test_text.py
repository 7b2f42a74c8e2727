"""The text tower is CLIP's, prompts stand where they should, and strangers' files of class names do no harm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from model.backbone import load_image_tower
from model.geometry import CLIPGeometry
from model.image_text import ImageTextEncoder, clip_weights
from model.open_clip_models import END, START, VOCABULARY, load_clip
from model.text import Prompts, check_template, class_texts, read_class_texts
from model.video import load_tower_weights
from tests.towers import BOTH

TEXTS = ["brush hairs", "a video of a small red circle", "!"]


def tiny_clip() -> ImageTextEncoder:
    tower = load_image_tower("tiny-clip", "shapes", text_tower=True)
    assert isinstance(tower.geometry, CLIPGeometry)
    encoder = ImageTextEncoder(tower.geometry)
    load_tower_weights(encoder, clip_weights(tower), ())
    return encoder.requires_grad_(False)


def prompts(texts: list[str], context: int = 24, prefix: int = 0, postfix: int = 0) -> Prompts:
    return Prompts.of(texts, replace(BOTH, context_length=context), prefix=prefix, postfix=postfix)


def test_both_towers_are_open_clips() -> None:
    encoder, clip = tiny_clip(), load_clip("tiny-clip", "shapes")
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        texts, frames = clip.encode_text(SimpleTokenizer(context_length=24)(TEXTS)), clip.encode_image(images)
        torch.testing.assert_close(encoder.encode(prompts(TEXTS)), texts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder.stem(images.unsqueeze(1)).squeeze(1), frames, rtol=1e-5, atol=1e-5)
        assert encoder.logit_scale.item() == clip.logit_scale.item()


def test_our_tokens_are_the_published_ones() -> None:
    """As the reference gives them: two words between 16 and 16 stand at 17 and 18, the end at 35."""
    made = prompts(["climb stairs"], 77, 16, 16)
    assert made.taken[0].nonzero().flatten().tolist() == [0, 17, 18, 35] and made.ends.tolist() == [35]
    expected = SimpleTokenizer(context_length=77)(["climb stairs"])[0, :4].tolist()
    assert made.tokens[0, made.taken[0]].tolist() == expected == [START, 10649, 9577, END]
    assert SimpleTokenizer().vocab_size == VOCABULARY


def test_texts_of_different_length_end_at_different_places() -> None:
    made = prompts(["bowling", "climb stairs"], 24, 2, 3)
    assert made.ends.tolist() == [7, 8] and made.tokens.shape == (2, 9)
    assert made.taken.int().tolist() == [[1, 0, 0, 1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 0, 0, 1]]
    assert (made.tokens[~made.taken] == 0).all()
    second = made[torch.tensor([1])]
    assert second.ends.tolist() == [8] and [part.tokens.shape[0] for part in made.split(1)] == [1, 1]


def test_what_stands_after_the_end_means_nothing() -> None:
    encoder = tiny_clip()
    alone, beside = prompts(["red"]), prompts(["red", "a large blue square turning to the left"])
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(alone), encoder.encode(beside)[:1], rtol=1e-5, atol=1e-5)
        x_CLD = encoder.place(beside)
        changed = x_CLD.clone()
        changed[0, beside.ends[0] + 1 :] = 7.0
        before, after = (encoder.text(x, beside.ends) for x in (x_CLD, changed))
    assert torch.equal(before, after)


def test_a_text_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"the text 'one two three' has 3 tokens; of the text tower's 8 places .* 3 \+ 1"
    ):
        prompts(["one", "one two three"], 8, 3, 1)
    with pytest.raises(ValueError, match=r"has 7 tokens; of the text tower's 8 places start, end leave 6: shorten it"):
        prompts(["one two three four five six seven"], 8)
    with pytest.raises(ValueError, match="knows 100 tokens, and CLIP's tokeniser makes 49408"):
        Prompts.of(["a"], replace(BOTH, vocab_size=100))


def test_names_become_words(tmp_path: Path) -> None:
    assert class_texts(["brush_hair", "  draw  sword "], "") == ["brush hair", "draw sword"]
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"brush_hair": "brush hairs", "wave": " a  hand ", "unused": "x"}))
    assert class_texts(["wave", "brush_hair"], str(path)) == ["a hand", "brush hairs"]
    with pytest.raises(ValueError, match=r"names.json' has no class 'run' \(1 of 2 are missing\)"):
        class_texts(["wave", "run"], str(path))
    with pytest.raises(ValueError, match="a class has an empty name"):
        class_texts(["_"], "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "a JSON object"),
        (b"[" * 100_000, "a JSON object"),
        (b'["a"]', "holds a list; a JSON object"),
        (b'{"a": 1}', "'a' is 1; allowed is a text"),
        (b'{"a": "  "}', "'a' is '  '; allowed is a text"),
        (b'{"a": {"b": "c"}}', "allowed is a text"),
        (b'{"a": "b", "a": "c"}', "'a' stands there twice"),
        (json.dumps({"a": "b" * 1001}).encode(), "up to 1000 letters"),
        (b" " * (4 * 2**20 + 1), "larger than 4194304 bytes"),
    ],
)
def test_a_strangers_file_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_class_texts(str(path))
    text = str(error.value)
    assert message in text and "model.class_texts" in text and "\n" not in text and len(text) < 500


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to read it would take for ever
    for name in ("pipe", "missing", "."):
        with pytest.raises(FileNotFoundError, match=r"no such file; give its place with --set model\.class_texts=PATH"):
            read_class_texts(str(tmp_path / name))


@pytest.mark.parametrize("template", ["", "a video", "{} and {}", "{0}"])
def test_a_template_has_one_place_for_the_class(template: str) -> None:
    with pytest.raises(ValueError, match=r"model\.template = .*; allowed is a text with one \{\}"):
        check_template(template)
    check_template("a video of {}.")


def test_attention_is_causal() -> None:
    encoder = tiny_clip()
    made = prompts(["a large red circle"])
    x_CLD: Tensor = encoder.place(made).requires_grad_()
    encoder.text(x_CLD, torch.tensor([2])).sum().backward()
    assert x_CLD.grad is not None
    reached: Callable[[int], bool] = lambda place: bool(x_CLD.grad[0, place].any())  # type: ignore[index]  # noqa: E731
    assert [reached(place) for place in range(made.tokens.shape[1])] == [True] * 3 + [False] * (
        made.tokens.shape[1] - 3
    )
