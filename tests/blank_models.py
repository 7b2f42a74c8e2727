"""Models without weights, to count."""

from __future__ import annotations

from typing import Any

from model.flops import WithoutData
from model.methods import METHODS, create, load_tower
from model.video import VideoModel

CLIP_B = "ViT-B-16-quickgelu"
CLIP_L = "ViT-L-14-quickgelu"
IN21K_B = "vit_base_patch16_224"
SWIN_B = "swin_base_patch4_window7_224"


def blank_model(method: str, name: str, num_classes: int | None, num_frames: int, **options: Any) -> VideoModel:
    """A method on an image model; `options` differ from its defaults."""
    chosen = METHODS[method].options(**options)
    tower = load_tower(method, name, "none", options=chosen)
    with WithoutData():
        return create(method, tower, num_classes=num_classes, num_frames=num_frames, options=chosen)
