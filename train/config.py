"""What a run is made of: one dataclass a section of a recipe, each checking its own values.

The defaults are the published AIM settings for Kinetics-400 with ViT-B/16. `resolve.py` fills these from a recipe, the
DeepSpeed file and the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from model.backbone import NORMALISATIONS
from model.methods import METHODS
from model.speed import SpeedOptions
from pipelines.cache import CacheSettings, default_cache_folder
from pipelines.plan import ClipOptions
from pipelines.subset import Part, read_episode

PUBLISHED_BATCH = 64
"""Clips a step of the published runs, which the published learning rate is for."""


@dataclass(frozen=True)
class DataConfig(ClipOptions):
    """[data]: the packed set, how clips are cut from it (see `ClipOptions`), and how it is read."""

    shards: str = ""
    """Folder made by tools/make_shards.py or tools/index_shards.py, relative to the working directory; or the address
    of one: s3://bucket/set, gs://bucket/set, https://host/set."""
    train_split: str = "train"
    val_split: str = "val"
    """Evaluated during training; empty: nothing is."""
    fraction: float = 1.0
    """Share of the training split that is learned from, the same of every class (see `pipelines.subset`)."""
    fraction_seed: int = 0
    """Which samples these are; with the same seed, a smaller share is part of a larger one."""
    shots: int = 0
    """Samples of each class that are learned from, chosen by fraction_seed too; 0: all."""
    classes: tuple[str, ...] = ()
    """Names of the only classes that are learned and evaluated, in the order of their new numbers; empty: all."""
    episodes: str = ""
    """JSON file of few-shot episodes (see `pipelines.subset`); empty: none."""
    episode: int = 0
    """Which of these is learned, from 0."""
    shuffle_shards: int = 0
    """0: an epoch is one permutation of all samples. W: the shards are permuted, taken W at a time, and the samples of
    those permuted, so that only W shards are read at once (slow disks, remote sets)."""
    cache_dir: str = ""
    """Where shards that come from an address are kept, on a local disk; empty: in the user's cache folder."""
    cache_gb: float = 100.0
    """GB of them that are kept, of all sets together; what is used next is fetched ahead, what is not evicted."""
    workers: int = 0
    """Decode processes of each rank; 0: as many as suit the machine."""
    prefetch: int = 3
    """Micro-batches decoded ahead."""
    max_bad_fraction: float = 0.01
    """Share of samples that may fail to decode before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allow("data.fraction", self.fraction, 0 < self.fraction <= 1, "a share, 0 < fraction <= 1")
        allow("data.fraction_seed", self.fraction_seed, 0 <= self.fraction_seed < 2**63, "0 to 2^63 - 1")
        allow("data.shots", self.shots, self.shots >= 0, "0 (all) or more")
        allow("data.episode", self.episode, self.episode >= 0, "0 or more")
        allow("data.classes", list(self.classes), len(self.classes) != 1, "[] (all), or two names or more")
        choices = {"fraction": self.fraction != 1, "shots": self.shots > 0, "episodes": self.episodes != ""}
        choices["classes"] = choices["episodes"] and len(self.classes) > 0
        given = [f"data.{name}" for name, is_given in choices.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what is learned from; give one of them")
        allow("data.shuffle_shards", self.shuffle_shards, self.shuffle_shards >= 0, "0 (all) or more shards")
        allow("data.cache_gb", self.cache_gb, 0 < self.cache_gb < inf, "more than 0")
        allow("data.workers", self.workers, 0 <= self.workers <= 256, "0 (automatic) to 256")
        allow("data.prefetch", self.prefetch, 1 <= self.prefetch <= 4, "1 to 4 batches")
        allow("data.max_bad_fraction", self.max_bad_fraction, 0 <= self.max_bad_fraction <= 1, "a share, 0 to 1")
        allow("data.train_split", self.train_split, self.train_split != "", "the name of a split")

    @property
    def part(self) -> Part:
        """Which samples are learned from and tested on. ValueError or OSError where `episodes` is no such file."""
        if not self.episodes:
            return Part(self.fraction, self.shots, self.fraction_seed, self.classes)
        chosen = read_episode(Path(self.episodes), self.episode)
        return Part(classes=chosen.classes, train_keys=chosen.train, test_keys=chosen.test)

    @property
    def cache(self) -> CacheSettings:
        """Where shards that come from an address are kept."""
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_folder()
        return CacheSettings(folder, round(self.cache_gb * 1e9))


@dataclass(frozen=True)
class ModelConfig:
    """[model]: the method, the image model it starts from, and the method's own options, which stand beside these in a
    recipe (`model.adapters`)."""

    method: str = "aim"
    """A key of `model.methods.METHODS`."""
    name: str = "ViT-B-16-quickgelu"
    """An image model of open_clip or timm, or `tiny-clip`, which ships with the project."""
    pretrained: str = "openai"
    """A weight tag of that model, the path of a .safetensors file, or `none` for random weights."""
    normalisation: str = ""
    """A key of `model.backbone.NORMALISATIONS`; empty: what the weights were made with."""
    options: Any = None
    """An instance of the method's dataclass of options (see `METHODS`); None becomes its defaults."""

    def __post_init__(self) -> None:
        allow("model.method", self.method, self.method in METHODS, " or ".join(METHODS))
        names = ("", *NORMALISATIONS)
        allow("model.normalisation", self.normalisation, self.normalisation in names, f"one of {json.dumps(names)}")
        kind = METHODS[self.method].options
        if self.options is None:
            object.__setattr__(self, "options", kind())
        assert type(self.options) is kind, (self.method, self.options)

    def as_dict(self) -> dict[str, Any]:
        """As in a recipe: the options beside the rest."""
        document = asdict(self)
        return document | document.pop("options")


