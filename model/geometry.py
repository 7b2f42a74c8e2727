"""What shape an image model has, and its weights: all that the video models need to know of where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

RANDOM_WEIGHTS = "none"
"""`model.pretrained` of an image model without pretrained weights."""


@dataclass(frozen=True)
class ViTGeometry:
    """Shape of an image transformer with a class token, from CLIP or from ImageNet."""

    kind: ClassVar[str] = "vit"
    """What a description calls it."""
    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    quick_gelu: bool
    """MLP activation x·sigmoid(1.702x) as in OpenAI's weights; erf GELU otherwise. Not part of a state dict."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per-channel normalisation of RGB in 0..1."""
    ln_pre: bool = True
    """A layer norm before the first block: CLIP has one, ImageNet's ViTs have none."""
    patch_bias: bool = False
    """A bias in the patch convolution: ImageNet's ViTs have one, CLIP has none."""
    eps: float = 1e-5
    """Of every layer norm; 1e-6 in timm's ViTs."""
    mlp_width: int = 0
    """Hidden width of the feed-forward layers; 0: four times the width, as in all but the largest models."""
    embed_dim: int = 0
    """Width of the space that CLIP's projection shares with texts; 0: there is no projection."""

    @property
    def num_tokens(self) -> int:
        """Class token and patches of one frame."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class CLIPGeometry(ViTGeometry):
    """Shape of both towers of a CLIP model, for methods that read texts; the defaults are those of ViT-B/16's texts."""

    kind: ClassVar[str] = "clip"
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    """Tokens of a text, its start and its end included."""
    vocab_size: int = 49408


@dataclass(frozen=True)
class SwinGeometry:
    """Shape of a Swin transformer; the defaults are Swin-B at 224 × 224."""

    kind: ClassVar[str] = "swin"
    width: int = 128
    """Of the first stage; each later one is twice as wide and half as large."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 7
    patch_size: int = 4
    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def features(self) -> int:
        """Width of the last stage."""
        return self.width * 2 ** (len(self.depths) - 1)


Geometry = ViTGeometry | SwinGeometry


@dataclass(frozen=True)
class ImageTower:
    """An image model: its geometry, and its float32 weights without the layers that only images need."""

    geometry: Geometry
    state_dict: dict[str, Tensor]
    """Under CLIP's names for a ViT of any origin, Swin's official ones (see `model.methods.swin`); empty: as
    constructed."""
    projection: Tensor | None = None
    """CLIP's projection of class tokens into the space shared with texts, [width, embed_dim]."""
    text_state: dict[str, Tensor] | None = None
    """The text tower that belongs to it, under CLIP's names (`token_embedding.weight`, `positional_embedding`,
    `transformer.resblocks.…`, `ln_final.…`, `text_projection`), and `logit_scale`; None where it was not asked for."""
