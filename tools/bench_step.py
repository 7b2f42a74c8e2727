"""A training step of AIM beside one written plainly: time, memory and what is reached of the hardware, on this machine.

    python tools/bench_step.py [--model ViT-L-14-quickgelu] [--layers K] [--variants ours ours+compile] [--json FILE]

Variants, all with the same weights:

    paper        the baseline: `PaperBlock` below, a block as the paper's reference describes it, in eager PyTorch
    paper+amp    the same with float32 weights under autocast, which is how mixed precision is mostly done
    ours         the blocks of `model.methods.aim`, nothing compiled, who computes attention chosen as in training
    ours+…       with one or several of `model.speed`: +sdpa, +xformers or +short (who computes attention), +compile,
                 +checkpoint (activations of all blocks computed twice), +graphs (CUDA graphs), +fp8

First every variant but FP8 computes a small batch in float32; one whose outputs or gradients are further than 1e-5 of
the scale from the baseline's is refused. Then they are timed one after the other, several rounds, each round beginning
with another one. A ratio is the median over the rounds of each round's own: what slows the machine for long slows both.
On a CPU that others use too, set OMP_NUM_THREADS=1: threads that wait for each other make ratios useless. Timed are:

    blocks   forward and backward pass of the blocks alone, with gradients to their input as the temporal embedding
             below needs them
    step     from bytes on the device to updated weights: stem, blocks, head, loss, AdamW. Beside PaperBlocks, too,
             stem and head are ours.
    temporal attention alone, by each back end, on the views that our blocks give it

Memory is what PyTorch held at most during a step on CUDA (weights and optimizer included, other variants not), and on
a CPU the bytes that autograd kept of a step's forward pass. MFU is the model's own multiply-adds (`model.flops`) times
two, against the data sheet's number for the dtype; what FP8 or computing twice adds does not count.

Weights are random and the network is not needed. The last line of the output is one JSON object. A CPU computes one
block of a clip by default and needs one to two minutes; CUDA all blocks of 16 clips, or as many as the baseline has
memory for. Nothing of this has been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model.attention import BACKENDS, attention
from model.backbone import load_image_tower
from model.flops import Cost, Keeper, count_cost, device_peak
from model.geometry import RANDOM_WEIGHTS, ImageTower, ViTGeometry
from model.methods import create
from model.methods.aim import AIM
from model.speed import ALL_BLOCKS, SpeedOptions, speed_up
from model.video import VideoModel
from pipelines.cli import run_cli, writable
from pipelines.machine import installed_versions, processor_name
from pipelines.shards import write_durably

BASELINE = "paper"
PARTS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in BACKENDS if name != "auto"},
    "compile": {"compile": "on"},
    "checkpoint": {"checkpoint_blocks": ALL_BLOCKS},
    "graphs": {"cuda_graphs": True},
    "fp8": {"fp8": True},
}
"""What may follow `ours+`, and the `SpeedOptions` that it sets."""
USUAL_CPU = ("ours", "ours+compile", "ours+checkpoint")
USUAL_CUDA = (
    *(f"ours{part}" for part in ("", "+sdpa", "+xformers", "+short", "+checkpoint", "+graphs")),
    *(f"ours+compile{part}" for part in ("", "+checkpoint", "+graphs", "+fp8")),
    "paper+amp",
)
TOLERANCE = 1e-5  # of the largest value, in float32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACKAGES = ("torch", "triton", "xformers")
CLASSES = 400
SAMPLE_SECONDS = 0.1  # a measurement repeats what is shorter
WARM_UP = 3  # passes on CUDA, whose clocks rise with the work; a CPU needs one


class PaperBlock(nn.Module):
    """The baseline: an AIM block on tokens [N, B·T, D], with explicit rearrangements and one operation a step.

    Parameters bear the names of `model.methods.aim.Block`. Masks drop a clip's branch, as ours do by default.
    """

    def __init__(self, geometry: ViTGeometry, num_frames: int, scale: float, hidden: int) -> None:
        """`hidden`: width of the adapters within."""
        super().__init__()
        width = geometry.width
        self.num_frames, self.scale = num_frames, scale
        self.ln_1 = PaperLayerNorm(width, geometry.eps)
        self.attn = nn.MultiheadAttention(width, geometry.heads)
        self.ln_2 = PaperLayerNorm(width, geometry.eps)
        mlp_width = geometry.mlp_width or 4 * width
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", QuickGELU() if geometry.quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))
        self.S_Adapter = PaperAdapter(width, hidden, skip=True)
        self.T_Adapter = PaperAdapter(width, hidden, skip=False)
        self.MLP_Adapter = PaperAdapter(width, hidden, skip=False)

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        """x [N, B·T, D]; `masks` [B, 2] as ours."""
        frames, tokens = self.num_frames, len(x)
        to_time, to_joint = masks.repeat_interleave(frames, dim=0)[..., None].unbind(1)  # [B·T, 1] each
        over_time = x.unflatten(1, (-1, frames)).permute(2, 1, 0, 3).flatten(1, 2)  # [T, B·N, D]
        over_time = self.T_Adapter(self.attend(self.ln_1(over_time)))
        x = x + over_time.unflatten(1, (-1, tokens)).permute(2, 1, 0, 3).flatten(1, 2) * to_time
        x = x + self.S_Adapter(self.attend(self.ln_1(x)))
        normed = self.ln_2(x)
        return x + self.mlp(normed) + self.scale * self.MLP_Adapter(normed) * to_joint

    def attend(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return out


class PaperLayerNorm(nn.LayerNorm):
    """In float32, whatever its input is in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class PaperAdapter(nn.Module):
    """D → hidden → D with GELU between."""

    def __init__(self, width: int, hidden: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.D_fc1, self.D_fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.D_fc2(F.gelu(self.D_fc1(x)))
        return x + y if self.skip else y


class QuickGELU(nn.Module):
    """OpenAI's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PaperStack(nn.Module):
    """PaperBlocks in the place of `model.vit.Transformer`, with its weights; tokens change their layout by views."""

    def __init__(self, model: AIM, autocast: torch.dtype | None) -> None:
        """`autocast`: the dtype that operations are cast to; None: none is."""
        super().__init__()
        assert isinstance(model.geometry, ViTGeometry)
        hidden = int(model.geometry.width * model.options.adapter_ratio)
        make = partial(PaperBlock, model.geometry, model.num_frames, model.options.adapter_scale, hidden)
        self.autocast = autocast
        self.resblocks = nn.ModuleList(make() for _ in model.blocks)
        self.resblocks.load_state_dict(nn.ModuleList(model.blocks).state_dict())

    def forward(self, x_BTND: Tensor, drop_path: Tensor | None, layers: range) -> Tensor:
        """As `model.vit.Transformer`."""
        x = x_BTND.flatten(0, 1).permute(1, 0, 2)
        on = self.autocast is not None
        with torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=on):
            for layer in layers:
                assert drop_path is not None
                x = self.resblocks[layer](x, drop_path[:, layer].to(x.dtype))
        return x.permute(1, 0, 2).unflatten(0, x_BTND.shape[:2])


def check_variant(name: str) -> None:
    """ValueError for one that there is not."""
    base, *parts = name.split("+")
    attentions = [part for part in parts if part in BACKENDS]
    sensible = len(set(parts)) == len(parts) and len(attentions) <= 1 and all(part in PARTS for part in parts)
    if name not in (BASELINE, f"{BASELINE}+amp") and not (base == "ours" and sensible):
        raise ValueError(
            f"--variants {name}: allowed are {BASELINE}, {BASELINE}+amp, and ours, which may be followed by each of "
            f"{', '.join(f'+{part}' for part in PARTS)} once, one back end of attention among them"
        )


def speed_options(name: str) -> SpeedOptions:
    """Of a variant of ours."""
    chosen: dict[str, Any] = {"compile": "off"}
    for part in name.split("+")[1:]:
        chosen |= PARTS[part]
    return SpeedOptions(**chosen)


def reference_model(name: str, layers: int, frames: int) -> AIM:
    """AIM with random weights in float32, its adapters' as well: as they start they would hide every difference. 0
    layers: all; ValueError for what is no ViT, or has fewer."""
    geometry = load_image_tower(name, RANDOM_WEIGHTS).geometry
    if not isinstance(geometry, ViTGeometry):
        raise ValueError(f"--model {name}: allowed are ViTs, for example ViT-B-16-quickgelu or ViT-L-14-quickgelu")
    if layers > geometry.layers:
        raise ValueError(f"--layers {layers}: {name} has {geometry.layers}")
    torch.manual_seed(0)
    tower = ImageTower(replace(geometry, layers=layers or geometry.layers), {})
    model = create("aim", tower, num_classes=CLASSES, num_frames=frames)
    assert isinstance(model, AIM)
    for block in model.blocks:
        for part, parameter in block.named_parameters():
            if "D_fc2" in part:
                nn.init.normal_(parameter, std=0.02)
    return model.train()


def build(reference: AIM, variant: str, dtype: torch.dtype, device: torch.device) -> VideoModel:
    """A variant with the reference's weights; ValueError for what this device cannot do."""
    model = copy.deepcopy(reference)
    if variant.startswith("ours"):
        model.set_compute_dtype(dtype)
        speed_up(model.to(device), speed_options(variant), device)
        return model
    by_autocast = variant != BASELINE
    stack = PaperStack(model, dtype if by_autocast and dtype != torch.float32 else None)
    model.backbone.transformer = stack
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.trains(name))
    model.set_compute_dtype(dtype)
    stack.to(torch.float32 if by_autocast else dtype)
    for part in stack.modules():
        if isinstance(part, PaperLayerNorm):
            part.float()
    return model.to(device)


