"""Small image models with random weights, for tests of the video models that stand on them."""

from __future__ import annotations

import torch
from torch import nn

from model.geometry import ImageTower, ViTGeometry
from model.methods.aim import Finetuned, SpaceOnlyOptions

CLIP = ViTGeometry(128, 3, 2, 16, 64, True, (0.5,) * 3, (0.25,) * 3)  # type: ignore[arg-type]
"""CLIP's kind of ViT: a layer norm before the first block, QuickGELU."""
IMAGENET = ViTGeometry(
    128,
    3,
    2,
    16,
    64,
    False,
    (0.5,) * 3,
    (0.5,) * 3,
    ln_pre=False,
    patch_bias=True,
    eps=1e-6,  # type: ignore[arg-type]
)
"""ImageNet's kind, as in timm."""


def tower(geometry: ViTGeometry = CLIP, seed: int = 0) -> ImageTower:
    """Random weights for a geometry; no norm and no bias is where it starts."""
    torch.manual_seed(seed)
    backbone = Finetuned(ImageTower(geometry, {}), None, 1, SpaceOnlyOptions()).backbone
    for name, parameter in backbone.named_parameters():
        nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.1)
    return ImageTower(geometry, {key: value.detach().clone() for key, value in backbone.state_dict().items()})
