"""The image model behind a video model, by name: from open_clip (`ViT-B-16-quickgelu`, …, and the shipped `tiny-clip`) or
from timm (`vit_base_patch16_224`, `swin_base_patch4_window7_224`, …)."""

from __future__ import annotations

import dataclasses
import difflib

from model import open_clip_models, timm_models
from model.geometry import ImageTower

RANDOM_WEIGHTS = "none"
NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "aim_clip": ((122.769 / 255, 116.74 / 255, 104.04 / 255), (68.493 / 255, 66.63 / 255, 70.321 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "timesformer": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
}
"""Mean and standard deviation of RGB in 0..1. `aim_clip`: CLIP's, as rounded in the official AIM configs; `imagenet`: also
what those use with ImageNet-21k's ViT, whose weights were made with `half`."""


def load_image_tower(
    name: str, pretrained: str, *, normalisation: str = "", text_tower: bool = False
) -> ImageTower:
    """Loads an image model.

    Args:
        name: of open_clip or of timm.
        pretrained: a weight tag of that model, the path of a `.safetensors` file (of a CLIP, also an OpenAI archive),
            or `none` for random weights.
        normalisation: a key of NORMALISATIONS; empty: what the weights were made with.
        text_tower: also loads the text tower's weights; of a model without one, a ValueError.

    Raises:
        ValueError: unknown name or tag, weights that cannot be had, an activation that does not fit the weights, or a
            structure that no method here can adapt.
    """
    raise NotImplementedError


def image_size(name: str) -> int:
    """Side in pixels of the square frames that a model takes, without building it; ValueError for unknown names."""
    raise NotImplementedError
