"""The one door to attention: on CUDA a Triton kernel for short sequences and xformers for the others, PyTorch's
scaled_dot_product_attention elsewhere and wherever the logits have a bias (Swin), same numbers.

All take q, k and v as [batch, sequence, heads, head width] views with any strides. AIM's two attentions are two such
views of the same [B, T, N, D] tensor, so neither permutes nor copies tokens:

    spatial   [B*T, N, heads,   K]    the sequence is a frame's tokens
    temporal  [B,   T, N*heads, K]    the sequence is time; tokens join the heads

Who computes is decided outside of what torch.compile traces: compiled code holds the answer as a constant. There SDPA
stands in for xformers, whose dispatch is Python that would have to be traced; both end in the same flash kernels of
PyTorch. At the first use for a shape, type and device the Triton kernel is compared with plain products on a small
input, forward and backward; where it fails or differs, a warning says so and attention goes the usual way.

A CUDA grid has at most 65,535 places along an axis, and flash kernels give one to the batch and one to the heads:
larger calls are cut and their results joined. Triton's grid here is flat and takes any number.

Neither the Triton nor the xformers path has been run on a GPU yet; CPU tests check the kernel in Triton's interpreter,
and with a recorder in xformers' place that it is given the same values, shapes and strides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "xformers", "sdpa", "short")
"""What may be asked for. "short" means the Triton kernel wherever it serves and "auto" for longer sequences; the other
two mean all attention without a bias."""

SHORT_SEQUENCES = 32
"""Longest sequence for the Triton kernel. A flash kernel gives each sequence a tile of 64 or 128 rows, so up to here at
most half of one is used; and its backward pass adds into a float32 buffer, which the Triton kernel does without."""

CPU_PRODUCTS = 24
"""Sequence length up to which PyTorch's fused CPU attention loses to plain products when it trains in bf16: its
backward pass then takes 2 to 3 times as long (17 steps, forward and backward: 21 against 7 ms, torch 2.11, 2 cores)."""

GRID_LIMIT = 65_535
"""Places along the second and third axis of a CUDA grid."""

TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}
"""How far the Triton kernel may be from float64 products, as a part of the largest value."""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √K + bias) v for q, k, v of [batch, sequence, heads, K]; returns the same shape.

    `bias` [heads, sequence, sequence], in q's dtype, is the same for the whole batch and may train. With one, all
    devices use SDPA, whatever `backend` is: xformers would want it aligned in memory, which Swin's windows of 49 tokens
    are not. Raises ValueError for a backend that there is not, or that cannot serve here.
    """
    if bias is not None:
        chosen = "sdpa"
    else:
        # The length of a range is a plain number even where torch.compile has made the shape a symbol.
        steps, width = len(range(q.shape[1])), len(range(q.shape[3]))
        chosen = _choose(backend, q.device, steps, width, q.dtype, torch.compiler.is_compiling())
    if chosen == "short":
        return torch.ops.image_to_video.short_attention(q, k, v)
    run = _by_xformers if chosen == "xformers" else _by_sdpa
    return _in_pieces(run, q, k, v, bias) if q.is_cuda else run(q, k, v, bias)


def attention_backend(device: torch.device, *, biased: bool, backend: str = "auto") -> str:
    """What computes attention, with a bias or without, on `device`: for the log. Raises ValueError as `attention`."""
    usual = _usual(backend, device, compiled=False)
    if biased or device.type != "cuda":
        return "PyTorch SDPA"
    name = {"xformers": "xformers", "sdpa": "PyTorch SDPA"}[usual]
    if usual == "xformers" and backend != "xformers":
        name += " (PyTorch SDPA where compiled)"
    if backend in ("xformers", "sdpa") or _short_kernel() is None:
        return name
    types = "sequences" if backend == "short" else "16-bit sequences"
    return f"{name}, Triton for {types} up to {SHORT_SEQUENCES}"


@torch.compiler.assume_constant_result
def _choose(backend: str, device: torch.device, steps: int, width: int, dtype: torch.dtype, compiled: bool) -> str:
    """Who computes attention without a bias: "xformers", "sdpa" or "short"."""
    usual = _usual(backend, device, compiled)
    asked = backend == "short"
    if device.type != "cuda" or steps > SHORT_SEQUENCES or not (asked or backend == "auto"):
        return usual
    if not asked and dtype not in (torch.bfloat16, torch.float16):
        return usual  # in float32 the kernel has no tensor cores to pay for the products it wastes
    obstacle = _obstacle(device, steps, width, dtype)
    if obstacle is None:
        return "short"
    if asked:
        raise ValueError(
            f'attention backend "short" cannot serve {steps} steps of heads {width} wide in {dtype} on {device}: '
            f'{obstacle}; use "auto"'
        )
    return usual


