"""The image transformer that AIM, TimeSformer on CLIP and the space-only baselines share: stem, parts of blocks, norm.

Parameters bear CLIP's names, which are the official AIM's. Tokens are held as x_BTND from stem to head and never
permuted.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.geometry import ViTGeometry
from model.layers import LayerNorm, Linear, PatchEmbedding

BlockFactory = Callable[[int], nn.Module]
"""Layer number → a block that takes x_BTND and its masks, and returns x_BTND."""


class ViT(nn.Module):
    """Normalised clips [B, T, 3, H, W] → class tokens [B, D, T, 1, 1], as the official backbone returns them."""

    def __init__(self, geometry: ViTGeometry, make_block: BlockFactory, temporal_frames: int | None) -> None:
        """`temporal_frames`: length of the temporal embedding; None where there is none."""
        super().__init__()
        width = geometry.width
        self.conv1 = PatchEmbedding(width, geometry.patch_size, geometry.patch_bias)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(geometry.num_tokens, width))
        frames = temporal_frames
        self.temporal_embedding = None if frames is None else nn.Parameter(torch.zeros(1, frames, width))
        self.ln_pre = LayerNorm(width, geometry.eps) if geometry.ln_pre else None
        self.transformer = Transformer(geometry.layers, make_block)
        self.ln_post = LayerNorm(width, geometry.eps)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks["drop_path"]`: scaled keep masks [B, layers, …], absent for no drop."""
        x_BTND = self.transformer(self.embed(clips), masks.get("drop_path"))
        return self.ln_post(x_BTND[:, :, 0]).transpose(1, 2)[..., None, None]

    def embed(self, clips: Tensor) -> Tensor:
        """The stem: [B, T, 3, H, W] → x_BTND before the first block."""
        patches = self.conv1(clips.flatten(0, 1))
        class_tokens = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x_MND = torch.cat([class_tokens, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x_BTND = x_MND.unflatten(0, clips.shape[:2])
        if self.temporal_embedding is not None:
            x_BTND = x_BTND + self.temporal_embedding.to(x_BTND.dtype).unsqueeze(2)
        return x_BTND if self.ln_pre is None else self.ln_pre(x_BTND)


class Transformer(nn.Module):
    """The stack of blocks."""

    def __init__(self, layers: int, make_block: BlockFactory) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(make_block(layer) for layer in range(layers))

    def forward(self, x_BTND: Tensor, drop_path: Tensor | None) -> Tensor:
        for layer, block in enumerate(self.resblocks):
            masks = None if drop_path is None else drop_path[:, layer].to(x_BTND.dtype)
            x_BTND = block(x_BTND, masks)
        return x_BTND


class Attention(nn.Module):
    """Multi-head self-attention, over space or over time with the same weights.

    The three projections are three products, so that q, k and v are plain views of contiguous [B, T, N, D] tensors;
    a fused one would make the temporal view impossible without a copy.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def over_space(self, x_BTND: Tensor) -> Tensor:
        """Every frame's tokens attend to each other."""
        B, T, N, D = x_BTND.shape
        return self._attend(x_BTND, (B * T, N, self.heads, D // self.heads))

    def over_time(self, x_BTND: Tensor) -> Tensor:
        """Every token attends to the same token of the other frames, the class token included."""
        B, T, N, D = x_BTND.shape
        return self._attend(x_BTND, (B, T, N * self.heads, D // self.heads))

    def queries_keys(self, x_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """q and k over space [B·T, N, H, K]: what attention maps are made of."""
        B, T, N, D = x_BTND.shape
        q, k, _ = self._project(x_BTND, (B * T, N, self.heads, D // self.heads))
        return q, k

    def _attend(self, x_BTND: Tensor, view: tuple[int, int, int, int]) -> Tensor:
        q, k, v = self._project(x_BTND, view)
        return self.out_proj(attention(q, k, v).reshape(x_BTND.shape))

    def _project(self, x_BTND: Tensor, view: tuple[int, int, int, int]) -> list[Tensor]:
        weights = self.in_proj_weight.to(x_BTND.dtype).chunk(3)
        biases = self.in_proj_bias.to(x_BTND.dtype).chunk(3)
        return [F.linear(x_BTND, w, b).view(view) for w, b in zip(weights, biases, strict=True)]


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, width: int, quick_gelu: bool, hidden: int = 0) -> None:
        """`hidden`: its width within; 0: four times the width."""
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = Linear(width, hidden or 4 * width)
        self.c_proj = Linear(hidden or 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


def initialise(module: nn.Module) -> None:
    """The official start, before pretrained weights: every linear layer truncated normal of std 0.02 with bias 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.is_meta:  # on meta it would only take time
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
