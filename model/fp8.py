"""Frozen linear layers in 8 bits: y = x Wᵀ + b and its gradient to x, both products of e4m3 values.

    model.set_compute_dtype(torch.bfloat16)
    model.to(device)
    use_fp8(model)

A frozen weight is quantised once, tokens and gradients when they come, each by its largest value; sums, results and
whatever trains stay as they are. One scale serves a whole tensor: the CPU's `torch._scaled_mm` takes no other, so what
FP8 costs in accuracy can be measured without a GPU.

It costs accuracy: AIM on the demo's shapes loses a point (tools/results/ablation_cheaper.md). It costs 2 bytes of
memory a weight, for two layouts beside the original. It can gain speed alone, where products are large and quantising
is fused with what comes before (torch.compile). On the CPU a run takes three times as long
(tools/results/ablation_cheaper_speed.json). Nothing here has been run on a GPU yet: whether it is faster there is not
known.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Both sides of a weight must be multiples of it (`torch._scaled_mm` on CUDA); the number of tokens is free."""
# For gradients too. In the model named above they are off by 2.7 % in e4m3 and by 5.3 % in e5m2, whose wider range is
# not needed there: no token's gradient became 0.
_FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # torch.finfo(_FP8).max, which torch.compile cannot look up
_TINY = 2.0**-80  # a tensor without larger values than this could have a scale beyond bfloat16's range


@runtime_checkable
class Multiplies(Protocol):
    """A module with weights of its own to multiply with."""

    def use_fp8(self) -> int:
        """Gives those that are frozen and fit an `FP8Weight`; returns how many that are."""
        ...


def fp8_obstacle(device: torch.device) -> str | None:
    """Why products in FP8 cannot be had on `device`, and what to do; None where they can.

    The CPU can, slowly: it rounds by the same rule, and is for tests and for measuring what FP8 costs in accuracy.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"FP8 products need a CUDA device (or the CPU, to try them), not {device.type}; leave it off"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    given, name = ".".join(map(str, capability)), torch.cuda.get_device_name(device)
    return f"FP8 products need compute capability 8.9 (Ada) or more, and {name} has {given}; leave it off"


def use_fp8(module: nn.Module) -> int:
    """Lets every frozen linear layer at or below `module` multiply in FP8, where its sides are multiples of 16; returns
    how many weights that are. What trains is left as it is.

    Called last: when the weights are loaded, on their device, frozen and bfloat16. Else ValueError.
    """
    return sum(part.use_fp8() for part in module.modules() if isinstance(part, Multiplies))


def can_be_fp8(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a linear layer is frozen and of a size that FP8 products take."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not trains and all(side % ALIGNMENT == 0 for side in weight.shape)


class FP8Weight:
    """A frozen weight [N, K] in 8 bits, laid out for both products; no part of a state dict.

    It is a copy: a later change of the weight does not reach it. It follows its layer to another device when it is
    used there; a deep copy shares its tensors, which are never changed.
    """

    def __init__(self, values: Tensor, transposed: Tensor, unit: Tensor) -> None:
        """`values` [N, K] e4m3; `transposed` [K, N], the same; `unit`: what a value of 1 stands for, float32."""
        self.values = values
        self.transposed = transposed
        self.unit = unit

    @classmethod
    def of(cls, weight: Tensor) -> FP8Weight:
        """From a bfloat16 weight [N, K] that does not train, N and K multiples of 16."""
        assert can_be_fp8(weight, None), "it trains, or its sides are not multiples of 16: ask can_be_fp8 first"
        if weight.dtype != torch.bfloat16:
            raise ValueError(
                f"FP8 goes with a model that computes in bfloat16, and frozen weights are {weight.dtype}; switch "
                "bf16 on in the DeepSpeed file, or FP8 off"
            )
        values, unit = _quantise(weight.detach())
        return cls(values, values.t().contiguous(), unit)

    def multiply(self, x: Tensor, bias: Tensor | None, factor: float = 1.0) -> Tensor:
        """factor · x Wᵀ + b: x [..., K] and b [N], which does not train, both bfloat16 → [..., N] bfloat16."""
        assert bias is None or not bias.requires_grad, "there is no gradient to a bias"
        if x.dtype != torch.bfloat16:
            raise ValueError(
                f"FP8 layers take tokens of torch.bfloat16, not {x.dtype}; give the model uint8 frames or bfloat16 "
                "clips, or switch FP8 off"
            )
        if self.unit.device != x.device:
            self._move(x.device)
        out: Tensor = _Product.apply(x, self, bias, factor)
        return out

    def _move(self, device: torch.device) -> None:
        self.values, self.transposed = self.values.to(device), self.transposed.to(device)
        self.unit = self.unit.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Weight:
        return FP8Weight(self.values, self.transposed, self.unit)


class _Product(torch.autograd.Function):
    """factor · x Wᵀ + b, both matrices in e4m3; the backward pass needs nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FP8Weight, bias: Tensor | None, factor: float) -> Tensor:
        ctx.weight, ctx.factor = weight, factor  # not save_for_backward: no hook need see what never changes
        return _multiply(x, weight.values, weight.unit, factor, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = ctx.weight
        return _multiply(gradient, weight.transposed, weight.unit, ctx.factor), None, None, None


def _multiply(x: Tensor, values: Tensor, unit: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """factor · unit · x valuesᵀ + bias: x [..., K] bfloat16, values [N, K] → [..., N] bfloat16.

    On CUDA `torch._scaled_mm` wants the left matrix row by row in memory and the right one column by column. Its fast
    accumulation stays off: it sums with fewer bits than the CPU.
    """
    flat = x.reshape(-1)  # from here on strides are a row's, even those of a lone token that came with others
    rows, x_unit = _quantise(flat.view(-1, x.shape[-1]))
    y = torch._scaled_mm(rows, values.t(), scale_a=x_unit * factor, scale_b=unit, bias=bias, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], -1)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 → FP8 values that reach to the largest there is, and what a value of 1 stands for (float32, on x's
    device: the host waits for nothing)."""
    scale = _LARGEST / torch.linalg.vector_norm(x, math.inf).float().clamp(min=_TINY)
    # In bfloat16 no float32 copy of x is needed. Nothing is lost, for the unit is the rounded scale's; and the largest
    # value may pass 448 by 2 at most, which rounds to 448.
    scale = scale.to(x.dtype)
    return (x * scale).to(_FP8), scale.float().reciprocal()
