"""The attention door: AIM's two views reach it without a copy, and both backends get the same thing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import attention as door
from model.vit import Attention


def reference(module: Attention, x: torch.Tensor, over_time: bool) -> torch.Tensor:
    """PyTorch's own multi-head attention on explicitly permuted tokens."""
    B, T, N, D = x.shape
    mha = torch.nn.MultiheadAttention(D, module.heads, batch_first=True)
    mha.load_state_dict(module.state_dict())
    tokens = x.transpose(1, 2).reshape(B * N, T, D) if over_time else x.reshape(B * T, N, D)
    out = mha(tokens, tokens, tokens, need_weights=False)[0]
    return out.view(B, N, T, D).transpose(1, 2) if over_time else out.view(B, T, N, D)


@pytest.mark.parametrize("over_time", [False, True])
def test_equals_multihead_attention_on_permuted_tokens(over_time: bool) -> None:
    torch.manual_seed(0)
    module, x = Attention(128, 2), torch.randn(2, 5, 7, 128)
    ours = module.over_time(x) if over_time else module.over_space(x)
    torch.testing.assert_close(ours, reference(module, x, over_time), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("over_time", [False, True])
def test_xformers_gets_plain_views_and_nothing_is_copied(over_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = Attention(128, 2), torch.randn(2, 5, 7, 128)
    B, T, N, D = x.shape
    expected = module.over_time(x) if over_time else module.over_space(x)
    projected: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    linear = F.linear

    def recording_linear(*args: torch.Tensor) -> torch.Tensor:
        projected.append(linear(*args))
        return projected[-1]

    def recorder(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stands where xformers.ops.memory_efficient_attention would be, in its [B, M, H, K] layout."""
        seen.extend((q, k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).contiguous()

    monkeypatch.setattr(F, "linear", recording_linear)
    monkeypatch.setattr(door, "_xformers_ops", lambda: SimpleNamespace(memory_efficient_attention=recorder))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    ours = module.over_time(x) if over_time else module.over_space(x)
    shape = (B, T, N * 2, D // 2) if over_time else (B * T, N, 2, D // 2)
    for view, source in zip(seen, projected, strict=False):
        assert view.shape == shape
        assert view.data_ptr() == source.data_ptr() and view.is_contiguous()
    assert len(seen) == 3
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_sdpa_result_is_viewed_back_without_a_copy() -> None:
    """On the CPU the fused kernel writes [B, M, H, K] memory, so merging the heads is a view."""
    for shape in [(6, 17, 2, 64), (2, 4, 34, 64)]:
        q, k, v = torch.randn(3, *shape).unbind(0)
        out = door.attention(q, k, v)
        assert out.shape == shape and out.flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("length", [8, door.SHORT + 1])
def test_training_in_bf16_gives_the_gradients_of_float32(length: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, length, 4, 64) for _ in range(3)]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (leaf.detach().clone().to(dtype).requires_grad_() for leaf in leaves)
        door.attention(q, k, v).float().pow(2).sum().backward()
        gradients.append([t.grad.float() for t in (q, k, v) if t.grad is not None])
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_added_to_the_logits_and_trains(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 7, 4, 32), torch.randn(3, 7, 4, 32), torch.randn(3, 7, 4, 32), torch.randn(4, 7, 7)]
    q, k, v, bias = (leaf.clone().requires_grad_() for leaf in leaves)
    weights = (torch.einsum("bqhk,bshk->bhqs", q, k) / 32**0.5 + bias).softmax(-1)
    expected = torch.einsum("bhqs,bshk->bqhk", weights, v)
    expected.pow(2).sum().backward()
    ours = [leaf.clone().to(dtype).requires_grad_() for leaf in leaves]
    monkeypatch.setattr(door, "_xformers_ops", lambda: pytest.fail("xformers takes no bias"))
    out = door.attention(*ours)
    out.float().pow(2).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert out.shape == expected.shape and (out - expected).abs().max() < tolerance * expected.abs().max()
    for mine, theirs in zip(ours, (q, k, v, bias), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    torch.manual_seed(0)
    for shape in [(6, 197, 12, 64), (2, 8, 197 * 12, 64)]:
        q, k, v = torch.randn(3, *shape).unbind(0)
        on_gpu = door.attention(*(t.cuda().half() for t in (q, k, v))).float().cpu()
        torch.testing.assert_close(on_gpu, door.attention(q, k, v), atol=5e-3, rtol=5e-3)


@pytest.mark.gpu
def test_bias_on_cuda_equals_cpu() -> None:
    """The shapes of Swin: windows of 49 tokens side by side, time steps of every place, windows over time."""
    torch.manual_seed(0)
    for M, N, heads in [(4, 49, 64 * 4), (2, 16, 3136 * 4), (4, 392, 8)]:
        (q, k, v), bias = torch.randn(3, M, N, heads, 32).unbind(0), torch.randn(heads, N, N)
        results = []
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
            leaves = [t.to(device, dtype).requires_grad_() for t in (q, k, v, bias)]
            out = door.attention(*leaves)
            out.float().pow(2).sum().backward()
            results.append([out.detach().float().cpu(), *(t.grad.float().cpu() for t in leaves if t.grad is not None)])
        for exact, rounded in zip(*results, strict=True):
            assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
