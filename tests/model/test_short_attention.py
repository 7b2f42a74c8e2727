"""The Triton kernel: what it computes, in Triton's interpreter and on a GPU where there is one; and its machine code.

The interpreter must be switched on before Triton is imported, so functions named `interpreted_…` are not collected here
but by another pytest, which `test_in_the_interpreter` starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import attention as door

triton = pytest.importorskip("triton", reason="Triton is built for Linux only")

from model import short_attention as short  # noqa: E402 (it imports Triton)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 0.02}
LENGTHS = [1, 2, 5, 8, 12, 16, 32]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def differentiated(function: Any, leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Result and the three gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same_as_plain(ours: list[torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor) -> None:
    exact = differentiated(plain, [leaf.double() for leaf in leaves], grad.double())
    for name, mine, right in zip(("result", "dq", "dk", "dv"), ours, exact, strict=True):
        assert mine.dtype == leaves[0].dtype and mine.shape == right.shape, name
        scale = right.abs().max().clamp_min(0.1)
        assert (mine - right).abs().max() < TOLERANCES[leaves[0].dtype] * scale, name


def heads_that_do_not_fill(steps: int) -> int:
    """Two tiles, the second half empty."""
    group = 64 // steps
    return group + max(1, group // 2)


def test_in_the_interpreter() -> None:
    """All `interpreted_…` functions below, in one process."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [*command, "-o", "python_functions=interpreted_*", __file__],
        cwd=root,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0 and re.search(r"\d+ passed", run.stdout), run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout, run.stdout


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter keeps bfloat16 as the integers of its bits, and multiplies matrices of these."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", LENGTHS)
def interpreted_equals_plain_products(steps: int, dtype: torch.dtype, bf16_products: None) -> None:
    torch.manual_seed(0)
    heads = heads_that_do_not_fill(steps)
    *leaves, grad = torch.randn(4, 2, steps, heads, 64).to(dtype)
    ours = differentiated(short.short_attention, leaves, grad)
    assert ours[0].is_contiguous()
    assert_same_as_plain(ours, leaves, grad)


@pytest.mark.parametrize(("steps", "width"), [(8, 16), (8, 32), (5, 80), (16, 128), (12, 24), (8, 1)])
def interpreted_any_width(steps: int, width: int) -> None:
    torch.manual_seed(0)
    *leaves, grad = torch.randn(4, 1, steps, 9, width).half()
    assert_same_as_plain(differentiated(short.short_attention, leaves, grad), leaves, grad)


