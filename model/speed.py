"""How a step is computed, apart from what it computes: back ends, compilation, recomputation, graphs, precision.

    model.set_compute_dtype(torch.bfloat16)
    model.to(device)
    speed_up(model, SpeedOptions(compile="on"), device)

What is on without being asked for changes no more than rounding: frozen weights in the compute dtype without gradients,
views instead of copies in attention, the activation of CLIP's MLP inside its two products (`vit.MLP`). On CUDA blocks
are also compiled and short sequences have a kernel of their own. What saves memory for time (`checkpoint_blocks`) or
time for accuracy (`fp8`) is off until asked for.

Blocks are compiled one by one, whole (a graph break in a block is an error) and for fixed shapes: all blocks of a kind
share one graph, so a model of 24 blocks compiles as quickly as one of 12, and whatever wraps the model, DeepSpeed's
hooks say, stays outside.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import BACKENDS, attention_backend
from model.fp8 import fp8_obstacle, use_fp8
from model.layers import recomputation
from model.video import VideoModel

SWITCHES = ("auto", "on", "off")
ALL_BLOCKS = -1
MAX_FORMS = 64
"""Graphs of one function that the compiler keeps: it gives up at 8, and a Swin of four stages, whose blocks are all the
same code, has twice that in training and evaluation."""


@dataclass(frozen=True)
class SpeedOptions:
    """[speed] of a recipe. None of it is part of what a run is, but `fp8`."""

    attention: str = "auto"
    """Who computes attention: `xformers`, `sdpa` (PyTorch's own), `short` (a kernel for short sequences, which are
    those over time, and the automatic choice for the others). `auto`: on CUDA `short` and xformers, on the CPU
    PyTorch's."""
    compile: str = "auto"
    """Whether blocks are compiled (torch.compile): `on`, `off`, or `auto`: on CUDA. The first step then takes a minute
    longer."""
    checkpoint_blocks: int = 0
    """Blocks, from the input on, whose activations are computed again in the backward pass instead of being kept: less
    memory, a third more time, the same numbers. -1: all."""
    cuda_graphs: bool = False
    """Whether each block's kernels are launched as one graph: for small micro-batches, whose launches take longer than
    their work. Memory for its inputs and outputs is then held for good."""
    fp8: bool = False
    """Whether the products with frozen weights are computed in 8 bits (see `model.fp8`). It costs accuracy."""
    cache_gb: float = 0.0
    """GB of memory, in each process, for what the frozen part before the first trained weight makes of clips, so that a
    clip that comes again is neither decoded nor computed there: those of evaluations, and all with data.fixed_views. Of
    several processes each keeps what it met: a training clip comes back to another one more often than not."""

    def __post_init__(self) -> None:
        for name, allowed in (("attention", BACKENDS), ("compile", SWITCHES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"speed.{name} = {getattr(self, name)!r}; allowed is {', '.join(allowed)}")
        if not 0 <= self.cache_gb < float("inf"):
            raise ValueError(f"speed.cache_gb = {self.cache_gb}; allowed is 0 (off) or more")
        if self.checkpoint_blocks < ALL_BLOCKS:
            raise ValueError(
                f"speed.checkpoint_blocks = {self.checkpoint_blocks}; allowed is 0 or more blocks, or -1 for all"
            )


def speed_up(model: VideoModel, options: SpeedOptions, device: torch.device) -> None:
    """Sets a model up as asked; it must be on `device` and have its compute dtype. The last thing before training.

    Raises ValueError for what this model or this device cannot do.
    """
    blocks = model.blocks
    if options.checkpoint_blocks > len(blocks):
        raise ValueError(
            f"speed.checkpoint_blocks = {options.checkpoint_blocks}, and the model has {len(blocks)} blocks; "
            "-1 means all of them"
        )
    if options.cuda_graphs and (device.type != "cuda" or options.checkpoint_blocks):
        raise ValueError("speed.cuda_graphs = true needs a CUDA device, and speed.checkpoint_blocks = 0; leave it off")
    if options.cache_gb and not model.has_frozen_stem:
        raise ValueError(
            f"speed.cache_gb = {options.cache_gb:g}: in this model all that computes trains, and nothing can be kept"
        )
    if options.fp8 and (obstacle := fp8_obstacle(device)):
        raise ValueError(f"speed.fp8 = true: {obstacle}")
    attention_backend(device, biased=model.biased_attention, backend=options.attention)  # may be none of this device
    compiled = compiles(options, device)

    for module in model.modules():
        if hasattr(module, "attention_backend"):
            setattr(module, "attention_backend", options.attention)  # noqa: B010 (no type says that it has one)
    if options.fp8:
        use_fp8(model)
    for block in blocks[: None if options.checkpoint_blocks == ALL_BLOCKS else options.checkpoint_blocks]:
        block.checkpointed = True  # type: ignore[assignment]
    if compiled:
        torch._dynamo.config.recompile_limit = MAX_FORMS
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
    if options.cuda_graphs:
        for block in blocks:
            block.graphed = _Graphed(block)  # type: ignore[assignment]


def record_graphs(model: VideoModel, clips: int) -> None:
    """Has the CUDA graphs of micro-batches of so many clips recorded, while no other thread uses the device."""
    device, size = model.pixel_mean.device, model.geometry.image_size
    frames = torch.zeros((clips, model.num_frames, size, size, 3), dtype=torch.uint8, device=device)
    model(frames, {name: torch.ones((clips, *p.shape), device=device) for name, p in model.random_masks.items()})


def compiles(options: SpeedOptions, device: torch.device) -> bool:
    """Whether blocks are compiled there; ValueError where they should be and cannot."""
    missing = _missing_compiler(device)
    if options.compile == "on" and missing:
        raise ValueError(f'speed.compile = "on" needs a compiler ({missing}), and there is none: install g++')
    return options.compile == "on" or (options.compile == "auto" and device.type == "cuda" and not missing)


def _missing_compiler(device: torch.device) -> str:
    """The compiler that torch.compile would call and that is not there; empty where it is."""
    compiler = "gcc" if device.type == "cuda" else "c++"
    return "" if shutil.which(compiler) else compiler


def describe_speed(options: SpeedOptions, device: torch.device) -> str:
    """What of it is on, for the log; empty where nothing is."""
    lacks = options.compile == "auto" and device.type == "cuda" and _missing_compiler(device)
    recomputed = "all" if options.checkpoint_blocks == ALL_BLOCKS else str(options.checkpoint_blocks)
    parts = {
        "blocks compiled (the first step takes a minute longer)": compiles(options, device),
        f"blocks not compiled, for there is no {lacks}": bool(lacks),
        f"activations of {recomputed} blocks computed twice": options.checkpoint_blocks != 0,
        "CUDA graphs": options.cuda_graphs,
        "products with frozen weights in FP8": options.fp8,
        f"up to {options.cache_gb:g} GB of what the frozen part computes kept": options.cache_gb != 0,
    }
    return ", ".join(name for name, on in parts.items() if on)


def call_block(block: nn.Module, *inputs: Any) -> Any:
    """block(*inputs), in the way that `speed_up` chose for it. Stacks of blocks call them so."""
    if torch.is_grad_enabled():
        graphed: Any = getattr(block, "graphed", None)
        if graphed is not None:
            return graphed(*inputs)
        if getattr(block, "checkpointed", False):
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return block(*inputs)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """In which a block is computed, and in which it is computed again."""
    return nullcontext(), recomputation()


class _Graphed:
    """A block whose kernels are launched as two graphs, one forward and one backward; recorded in its first call.

    Micro-batches of a run have one shape; what comes in another one is computed as usual. Never run yet.
    """

    def __init__(self, block: nn.Module) -> None:
        self._shell = _Shell(block)  # takes the graphs, so that the block itself stays as it is
        self._shapes: list[torch.Size] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if not all(isinstance(value, Tensor) for value in inputs):
            return self._shell.block(*inputs)
        shapes = [value.shape for value in inputs]
        if self._shapes is None:
            samples = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in inputs)
            torch.cuda.make_graphed_callables(self._shell, samples)
            for parameter in self._shell.parameters():
                if parameter.requires_grad:  # its gradient comes in memory that the next replay overwrites
                    parameter.register_hook(Tensor.clone)
            self._shapes = shapes
        return self._shell(*inputs) if shapes == self._shapes else self._shell.block(*inputs)


class _Shell(nn.Module):
    """A block and nothing else."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Any:
        return self.block(*inputs)
