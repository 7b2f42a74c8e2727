"""The frozen image model as feature sets are made with it."""

from __future__ import annotations

import pytest
import torch

from model.image_text import FrameEncoder, load_frame_encoder
from model.methods import build, create
from model.methods.aim import SpaceOnlyOptions
from model.open_clip_models import load_clip
from tests.towers import CLIP, IMAGENET, tower


def frames(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_frames_become_what_clip_makes_of_them() -> None:
    encoder, clip = load_frame_encoder("tiny-clip", "shapes"), load_clip("tiny-clip", "shapes")
    features = encoder.embed_frames(frames(48))
    images = encoder.prepare(frames(48).unsqueeze(1)).squeeze(1)
    assert features.dtype == torch.float32 and not features.requires_grad and features.shape == (3, 64)
    with torch.no_grad():
        torch.testing.assert_close(features, clip.encode_image(images), rtol=1e-4, atol=1e-5)
    encoder.set_compute_dtype(torch.bfloat16)
    assert encoder.embed_frames(frames(48)).dtype == torch.float32


@pytest.mark.parametrize("geometry", [CLIP, IMAGENET])
def test_without_a_projection_it_is_the_class_token(geometry: object) -> None:
    image = tower(geometry)  # type: ignore[arg-type]
    features = FrameEncoder(image, "x").embed_frames(frames(64))
    plain = create("frozen", image, num_classes=None, num_frames=1, options=SpaceOnlyOptions()).eval()
    with torch.no_grad():
        torch.testing.assert_close(features, plain(frames(64).unsqueeze(1)).flatten(1))


def test_a_model_says_what_made_its_features() -> None:
    encoder = load_frame_encoder("tiny-clip", "shapes")
    assert encoder.source.keys() == {"model", "weights_xxh3", "width", "size", "mean", "std"}
    assert (encoder.source["model"], encoder.source["width"], encoder.source["size"]) == ("tiny-clip", 64, 48)
    names = {"num_classes": 1, "num_frames": 2, "class_names": ["a"]}
    reading = build("zero_shot", "tiny-clip", "shapes", **names)  # type: ignore[arg-type]
    assert {"model": "tiny-clip", **(reading.feature_source or {})} == encoder.source
    other = build("zero_shot", "tiny-clip", "none", **names)  # type: ignore[arg-type]
    assert (other.feature_source or {})["weights_xxh3"] != encoder.source["weights_xxh3"]
    assert build("frozen", "tiny-clip", "shapes", num_classes=1, num_frames=2).feature_source is None


def test_a_swin_is_refused() -> None:
    with pytest.raises(ValueError, match="has no class token"):
        load_frame_encoder("swin_tiny_patch4_window7_224", "none")
