"""What shape an image model has, and its weights: all that the video models need to know of where they came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

RANDOM_WEIGHTS = "none"
"""`model.pretrained` of an image model without pretrained weights."""


@dataclass(frozen=True)
class ViTGeometry:
    """Shape of an image transformer with a class token, from CLIP or from ImageNet."""

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

    @property
    def num_tokens(self) -> int:
        """Class token and patches of one frame."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class SwinGeometry:
    """Shape of a Swin transformer; the defaults are Swin-B at 224 × 224."""

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
    """Under CLIP's names for a ViT of any origin, Swin's official ones (see `model.swin`); empty: as constructed."""
    text_state: dict[str, Tensor] | None = None
    """Under CLIP's names, the blocks of the text tower that belongs to it (`transformer.resblocks.…`)."""
