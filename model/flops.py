"""What a model costs before it is run: multiply-adds of a view and of a training step, and bytes that training keeps
for the backward pass.

All are counted, not derived: a copy of the model without data (the meta device) takes one training clip forward and
back, every product of matrices that passes is added up, and so is everything that autograd keeps. Any method is counted
alike, adapters, windows and all, in a fraction of a second and next to no memory. What is counted is the model: not
what a kernel or a saving of memory computes a second time (MFU is made of such counts), nor how it is sped up.

The unit is that of the papers, whose "FLOPs" are fvcore's: 1 for each multiply-add of a linear layer, a convolution or
one of attention's two products, nothing for biases, activations and softmax. fvcore adds 5 for each element of a layer
norm, which is counted apart here: it is 0.1 % of a ViT-B/16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model.video import VideoModel


@dataclass(frozen=True)
class Cost:
    """What one micro-batch costs, nearly all of it in proportion to the number of clips."""

    gmac: float
    """10⁹ multiply-adds of the forward pass."""
    layer_norm: float
    """10⁹ operations of all layer norms, 5 an element."""
    kept_bytes: int
    """What autograd keeps from the forward to the backward pass, parameters and their copies left out."""
    copied_bytes: int
    """Copies of trained float32 weights in the compute dtype that autograd keeps too, whatever the number of clips."""
    training_gmac: float
    """10⁹ multiply-adds of forward and backward pass together. Autograd computes gradients to an input where something
    below it trains, and to trained weights: below the lowest adapter there is no more than the forward pass."""


def count_cost(model: VideoModel, clips: int = 1, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Counts the cost of a micro-batch of clips of `model.num_frames` frames; neither weights nor data are read.

    The multiply-adds are those of evaluation too. Attention keeps what a fused kernel keeps, as it does on a GPU:
    q, k, v, its output and one float32 a row; and every storage counts once, however many operations keep it.
    """
    trained = _without_data(model).train()
    trained.set_compute_dtype(dtype)
    size = model.geometry.image_size
    frames = torch.empty((clips, model.num_frames, size, size, 3), dtype=torch.uint8, device="meta")
    masks = {name: torch.empty((clips, *p.shape), device="meta") for name, p in model.random_masks.items()}
    operations, keeper = _Operations(trained), Keeper(trained)
    with keeper, _FusedAttention(), operations:
        logits = trained(frames, masks)
    forward = operations.mac
    copied = sum(size for storage, size in keeper.kept.items() if storage in operations.copies)
    if logits.requires_grad:
        with operations:
            logits.sum().backward()
    return Cost(
        gmac=forward / 1e9,
        layer_norm=operations.layer_norm / 1e9,
        kept_bytes=keeper.kept_bytes - copied,
        copied_bytes=copied,
        training_gmac=operations.mac / 1e9,
    )


_BF16, _FP16, _FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
_HOPPER = {_BF16: 989e12, _FP16: 989e12, _FP8: 1979e12}
GPU_PEAKS: dict[str, dict[torch.dtype, float]] = {
    "H200": _HOPPER,
    "H100 80GB HBM3": _HOPPER,
    "H100 PCIe": {_BF16: 756e12, _FP16: 756e12, _FP8: 1513e12},
    "A100": {_BF16: 312e12, _FP16: 312e12},
    "L40S": {_BF16: 362e12, _FP16: 362e12, _FP8: 733e12},
    "L4": {_BF16: 121e12, _FP16: 121e12, _FP8: 242e12},
    "RTX 4090": {_BF16: 165e12, _FP16: 165e12, _FP8: 330e12},
    "V100 SXM2": {_FP16: 125e12},
    "V100 PCIE": {_FP16: 112e12},
}
"""Words in a GPU's name, hyphens read as spaces → operations a second."""
_OTHER_FORMS = ("NVL", "MIG", "D", "Laptop")  # of GPUs so called, with peaks of their own


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """`gpu_peak` of the GPU at hand; None for CPUs."""
    return gpu_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def gpu_peak(gpu: str, dtype: torch.dtype) -> float | None:
    """Operations a second (2 a multiply-add) that the maker states for products of matrices in `dtype` on a GPU of that
    name; None for GPUs that are not listed, and dtypes without tensor cores or a stated number.

    From NVIDIA's data sheets: tensor cores, without sparsity, accumulating in float32. No real work reaches it.
    """
    name = f" {gpu.replace('-', ' ')} "
    if any(f" {form} " in name for form in _OTHER_FORMS):
        return None
    return next((peaks.get(dtype) for words, peaks in GPU_PEAKS.items() if f" {words} " in name), None)


