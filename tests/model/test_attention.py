"""The attention door: AIM's two views reach it without a copy, and both backends get the same thing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

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
    monkeypatch.setattr(door, "_choose", lambda *_: "xformers")
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


@pytest.mark.parametrize("length", [8, door.CPU_PRODUCTS + 1])
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


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "device", "steps", "dtype", "compiled", "expected"),
    [
        ("auto", CPU, 8, BF16, False, "sdpa"),
        ("sdpa", CPU, 8, BF16, False, "sdpa"),
        ("auto", CUDA, 8, BF16, False, "short"),
        ("auto", CUDA, 32, torch.float16, True, "short"),
        ("auto", CUDA, 8, torch.float32, False, "xformers"),
        ("auto", CUDA, 33, BF16, False, "xformers"),
        ("auto", CUDA, 197, BF16, True, "sdpa"),
        ("short", CUDA, 8, torch.float32, False, "short"),
        ("short", CUDA, 197, BF16, False, "xformers"),
        ("xformers", CUDA, 8, BF16, True, "xformers"),
        ("sdpa", CUDA, 8, BF16, False, "sdpa"),
    ],
)
def test_who_computes(
    asked: str,
    device: torch.device,
    steps: int,
    dtype: torch.dtype,
    compiled: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "_xformers_ops", lambda: SimpleNamespace())
    monkeypatch.setattr(door, "_obstacle", lambda *_: None)
    assert door._choose(asked, device, steps, 64, dtype, compiled) == expected


def test_the_usual_way_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_xformers_ops", lambda: None)
    monkeypatch.setattr(door, "_obstacle", lambda *_: "it is ill")
    assert door._choose("auto", CUDA, 8, 64, BF16, False) == "sdpa"
    with pytest.raises(ValueError, match=r'"short" cannot serve 8 steps of heads 64 wide.*it is ill; use "auto"'):
        door._choose("short", CUDA, 8, 64, BF16, False)
    with pytest.raises(ValueError, match=r"xformers.*cannot be imported here; install it"):
        door._choose("xformers", CUDA, 8, 64, BF16, False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("flash", '"flash"; allowed is auto, xformers, sdpa, short'),
        ("short", "needs a CUDA device, not cpu; use"),
        ("xformers", "needs a CUDA device, not cpu; use"),
    ],
)
def test_what_cannot_serve_is_refused(asked: str, message: str) -> None:
    q = torch.randn(2, 8, 3, 16)
    with pytest.raises(ValueError, match=message):
        door.attention(q, q, q, backend=asked)
    with pytest.raises(ValueError, match=message):
        door.attention_backend(CPU, biased=False, backend=asked)


def test_the_log_says_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers = SimpleNamespace()
    monkeypatch.setattr(door, "_xformers_ops", lambda: xformers)
    monkeypatch.setattr(door, "_short_kernel", lambda: SimpleNamespace())
    assert door.attention_backend(CPU, biased=False) == "PyTorch SDPA"
    assert door.attention_backend(CUDA, biased=True, backend="xformers") == "PyTorch SDPA"
    assert door.attention_backend(CUDA, biased=False, backend="xformers") == "xformers"
    on_cuda = door.attention_backend(CUDA, biased=False)
    assert on_cuda == "xformers (PyTorch SDPA where compiled), Triton for 16-bit sequences up to 32"
    xformers = None
    assert door.attention_backend(CUDA, biased=False, backend="short") == "PyTorch SDPA, Triton for sequences up to 32"
    assert door.attention_backend(CUDA, biased=False, backend="sdpa") == "PyTorch SDPA"


def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return door._plain_products(q, k, v, v)[0]


def right_gradients(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    return door._plain_products(q, k, v, grad)[1:]


def broken(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        (right, right_gradients, None),
        (lambda q, k, v: right(1.1 * q, k, v), right_gradients, "result differs by .* allowed is 0.0001 [(]8 steps[)]"),
        (right, lambda *x: [0.9 * gradient for gradient in right_gradients(*x)], "dq differs by 0.1 of"),
        (right, lambda *x: [float("nan") * gradient for gradient in right_gradients(*x)], "dq differs by nan"),
        (broken, right_gradients, "RuntimeError: no kernel image"),
    ],
)
def test_kernel_is_tried_once_and_alone(
    forward: Callable[..., torch.Tensor],
    backward: Callable[..., list[torch.Tensor]],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller's modes, counters and random numbers have no part in it."""
    kernel = SimpleNamespace(short_attention=forward, short_attention_backward=backward, MAX_WIDTH=128)
    kernel.DTYPES = (torch.float32,)
    monkeypatch.setattr(door, "_short_kernel", lambda: kernel)
    monkeypatch.setattr(door, "_obstacles", {})
    random_state = torch.get_rng_state()
    counter = FlopCounterMode(display=False)
    with caplog.at_level(logging.WARNING), torch.inference_mode(), torch.autocast("cpu", dtype=BF16), counter:
        found = [door._obstacle(CPU, 8, 16, torch.float32) for _ in range(2)]
    assert found[0] == found[1] and len(caplog.messages) == (message is not None)
    if message is None:
        assert found[0] is None
    else:
        assert re.search(message, str(found[0]))
        assert str(found[0]) in caplog.text
    assert counter.get_total_flops() == 0 and torch.equal(random_state, torch.get_rng_state())


