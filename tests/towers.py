"""Small image models with random weights, for tests of the video models that stand on them."""

from __future__ import annotations

import torch
from torch import nn

from model.geometry import CLIPGeometry, Geometry, ImageTower, SwinGeometry, ViTGeometry
from model.image_text import ImageTextEncoder
from model.methods import METHODS
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

BOTH = CLIPGeometry(
    128, 2, 2, 16, 32, True, (0.5,) * 3, (0.25,) * 3, embed_dim=64, text_width=64, text_layers=2, text_heads=1
)  # type: ignore[arg-type]
"""Both towers of a CLIP model, texts as long as CLIP's."""
SWIN = SwinGeometry(width=32, depths=(2, 2), heads=(1, 2), window=4, image_size=32)


def geometry_for(method: str) -> Geometry:
    """A geometry that the method takes."""
    return next(each for each in (CLIP, BOTH, SWIN) if any(isinstance(each, kind) for kind in METHODS[method].models))


def tower_for(method: str, seed: int = 0) -> ImageTower:
    """Random weights for it; Swin's as constructed."""
    geometry = geometry_for(method)
    if isinstance(geometry, CLIPGeometry):
        return both_towers(geometry, seed)
    return tower(geometry, seed) if isinstance(geometry, ViTGeometry) else ImageTower(geometry, {})


def both_towers(geometry: CLIPGeometry = BOTH, seed: int = 0) -> ImageTower:
    """Random weights of a CLIP model."""
    torch.manual_seed(seed)
    encoder = ImageTextEncoder(geometry)
    for name, parameter in encoder.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    texts = {
        key.removeprefix("text."): state.pop(key) for key in list(state) if key.startswith(("text.", "logit_scale"))
    }
    return ImageTower(geometry, state, state.pop("proj"), texts)


def tower(geometry: ViTGeometry = CLIP, seed: int = 0) -> ImageTower:
    """Random weights for a geometry; no norm and no bias is where it starts."""
    torch.manual_seed(seed)
    backbone = Finetuned(ImageTower(geometry, {}), None, 1, SpaceOnlyOptions()).backbone
    for name, parameter in backbone.named_parameters():
        nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.1)
    return ImageTower(geometry, {key: value.detach().clone() for key, value in backbone.state_dict().items()})
