"""Layers whose weights may be kept in another precision than the tokens: each computes in its input's dtype.

Frozen weights are stored in the compute dtype (bf16), trainable ones in float32 as the optimizer's exact masters. A
layer casts what it needs on the way in, so the same modules serve fp32, bf16, frozen and trained alike, without
autocast.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x Wᵀ + b in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis; statistics are accumulated in float32, the result has x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PatchEmbedding(nn.Conv2d):
    """Non-overlapping patches to tokens: [M, 3, H, W] → [M, (H/p)·(W/p), D], row major."""

    def __init__(self, width: int, patch_size: int, bias: bool = False) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, stride=self.stride).flatten(2).transpose(1, 2)
