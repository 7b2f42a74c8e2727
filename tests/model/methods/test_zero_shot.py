"""CLIP's own zero-shot recognition: nothing trains, and the answers are open_clip's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer

from model.methods import build
from model.methods.zero_shot import ZeroShotOptions
from model.open_clip_models import load_clip
from model.parameters import count_parameters
from model.video import VideoModel

NAMES = ["moves_left", "large red circle"]


def make(**options: object) -> VideoModel:
    chosen = ZeroShotOptions(**options)  # type: ignore[arg-type]
    return build(
        "zero_shot", "tiny-clip", "shapes", num_classes=2, num_frames=3, options=chosen, class_names=NAMES
    ).eval()


def clips(frames: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, 48, 48, 3), dtype=torch.uint8, generator=generator)


def test_logits_are_clips() -> None:
    """A frame's mean vector, against the mean of two sentences."""
    ours, clip = make(template=("a video of {}.", "{}")), load_clip("tiny-clip", "shapes")
    sentences = ["a video of moves left.", "moves left", "a video of large red circle.", "large red circle"]
    with torch.no_grad():
        frames = clip.encode_image(ours.prepare(clips()).flatten(0, 1), normalize=True)
        videos = F.normalize(frames.unflatten(0, (2, 3)).mean(1), dim=-1)
        texts = clip.encode_text(SimpleTokenizer(context_length=24)(sentences), normalize=True)
        classes = F.normalize(texts.unflatten(0, (2, 2)).mean(1), dim=-1)
        expected = clip.logit_scale.exp() * videos @ classes.T
        torch.testing.assert_close(ours(clips()), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(ours.stem(clips())), expected, rtol=1e-4, atol=1e-4)
        warm = make(template=("a video of {}.", "{}"), temperature=0.5)(clips())
        torch.testing.assert_close(warm, 2 * videos @ classes.T, rtol=1e-4, atol=1e-4)


def test_nothing_trains_and_order_means_nothing() -> None:
    ours = make()
    assert count_parameters(ours)[1] == 0
    with torch.no_grad():
        torch.testing.assert_close(ours(clips().flip(1)), ours(clips()))
        assert ours(clips(5)).shape == (2, 2)
        ours.name_classes(["a", "b", "c"])
        assert ours(clips()).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": ()}, "allowed are one or more sentences"),
        ({"template": ("a", "{}")}, "model.template = 'a'"),
        ({"temperature": -1.0}, "model.temperature = -1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroShotOptions(**options)  # type: ignore[arg-type]
