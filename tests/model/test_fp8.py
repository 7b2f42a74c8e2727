"""Frozen linear layers in FP8: as near to float32 as 8 bits allow, gradients included, and nothing else is touched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.flops import count_cost
from model.fp8 import ALIGNMENT, FP8Weight, can_be_fp8, fp8_obstacle, use_fp8
from model.layers import LayerNorm, Linear
from model.methods import create
from model.methods.aim import AIM
from tests.towers import tower

BF16 = torch.bfloat16
HALF_STEP = 2.0**-4
"""By how much e4m3 rounds at most, relative to the value: it has three bits behind the point."""
SMALLEST_STEP = 2.0**-9 / 448
"""Its smallest step, relative to the largest value of the tensor: below 2⁻⁶ / 448 of that, steps are all of this."""


def frozen(width: int, out: int, seed: int = 0, bias: bool = True) -> Linear:
    torch.manual_seed(seed)
    return Linear(width, out, bias).to(BF16).requires_grad_(False)


def in_fp8(layer: Linear) -> Linear:
    layer = copy.deepcopy(layer)
    assert use_fp8(layer) == 1
    return layer


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """The most by which x Wᵀ may be off, element by element, for x [M, K] and W [N, K] quantised to e4m3.

    Each value by half a step, or by half the smallest one; a little more, for it is rounded to bfloat16 before.
    """

    def error(t: Tensor) -> Tensor:
        return 1.1 * (HALF_STEP * t.abs()).clamp(min=SMALLEST_STEP / 2 * t.abs().max().item())

    return error(x) @ (weight.abs() + error(weight)).t() + x.abs() @ error(weight).t()


def assert_within_fp8(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> None:
    """y against x Wᵀ + b in float32: within the bound everywhere, and by root mean square within 5 % (two independent
    roundings of 2.6 % each are 3.7 %)."""
    x, weight = x.double().flatten(0, -2), weight.double()
    exact = x @ weight.t()
    off = y.double().flatten(0, -2) - bias - exact
    output_rounding = 2.0**-8 * (exact + bias).abs()
    assert (off.abs() <= bound(x, weight) + output_rounding).all()
    assert off.norm() < 0.05 * exact.norm()
    assert off.norm() > 0.005 * exact.norm()  # bfloat16 alone would be this near: it was FP8


@pytest.mark.parametrize("shape", [(64,), (3, 5), (2, 3, 7), (1,)])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_as_near_as_8_bits_allow(shape: tuple[int, ...], bias: bool) -> None:
    layer = frozen(96, 48, bias=bias)
    x = torch.randn(*shape, 96, dtype=BF16, requires_grad=True)
    y = in_fp8(layer)(x)
    assert y.shape == (*shape, 48) and y.dtype == BF16
    assert_within_fp8(y, x.detach(), layer.weight, layer.bias.float() if bias else 0.0)
    gradient = torch.randn(*shape, 48, dtype=BF16)
    y.backward(gradient)
    assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == BF16
    assert_within_fp8(x.grad, gradient, layer.weight.t())


def test_tokens_may_lie_in_memory_as_they_like() -> None:
    """AIM's views, and what autograd hands back of a sum: one number for all."""
    layer = in_fp8(frozen(64, 32))
    x = torch.randn(2, 6, 5, 64, dtype=BF16)
    views = (x.transpose(1, 2), x[:, ::2], x.transpose(2, 3).contiguous().transpose(2, 3), x[:1, :1, :1])
    for view in views:
        leaf = view.detach().requires_grad_()
        plain = view.contiguous().requires_grad_()
        for tokens in (leaf, plain):
            layer(tokens).sum().backward()
        assert layer(leaf).equal(layer(plain))
        assert leaf.grad is not None and plain.grad is not None and leaf.grad.equal(plain.grad)


def test_factors_ride_on_the_product() -> None:
    layer = in_fp8(frozen(64, 32))
    x = torch.randn(7, 64, dtype=BF16, requires_grad=True)
    layer(x, input_factor=0.25, output_factor=2.0).sum().backward()
    scaled, gradient = layer(x, input_factor=0.25, output_factor=2.0), x.grad
    x.grad = None
    y = layer(x)
    y.sum().backward()
    assert gradient is not None and x.grad is not None and gradient.equal(x.grad / 2)
    assert layer.bias is not None
    torch.testing.assert_close(scaled, 0.5 * (y - layer.bias) + 2 * layer.bias, atol=0.02, rtol=0.02)