def test_every_length_of_the_triton_kernel_is_one_it_takes() -> None:
    kernel = pytest.importorskip("model.short_attention", reason="Triton is built for Linux only")
    assert door.SHORT_SEQUENCES <= kernel.MAX_STEPS and set(door.TOLERANCES) == set(kernel.DTYPES)


@pytest.mark.parametrize("chosen", ["xformers", "sdpa"])
@pytest.mark.parametrize(
    ("shape", "biased"),
    [
        ((10, 5, 3, 8), False),
        ((3, 5, 10, 8), False),
        ((9, 5, 9, 8), False),
        ((9, 5, 9, 8), True),
        ((4, 5, 4, 8), False),
    ],
)
def test_no_call_is_larger_than_a_grid(
    shape: tuple[int, ...], biased: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 for 65,535: results and gradients are those of one call."""
    torch.manual_seed(0)
    leaves = [*torch.randn(3, *shape)] + [torch.randn(shape[2], shape[1], shape[1])] * biased
    calls = []
    sdpa = F.scaled_dot_product_attention

    def recorder(q: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        calls.append((q.shape[0], q.shape[1]))
        return sdpa(q, *rest, **more)

    def as_xformers(*qkv: torch.Tensor) -> torch.Tensor:
        return recorder(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    def run() -> list[torch.Tensor]:
        ours = [leaf.clone().requires_grad_() for leaf in leaves]
        out = door.attention(*ours)
        return [out.detach(), *torch.autograd.grad(out.pow(2).sum(), ours)]

    expected = run()
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorder)
    monkeypatch.setattr(door, "_xformers_ops", lambda: SimpleNamespace(memory_efficient_attention=as_xformers))
    monkeypatch.setattr(door, "_choose", lambda *_: chosen)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(door, "GRID_LIMIT", 4)
    torch.testing.assert_close(run(), expected)
    assert max(max(call) for call in calls) <= 4
    assert sum(batch * heads for batch, heads in calls) == shape[0] * shape[2]
    assert len(calls) == -(-shape[0] // 4) * -(-shape[2] // 4)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "sdpa"), (torch.bfloat16, "auto")])
def test_compiles_without_a_graph_break(dtype: torch.dtype, backend: str) -> None:
    """With one length after the other too, where torch.compile makes the shape a symbol."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: door.attention(2 * q, k, v, backend=backend) + 1, fullgraph=True, backend="aot_eager"
    )
    for batch, length in [(2, 8), (3, 8), (3, 9), (3, 30)]:
        leaves = [x.requires_grad_() for x in torch.randn(3, batch, length, 4, 16, dtype=dtype).unbind(0)]
        results = []
        for function in (compiled, lambda q, k, v: door.attention(2 * q, k, v) + 1):
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out.float().pow(2).sum(), leaves)])
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", door.BACKENDS)
def test_every_backend_on_cuda_equals_cpu(backend: str) -> None:
    torch.manual_seed(0)
    for shape in [(2, 8, 197 * 12, 64), (16, 197, 12, 64), (2, 16, 257 * 16, 64)]:
        *leaves, grad = torch.randn(4, *shape)
        results = []
        for device, dtype, chosen in ((CPU, torch.float32, "sdpa"), (CUDA, BF16, backend)):
            ours = [x.to(device, dtype).requires_grad_() for x in leaves]
            out = door.attention(*ours, backend=chosen)
            gradients = torch.autograd.grad(out, ours, grad.to(device, dtype))
            results.append([out.detach().float().cpu(), *(x.float().cpu() for x in gradients)])
        for exact, rounded in zip(*results, strict=True):
            assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.gpu
def test_triton_kernel_passes_its_trial_on_cuda() -> None:
    for steps in (2, 8, 12, 16, 32):
        for dtype in door.TOLERANCES:
            assert door._obstacle(CUDA, steps, 64, dtype) is None
    assert door._choose("auto", CUDA, 8, 64, BF16, False) == "short"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "sdpa", "short"])
def test_compiles_without_a_graph_break_on_cuda(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: door.attention(q, k, v, backend=backend), fullgraph=True)
    for shape in [(2, 8, 197 * 12, 64), (16, 197, 12, 64)]:
        leaves = [x.requires_grad_() for x in torch.randn(3, *shape, device=CUDA, dtype=BF16).unbind(0)]
        results = []
        for function in (compiled, door.attention):
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out.float().pow(2).sum(), leaves)])
        torch.testing.assert_close(*results, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "xformers", "sdpa"])
@pytest.mark.parametrize("shape", [(70_000, 40, 1, 64), (1, 40, 70_000, 64)])
def test_more_sequences_than_a_grid_axis_has_places(shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    leaves = [x.requires_grad_() for x in torch.randn(3, *shape, device=CUDA, dtype=BF16).unbind(0)]
    out = door.attention(*leaves, backend=backend)
    gradients = torch.autograd.grad(out.sum(), leaves)
    last = [x[-1:, :, -1:].detach().requires_grad_() for x in leaves]
    alone = door.attention(*last, backend="sdpa")
    for many, one in zip((out, *gradients), (alone, *torch.autograd.grad(alone.sum(), last)), strict=True):
        torch.testing.assert_close(many[-1:, :, -1:], one, atol=0.02, rtol=0.02)
