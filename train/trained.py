"""A trained model from where it lies: a run, one of its checkpoints, or what tools/convert_checkpoint.py made; or, of a
method that trains nothing, its recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import checkpoints
from model.methods import METHODS
from model.video import VideoModel
from train.build import backbone_checksum, build_model
from train.checkpoint import load_weights, newest_checkpoint, read_checkpoint
from train.config import Config
from train.resolve import config_from_dict, load_config, parse_override

_SPAN = 128  # source frames that every published dense clip covers: 8 × 16, 16 × 8, 32 × 4
_CONVERTED_BATCH = 8


@dataclass(frozen=True)
class Trained:
    """A model and what is known of its training."""

    model: VideoModel
    """On the CPU, float32, in eval mode."""
    config: Config
    """The run's; of a converted checkpoint the defaults, with its number of frames and how its clips are cut."""
    folder: Path
    """Where reports about it go: the run's, or the converted checkpoint's."""
    step: int | None
    """Optimizer steps done; None where that is not known."""
    classes: tuple[str, ...] | None
    """Names of its classes; None where they were not stored."""
    micro_batch: int
    """Clips at once that it was trained with."""
    assumed: str = ""
    """What is not known of a converted checkpoint and was assumed, a sentence for the user; empty: nothing."""

    def before_training(self) -> VideoModel | None:
        """The model that the run started from; None where that is not known."""
        if self.step is None:
            return None
        config, count, frames = self.config, self.model.num_classes, self.model.num_frames
        assert count is not None
        seed, names = config.train.seed, self.classes
        return build_model(config.model, num_classes=count, num_frames=frames, seed=seed, class_names=names).eval()

    def require_classes(self, names: tuple[str, ...], where: str) -> None:
        """ValueError, naming the first class that differs, unless the model was trained for these classes; one that
        reads class names is told these and answers for them, whatever it was trained for."""
        if self.model.reads_class_names:
            self.model.name_classes(names)
            return
        if self.model.num_classes is None:
            raise ValueError(f"{self.folder} has no classifier, so there is nothing to compare with labels; train it")
        if self.classes is not None:
            for number, (own, other) in enumerate(zip(self.classes, names, strict=False)):
                if own != other:
                    raise ValueError(
                        f"the classes of {where} are not those of {self.folder}: class {number} is {other!r} there and "
                        f"was {own!r} in training; pack the set with the class list of the training set"
                    )
        if self.model.num_classes != len(names):
            raise ValueError(
                f"{where} has {len(names)} classes and {self.folder} was trained for {self.model.num_classes}; "
                "pack the set with the class list of the training set"
            )


def open_trained(path: Path, overrides: Iterable[str] = ()) -> Trained:
    """Loads the newest checkpoint of a run's folder, a checkpoint by its own folder, a converted one, or the model of a
    recipe (.toml) whose method trains nothing.

    `overrides` change the configuration as `--set` does in training; those of [model] are settings of `model.load` for
    a converted checkpoint. Raises ValueError or OSError: nothing of the kind there, damaged, or the frozen weights are
    not those that it was trained on.
    """
    if path.suffix == ".toml":
        return _open_recipe(path, overrides)
    if path.is_file():
        raise ValueError(
            f"{path} is a file; convert it to a folder, then give that: python tools/convert_checkpoint.py {path} NEW"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give a run, one of its checkpoints or a converted checkpoint")
    checkpoint = path if (path / "state.json").exists() else newest_checkpoint(path)
    if checkpoint is not None:
        return _open_checkpoint(checkpoint, overrides)
    if checkpoints.find_document(path):
        return _open_converted(path, overrides)
    raise FileNotFoundError(
        f"{path} is neither a run with a checkpoint (checkpoint-…), nor a checkpoint (state.json), nor a converted "
        f"checkpoint ({checkpoints.DOCUMENT})"
    )


def _open_recipe(path: Path, overrides: Iterable[str]) -> Trained:
    config = load_config(str(path), overrides, needs_data=False)
    if METHODS[config.model.method].trains:
        untrained = " or ".join(name for name, method in METHODS.items() if not method.trains)
        raise ValueError(
            f"{path} is a recipe, and a model of method {config.model.method} must be trained: python train/main.py "
            f"--recipe {path}, then give the run's folder; only with model.method = {untrained} a recipe is enough"
        )
    frames, seed = config.data.num_frames, config.train.seed
    built = build_model(config.model, num_classes=None, num_frames=frames, seed=seed).eval()
    micro_batch = config.deepspeed["train_micro_batch_size_per_gpu"]
    return Trained(built, config, Path(config.run.out), None, None, micro_batch)


def _open_checkpoint(path: Path, overrides: Iterable[str]) -> Trained:
    document, tensors = read_checkpoint(path)
    config = config_from_dict(document["config"], overrides)
    classes, head = document.get("classes"), tensors.get("weights/cls_head.fc_cls.weight")
    if classes is None and head is None:
        raise ValueError(f"{path} holds no classifier, nor the names of its classes")
    count = len(classes or ()) if head is None else len(head)
    built = build_model(
        config.model,
        num_classes=count,
        num_frames=config.data.num_frames,
        seed=config.train.seed,
        class_names=classes,
    ).eval()
    if backbone_checksum(built) != document["run"]["checksum of the frozen weights"]:
        raise ValueError(
            f"the weights of {config.model.name} ({config.model.pretrained}) are not those that {path} was trained on "
            "(checksum); bring those back, or name their file with --set model.pretrained=PATH"
        )
    load_weights(built, tensors)
    return Trained(
        built,
        config,
        path.resolve().parent,
        int(document["step"]),
        None if classes is None else tuple(classes),
        int(document["micro_batch"]),
    )


def _open_converted(path: Path, overrides: Iterable[str]) -> Trained:
    settings, others = {}, {}
    for override in overrides:
        keys, value = parse_override(override)
        if keys[0] == "model" and len(keys) == 2:
            settings[keys[1]] = value
        elif keys[0] in ("data", "ds", "speed"):
            others[".".join(keys)] = override
        else:
            raise ValueError(
                f"--set {override}: {path} is converted, and no training's; of it can be set model.X (the settings of "
                "model.load), data.X, speed.X and ds.X"
            )
    read = checkpoints.read_folder(path, settings.pop("pretrained", None))
    stored = checkpoints.with_settings(read, settings)
    loaded = checkpoints.model_of(stored)
    data: dict[str, Any] = {
        "num_frames": loaded.num_frames,
        "interval": stored.interval or max(1, _SPAN // loaded.num_frames),
    }
    if stored.sampling is not None:
        data["sampling"] = stored.sampling
    batch = {"train_batch_size": _CONVERTED_BATCH, "train_micro_batch_size_per_gpu": _CONVERTED_BATCH}
    config = config_from_dict({"data": data, "deepspeed": batch}, others.values())
    assumed = []
    unknown = {
        name for name in ("sampling", "interval") if getattr(stored, name) is None and f"data.{name}" not in others
    }
    if config.data.sampling == "dense" and unknown:
        assumed.append(
            f"clips are cut densely, {config.data.interval} frames apart, as published for Kinetics: set others with "
            "--set data.sampling=uniform or --set data.interval=N"
        )
    if stored.classes is None and loaded.num_classes is not None:
        assumed.append("class names are unknown, and only their number is compared")
    return Trained(loaded, config, path, None, stored.classes, _CONVERTED_BATCH, "; ".join(assumed))
