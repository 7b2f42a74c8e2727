"""What training and answering cost with one recipe, and whether the order of frames counts: for comparing methods.

`measure_alone` does it in a process of its own, so that its peak memory is that of this recipe and of nothing before.
CUDA's side has not been run on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from model.flops import count_cost
from model.parameters import count_parameters
from pipelines.machine import forget_peak_memory, installed_versions, peak_memory, processor_name
from tools.parts.throughput_measure import Phase, Rig, keep_batch, measure_inference, measure_model
from train.build import build_model
from train.config import Config
from train.resolve import load_config, resolve_batch
from train.start import prepare

ROUNDS = 3
BLIND = 1e-4  # of the spread of the logits: what another order of the same sums changes at most
SCATTER = 0.05  # what is added to trained weights, so that no adapter is where it starts, which is at zero
PACKAGES = ("torch", "deepspeed", "xformers", "triton")


def measure_alone(recipe: str, overrides: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    """`measure` in a new process, whose output goes to the end of `log`; its ValueError or OSError is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure_into, recipe, tuple(overrides), seconds, log).result()


def _measure_into(recipe: str, overrides: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):  # of this process and of the compilers that it starts
            os.dup2(file.fileno(), stream.fileno())
    return measure(recipe, overrides, seconds)


def measure(recipe: str, overrides: Sequence[str], seconds: float) -> dict[str, Any]:
    """Of a recipe's model and micro-batch, as plain values. Each measurement takes `seconds` or a little longer.

    Speeds are medians of clips/s of whole training steps, and of answers, on input that lies on the device. Memory is
    what PyTorch held at most on CUDA, and the whole process on a CPU, in bytes: while training and while answering, and
    each time what was held just before. Learning from a clip costs `training_gmac`, of which autograd keeps
    `kept_bytes`.
    """
    with tempfile.TemporaryDirectory(prefix="method_cost-") as scratch:
        config = load_config(recipe, [*overrides, f"run.out={json.dumps(scratch)}"])
        config = replace(config, data=replace(config.data, val_split=""), run=replace(config.run, trace=False))
        batch = resolve_batch(config.deepspeed, 1, in_pairs=config.data.mixes)
        rig = Rig(prepare(config, batch, resume=False), Path(scratch))
        model = rig.prepared.model
        cost = count_cost(model, 1, torch.bfloat16 if config.bf16 else torch.float32)
        total, trainable = count_parameters(model)
        return {
            "parameters": {"total": total, "trainable": trainable},
            "gmac": cost.gmac,
            "training_gmac": cost.training_gmac,
            "kept_bytes": cost.kept_bytes,
            "sees_order": sees_order(config, rig.prepared.shards.classes),
            **_measure_speed(rig, seconds),
            "frames": config.data.num_frames,
            "micro_batch": rig.batch.micro,
            "precision": "bfloat16" if config.bf16 else "float32",
            "environment": _environment(rig.device),
        }


def sees_order(config: Config, class_names: Sequence[str]) -> bool:
    """Whether a model of this kind, its trained weights scattered, answers otherwise when the frames of a clip change
    places: computed in float32."""
    frames = config.data.num_frames
    model = build_model(
        config.model, num_classes=len(class_names), num_frames=frames, seed=0, class_names=class_names
    ).eval()
    generator = torch.Generator().manual_seed(0)
    size = model.geometry.image_size
    clip = torch.randint(0, 256, (1, frames, size, size, 3), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(SCATTER * torch.randn(parameter.shape, generator=generator))
        before, after = model(clip), model(clip[:, torch.randperm(frames, generator=generator)])
    return bool((after - before).abs().max() > BLIND * before.std())


def _measure_speed(rig: Rig, seconds: float) -> dict[str, Any]:
    with closing(rig.job.train_loader()) as loader:
        kept, _ = keep_batch(rig, loader)
    source = rig.synthetic(kept, rig.batch.micro)
    ways: dict[str, Callable[[], Phase]] = {
        "training": lambda: measure_model(rig, source, seconds),
        "inference": lambda: measure_inference(rig, source, seconds),
    }
    for way in ways.values():  # the first of each allocates what stays
        way()
    found: dict[str, Any] = {"clips_per_s": {name: [] for name in ways}, "peak_bytes": {}, "held_bytes": {}}
    others, taken = 0.0, 0.0
    for _ in range(ROUNDS):
        for name, way in ways.items():
            rig.forget()
            held = _forget_memory(rig.device)
            phase = way()
            found["clips_per_s"][name].append(phase.clips_per_s)
            found["peak_bytes"][name] = max(_peak_memory(rig.device), found["peak_bytes"].get(name, 0))
            found["held_bytes"][name] = min(held, found["held_bytes"].get(name, held))
            others, taken = others + phase.others_cpu, taken + phase.seconds
    found["clips_per_s"] = {name: median(paces) for name, paces in found["clips_per_s"].items()}
    return found | {"others_cores": others / taken}


def _forget_memory(device: torch.device) -> int:
    """Peak memory begins anew: from so many bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak_memory()
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory(os.getpid())


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "kind": device.type,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "packages": installed_versions(PACKAGES),
    }