class WithoutData(TorchDispatchMode):
    """Tensors made in this context have a shape and no data, and initialising them costs nothing:

        with WithoutData():
            model = create("aim", ImageTower(geometry, {}), num_classes=400, num_frames=8)

    It is the meta device, made quicker: what an operation returns is worked out once for every shape that it gets, and
    operations in place are passed over.
    """

    def __init__(self) -> None:
        super().__init__()
        self._device = torch.device("meta")
        self._results: dict[Any, Any] = {}

    def __enter__(self) -> WithoutData:
        self._device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._device.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _IN_PLACE:
            return args[0]
        if not _makes_new(func):
            return func(*args, **kwargs)
        key = (func, *map(_description, args), *((name, _description(value)) for name, value in kwargs.items()))
        if key not in self._results:
            out = func(*args, **kwargs)
            self._results[key] = _description(out)
            return out
        return _made(self._results[key])


_IN_PLACE = {
    getattr(torch.ops.aten, name)
    for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_")
}


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation changes nothing and what it returns is neither one of its arguments nor a view of one."""
    schema = func._schema
    if schema.is_mutable or func.overloadpacket is torch.ops.aten._unsafe_view:
        return False
    return all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


@dataclass(frozen=True)
class _Shape:
    """All that a tensor without data is."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _description(value: Any) -> Any:
    """A hashable description of an operation's argument or result."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(map(_description, value)) if isinstance(value, (list, tuple)) else value


def _made(description: Any) -> Any:
    """What was described, made anew."""
    if isinstance(description, _Shape):
        shape, stride = description.shape, description.stride
        return torch.empty_strided(shape, stride, dtype=description.dtype, device=description.device)
    return tuple(map(_made, description)) if isinstance(description, tuple) else description


class _Operations(WithoutData):
    """Adds up what passes, and remembers which storages are copies of parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.mac = 0
        self.layer_norm = 0
        self.weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.copies: set[StorageWeakRef] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        operation = func.overloadpacket
        if operation in _ATTENTION_BACKWARD:
            self.mac += _attention_backward_mac(*args)
        elif operation is torch.ops.aten.convolution_backward:
            self.mac += _convolution_backward_mac(*args)
        elif operation in flop_registry:
            self.mac += flop_registry[operation](*args, **kwargs, out_val=out) // 2  # PyTorch counts 2 a multiply-add
        elif operation is torch.ops.aten.native_layer_norm:
            self.layer_norm += 5 * args[0].numel()
        elif operation is torch.ops.aten._to_copy and _storage(args[0]) in self.weights:
            self.copies.add(_storage(out))
        return out


_ATTENTION_BACKWARD = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward,
}


def _attention_backward_mac(gradient: Tensor, query: Tensor, key: Tensor, *others: Any) -> int:
    """Without the product that a fused kernel computes a second time, which PyTorch's counter adds."""
    masks = [
        other for other in others if isinstance(other, list)
    ]  # the kernel that takes a bias is told what is wanted
    to_query, to_key, to_value, to_bias = masks[0] if masks else (True, True, True, False)
    products = (to_query or to_key or to_bias) + to_query + to_key + to_value
    return products * query.numel() * key.shape[-2]


def _convolution_backward_mac(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any) -> int:
    """To the input and to the weight, where wanted; PyTorch's counter forgets that a depth-wise one has groups."""
    to_input, to_weight, _ = others[-1]
    return (to_input + to_weight) * gradient.numel() * weight[0].numel()


class Keeper:
    """A context that notes what autograd keeps in it for the backward pass, but for the model's own parameters and
    buffers: every storage once, however many operations keep it."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: dict[StorageWeakRef, int] = {}
        """Storages and their bytes."""
        self._own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @property
    def kept_bytes(self) -> int:
        """Of all of it."""
        return sum(self.kept.values())

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._own:
            self.kept[storage] = tensor.untyped_storage().nbytes()
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Sends attention to a fused kernel; without data PyTorch takes plain products, which keep every weight."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        call = _fused_attention if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """By the kernel that a GPU takes: the one that is given a bias keeps that too."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, compute_log_sumexp=True)[0]


def _storage(tensor: Tensor) -> StorageWeakRef:
    """What two views of the same memory have in common."""
    return StorageWeakRef(tensor.untyped_storage())


_PLAIN = {"attention_backend": "sdpa", "fp8": None, "in_proj_fp8": None, "checkpointed": False, "graphed": None}
"""What `model.speed` sets in parts of a model, as it is before."""


def _without_data(model: VideoModel) -> VideoModel:
    """A copy of the model on the meta device, not sped up."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    for part in model.modules():
        for name in _PLAIN.keys() & vars(part).keys():
            memo[id(getattr(part, name))] = getattr(part, name)  # not copied: a recorded graph cannot be
    plain = copy.deepcopy(model, memo)
    for part in plain.modules():
        for name in _PLAIN.keys() & vars(part).keys():
            setattr(part, name, _PLAIN[name])
    return plain
