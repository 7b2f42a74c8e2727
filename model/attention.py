"""The one door to attention: xformers on CUDA, PyTorch's scaled_dot_product_attention elsewhere and wherever the logits
have a bias (Swin), same numbers.

Both take q, k and v as [batch, sequence, heads, head width] views with any strides. AIM's two attentions are two such
views of the same [B, T, N, D] tensor, so neither permutes nor copies tokens:

    spatial   [B*T, N, heads,   K]    the sequence is a frame's tokens
    temporal  [B,   T, N*heads, K]    the sequence is time; tokens join the heads

The xformers path has not been run on a GPU yet; a CPU test checks with a recorder in its place that it is given the
same values, shapes and strides.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

SHORT = 24
"""Sequence length up to which PyTorch's fused CPU attention loses to plain products when it trains in bf16: its
backward pass then takes 2 to 3 times as long (17 steps, forward and backward: 21 against 7 ms, torch 2.11, 2 cores)."""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √K + bias) v for q, k, v of [batch, sequence, heads, K]; returns the same shape.

    `bias` [heads, sequence, sequence], in q's dtype, is the same for the whole batch and may train. With one, all
    devices use SDPA: xformers would want it aligned in memory, which Swin's windows of 49 tokens are not.
    """
    if bias is None and q.is_cuda and (xformers_ops := _xformers_ops()) is not None:
        return xformers_ops.memory_efficient_attention(q, k, v)
    slow_backward = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    with sdpa_kernel(SDPBackend.MATH) if slow_backward and q.shape[1] <= SHORT else nullcontext():
        mask = None if bias is None else bias[None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def attention_backend(device: torch.device, *, biased: bool) -> str:
    """What computes attention, with a bias or without, on `device`: for the log."""
    by_xformers = not biased and device.type == "cuda" and _xformers_ops() is not None
    return "xformers" if by_xformers else "PyTorch SDPA"


@cache
def _xformers_ops() -> Any | None:
    """xformers' operators, or None after saying once that SDPA is used instead."""
    try:
        import xformers.ops
    except ImportError as error:
        logger.warning("xformers cannot be used (%s): attention runs on PyTorch's SDPA", error)
        return None
    return xformers.ops