def _usual(backend: str, device: torch.device, compiled: bool) -> str:
    """Who computes attention for longer sequences: "xformers" or "sdpa"."""
    if backend not in BACKENDS:
        raise ValueError(f'attention backend "{backend}"; allowed is {", ".join(BACKENDS)}')
    if device.type != "cuda":
        if backend in ("auto", "sdpa"):
            return "sdpa"
        raise ValueError(f'attention backend "{backend}" needs a CUDA device, not {device.type}; use "auto" or "sdpa"')
    if backend == "sdpa" or (compiled and backend != "xformers"):
        return "sdpa"
    if _xformers_ops() is not None:
        return "xformers"
    if backend == "xformers":
        raise ValueError('attention backend "xformers": it cannot be imported here; install it, or use "auto"')
    return "sdpa"


def _by_xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is None
    xformers_ops = _xformers_ops()
    assert xformers_ops is not None
    return xformers_ops.memory_efficient_attention(q, k, v)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    slow_backward = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    with sdpa_kernel(SDPBackend.MATH) if slow_backward and q.shape[1] <= CPU_PRODUCTS else nullcontext():
        mask = None if bias is None else bias[None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _in_pieces(
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> Tensor:
    """`run` on parts of the batch and of the heads that a grid has places for."""
    if q.shape[0] > GRID_LIMIT:
        batches = zip(q.split(GRID_LIMIT), k.split(GRID_LIMIT), v.split(GRID_LIMIT), strict=True)
        return torch.cat([_in_pieces(run, *batch, bias) for batch in batches])
    if q.shape[2] > GRID_LIMIT:
        heads = zip(q.split(GRID_LIMIT, 2), k.split(GRID_LIMIT, 2), v.split(GRID_LIMIT, 2), strict=True)
        biases = None if bias is None else bias.split(GRID_LIMIT)
        return torch.cat([run(*part, biases and biases[i]) for i, part in enumerate(heads)], 2)
    return run(q, k, v, bias)


@cache
def _xformers_ops() -> Any | None:
    """xformers' operators, or None after saying once that SDPA is used instead."""
    try:
        import xformers.ops
    except ImportError as error:
        logger.warning("xformers cannot be used (%s): attention runs on PyTorch's SDPA", error)
        return None
    return xformers.ops


@cache
def _short_kernel() -> Any | None:
    """The module of the Triton kernel, or None after saying once that it cannot be had."""
    try:
        from model import short_attention
    except ImportError as error:
        logger.warning("Triton cannot be used (%s): short sequences take the usual attention", error)
        return None
    return short_attention


_obstacles: dict[tuple[torch.device, int, int, torch.dtype], str | None] = {}
"""What a trial of the Triton kernel found, kept while the process lives."""


def _obstacle(device: torch.device, steps: int, width: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel cannot be used; None where it can. The first call for a shape tries it out, and waits."""
    kernel = _short_kernel()
    if kernel is None:
        return "Triton cannot be imported"
    if width > kernel.MAX_WIDTH or dtype not in kernel.DTYPES:
        return f"it takes heads up to {kernel.MAX_WIDTH} wide in {', '.join(str(d) for d in kernel.DTYPES)}"
    key = (device, steps, width, dtype)
    if key not in _obstacles:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "it cannot be tried while a CUDA graph is recorded; let the same call run once before"
        # A thread of its own knows nothing of the caller's modes: autocast, inference, counting, tracing.
        with ThreadPoolExecutor(1) as thread:
            _obstacles[key] = thread.submit(_try_out, kernel, *key).result()
        if found := _obstacles[key]:
            logger.warning("short sequences take the usual attention, for the Triton kernel fails its trial: %s", found)
    return _obstacles[key]


def _try_out(kernel: Any, device: torch.device, steps: int, width: int, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernel on a small input, forward or backward; None if nothing is.

    Without autograd: inside a recomputed forward pass its thread would wait for this one.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, steps, 67, width)  # heads that fill no tile
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    try:
        ours = [kernel.short_attention(q, k, v), *kernel.short_attention_backward(grad, q, k, v)]
        exact = _plain_products(*(x.double() for x in (q, k, v, grad)))
        for name, mine, right in zip(("result", "dq", "dk", "dv"), ours, exact, strict=True):
            off = ((mine - right).abs().max() / right.abs().max().clamp_min(0.1)).item()
            if not off < TOLERANCES[dtype]:
                allowed = TOLERANCES[dtype]
                return f"{name} differs by {off:.2g} of the largest value, allowed is {allowed} ({steps} steps)"
    except Exception as error:  # whatever a compiler, a driver or a launch may raise, training must not end for it
        return f"{type(error).__name__}: {error}"
    return None


def _plain_products(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Attention's result and the gradients of q, k and v."""
    scale = q.shape[3] ** -0.5
    weights = (scale * torch.einsum("bqhk,bshk->bhqs", q, k)).softmax(-1)
    d_weights = torch.einsum("bqhk,bshk->bhqs", grad, v)
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    return [
        torch.einsum("bhqs,bshk->bqhk", weights, v),
        torch.einsum("bhqs,bshk->bqhk", d_scores, k),
        torch.einsum("bhqs,bqhk->bshk", d_scores, q),
        torch.einsum("bhqs,bqhk->bshk", weights, grad),
    ]
