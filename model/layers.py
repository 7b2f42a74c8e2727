"""Layers whose weights may be kept in another precision than the tokens: each computes in its input's dtype.

Frozen weights are stored in the compute dtype (bf16), trainable ones in float32 as the optimizer's exact masters. A
layer casts what it needs on the way in, so the same modules serve fp32, bf16, frozen and trained alike, without
autocast. Frozen linear layers may also multiply in 8 bits (`model.fp8`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.fp8 import FP8Weight, can_be_fp8


def linear(
    x: Tensor,
    weight: Tensor | FP8Weight,
    bias: Tensor | None,
    *,
    input_factor: float = 1.0,
    output_factor: float = 1.0,
) -> Tensor:
    """y = output_factor · (input_factor · x Wᵀ + b) in x's dtype: x [..., K], W [N, K], b [N] → y [..., N].

    The factors ride on the product, forward and backward: neither x nor y is read or written once more for them.
    """
    bias = None if bias is None else bias.to(x.dtype)
    factor = input_factor * output_factor
    if bias is not None and output_factor != 1:
        bias = bias * output_factor
    if isinstance(weight, FP8Weight):
        return weight.multiply(x, bias, factor)
    weight = weight.to(x.dtype)
    return F.linear(x, weight, bias) if factor == 1 else _ScaledLinear.apply(x, weight, bias, factor)


class Linear(nn.Linear):
    """y = x Wᵀ + b in x's dtype."""

    fp8: FP8Weight | None = None
    """What it multiplies with instead of its weight, once `model.fp8.use_fp8` has been called."""

    def forward(self, x: Tensor, *, input_factor: float = 1.0, output_factor: float = 1.0) -> Tensor:
        """x [..., K] → output_factor · (input_factor · x Wᵀ + b) [..., N]."""
        weight = self.weight if self.fp8 is None else self.fp8
        return linear(x, weight, self.bias, input_factor=input_factor, output_factor=output_factor)

    def use_fp8(self) -> int:
        """Called by `model.fp8.use_fp8`: how many weights multiply in 8 bits from now on, 0 or 1."""
        if not can_be_fp8(self.weight, self.bias):
            return 0
        self.fp8 = FP8Weight.of(self.weight)
        return 1


class _ScaledLinear(torch.autograd.Function):
    """factor · x Wᵀ + b. PyTorch's own derivative of such a product multiplies the gradient in a pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> Tensor:
        x_needs, weight_needs, ctx.bias_needs, _ = ctx.needs_input_grad
        ctx.factor = factor
        ctx.save_for_backward(x if weight_needs else None, weight if x_needs else None)
        return _product(x.reshape(-1, x.shape[-1]), weight.t(), factor, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = None if weight is None else _product(rows, weight, ctx.factor).view(*gradient.shape[:-1], -1)
        to_weight = None if x is None else _product(rows.t(), x.reshape(-1, x.shape[-1]), ctx.factor)
        return to_x, to_weight, rows.sum(0) if ctx.bias_needs else None, None


def _product(left: Tensor, right: Tensor, factor: float, added: Tensor | None = None) -> Tensor:
    """factor · left right + added, the factor applied by the product's own kernel."""
    if added is None:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)  # beta 0: what is added is not read
    return torch.addmm(added, left, right, alpha=factor)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis; statistics are accumulated in float32, the result has x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, whose statistics are those of a micro-batch on all processes together;
    computed in float32, the result has x's dtype. In evaluation, running statistics count.

    PyTorch's own knows only the clips of one process, and its synchronised form only CUDA.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, affine: bool = True, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        wide = x.float()
        if self.training and torch.is_grad_enabled():
            count = _sum_of_processes(wide.new_full((1,), wide[..., 0].numel()))
            mean = _sum_of_processes(wide.flatten(0, -2).sum(0)) / count
            centred = wide - mean
            variance = _sum_of_processes(centred.square().flatten(0, -2).sum(0)) / count
            if not _recomputing:
                self._remember(mean, variance, count)
        else:
            centred, variance = wide - self.running_mean, self.running_var
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None or self.bias is None:
            return (centred * scale).to(x.dtype)
        return (centred * (scale * self.weight) + self.bias).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), self.momentum)


_recomputing = False
"""Whether a block is computed a second time, for the backward pass (`model.speed.call_block`)."""


@contextmanager
def recomputation() -> Iterator[None]:
    """While a block is computed a second time: what has been remembered of it is not remembered again."""
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


def _sum_of_processes(values: Tensor) -> Tensor:
    """The sum over all processes, through which gradients flow."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    summed: Tensor = torch.ops.image_to_video.sum_of_processes(values)
    return summed


@torch.library.custom_op("image_to_video::sum_of_processes", mutates_args=())
def _all_reduced(values: Tensor) -> Tensor:
    """An operation of its own: torch.compile (2.11) takes PyTorch's apart and then does not sum the gradients."""
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


@_all_reduced.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _all_reduced_backward(ctx: Any, gradient: Tensor) -> Tensor:
    return _sum_of_processes(gradient)


_all_reduced.register_autograd(_all_reduced_backward)


def convolve_time(x_BTPD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every feature by itself over the frames, with zeros beyond the clip's ends: [B, T, P, D] → [B, T, P, D]; weight
    [D, 1, K] of an odd number of frames K, bias [D].

    As PyTorch's convolution of channels-last images of T rows and P columns, so that nothing is permuted in memory.
    """
    features, _, kernel = weight.shape
    weight = weight.unsqueeze(-1).to(x_BTPD.dtype)
    bias = None if bias is None else bias.to(x_BTPD.dtype)
    y_BDTP = F.conv2d(x_BTPD.permute(0, 3, 1, 2), weight, bias, padding=(kernel // 2, 0), groups=features)
    return y_BDTP.permute(0, 2, 3, 1)


class PatchEmbedding(nn.Conv2d):
    """Non-overlapping patches to tokens: [M, 3, H, W] → [M, (H/p)·(W/p), D], row major."""

    def __init__(self, width: int, patch_size: int, bias: bool = False) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, stride=self.stride).flatten(2).transpose(1, 2)
