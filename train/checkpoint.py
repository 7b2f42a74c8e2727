"""Checkpoints: what trains, its optimizer state, and where in the data the run stands.

    checkpoint-000123/state.safetensors   weights/NAME, exp_avg/NAME, exp_avg_sq/NAME, step/NAME; buffers/NAME of models
                                          with running statistics
    checkpoint-000123/state.json          step, what the run is, checksum of the tensors

The frozen backbone is not stored: it is named by the configuration and known by its checksum. A folder is written under
a temporary name, made durable and renamed, so a folder of that name is whole. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from model.video import VideoModel
from pipelines.shards import sync_folder
from train.config import Batch, Config

FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")
_READ = ("step", "run", "config", "micro_batch", "bad_samples")
_ADAM = ("exp_avg", "exp_avg_sq", "step")
_DEEPSPEED_KEYS = (
    "train_batch_size",
    "gradient_clipping",
    "torch_autocast",
    "prescale_gradients",
    "gradient_predivide_factor",
)
# Not what a run computes: how fast it reads, and evaluation, which has no effect on training.
_EVAL_KEYS = ("eval_crop", "test_clips", "test_crops")
# What an episode consists of is in the fingerprint of its part of the set.
_FREE_DATA_KEYS = (
    *("shards", "val_split", "workers", "prefetch", "max_bad_fraction", "cache_dir", "cache_gb", "episodes", "episode"),
)
_NEW_DATA_KEYS = {"shots": 0, "classes": [], "intervals": [], "short": "wrap"}
"""Where they are as here, a run is the same as one of before there were such keys."""


def identity(config: Config, *, fingerprint: str, backbone: str) -> dict[str, Any]:
    """Everything that a resumed run must share with the run that it continues: dotted name → plain value."""
    document = config.as_dict()
    sections = {name: document[name] for name in ("data", "model", "optimizer", "schedule")}
    free = (*_FREE_DATA_KEYS, *(() if config.data.fixed_views else _EVAL_KEYS))
    sections["data"] = {k: v for k, v in sections["data"].items() if k not in free}
    if config.data.sampling == "uniform":
        sections["data"].pop("interval")
    if config.data.fraction == 1 and not config.data.shots:
        sections["data"].pop("fraction_seed")
    for name, absent in _NEW_DATA_KEYS.items():
        if sections["data"][name] == absent:
            sections["data"].pop(name)
    sections["model"].pop("pretrained")  # a path may have moved; the checksum of the weights decides
    sections["train"] = {name: document["train"][name] for name in ("seed", "label_smoothing")}
    sections["speed"] = {"fp8": document["speed"]["fp8"]}  # all else of it is rounding
    sections["ds"] = {k: v for k, v in document["deepspeed"].items() if k in _DEEPSPEED_KEYS}
    flat = {f"{section}.{key}": value for section, entries in sections.items() for key, value in entries.items()}
    return {**flat, "fingerprint of data.shards": fingerprint, "checksum of the frozen weights": backbone}


def save_checkpoint(
    out: Path,
    step: int,
    model: VideoModel,
    optimizer: torch.optim.Optimizer,
    *,
    run: Mapping[str, Any],
    config: Config,
    world_size: int,
    batch: Batch,
    bad_samples: Iterable[int],
    classes: Sequence[str],
    keep: int,
) -> Path:
    """Writes the checkpoint of a run after `step` steps and removes all but the newest `keep`.

    `run` is what `identity` returned; `bad_samples` are the ids of the training split that could not be decoded,
    `classes` the names of its classes. Raises OSError when it cannot be written; then no such folder appears.
    """
    tensors = _state(model, optimizer)
    data = save_tensors(tensors)
    document = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "samples_seen": step * batch.total,
        "world_size": world_size,
        "micro_batch": batch.micro,
        "bad_samples": sorted(bad_samples),
        "classes": list(classes),
        "run": dict(run),
        "config": config.as_dict(),
        "parameters": [name.removeprefix("weights/") for name in tensors if name.startswith("weights/")],
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    for leftover in out.glob(".checkpoint-*.part"):  # of a process that was killed while writing
        shutil.rmtree(leftover)
    final = out / f"checkpoint-{step:06d}"
    part = out / f".{final.name}.part"
    try:
        part.mkdir()
        _write(part / "state.safetensors", data)
        _write(part / "state.json", (json.dumps(document, indent=1) + "\n").encode())
        sync_folder(part)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"cannot write {final}: {error.strerror}; make room, then --resume from the one before"
        ) from error
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    sync_folder(out)
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder."""
    found = _checkpoints(out)
    return found[-1] if found else None


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """state.json and the tensors, verified; ValueError or OSError names what is damaged."""
    try:
        document = json.loads((path / "state.json").read_bytes())
        version, expected, *_ = (document[name] for name in ("format_version", "tensors_sha256", *_READ))
    except (KeyError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path / 'state.json'} is damaged ({type(error).__name__}: {error}); delete {path} to use an earlier one"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
    data = (path / "state.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path / 'state.safetensors'} is damaged (checksum); delete {path} to use an earlier one")
    try:
        return document, load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path / 'state.safetensors'} holds no tensors ({error}); delete {path}") from error


