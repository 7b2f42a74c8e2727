"""Checkpoints: what trains, its optimizer state, and where in the data the run stands.

    checkpoint-000123/state.safetensors   weights/NAME, exp_avg/NAME, exp_avg_sq/NAME, step/NAME; buffers/NAME of models
                                          with running statistics
    checkpoint-000123/state.json          step, what the run is, checksums of the tensors and of itself

The frozen backbone is not stored: it is named by the configuration and known by its checksum. A folder is written under
a temporary name, made durable and renamed, so a folder of that name is whole. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
_MOST_JSON_BYTES = 2**28  # a million bad samples and all settings are a tenth of it
_UNSEALED_KEYS = {
    *(
        "format_version",
        "samples_seen",
        "world_size",
        "classes",
        "parameters",
        "tensors_sha256",
        "skipped_steps",
        *_READ,
    )
}
"""All that a document may have which has no checksum of itself, as those of earlier versions."""
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


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "tensors_sha256": lambda value: isinstance(value, str),
    "step": _is_count,
    "skipped_steps": _is_count,
    "micro_batch": lambda value: _is_count(value) and value > 0,
    "run": lambda value: isinstance(value, dict),
    "config": lambda value: isinstance(value, dict),
    "bad_samples": partial(_is_list_of, int),
    "classes": partial(_is_list_of, str),
}


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
    skipped_steps: int = 0,
) -> Path:
    """Writes the checkpoint of a run after `step` steps and removes all but the newest `keep`.

    `run` is what `identity` returned; `bad_samples` are the ids of the training split that could not be decoded,
    `classes` the names of its classes; `skipped_steps` of its steps were skipped. Raises OSError when it cannot be
    written; then no such folder appears.
    """
    final = out / f"checkpoint-{step:06d}"
    if final.exists():  # whole, as every folder of such a name, and of the same step of the same run
        return final
    tensors = _state(model, optimizer)
    data = save_tensors(tensors)
    document = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "samples_seen": step * batch.total,
        "world_size": world_size,
        "micro_batch": batch.micro,
        "bad_samples": sorted(bad_samples),
        "skipped_steps": skipped_steps,
        "classes": list(classes),
        "run": dict(run),
        "config": config.as_dict(),
        "parameters": [name.removeprefix("weights/") for name in tensors if name.startswith("weights/")],
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    document["document_sha256"] = _digest(document)
    for leftover in out.glob(".checkpoint-*.part"):  # of a process that was killed while writing
        shutil.rmtree(leftover)
    part = _part(final)
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
    part.rename(final)
    sync_folder(out)
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old.rename(_part(old)))  # under another name first: it may be killed in the middle
    return final


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder."""
    found = _checkpoints(out)
    return found[-1] if found else None


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """state.json and the tensors, verified; ValueError or OSError names what is damaged.

    The folder may come from a stranger: nothing in it is executed, no path in it is followed, and what is read is no
    larger than its files.
    """
    document = _read_document(path)
    data = _read_file(path / "state.safetensors")
    if hashlib.sha256(data).hexdigest() != document["tensors_sha256"]:
        raise ValueError(f"{path / 'state.safetensors'} is damaged (checksum); delete {path} to use an earlier one")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path / 'state.safetensors'} holds no tensors ({error}); delete {path}") from error
    broken = [name for name, tensor in tensors.items() if not _is_sound(name, tensor)]
    if broken:
        raise ValueError(
            f"{path / 'state.safetensors'}: {len(broken)} of {len(tensors)} tensors hold what is no finite number, the "
            f"first is {broken[0][:80]}; delete {path} to use an earlier one"
        )
    return document, tensors


def _read_document(path: Path) -> dict[str, Any]:
    """state.json, with every entry that is read of its type."""
    data = _read_file(path / "state.json", _MOST_JSON_BYTES)
    try:
        document = json.loads(data)
        version, *_ = (document[name] for name in ("format_version", "tensors_sha256", *_READ))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path / 'state.json'} is damaged ({type(error).__name__}: {str(error)[:200]}); delete {path} to use an "
            "earlier one"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {str(version)[:20]}, this program reads {FORMAT_VERSION}")
    unsealed = "document_sha256" not in document and document.keys() <= _UNSEALED_KEYS
    if not unsealed and document.get("document_sha256") != _digest(document):
        raise ValueError(f"{path / 'state.json'} is damaged (checksum); delete {path} to use an earlier one")
    wrong = [name for name, fits in _ENTRIES.items() if name in document and not fits(document[name])]
    if wrong:
        raise ValueError(
            f"{path / 'state.json'} is damaged ({wrong[0]} = {json.dumps(document[wrong[0]])[:60]}); delete {path} to "
            "use an earlier one"
        )
    return dict(document)


def _digest(document: Mapping[str, Any]) -> str:
    """Of all entries but that which holds it."""
    rest = {name: value for name, value in document.items() if name != "document_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_file(path: Path, most_bytes: int | None = None) -> bytes:
    """What a file holds; ValueError for what is no file, such as a device that never ends, or larger than allowed."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is no file; delete {path.parent} to use an earlier checkpoint")
    if most_bytes is not None and facts.st_size > most_bytes:
        raise ValueError(f"{path} has {facts.st_size} bytes, allowed are {most_bytes}; it is none of ours")
    return path.read_bytes()


def _is_sound(name: str, tensor: Tensor) -> bool:
    """Whether its numbers are finite; a sum of Adam's squares may be infinite, which is a step of 0."""
    numbers = ~tensor.isnan() if name.startswith("exp_avg_sq/") else tensor.isfinite()
    return tensor.is_floating_point() and bool(numbers.all())


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
    require_same_run(path, document["run"], run)
    load_weights(model, tensors)
    names = _names(model)
    state = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if f"step/{order[0]}" in tensors:  # absent before the first step
        _check_adam(path, tensors, {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]})
        state["state"] = {i: {part: tensors[f"{part}/{name}"] for part in _ADAM} for i, name in enumerate(order)}
    optimizer.load_state_dict(state)
    return document


def require_same_run(path: Path, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """ValueError naming the first setting in which two runs (see `identity`) differ; `path` is where the earlier one
    was found."""
    for name in sorted(before.keys() | run.keys(), key=lambda name: (" " in name, name)):
        if before.get(name) != run.get(name):
            raise ValueError(
                f"cannot resume from {path}: {name} is {json.dumps(run.get(name))} now and was "
                f"{json.dumps(before.get(name))}; set it back, or start anew with another run.out"
            )


def _check_adam(path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        for part in _ADAM:
            found, wanted = tensors.get(f"{part}/{name}"), [] if part == "step" else list(parameter.shape)
            if found is None or list(found.shape) != wanted:
                given = "missing" if found is None else f"{list(found.shape)}, not {wanted}"
                raise ValueError(f"{path / 'state.safetensors'} is damaged: {part}/{name} is {given}; delete {path}")


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


def _part(checkpoint: Path) -> Path:
    """The name of one that is not whole."""
    return checkpoint.with_name(f".{checkpoint.name}.part")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