def test_zeros_stay_zeros() -> None:
    layer = in_fp8(frozen(64, 32))
    assert layer.bias is not None
    x = torch.zeros(5, 64, dtype=BF16, requires_grad=True)
    y = layer(x)
    assert y.equal(layer.bias.expand(5, 32))
    y.backward(torch.zeros_like(y))
    assert x.grad is not None and x.grad.equal(torch.zeros_like(x))


@pytest.mark.parametrize("magnitude", [2.0**-70, 1e-6, 1e6, 2.0**70])
def test_scale_follows_the_largest_value(magnitude: float) -> None:
    layer = frozen(64, 32, bias=False)
    x = torch.randn(9, 64, dtype=BF16) * magnitude
    assert_within_fp8(in_fp8(layer)(x), x, layer.weight)


def test_large_and_small_values_side_by_side() -> None:
    """Tokens of four orders of magnitude; down to 3e-5 of the largest value, each keeps its three bits."""
    layer = frozen(64, 32, bias=False)
    x = torch.randn(4, 64, dtype=BF16) * torch.tensor([1e4, 1e2, 10, 1], dtype=BF16)[:, None]
    y, exact = in_fp8(layer)(x).float(), x.float() @ layer.weight.float().t()
    errors = (y - exact).norm(dim=1) / exact.norm(dim=1)
    assert (errors[:3] < 0.06).all() and errors[3] < 0.2  # the last lies among the smallest steps


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    x = torch.randn(4, 64, dtype=BF16)
    x[1, 3] = bad
    assert in_fp8(frozen(64, 32))(x)[1].isnan().all()


def test_nothing_of_the_tokens_is_kept_and_the_host_never_waits() -> None:
    layer = in_fp8(frozen(64, 32))
    kept: list[Tensor] = []
    calls: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 64, dtype=BF16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Recorder():
        layer(x).backward(torch.randn(4, 32, dtype=BF16))
    assert kept == []
    assert sum("_scaled_mm" in call for call in calls) == 2  # the output's and the input's gradient's
    assert not [call for call in calls if "_local_scalar_dense" in call]