def load_weights(model: VideoModel, tensors: Mapping[str, Tensor]) -> None:
    """Puts the trained weights of a checkpoint into a model."""
    wanted = _model_tensors(model)
    stored = {name for name in tensors if name.startswith(("weights/", "buffers/"))}
    if stored != set(wanted):
        wrong = sorted(name.partition("/")[2] for name in stored ^ set(wanted))[:3]
        raise ValueError(f"the checkpoint does not fit the model: {', '.join(wrong)} is in one of them only")
    with torch.no_grad():
        for name, tensor in wanted.items():
            stored_shape, shape = list(tensors[name].shape), list(tensor.shape)
            if stored_shape != shape:
                short = name.partition("/")[2]
                raise ValueError(f"the checkpoint does not fit the model: {short} is {stored_shape}, not {shape}")
            tensor.copy_(tensors[name])


def resume(path: Path, model: VideoModel, optimizer: torch.optim.Optimizer, run: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a run back where the checkpoint left it and returns its state.json.

    Raises ValueError naming the first setting in which `run` (see `identity`) differs from the run that is continued.
    """
    document, tensors = read_checkpoint(path)
    before = document["run"]
    for name in sorted(before.keys() | run.keys(), key=lambda name: (" " in name, name)):
        if before.get(name) != run.get(name):
            raise ValueError(
                f"cannot resume from {path}: {name} is {json.dumps(run.get(name))} now and was "
                f"{json.dumps(before.get(name))}; set it back, or start anew with another run.out"
            )
    load_weights(model, tensors)
    names = _names(model)
    state = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if f"step/{order[0]}" in tensors:  # absent before the first step
        state["state"] = {i: {part: tensors[f"{part}/{name}"] for part in _ADAM} for i, name in enumerate(order)}
    optimizer.load_state_dict(state)
    return document


def _state(model: VideoModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _model_tensors(model).items()}
    names = _names(model)
    for parameter, entries in optimizer.state.items():
        tensors |= {f"{part}/{names[id(parameter)]}": entries[part].cpu().contiguous() for part in _ADAM}
    return tensors


def _model_tensors(model: VideoModel) -> dict[str, Tensor]:
    """All that training changes in a model, by the names of its tensors in a checkpoint."""
    weights: dict[str, Tensor] = {f"weights/{name}": parameter for name, parameter in _trainable(model).items()}
    return weights | {f"buffers/{name}": tensor for name, tensor in model.extra_tensors().items()}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in _trainable(model).items()}


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    found = [(int(match[1]), path) for path in out.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