@dataclass(frozen=True)
class Inputs:
    """What the variants compute with, on the device."""

    x_BTND: Tensor
    """Tokens before the first block."""
    gradient_BTND: Tensor
    """Of the tokens behind the last one."""
    frames: Tensor
    """uint8 [B, T, S, S, 3]."""
    targets: Tensor
    """int64 [B]."""
    masks: dict[str, Tensor]
    """Scaled keep masks, as the model wants them."""


def make_inputs(model: AIM, clips: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random ones, always the same. The first clip keeps all of its branches: dropped ones show no difference."""
    geometry, frames = model.geometry, model.num_frames
    assert isinstance(geometry, ViTGeometry)
    random = torch.Generator().manual_seed(1)
    tokens = (clips, frames, geometry.num_tokens, geometry.width)
    x, gradient = (torch.randn(tokens, generator=random).to(device, dtype) for _ in range(2))
    pixels = torch.randint(256, (clips, frames, geometry.image_size, geometry.image_size, 3), generator=random)
    targets = torch.randint(CLASSES, (clips,), generator=random)
    masks = {}
    for name, drops in model.random_masks.items():
        kept = torch.rand((clips, *drops.shape), generator=random) >= drops
        kept[0] = True
        masks[name] = (kept / (1 - drops)).float().to(device)
    return Inputs(x, gradient, pixels.to(device, torch.uint8), targets.to(device), masks)


class Contender:
    """A variant, ready to be measured."""

    def __init__(self, reference: AIM, variant: str, dtype: torch.dtype, inputs: Inputs) -> None:
        self.name, self.inputs = variant, inputs
        self.device = inputs.frames.device
        self.model = build(reference, variant, dtype, self.device)
        fused = True if self.device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(self.model.optimizer_groups(0.05), lr=1e-5, fused=fused)

    def blocks_seconds(self) -> list[float]:
        """Forward and backward pass of the blocks: seconds of each."""
        stack, x = self.model.backbone.transformer, self.inputs.x_BTND.detach().requires_grad_()
        out: list[Tensor] = []
        masks, layers = self.inputs.masks["drop_path"], range(len(self.model.blocks))
        seconds = seconds_of(
            self.device,
            lambda: out.append(stack(x, masks, layers)),  # type: ignore[operator]
            lambda: out[0].backward(self.inputs.gradient_BTND),
        )
        self.model.zero_grad()
        return seconds

    def results(self) -> dict[str, Tensor]:
        """The blocks' output, the gradient to their input, and those to their weights by name, all on the CPU."""
        stack, x = self.model.backbone.transformer, self.inputs.x_BTND.detach().requires_grad_()
        out = stack(x, self.inputs.masks["drop_path"], range(len(self.model.blocks)))  # type: ignore[operator]
        out.backward(self.inputs.gradient_BTND)
        found = {"output": out.detach(), "input": x.grad}
        found |= {name: p.grad for name, p in stack.named_parameters()}  # type: ignore[union-attr]
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in found.items() if tensor is not None}
        self.model.zero_grad()
        return copies

    def warm_up(self) -> None:
        """After this nothing is compiled, recorded or allocated for the first time."""
        for _ in range(WARM_UP if self.device.type == "cuda" else 1):
            self.blocks_seconds()
            self.step()

    def sample(self, repeats: int) -> dict[str, float]:
        """Mean seconds of `forward`, `forward_backward` (of the blocks) and `step`."""
        step = statistics.fmean(self.step_seconds() for _ in range(repeats))
        return {**mean_passes(self.blocks_seconds, repeats), "step": step}

    def step_seconds(self) -> float:
        """From bytes to updated weights."""
        return seconds_of(self.device, self.step)[0]

    def step(self) -> None:
        """One, with everything that belongs to it."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """The whole model's forward pass."""
        return F.cross_entropy(self.model(self.inputs.frames, self.inputs.masks), self.inputs.targets)

    def step_bytes(self) -> int:
        """What a step holds beyond what was there before it; on a CPU, what autograd keeps."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device) - before
        keeper = Keeper(self.model)
        with keeper:
            self.loss().backward()
        self.model.zero_grad()
        return keeper.kept_bytes


def seconds_of(device: torch.device, *parts: Callable[[], Any]) -> list[float]:
    """Runs the parts one after the other: how long each took on the device."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for part in parts:
            part()
            times.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(times)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    events[0].record()
    for part, event in zip(parts, events[1:], strict=True):
        part()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def deviation(results: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """How far outputs and gradients are from those wanted, as a part of the largest value of each tensor; NaN and
    missing gradients are infinitely far."""

    def off(name: str) -> float:
        if name not in results:
            return float("inf")
        mine, right = results[name].double(), wanted[name].double()
        part = ((mine - right).abs().max() / right.abs().max().clamp_min(1e-30)).item()
        return part if part < float("inf") else float("inf")

    gradients = max(off(name) for name in wanted if name != "output")
    return {"output": off("output"), "gradients": gradients}


def check(
    reference: AIM, variants: Sequence[str], clips: int, device: torch.device, left_out: dict[str, str]
) -> dict[str, dict[str, float]]:
    """The deviation of every variant but FP8 from the baseline in float32. Those that cannot run, or are not equal, go
    to `left_out` with the reason."""
    inputs = make_inputs(reference, clips, torch.float32, device)
    wanted = Contender(reference, BASELINE, torch.float32, inputs).results()
    found = {}
    for variant in variants:
        if "fp8" in variant or variant == BASELINE:
            continue
        with not_running(variant, left_out):
            found[variant] = deviation(Contender(reference, variant, torch.float32, inputs).results(), wanted)
            if max(found[variant].values()) > TOLERANCE:
                left_out[variant] = REFUSED.format(**found[variant])
    return found


REFUSED = (
    "refused: in float32 the output is {output:.1g} of the scale from the baseline's, the gradients {gradients:.1g}"
)


@contextmanager
def not_running(variant: str, left_out: dict[str, str]) -> Iterator[None]:
    """Notes what a variant raises that cannot run here, in one line."""
    try:
        yield
    except ValueError as error:
        left_out[variant] = " ".join(str(error).split())
    except Exception as error:  # whatever a compiler, a driver or a launch may raise, the others can be measured
        left_out[variant] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def prepare(
    reference: AIM, variants: Sequence[str], inputs: Inputs, dtype: torch.dtype, left_out: dict[str, str]
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """All that can run, warm, the baseline first; and of each what a step holds in memory, how long it took to get
    warm, and how far its results are from the baseline's in the same dtype."""
    contenders: list[Contender] = []
    facts: dict[str, dict[str, Any]] = {}
    wanted: dict[str, Tensor] = {}
    for variant in tqdm(variants, desc="warming up", leave=False, disable=None):
        if variant in left_out:
            continue
        began, before = time.monotonic(), allocated(inputs.frames.device)
        with nullcontext() if variant == BASELINE else not_running(variant, left_out):
            contender = Contender(reference, variant, dtype, inputs)
            results = contender.results()
            wanted = wanted or results
            contender.warm_up()
            resident = allocated(inputs.frames.device) - before
            facts[variant] = {
                "warm_after_seconds": round(time.monotonic() - began, 1),
                "memory_bytes": resident + contender.step_bytes(),
                "deviation": deviation(results, wanted),
            }
            contenders.append(contender)
    return contenders, facts


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on CUDA now; 0 on a CPU, where nobody counts."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


Samples = dict[str, list[float]]
"""Seconds, one a round, by what was measured."""


def interleaved(subjects: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Samples]:
    """Measures everybody in every round, each round beginning with another one."""
    names = list(subjects)
    samples: dict[str, Samples] = {name: defaultdict(list) for name in names}
    for number in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            for what, seconds in subjects[name]().items():
                samples[name][what].append(seconds)
    return samples


def mean_passes(run: Callable[[], list[float]], repeats: int) -> dict[str, float]:
    """Of passes whose two parts are timed, forward and backward."""
    passes = [run() for _ in range(repeats)]
    forward, backward = (statistics.fmean(times) for times in zip(*passes, strict=True))
    return {"forward": forward, "forward_backward": forward + backward}


def summarise(samples: Mapping[str, Samples], baseline: str) -> dict[str, dict[str, Any]]:
    """Of everybody the median, lowest and highest milliseconds, and how many times as fast as the baseline it is."""

    def of(own: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
        ratio = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
        times = {"ms": statistics.median(own), "lowest": min(own), "highest": max(own)}
        return {key: round(1e3 * seconds, 4) for key, seconds in times.items()} | {"ratio": round(ratio, 3)}

    return {
        name: {what: of(times, samples[baseline][what]) for what, times in own.items()} for name, own in samples.items()
    }


class TemporalAttention:
    """Attention over time alone, on the views that our blocks give it, with gradients to q, k and v."""

    def __init__(self, heads: int, inputs: Inputs) -> None:
        x = inputs.x_BTND
        B, T, N, D = x.shape
        view = (B, T, N * heads, D // heads)
        self._leaves = [x.roll(shift, -1).requires_grad_() for shift in (1, 2, 3)]
        self._views = [leaf.view(view) for leaf in self._leaves]
        self._gradient = inputs.gradient_BTND.view(view)
        self.calls: dict[str, Callable[..., Tensor]] = {name: partial(attention, backend=name) for name in BACKENDS}
        if x.is_cuda and x.dtype != torch.float32:
            self.calls["flash"] = _flash

    def seconds(self, name: str) -> list[float]:
        """Forward and backward pass by a back end: seconds of each."""
        out: list[Tensor] = []
        return seconds_of(
            self._gradient.device,
            lambda: out.append(self.calls[name](*self._views)),
            lambda: torch.autograd.grad(out[0], self._leaves, self._gradient),
        )

    def measure(self, rounds: int, left_out: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Times and bytes a second of all back ends that can run. The bytes are the fewest that can move: forward q, k,
        v and the result; backward q, k, v, the result's gradient and three more."""
        for name in self.calls:
            with not_running(name, left_out):
                self.seconds(name)
        able = [name for name in self.calls if name not in left_out]
        repeats = max(1, round(SAMPLE_SECONDS / 2 / min(sum(self.seconds(name)) for name in able)))
        run = {name: partial(mean_passes, partial(self.seconds, name), repeats) for name in able}
        found = summarise(interleaved(run, rounds), "flash" if "flash" in able else "sdpa")
        for facts in found.values():
            for what, tensors in (("forward", 4), ("forward_backward", 4 + 7)):
                moved = tensors * self._gradient.numel() * self._gradient.element_size()
                facts[what]["gb_per_second"] = round(moved / facts[what]["ms"] / 1e6, 2)
        return found


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2 as PyTorch ships it (fa2-pt)."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def main() -> int:
    began = time.monotonic()
    args = _parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    variants = chosen_variants(args, device)
    reference = reference_model(args.model, args.layers or int(device.type == "cpu"), args.frames)
    clips = args.clips or (1 if device.type == "cpu" else largest_batch(reference, DTYPES[args.dtype], device))
    settings = {"model": args.model, "layers": reference.geometry.layers, "frames": args.frames, "clips": clips}
    document = {
        **bench(reference, variants, clips, DTYPES[args.dtype], args.rounds, device),
        "tolerance": TOLERANCE,
        "memory_is": MEMORY_IS[device.type],
        "settings": {**settings, "dtype": args.dtype, "rounds": args.rounds},
        "hardware": hardware(device),
        "versions": installed_versions(PACKAGES),
        "command": shlex.join(["python", "tools/bench_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_seconds": round(time.monotonic() - began),
    }
    print(table(document))
    if args.json:
        write_durably(args.json, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    print(json.dumps(document, ensure_ascii=False))
    return int(any(reason.startswith("refused") for reason in document["left_out"].values()))


def bench(
    reference: AIM, variants: Sequence[str], clips: int, dtype: torch.dtype, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Everything that is measured."""
    if any("compile" in variant for variant in variants):
        # All blocks are the same code to the compiler, which by default has 8 forms of it: one a dtype and a back end.
        torch._dynamo.config.recompile_limit = 64
    left_out: dict[str, str] = {}
    equality = check(reference, variants, min(clips, 2), device, left_out)
    inputs = make_inputs(reference, clips, dtype, device)
    contenders, facts = prepare(reference, variants, inputs, dtype, left_out)
    shortest = min(min(sum(c.blocks_seconds()), c.step_seconds()) for c in contenders)
    repeats = max(1, round(SAMPLE_SECONDS / shortest))
    times = summarise(interleaved({c.name: partial(c.sample, repeats) for c in contenders}, rounds), BASELINE)
    assert isinstance(reference.geometry, ViTGeometry)
    attention_left_out: dict[str, str] = {}
    over_time = TemporalAttention(reference.geometry.heads, inputs).measure(rounds, attention_left_out)
    cost, peak = count_cost(reference), device_peak(device, dtype)
    return {
        "variants": {
            name: {**own, **facts[name], **rates(cost, clips, own["step"]["ms"], peak)} for name, own in times.items()
        },
        "temporal_attention": over_time,
        "equality": equality,
        "left_out": left_out,
        "attention_left_out": attention_left_out,
        "per_clip": {"forward_gmac": cost.gmac, "training_gmac": cost.training_gmac},
        "passes_a_round": repeats,
    }


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="ViT-B-16-quickgelu", metavar="NAME", help="a ViT's model.name (default: %(default)s)")
    add("--layers", type=int, metavar="K", help="how many of its blocks (default: 1 on a CPU, all on CUDA)")
    add("--frames", type=int, default=8, metavar="T", help="of a clip (default: %(default)s)")
    add("--clips", type=int, metavar="B", help="of a micro-batch (default: 1 on a CPU; CUDA: see above)")
    add("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--variants", nargs="+", metavar="NAME", help="see above; the baseline always takes part")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="without it nothing is compiled")
    add("--quick", action="store_true", help="the tiny CLIP, 2 clips, 2 rounds: a rehearsal of seconds")
    add("--json", type=Path, metavar="FILE", help="write the JSON object there too")
    args = parser.parse_args()
    if args.json:
        writable(args.json, "--json")
    if args.quick:
        args.model, args.clips, args.rounds = "tiny-clip", 2, 2
    for name in ("layers", "frames", "clips", "rounds"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: allowed is 1 or more")
    return args


def chosen_variants(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The baseline, and what was asked for or what is usual on this device; ValueError for what there is not."""
    for name in args.variants or ():
        check_variant(name)
    names = args.variants or (USUAL_CPU if device.type == "cpu" else USUAL_CUDA)
    names = [name for name in names if args.compile or "compile" not in name]
    if not args.variants and args.dtype == "fp32":
        names = [name for name in names if "fp8" not in name and "amp" not in name]
    return list(dict.fromkeys((BASELINE, *names)))


def largest_batch(reference: AIM, dtype: torch.dtype, device: torch.device) -> int:
    """The first of 16, 8, 4, … clips that the baseline can train on."""
    for clips in (16, 8, 4, 2):
        with suppress(torch.OutOfMemoryError):
            Contender(reference, BASELINE, dtype, make_inputs(reference, clips, dtype, device)).step()
            return clips
        gc.collect()
    return 1


def rates(cost: Cost, clips: int, step_ms: float, peak: float | None) -> dict[str, Any]:
    """What a step of so many clips in so many milliseconds comes to; `cost` of one clip, `peak` operations a second."""
    tflops = 2 * clips * cost.training_gmac / step_ms
    return {
        "clips_per_second": round(1e3 * clips / step_ms, 2),
        "tflops": round(tflops, 3),
        "mfu": None if peak is None else round(tflops * 1e12 / peak, 4),
    }


MEMORY_IS = {
    "cuda": "the most bytes that tensors held during a step: weights, optimizer, activations; not a CUDA graph's pool",
    "cpu": "bytes that autograd keeps of a step's forward pass, without weights, and without what is computed again",
}


def hardware(device: torch.device) -> dict[str, Any]:
    """What this machine computes with."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0))
    return {"gpu": gpu, "processor": processor_name(), "cores": cores, "threads": torch.get_num_threads()}


def table(document: Mapping[str, Any]) -> str:
    """The results for people."""
    s, machine = document["settings"], document["hardware"]
    lines = [
        f"{s['model']}, {s['layers']} blocks, {s['clips']} clips of {s['frames']} frames, {s['dtype']}, "
        f"{s['rounds']} rounds on {machine['gpu'] or machine['processor']} ({machine['cores']} cores)",
        "",
        f"{'blocks':28}{'forward ms':>11}{'+ backward ms':>14}{'lowest..highest':>20}{'× paper':>9}"
        f"{'step clips/s':>14}{'× paper':>9}{'TFLOP/s':>9}{'MFU':>7}{'MiB':>9}{'of paper':>10}",
    ]
    paper_bytes = document["variants"][BASELINE]["memory_bytes"]
    for name, v in document["variants"].items():
        both, mfu = v["forward_backward"], "-" if v["mfu"] is None else f"{100 * v['mfu']:.1f}%"
        lines.append(
            f"{name:28}{v['forward']['ms']:11.2f}{both['ms']:14.2f}{_spread(both):>20}{both['ratio']:9.2f}"
            f"{v['clips_per_second']:14.2f}{v['step']['ratio']:9.2f}{v['tflops']:9.2f}{mfu:>7}"
            f"{v['memory_bytes'] / 2**20:9.1f}{100 * v['memory_bytes'] / paper_bytes:9.0f}%"
        )
    lines += [f"MiB: {document['memory_is']}", "", *_attention_lines(document["temporal_attention"]), ""]
    for name, v in document["variants"].items():
        equal = document["equality"].get(name)
        dtype, far = (s["dtype"], v["deviation"]) if equal is None else ("fp32", equal)
        if name != BASELINE:
            lines.append(
                f"{name}: in {dtype} the output is {far['output']:.1e} of the scale from the baseline's, the gradients "
                f"{far['gradients']:.1e}"
            )
    lines += [f"{name}: left out: {reason}" for name, reason in document["left_out"].items()]
    lines += [f"temporal attention by {name}: {reason}" for name, reason in document["attention_left_out"].items()]
    return "\n".join(lines)


def _attention_lines(found: Mapping[str, Any]) -> Iterator[str]:
    against, heads = "× flash" if "flash" in found else "× sdpa", ("forward µs", "+ backward µs", "lowest..highest")
    yield f"{'temporal attention':28}{heads[0]:>11}{heads[1]:>14}{heads[2]:>20}{against:>9}{'GB/s':>14}"
    for name, v in found.items():
        forward, both = v["forward"], v["forward_backward"]
        micro = {key: 1e3 * both[key] for key in ("ms", "lowest", "highest")}
        yield (
            f"{name:28}{1e3 * forward['ms']:11.1f}{micro['ms']:14.1f}{_spread(micro):>20}{both['ratio']:9.2f}"
            f"{both['gb_per_second']:14.1f}"
        )


def _spread(times: Mapping[str, float]) -> str:
    return f"{times['lowest']:.1f}..{times['highest']:.1f}"


if __name__ == "__main__":
    run_cli(main)
