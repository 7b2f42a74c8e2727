"""Attention for short sequences, in Triton: many of them share one tile, forward and backward. The only door to Triton.

AIM's temporal attention has 8 to 32 steps and thousands of sequences, and a flash kernel's tile has 64 or 128 rows for
one of them. Here a program takes G = 64 // T neighbouring heads of one batch entry and treats their steps as the rows
of one square tile, in which a row sees its own sequence only:

    row g·T + t  ←  step t of head g        scores [64, 64] → softmax inside the blocks of the diagonal → product with v

A sequence never leaves its tile. So there is no running maximum, nothing but q, k and v is kept for the backward pass,
and that makes the weights again and writes each gradient once, without a float32 buffer.

Cost: the floor is what must move, and the kernels move no more. For batch B, T steps and H heads of width K that is
4·B·T·H·K elements forward (q, k, v in, result out) and 7·B·T·H·K backward (q, k, v and the result's gradient in, three
gradients out). They do 64 / T times the products that are needed: in 16 bits 32 operations for every byte moved forward
and 46 backward, whatever T and K are, where an H200 has time for about 200.

They have been run in Triton's interpreter and compiled for sm_90, where no register is spilled in 16 bits, and not on a
GPU yet: no speed is known. In float32 they are exact (no TF32) and slow, being without tensor cores.

Not for more than 32 steps, heads wider than 128, a bias, or second derivatives.

A value that is not finite spoils its own sequence and no other. A product with 0 would carry NaN into every sequence of
the tile, so such values are taken out before the products and put back as NaN by way of the scores.

Legend of shapes: R rows of a tile, S the same as columns, K head width, padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MAX_STEPS = 32
"""Longest sequence: a tile still holds two of them."""

MAX_WIDTH = 128
"""Widest head: a program's four tiles must stay in registers."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("image_to_video::short_attention", mutates_args=())
def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v for q, k, v of [batch, steps, heads, K], all of one shape, type and device.

    They may be views with any strides; one whose last stride is not 1 is copied. The result is contiguous, so that
    merging the heads is a view. Differentiable once. Raises ValueError for what the kernel does not take.
    """
    _check(q, k, v)
    q, k, v = (_with_adjacent_columns(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _forward[_grid(q)](q, k, v, out, _strides(q), _strides(k), _strides(v), q.shape[2], **_constants(q, False))
    return out


@torch.library.custom_op("image_to_video::short_attention_backward", mutates_args=())
def short_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous, from that of `short_attention`'s result."""
    grad, q, k, v = (_with_adjacent_columns(x) for x in (grad, q, k, v))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    strides = (_strides(x) for x in (grad, q, k, v))
    with torch.cuda.device_of(q):
        _backward[_grid(q)](grad, q, k, v, dq, dk, dv, *strides, q.shape[2], **_constants(q, True))
    return dq, dk, dv


@short_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@short_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return short_attention_backward(grad, *ctx.saved_tensors)


short_attention.register_autograd(_differentiate, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.image_to_video.short_attention)
def _forward_flops(q_shape: torch.Size, *_: Any, **__: Any) -> int:
    """The products that are needed, as PyTorch counts its own attention: q kᵀ and weights · v, 2 a multiply-add."""
    batch, steps, heads, width = q_shape
    return 4 * batch * heads * steps * steps * width


@register_flop_formula(torch.ops.image_to_video.short_attention_backward)
def _backward_flops(_: torch.Size, q_shape: torch.Size, *__: Any, **___: Any) -> int:
    """Five products: q kᵀ again, and those of dv, of the weights' gradient, of dq and of dk."""
    return 5 * _forward_flops(q_shape) // 2


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    given = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} in {q.dtype} on {q.device}"
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"short attention got {given}; allowed is one shape [batch, steps, heads, K] and one type")
    _, steps, _, width = q.shape
    if not (1 <= steps <= MAX_STEPS and 1 <= width <= MAX_WIDTH and q.dtype in DTYPES):
        allowed = f"1 to {MAX_STEPS} steps of heads up to {MAX_WIDTH} wide in {', '.join(str(d) for d in DTYPES)}"
        raise ValueError(f'short attention got {given}; allowed is {allowed}: use attention backend "sdpa"')
    if not (q.is_cuda or triton.knobs.runtime.interpret) or {k.device, v.device} != {q.device}:
        raise ValueError(f'short attention got {given}; it needs all on one CUDA device: use attention backend "sdpa"')


