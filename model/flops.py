"""What a model costs before it is run: multiply-adds of a view, and bytes that training keeps for the backward pass.

Both are counted, not derived: a copy of the model without data (the meta device) takes one training clip, every product
of matrices that passes is added up, and so is everything that autograd keeps. Any method is counted alike, adapters,
windows and all, in a fraction of a second and next to no memory.

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
    operations, keeper = _Operations(trained), _Keeper()
    with torch.autograd.graph.saved_tensors_hooks(keeper.keep, keeper.give), _FusedAttention(), operations:
        logits = trained(frames, masks)
    kept = {storage: size for storage, size in keeper.kept.items() if storage not in operations.weights}
    copied = sum(size for storage, size in kept.items() if storage in operations.copies)
    del logits  # alive until here: with it go the storages
    return Cost(operations.mac / 1e9, operations.layer_norm / 1e9, sum(kept.values()) - copied, copied)


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
        if operation in flop_registry:
            self.mac += flop_registry[operation](*args, **kwargs, out_val=out) // 2  # PyTorch counts 2 a multiply-add
        elif operation is torch.ops.aten.native_layer_norm:
            self.layer_norm += 5 * args[0].numel()
        elif operation is torch.ops.aten._to_copy and _storage(args[0]) in self.weights:
            self.copies.add(_storage(out))
        return out


class _Keeper:
    """Hooks for what autograd keeps: bytes by storage."""

    def __init__(self) -> None:
        self.kept: dict[StorageWeakRef, int] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def give(self, tensor: Tensor) -> Tensor:
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


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """By the kernel that a GPU takes: the one that is given a bias keeps that too."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, compute_log_sumexp=True)[0]


def _storage(tensor: Tensor) -> StorageWeakRef:
    """What two views of the same memory have in common."""
    return StorageWeakRef(tensor.untyped_storage())


def _without_data(model: VideoModel) -> VideoModel:
    """A copy of the model on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
