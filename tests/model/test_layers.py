"""Linear layers in every precision, and the factors that ride on their products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers import BatchNorm, Linear, linear

FACTORS = [(1.702, 1.0), (1.0, 1.702), (1 / 1.702, 0.5), (0.0, 2.0)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, input_factor: float, output_factor: float) -> Tensor:
    y = (input_factor * x) @ weight.t()
    return output_factor * (y if bias is None else y + bias)


@pytest.mark.parametrize(("input_factor", "output_factor"), FACTORS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", ["all", "weight", "bias", "nothing"])
def test_factors_equal_plain_products(input_factor: float, output_factor: float, bias: bool, trains: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 5, 24), torch.randn(16, 24), torch.randn(16)]
    gradient = torch.randn(2, 3, 5, 16)
    results = []
    for product in (lambda *given: linear(*given[:3], input_factor=given[3], output_factor=given[4]), plain):
        x, weight, added = (leaf.clone().requires_grad_() for leaf in leaves)
        weight.requires_grad_(trains in ("all", "weight"))
        added.requires_grad_(trains in ("all", "bias"))
        y = product(x, weight, added if bias else None, input_factor, output_factor)
        y.backward(gradient)
        results.append([y.detach(), x.grad, weight.grad, added.grad])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_without_factors_it_is_plain_linear() -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, 16), torch.randn(5, 24)
    assert layer(x).equal(F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("factor", [1.0, 1.702])
def test_bf16_tokens_meet_float32_masters(factor: float) -> None:
    """Whose gradients stay float32."""
    torch.manual_seed(0)
    layer = Linear(64, 32)
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x, output_factor=factor)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert layer.bias.grad is not None and layer.bias.grad.dtype == torch.float32
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    exact = plain(x.float(), layer.weight, layer.bias, 1.0, factor)
    assert (y.float() - exact).norm() < 0.01 * exact.norm()
    assert (layer.weight.grad - factor * x.float().sum(0)).norm() < 0.01 * layer.weight.grad.norm()


def test_a_factor_costs_no_pass_and_keeps_what_a_product_keeps() -> None:
    """Of a frozen layer: two products, and its weight kept; nothing as large as its input or output is multiplied."""
    torch.manual_seed(0)
    layer = Linear(24, 16).requires_grad_(False)
    calls: list[tuple[str, tuple[int, ...]]] = []
    kept: list[Tensor] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            calls.append((str(func.overloadpacket), tuple(out.shape)))
            return out

    x = torch.randn(100, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Recorder():
        layer(x, input_factor=0.7, output_factor=1.3).backward(torch.ones(100, 16))
    assert [shape for name, shape in calls if name == "aten.addmm"] == [(100, 16), (100, 24)]
    assert [shape for name, shape in calls if name == "aten.mul"] == [(16,)]  # the bias
    assert len(kept) == 1 and kept[0].data_ptr() == layer.weight.data_ptr()


def test_factors_compile_without_a_graph_break() -> None:
    torch.manual_seed(0)
    layer = Linear(24, 16)
    compiled = torch.compile(lambda x: layer(x, output_factor=0.5).sin(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 24)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x, output_factor=0.5).sin())
    assert layer.weight.grad is not None


def test_batch_norm_is_torchs_in_training_and_after() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6), torch.nn.BatchNorm1d(6)
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 6))
            layer.bias.copy_(torch.linspace(-1, 1, 6))
    for _ in range(3):
        x = 100 + 3 * torch.randn(4, 5, 6)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        left, right = ours(mine), theirs(other.flatten(0, 1)).unflatten(0, (4, 5))
        torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-4)
        for output in (left, right):
            output.pow(3).sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    before = ours.running_mean.clone()
    with torch.no_grad():
        ours(x + 1)  # nothing is learned without gradients
    assert ours.running_mean.equal(before)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).unflatten(0, (4, 5)), atol=2e-4, rtol=1e-4)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_batch_norm_takes_all_processes_together(tmp_path: Path) -> None:
    """Each has half of the clips; outputs, gradients and running statistics are those of one process with all, compiled
    or not."""
    mp.spawn(_half_of_a_batch, args=(tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, layer = _clips().requires_grad_(), BatchNorm(6, affine=False)
    y = layer(x)
    y.pow(3).sum().backward()
    for name, whole in (("y", y.detach()), ("gradient", x.grad)):
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), whole)
    for half in halves:
        torch.testing.assert_close(half["mean"], layer.running_mean)
        torch.testing.assert_close(half["var"], layer.running_var)


def _clips() -> Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))


def _half_of_a_batch(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, layer = _clips()[2 * rank : 2 * rank + 2].requires_grad_(), BatchNorm(6, affine=False)
    y = layer(x)
    y.pow(3).sum().backward()
    kept = {"y": y.detach(), "gradient": x.grad, "mean": layer.running_mean, "var": layer.running_var}
    again = x.detach().clone().requires_grad_()
    compiled = torch.compile(BatchNorm(6, affine=False), fullgraph=True, backend="eager")
    compiled(again).pow(3).sum().backward()
    torch.testing.assert_close(again.grad, x.grad)
    torch.save(kept, folder / f"{rank}.pt")
    dist.destroy_process_group()