@dataclass(frozen=True)
class OptimizerConfig:
    """[optimizer]: AdamW."""

    lr: float = 3e-4
    """Peak learning rate (published: 3e-4 for 64 clips a step)."""
    lr_scaling: str = "none"
    """`none`: lr is for the global batch that is set. `linear`: it is for 64 clips, and grows with the batch."""
    backbone_lr: float = 1.0
    """Factor of the learning rate of what trains outside the head (official: 0.1 for ViT-L on Kinetics-400 and
    Something-Something V2)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        allow("optimizer.lr", self.lr, 0 < self.lr < inf, "more than 0")
        scalings = ("none", "linear")
        allow("optimizer.lr_scaling", self.lr_scaling, self.lr_scaling in scalings, " or ".join(scalings))
        allow("optimizer.backbone_lr", self.backbone_lr, 0 < self.backbone_lr < inf, "a factor, more than 0")
        allow("optimizer.betas", list(self.betas), all(0 <= b < 1 for b in self.betas), "two numbers, 0 <= beta < 1")
        allow("optimizer.eps", self.eps, 0 < self.eps < inf, "more than 0")
        allow("optimizer.weight_decay", self.weight_decay, 0 <= self.weight_decay < inf, "0 or more")

    def peak(self, global_batch: int) -> float:
        """Peak learning rate of the head for a global batch."""
        return self.lr * global_batch / PUBLISHED_BATCH if self.lr_scaling == "linear" else self.lr


@dataclass(frozen=True)
class ScheduleConfig:
    """[schedule]: linear warm-up times a cosine to 0 (see `schedule.learning_rate`)."""

    epochs: float = 30.0
    """Passes over the training split; may be a fraction."""
    warmup_epochs: float = 2.5
    warmup_start: float = 0.1
    """Factor of the first step, rising linearly to 1."""
    cosine: str = "step"
    """When the cosine moves: with every `step`, or once an `epoch`, as in the official runs."""

    def __post_init__(self) -> None:
        allow("schedule.epochs", self.epochs, 0 < self.epochs <= 100_000, "more than 0, up to 100000")
        fits = 0 <= self.warmup_epochs <= self.epochs
        allow("schedule.warmup_epochs", self.warmup_epochs, fits, f"0 to schedule.epochs = {self.epochs:g}")
        allow("schedule.warmup_start", self.warmup_start, 0 <= self.warmup_start <= 1, "0 to 1")
        allow("schedule.cosine", self.cosine, self.cosine in ("step", "epoch"), "step or epoch")


@dataclass(frozen=True)
class TrainConfig:
    """[train]: loss, randomness, and how often what happens."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes; 0 for sets with several labels a video."""
    seed: int = 0
    eval_every: float = 5.0
    """Epochs between evaluations, on one view a video; the one at the end takes all views. 0: only that."""
    log_every: int = 20
    """Optimizer steps between log lines; a short run still has five."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; a short run still has five; 0: only at the end."""
    keep: int = 2
    """Checkpoints that are kept, newest first."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because their gradients are no finite numbers; one more and the run stops."""

    def __post_init__(self) -> None:
        allow("train.label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "0 <= share < 1")
        allow("train.seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        allow("train.eval_every", self.eval_every, 0 <= self.eval_every < inf, "epochs, or 0 for only at the end")
        allow("train.log_every", self.log_every, self.log_every >= 1, "1 or more steps")
        at_end = self.checkpoint_every >= 0
        allow("train.checkpoint_every", self.checkpoint_every, at_end, "steps, or 0 for only at the end")
        allow("train.keep", self.keep, self.keep >= 1, "1 or more")
        skips = self.max_skipped_steps >= 0
        allow("train.max_skipped_steps", self.max_skipped_steps, skips, "steps, or 0 to stop at the first")


@dataclass(frozen=True)
class RunConfig:
    """[run]: where the run writes."""

    out: str = ""
    """Folder of checkpoints, logs and predictions; empty: runs/<name of the recipe>."""
    report: bool = True
    """Write report.html at the end (see `report.py`)."""
    trace: bool = False
    """Write every rank's sample ids, frames, boxes, flips, augmentations and loss of every step to
    trace-<rank>.jsonl; slows down."""


@dataclass(frozen=True)
class Config:
    """A resolved run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """The DeepSpeed document."""

    @property
    def bf16(self) -> bool:
        """Whether tokens are computed in bfloat16."""
        return bool(self.deepspeed["torch_autocast"]["enabled"])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `resolve.config_from_dict` makes an equal configuration of them."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"model": self.model.as_dict()}))
        return document


@dataclass(frozen=True)
class Batch:
    """How the global batch is shared."""

    total: int
    """Clips an optimizer step learns from, all processes together."""
    micro: int
    """Clips a process computes at once."""
    accumulation: int
    """Micro-batches a process computes for one optimizer step."""
    note: str = ""
    """What the user should know of it."""


def allow(name: str, value: object, allowed: bool, what: str) -> None:
    """ValueError naming the key, the value and what is allowed, unless it is allowed."""
    if not allowed:
        raise ValueError(f"{name} = {json.dumps(value)}; allowed is {what}")
