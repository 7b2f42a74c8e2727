"""Pro-tuning-style: a frozen image transformer between whose blocks small convolutions add prompts to the features
(after Nie et al., "Pro-tuning: Unified Prompt Tuning for Vision Tasks", IEEE TCSVT 2023). It sees no order of frames.

    patches [P, D] ─▶ 1 × 1: D → C ─▶ GELU ─▶ 5 × 5, each feature by itself ─▶ GELU ─▶ 1 × 1: C → D ─▶ added to them

From the paper: everything is frozen but the head and the prompt blocks, which predict a prompt of the features' own
shape from a block's output and add it. Ours, for there is no official code to go by and nothing published to compare
with: the order of layers, the widths and the kernel, the zeros at which the last 1 × 1 starts (the network starts as
the image model), class tokens passed by, and AIM's head over the frames. There is no prompt after the last block: it
would change the patches alone, and the head reads class tokens.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), P patches a frame, D width, C bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.layers import Linear
from model.method import Method
from model.video import VideoModel, check_rates, load_tower_weights
from model.vit import Block, ViT, add_to_patches, initialise


@dataclass(frozen=True)
class ProTuningOptions:
    """What can be set of it; none of the defaults is published."""

    prompt_ratio: float = 0.25
    """C over D."""
    kernel: int = 5
    """Side of the convolution over patches, odd."""
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.prompt_ratio <= 4:
            raise ValueError(f"model.prompt_ratio = {self.prompt_ratio}; allowed is 0 < ratio <= 4")
        if not (1 <= self.kernel <= 63 and self.kernel % 2):
            raise ValueError(f"model.kernel = {self.kernel}; allowed is an odd number of patches, 1 to 63")
        check_rates(self, "head_dropout")


class ProTuning(VideoModel):
    """Prompt blocks in a ViT with a class token; arguments as `model.methods.create` says."""

    any_frames = True
    trained_names = ("prompt", "cls_head")

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: ProTuningOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        last = geometry.layers - 1
        self.backbone = ViT(geometry, lambda layer: PromptedBlock(geometry, options, layer < last), None)
        initialise(self.backbone)
        load_tower_weights(self.backbone, tower.state_dict, ("prompt",))
        for module in self.backbone.modules():
            if isinstance(module, PromptBlock):
                nn.init.zeros_(module.up.weight)
        self.finish()


class PromptedBlock(Block):
    """A block of the image model, and the prompt block after it."""

    def __init__(self, geometry: ViTGeometry, options: ProTuningOptions, prompted: bool) -> None:
        super().__init__(geometry)
        self.prompt = PromptBlock(geometry.width, options) if prompted else None

    def forward(self, x_BTND: Tensor, masks: Tensor | None = None) -> Tensor:
        x = super().forward(x_BTND, masks)
        return x if self.prompt is None else add_to_patches(x, self.prompt(x[:, :, 1:]))


class PromptBlock(nn.Module):
    """Patches [B, T, P, D] → a prompt for each [B, T, P, D], zero at the start. Beyond a frame's border there are
    zeros."""

    def __init__(self, width: int, options: ProTuningOptions) -> None:
        super().__init__()
        hidden, kernel = int(width * options.prompt_ratio), options.kernel
        self.down = Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.up = Linear(hidden, width)

    def forward(self, x_BTPD: Tensor) -> Tensor:
        side, conv = isqrt(x_BTPD.shape[2]), self.conv
        h = F.gelu(self.down(x_BTPD)).flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)  # channels last
        assert conv.bias is not None
        h = F.conv2d(h, conv.weight.to(h.dtype), conv.bias.to(h.dtype), padding=conv.padding, groups=conv.groups)
        return self.up(F.gelu(h).permute(0, 2, 3, 1).reshape(*x_BTPD.shape[:3], -1))


METHODS = (
    Method(
        "pro_tuning",
        "convolutional prompts between frozen blocks",
        ProTuningOptions,
        {ViTGeometry: ProTuning},
        paper='Nie et al., "Pro-tuning: Unified Prompt Tuning for Vision Tasks", IEEE TCSVT 2023',
    ),
)