class Mixed(nn.Module):
    """Everything that a model may be made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Sequential(Linear(64, 64), nn.GELU(), Linear(64, 32, bias=False))
        self.bias_trains = Linear(32, 32)
        self.adapter = Linear(32, 32)
        self.odd = Linear(32, 8)
        self.norm = LayerNorm(8)
        self.requires_grad_(False)
        self.bias_trains.bias.requires_grad_()
        self.adapter.requires_grad_()
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.odd(self.adapter(self.bias_trains(self.frozen(x)))))


def test_only_what_is_frozen_and_fits_is_touched() -> None:
    model = Mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert use_fp8(model) == 2
    assert [name for name, part in model.named_modules() if getattr(part, "fp8", None)] == ["frozen.0", "frozen.2"]
    after = model.state_dict()
    assert list(after) == list(before) and all(after[name].equal(before[name]) for name in before)
    model.load_state_dict(before)
    model(torch.randn(3, 64, dtype=BF16)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"bias_trains.bias", "adapter.weight", "adapter.bias"}


def test_sizes_that_fit() -> None:
    for sides, fits in (((16, 16), True), ((48, 1024), True), ((16, 24), False), ((8, 16), False)):
        weight = torch.empty(*sides)
        assert can_be_fp8(weight, None) is fits
        assert not can_be_fp8(weight.requires_grad_(), None)
    assert ALIGNMENT == 16


def test_float32_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"bfloat16, and frozen weights are torch\.float32"):
        use_fp8(Linear(16, 16).requires_grad_(False))
    with pytest.raises(ValueError, match=r"take tokens of torch\.bfloat16, not torch\.float32"):
        in_fp8(frozen(16, 16))(torch.randn(2, 16))


def test_compiles_without_a_graph_break() -> None:
    model = nn.Sequential(frozen(64, 48), nn.GELU(), frozen(48, 32, bias=False))
    assert use_fp8(model) == 2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        torch.manual_seed(1)
        x = torch.randn(3, 5, 64, dtype=BF16, requires_grad=True)
        y = call(x)
        y.float().pow(2).sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, atol=0.01, rtol=0.01)


def test_a_deep_copy_computes_the_same_and_goes_its_own_way() -> None:
    layer = in_fp8(frozen(64, 32))
    x = torch.randn(4, 64, dtype=BF16)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert twin(x).equal(expected)
    assert twin.to("meta")(x.to("meta")).shape == (4, 32)  # moves its own FP8 weight with it
    assert layer(x).equal(expected)


def small_aim() -> AIM:
    model = create("aim", tower(), num_classes=7, num_frames=2)
    model.set_compute_dtype(BF16)
    assert isinstance(model, AIM)
    return model


def test_costs_are_counted_as_before() -> None:
    """On a copy on the meta device: multiply-adds are the same, and what is kept too."""
    model = small_aim()
    before = count_cost(model, 3)
    assert use_fp8(model) == 3 * (3 + 1 + 2)  # blocks, of attention's q, k, v and output, and the MLP's two
    assert count_cost(model, 3) == before


def test_a_model_in_fp8_stays_near_itself() -> None:
    model = small_aim().eval()
    frames = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    features = [model.classify(model.prepare(frames)).detach()]
    use_fp8(model)
    features.append(model.classify(model.prepare(frames)).detach())
    model(frames).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    difference = (features[1] - features[0]).norm() / features[0].norm()
    assert 0.001 < difference < 0.15


@pytest.mark.parametrize("tokens", [1, 7])
def test_memory_lies_as_cuda_wants_it(tokens: int) -> None:
    """PyTorch checks shapes and strides of an FP8 product on tensors without data too, by the rules of their device."""
    with FakeTensorMode():
        weight = FP8Weight.of(torch.empty(48, 96, dtype=BF16, device="cuda"))
        backward = FP8Weight(weight.transposed, weight.values, weight.unit)
        for matrix, width, out in ((weight, 96, 48), (backward, 48, 96)):
            x = torch.empty(tokens, 3, width, dtype=BF16, device="cuda")
            columns = torch.empty(width, tokens, dtype=BF16, device="cuda").t()
            for view in (x, x[:, :1], x.transpose(0, 1), x[0, 0].expand(tokens, width), columns):
                assert matrix.multiply(view, None).shape == (*view.shape[:-1], out)
        with pytest.raises(RuntimeError, match="col_major"):
            FP8Weight(weight.values.t().contiguous().t(), weight.transposed, weight.unit).multiply(
                torch.empty(4, 96, dtype=BF16, device="cuda"), None
            )


def test_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8_obstacle(torch.device("cpu")) is None
    assert "not mps" in (fp8_obstacle(torch.device("mps")) or "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, supported in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, given=capability: given)
        obstacle = fp8_obstacle(torch.device("cuda"))
        assert (obstacle is None) is supported
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 has 8.0" in (fp8_obstacle(torch.device("cuda")) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 1576])
def test_cuda_equals_cpu(tokens: int) -> None:
    """Quantised values are the same, so only the order of sums differs; any number of tokens is taken."""
    if obstacle := fp8_obstacle(torch.device("cuda")):
        pytest.skip(obstacle)
    layer = frozen(768, 3072)
    inputs, gradients = torch.randn(tokens, 768, dtype=BF16), torch.randn(tokens, 3072, dtype=BF16)
    results = []
    for device in ("cpu", "cuda"):
        moved = in_fp8(copy.deepcopy(layer).to(device))
        x = inputs.to(device).requires_grad_()
        y = moved(x)
        y.backward(gradients.to(device))
        assert x.grad is not None
        results.append((y.detach().float().cpu(), x.grad.float().cpu()))
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.005 * exact.norm()


@pytest.mark.gpu
def test_moves_to_cuda_with_its_layer() -> None:
    if obstacle := fp8_obstacle(torch.device("cuda")):
        pytest.skip(obstacle)
    layer = in_fp8(frozen(64, 32))
    x = torch.randn(4, 64, dtype=BF16)
    expected = layer(x)
    assert (layer.cuda()(x.cuda()).cpu() - expected).float().norm() < 0.005 * expected.float().norm()