def _with_adjacent_columns(x: Tensor) -> Tensor:
    """Gradients often come expanded, with strides of 0."""
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]  # type: ignore[return-value]


def _tile(steps: int, width: int, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Rows of a tile and warps that work on it, chosen by the registers that the compiler reports for sm_90.

    64 rows are the fewest of Hopper's matrix instruction, whose operands lie in shared memory: 8 steps of heads 64 wide
    in bf16 then take 108 registers a thread forward and 151 backward, so that 4 and 3 programs fit on a multiprocessor;
    with 32 rows the backward pass takes 168. For heads wider than 64 it would spill with 4 warps.
    In float32 products are done in registers, and idle ones take time: tiles are as small as the steps allow. Of these
    only the backward pass of 17 and more steps of heads wider than 64 spills, 136 bytes a thread.
    """
    if dtype != torch.float32:
        return 64, 8 if backward and width > 64 else 4
    return (16, 4) if steps <= 16 else (32, 8)


def _constants(q: Tensor, backward: bool) -> dict[str, Any]:
    """What a kernel is compiled for, and with how many warps."""
    _, steps, _, width = q.shape
    rows, warps = _tile(steps, width, q.dtype, backward)
    padded = max(16, triton.next_power_of_2(width))
    return {"SCALE": width**-0.5, "T": steps, "K": width, "ROWS": rows, "WIDTH": padded, "num_warps": warps}


def _grid(q: Tensor) -> tuple[int]:
    """One axis for all: it has room for 2³¹ - 1 programs, the others for 65,535."""
    batch, steps, heads, width = q.shape
    rows, _ = _tile(steps, width, q.dtype, False)
    return (batch * triton.cdiv(heads, rows // steps),)


@triton.jit
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    heads: tl.tensor,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    batch, head, there_RK = _place(heads, T, K, ROWS, WIDTH)
    q_RK = tl.load(q + _offsets(batch, head, q_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    k_SK = tl.load(k + _offsets(batch, head, k_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    v_SK = tl.load(v + _offsets(batch, head, v_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    weights_RS = _softmax(q_RK, k_SK, tl.sum(_poison(v_SK), 1), SCALE, T, ROWS)
    out_RK = tl.dot(weights_RS.to(v_SK.dtype), _finite(v_SK), input_precision="ieee")
    written = _offsets(batch, head, _contiguous(heads, T, K), T, ROWS, WIDTH)
    tl.store(out + written, out_RK.to(out.dtype.element_ty), mask=there_RK)


@triton.jit
def _backward(
    grad: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    grad_strides: tl.tuple,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    heads: tl.tensor,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    batch, head, there_RK = _place(heads, T, K, ROWS, WIDTH)
    grad_RK = tl.load(grad + _offsets(batch, head, grad_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    q_RK = tl.load(q + _offsets(batch, head, q_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    k_SK = tl.load(k + _offsets(batch, head, k_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    v_SK = tl.load(v + _offsets(batch, head, v_strides, T, ROWS, WIDTH), mask=there_RK, other=0.0)
    poison_S = tl.sum(_poison(grad_RK) + _poison(q_RK) + _poison(k_SK) + _poison(v_SK), 1)
    grad_RK, q_RK, k_SK, v_SK = _finite(grad_RK), _finite(q_RK), _finite(k_SK), _finite(v_SK)

    written = _offsets(batch, head, _contiguous(heads, T, K), T, ROWS, WIDTH)
    weights_RS = _softmax(q_RK, k_SK, poison_S, SCALE, T, ROWS)
    dv_SK = tl.dot(tl.trans(weights_RS.to(v_SK.dtype)), grad_RK, input_precision="ieee")
    tl.store(dv + written, dv_SK.to(dv.dtype.element_ty), mask=there_RK)

    same_RS = _same_sequence(T, ROWS)
    d_weights_RS = tl.where(same_RS, tl.dot(grad_RK, tl.trans(v_SK), input_precision="ieee"), 0.0)
    centre_R = tl.sum(weights_RS * d_weights_RS, 1)
    d_scores_RS = tl.where(same_RS, weights_RS * (d_weights_RS - centre_R[:, None]) * SCALE, 0.0).to(q_RK.dtype)
    dq_RK = tl.dot(d_scores_RS, k_SK, input_precision="ieee")
    tl.store(dq + written, dq_RK.to(dq.dtype.element_ty), mask=there_RK)
    dk_SK = tl.dot(tl.trans(d_scores_RS), q_RK, input_precision="ieee")
    tl.store(dk + written, dk_SK.to(dk.dtype.element_ty), mask=there_RK)


@triton.jit
def _place(heads: tl.tensor, T: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tuple:
    """This program's batch entry, the head of each of its rows [R], and which elements there are [R, K]."""
    GROUP: tl.constexpr = ROWS // T
    groups = tl.cdiv(heads, GROUP)
    rows = tl.arange(0, ROWS)
    head = (tl.program_id(0) % groups) * GROUP + rows // T
    there = (rows < GROUP * T) & (head < heads)
    # Offsets beyond 2³¹ are ordinary in large batches.
    return (tl.program_id(0) // groups).to(tl.int64), head.to(tl.int64), there[:, None] & (tl.arange(0, WIDTH) < K)


@triton.jit
def _offsets(batch: tl.tensor, head: tl.tensor, strides: tl.tuple, T: tl.constexpr, ROWS: tl.constexpr,
             WIDTH: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Where the tile's elements lie [R, K], from strides of batch, step and head."""
    step = (tl.arange(0, ROWS) % T).to(tl.int64)
    row = batch * strides[0] + step * strides[1] + head * strides[2]
    return row[:, None] + tl.arange(0, WIDTH)


@triton.jit
def _contiguous(heads: tl.tensor, T: tl.constexpr, K: tl.constexpr) -> tl.tuple:
    """Strides of batch, step and head in a contiguous [batch, T, heads, K]."""
    step = tl.cast(heads, tl.int64) * K
    return step * T, step, K


@triton.jit
def _same_sequence(T: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    sequence = tl.arange(0, ROWS) // T
    return sequence[:, None] == sequence


@triton.jit
def _poison(x: tl.tensor) -> tl.tensor:
    """0 for what is finite, NaN for the rest, in float32."""
    return x.to(tl.float32) * 0.0


@triton.jit
def _finite(x: tl.tensor) -> tl.tensor:
    """0 in the place of what is not finite."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def _softmax(q_RK: tl.tensor, k_SK: tl.tensor, poison_S: tl.tensor, SCALE: tl.constexpr, T: tl.constexpr,
             ROWS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Attention weights [R, S] in float32, 0 between sequences; `poison_S` is added to the scores."""
    same_RS = _same_sequence(T, ROWS)
    LOG2_E: tl.constexpr = 1.4426950408889634
    scores_RS = tl.dot(q_RK, tl.trans(k_SK), input_precision="ieee") * (SCALE * LOG2_E) + poison_S[None, :]
    scores_RS = tl.where(same_RS, scores_RS, float("-inf"))
    powers_RS = tl.exp2(scores_RS - tl.max(scores_RS, 1)[:, None])
    # The mask once more: a row that is NaN is so in all columns by now.
    return tl.where(same_RS, powers_RS * (1.0 / tl.sum(powers_RS, 1))[:, None], 0.0)