VIEWS = {
    "AIM's temporal view": lambda x_BTND: x_BTND.view(2, 8, 5 * 3, 16),
    "class token and channels left out": lambda x_BTND: x_BTND[:, :, 1:, 16:].unflatten(3, (2, 16)).flatten(2, 3),
    "time first": lambda x_BTND: x_BTND.view(2, 8, 15, 16).transpose(0, 1).contiguous().transpose(0, 1),
    "columns not adjacent": lambda x_BTND: x_BTND.view(2, 8, 15, 16).transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x_BTND: x_BTND.view(2, 8, 15, 16)[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def interpreted_views(view: str) -> None:
    torch.manual_seed(0)
    leaves = [VIEWS[view](x) for x in torch.randn(3, 2, 8, 5, 48).half()]
    for grad in (VIEWS[view](torch.randn(2, 8, 5, 48).half()), torch.ones(()).half().expand(leaves[0].shape)):
        assert_same_as_plain(differentiated(short.short_attention, leaves, grad), leaves, grad)


@pytest.mark.parametrize("spoilt", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def interpreted_sequences_of_a_tile_do_not_spoil_each_other(value: float, spoilt: int) -> None:
    """q, k, v or the result's gradient is not finite, or its products are not, in one of the sequences of a tile."""
    torch.manual_seed(0)
    *leaves, grad = torch.randn(4, 1, 8, 4, 16)
    clean = differentiated(short.short_attention, leaves, grad)
    [*leaves, grad][spoilt][0, 3, 1, 5] = value
    dirty = differentiated(short.short_attention, leaves, grad)
    others = [0, 2, 3]
    for name, before, after in zip(("result", "dq", "dk", "dv"), clean, dirty, strict=True):
        assert torch.equal(before[:, :, others], after[:, :, others]), name
    if value != 3e38:
        assert all(gradient[:, :, 1].isnan().all() for gradient in dirty[1:])
        assert spoilt == 3 or not dirty[0][:, :, 1].isfinite().all()


@pytest.mark.parametrize("steps", [5, 8])
def interpreted_a_program_writes_its_own_heads_only(steps: int) -> None:
    """Rows that no whole sequence fills would be another program's, at the same time."""
    q = torch.randn(2, steps, 40, 16).half()
    out = torch.full_like(q, float("nan"))
    strides = [short._strides(q)] * 3
    short._forward[(1,)](q, q, q, out, *strides, 40, **short._constants(q, False))
    written = out.isfinite()
    assert written[0, :, : 64 // steps].all() and written.sum() == 64 // steps * steps * 16


def interpreted_nothing_but_the_inputs_is_kept() -> None:
    q, k, v = torch.randn(3, 1, 8, 9, 16).requires_grad_().unbind(0)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        short.short_attention(q, k, v)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (q, k, v)]


def interpreted_keeps_the_contract_of_custom_operators() -> None:
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, 8, 5, 16)]
    torch.library.opcheck(short.short_attention, leaves)


def interpreted_door_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial, which `torch.compile` must not see, runs while it traces."""
    torch.manual_seed(0)

    @torch.compiler.assume_constant_result
    def choose(_: str, device: torch.device, *shape_and_type: Any) -> str:
        assert door._obstacle(device, *shape_and_type[:-1]) is None
        return "short"

    monkeypatch.setattr(door, "_choose", choose)
    monkeypatch.setattr(door, "_obstacles", {})
    compiled = torch.compile(lambda q, k, v: door.attention(2 * q, k, v) + 1, fullgraph=True, backend="aot_eager")
    for batch in (1, 2):
        *leaves, grad = torch.randn(4, batch, 2, 33, 16)
        ours = differentiated(compiled, leaves, grad)
        exact = differentiated(lambda q, k, v: plain(2 * q, k, v) + 1, leaves, grad)
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    assert list(door._obstacles.values()) == [None]


def interpreted_second_derivative_is_refused() -> None:
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(short.short_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def interpreted_passes_the_trial_of_the_door(bf16_products: None) -> None:
    assert door._try_out(short, torch.device("cpu"), 2, 16, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 33, 4, 64), torch.float32, "33, 4, 64.*allowed is 1 to 32 steps.*sdpa"),
        ((2, 8, 4, 129), torch.float32, "up to 128 wide"),
        ((2, 8, 4, 64), torch.float64, "torch.float64.*allowed"),
        ((2, 8, 64), torch.float32, r"\[batch, steps, heads, K\]"),
        ((2, 8, 4, 64), torch.float32, "on cpu; it needs all on one CUDA device.*sdpa"),
    ],
)
def test_what_it_does_not_take_is_named(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short.short_attention(*torch.zeros(3, *shape, dtype=dtype))


def test_flops_are_those_of_pytorchs_attention() -> None:
    """No data: an operator's formula sees shapes only."""
    counts = []
    for function in (short.short_attention, lambda *x: F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x))):
        q, k, v = (torch.empty(2, 8, 5, 16, device="meta", requires_grad=True) for _ in range(3))
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                out = function(q, k, v)
                if backward:
                    out.sum().backward()
            counts.append(counter.get_total_flops())
    forward = 4 * 2 * 5 * 8 * 8 * 16
    assert counts[:2] == [forward, forward * 7 // 2] and counts[2] == forward


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize(("steps", "width", "heads"), [(8, 64, 2364), (16, 64, 2364), (32, 64, 1), (8, 128, 12)])
def test_compiles_for_hopper_and_spills_nothing(
    kernel: str, steps: int, width: int, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AIM's shapes in bf16, down to machine code: Triton brings the assembler, and needs no GPU for it."""
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    compiled = compile_for_hopper(kernel, steps, width, heads)
    assert "wgmma" in compiled.asm["ptx"] and "ld.global.v4" in compiled.asm["ptx"]
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    warps = compiled.metadata.num_warps
    assert stack == 0 and local == 0, usage
    assert registers * 32 * warps <= 65_536 and compiled.metadata.shared <= 227 * 1024, usage


def compile_for_hopper(kernel: str, steps: int, width: int, heads: int) -> Any:
    function = getattr(short, kernel)
    q = torch.empty(1, steps, heads, width, dtype=torch.bfloat16, device="meta")
    constants = short._constants(q, kernel == "_backward")
    options = {"num_warps": constants.pop("num_warps")}
    signature: dict[str, Any] = {}
    multiples_of_16 = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "heads":
            signature[name] = "i32"
        elif name.endswith("_strides"):
            signature[name] = ("i32",) * 3
            multiples_of_16.update({(i, place): [["tt.divisibility", 16]] for place in range(3)})
        else:
            signature[name] = "*bf16"
            multiples_of_16[(i,)] = [["tt.divisibility", 16]]
    if heads == 1:  # as the launcher does it
        signature["heads"], constants["heads"] = "constexpr", 1
    source = triton.compiler.ASTSource(function, signature, constants, multiples_of_16)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("steps", LENGTHS)
def test_cuda_equals_plain_products(steps: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in [(2, steps, heads_that_do_not_fill(steps), 64), (3, steps, 1, 128), (1, steps, 197 * 12, 80)]:
        *leaves, grad = torch.randn(4, *shape, device="cuda").to(dtype)
        assert_same_as_plain(differentiated(short.short_attention, leaves, grad), leaves, grad)


@pytest.mark.gpu
def test_one_sequence_does_not_spoil_others_on_cuda() -> None:
    torch.manual_seed(0)
    *leaves, grad = torch.randn(4, 1, 8, 4, 64, device="cuda", dtype=torch.bfloat16)
    clean = differentiated(short.short_attention, leaves, grad)
    for tensor in (*leaves, grad):
        was = tensor[0, 3, 1, 5].clone()
        tensor[0, 3, 1, 5] = float("inf")
        dirty = differentiated(short.short_attention, leaves, grad)
        tensor[0, 3, 1, 5] = was
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before[:, :, [0, 2, 3]], after[:, :, [0, 2, 3]])
        assert dirty[1][:, :, 1].isnan().all()


@pytest.mark.gpu
def test_more_sequences_than_a_grid_axis_has_places() -> None:
    torch.manual_seed(0)
    *leaves, grad = torch.randn(4, 70_000, 8, 9, 16, device="cuda", dtype=torch.bfloat16)
    assert_same_as_plain(differentiated(short.short_attention, leaves, grad), leaves, grad)
