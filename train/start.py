"""From a resolved configuration to a running job: check everything, join the processes, build, resume, train."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from model.attention import attention_backend
from model.methods import METHODS
from model.parameters import count_parameters, parameter_table
from model.speed import describe_speed, record_graphs, speed_up
from model.video import VideoModel
from pipelines.features import check_options
from pipelines.loader import describe_decoding
from pipelines.machine import installed_versions, processor_name
from pipelines.remote import open_set
from pipelines.shards import ShardSet, write_durably
from train.bad_samples import BadSamples
from train.build import backbone_checksum, build_model
from train.checkpoint import identity, newest_checkpoint, require_same_run, resume
from train.config import Batch, Config
from train.control import Control, typed_launcher
from train.engine import Engine, World, start_world
from train.feature_sets import check_feature_set
from train.loop import Job, train
from train.metrics import MetricsLog, counted
from train.resolve import ROOT
from train.run_folder import RUN, read_facts
from train.stem_cache import StemCache

LOCK = ".lock"  # in the run's folder
FEW_STEPS = 100  # of a run
MAX_TOLD = 5  # missing shards that are named
PACKAGES = ("deepspeed", "nvidia-dali-cuda130", "numpy", "open_clip_torch", "safetensors", "torch", "xformers")


@dataclass(frozen=True)
class Prepared:
    """A run of which everything that needs no other process has been checked; nothing is written yet."""

    config: Config
    batch: Batch
    shards: ShardSet
    val_shards: ShardSet | None
    resumes: bool
    """Whether --resume was asked for; without a checkpoint the run starts anew and says so."""
    checkpoint: Path | None
    model: VideoModel
    backbone: str

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that is resumed must share with this one: see `checkpoint.identity`."""
        return identity(self.config, fingerprint=self.shards.fingerprint, backbone=self.backbone)

    def run(self, command: Sequence[str], control: Control) -> None:
        """Joins the other processes and trains. `command` is for the record."""
        world = start_world()
        control.join(world)
        engine = self.start_engine(world)
        with closing(_Claim(Path(self.config.run.out))) as claim:
            world.on_first(claim.take)
            self._train(world, engine, command, control)

    def start_engine(self, world: World) -> Engine:
        """Sets the model up for training on this process's device, under DeepSpeed."""
        if self.config.bf16:
            self.model.set_compute_dtype(torch.bfloat16)
        speed_up(self.model.to(world.device), self.config.speed, world.device)
        skips = self.config.train.max_skipped_steps
        engine = Engine(world, self.model, self.config.optimizer, self.config.deepspeed, self.batch, skips)
        if self.config.speed.cuda_graphs:  # before a loader's thread decodes on the device
            record_graphs(self.model, self.batch.micro)
        return engine

    def _train(self, world: World, engine: Engine, command: Sequence[str], control: Control) -> None:
        config, out = self.config, Path(self.config.run.out)
        run = self.identity
        state: dict[str, Any] = {"step": 0, "bad_samples": []}
        if self.checkpoint is not None:
            state = resume(self.checkpoint, self.model, engine.optimizer, run)
        start_step = int(state["step"])
        world.on_first(lambda: _write_run_json(out, self, world, command, start_step))
        parts = (self.model, engine, self.shards, self.val_shards)
        bad_samples = BadSamples(world, out, config.data.max_bad_fraction, state["bad_samples"])
        cache = StemCache(self.model, config.speed.cache_gb) if config.speed.cache_gb else None
        before = (run, start_step, bad_samples)
        job = Job(config, world, self.batch, *parts, out, *before, cache, control, state.get("skipped_steps", 0))
        log = None
        if world.rank == 0:
            print(_opening(job), flush=True)
            if self.resumes and self.checkpoint is None:
                print(f"no checkpoint in {out} to resume from: this run starts anew", flush=True)
            log = MetricsLog(out, start_step)
        try:
            train(job, log)
        finally:
            if log is not None:
                log.close()
        if log is not None and config.run.report:
            from train.report import report_finished_run  # draws: runs without it do without matplotlib

            report_finished_run(out)


class _Claim:
    """Keeps other runs out of a run's folder while this one lives; of no effect on file systems without locks."""

    def __init__(self, out: Path) -> None:
        self._path = out / LOCK
        self._file: TextIO | None = None

    def take(self) -> None:
        """Makes the folder if need be. FileExistsError when another run has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another run is writing into {self._path.parent}: wait for its end, or choose another folder with "
                "--set run.out=…"
            ) from None
        except OSError:
            pass

    def close(self) -> None:
        """Lets others in."""
        if self._file is not None:
            self._file.close()


def prepare(config: Config, batch: Batch, *, resume: bool) -> Prepared:
    """Opens and checks the data, finds the checkpoint, builds the model.

    Raises ValueError or OSError: shards missing or damaged, no such split, run.out in use, by another run perhaps which
    cannot be resumed, an unknown model.
    """
    if not METHODS[config.model.method].trains:
        raise ValueError(
            f"model.method = {config.model.method!r} has nothing to train: evaluate it, "
            "python tools/evaluate.py RECIPE.toml --shards SHARDS"
        )
    out = Path(config.run.out)
    in_use = out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir()))
    if in_use and not resume:
        raise FileExistsError(
            f"{out} exists and is not empty: add --resume to continue that run, or choose another with --set run.out=…"
        )
    part = config.data.part
    shards = part.of_training(_open_shards(config, config.data.train_split))
    val_shards = part.of_testing(_open_shards(config, config.data.val_split)) if config.data.val_split else None
    if shards.features is not None:
        check_options(config.data, shards.features)
    if shards.multi_label and config.train.label_smoothing:
        raise ValueError(
            f"train.label_smoothing = {config.train.label_smoothing}; allowed is 0: the videos of {shards.folder} have "
            "several labels each, learned one by one as yes or no"
        )
    if (warning := _uneven_frames(config, shards)) and os.environ.get("RANK", "0") == "0":
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    checkpoint = newest_checkpoint(out) if resume and out.is_dir() else None
    settings, frames, seed = config.model, config.data.num_frames, config.train.seed
    if os.environ.get("RANK", "0") == "0":  # may download for minutes
        print(f"loading {settings.name}, weights {settings.pretrained}, method {settings.method}", flush=True)
    classes = shards.classes
    model = build_model(settings, num_classes=len(classes), num_frames=frames, seed=seed, class_names=classes)
    for split in (shards, val_shards):
        if split is not None:
            check_feature_set(split, model, config)
    parts = (config, batch, shards, val_shards, resume, checkpoint, model)
    prepared = Prepared(*parts, backbone_checksum(model))
    if checkpoint is None and (out / RUN).is_file():  # a run that was stopped before it saved anything
        before = read_facts(out).get("identity")
        if isinstance(before, dict):  # not of an earlier version
            require_same_run(out, before, prepared.identity)
    return prepared


def _uneven_frames(config: Config, shards: ShardSet) -> str:
    """What to say where the planned frames are not among the stored ones, or nothing."""
    data, (_, slash, every) = config.data, shards.stored_frames.partition("/")
    if data.sampling != "dense" or not slash or not every.isdecimal():
        return ""
    uneven = [interval for interval in (data.interval, *data.intervals) if interval % int(every)]
    if not uneven:
        return ""
    key = "data.interval" if data.interval in uneven else "data.intervals"
    return (
        f"{shards.folder} stores one frame in {every} and {key} is {uneven[0]}: clips take the nearest stored frames, "
        f"unevenly; choose a multiple of {every}, or pack with --fps source/{math.gcd(data.interval, *data.intervals)}"
    )


def _open_shards(config: Config, split: str) -> ShardSet:
    """A split; if shards of it are missing or cut, a warning, if too many are, a ValueError."""
    window = config.data.shuffle_shards if split == config.data.train_split else 1  # evaluation: shard after shard
    try:
        shards = open_set(config.data.shards, split, cache=config.data.cache, window=window)
    except ValueError as error:
        if split == config.data.val_split and "has no split" in str(error):
            raise ValueError(
                f'{error}; name it in data.val_split, or train without: --set data.val_split=""'
            ) from error
        raise
    problems = shards.check_files()
    lost, texts = sum(shard.samples for shard, _ in problems), [text for _, text in problems]
    told = "; ".join(texts[:MAX_TOLD]) + (f"; and {len(texts) - MAX_TOLD} more" if len(texts) > MAX_TOLD else "")
    lost_of = f"{lost} of {len(shards)} samples of split {split!r} cannot be read"
    if lost > config.data.max_bad_fraction * len(shards):
        raise ValueError(f"{lost_of}, more than data.max_bad_fraction = {config.data.max_bad_fraction}: {told}")
    if problems and os.environ.get("RANK", "0") == "0":
        print(f"warning: {lost_of} and are replaced by others or left out: {told}", file=sys.stderr, flush=True)
    return shards


def _opening(job: Job) -> str:
    """What is printed before the first step."""
    config, batch, world = job.config, job.batch, job.world
    lines = [parameter_table(job.model)]
    if batch.note:
        lines.append(batch.note)
    shared = f"{counted(world.size, 'process', 'es')} × {counted(batch.accumulation, 'micro-batch', 'es')}"
    lines.append(
        f"{_samples(job)}, {len(job.shards.classes)} classes; {counted(job.num_steps, 'step')} of {batch.total} clips: "
        f"{shared} × {batch.micro}, on {world.device.type}, {'bfloat16' if config.bf16 else 'float32'}"
    )
    lines.append(_learning(job))
    decoding = describe_decoding(job.shards, world.device, job.loader_options()["workers"])
    attention = attention_backend(world.device, biased=job.model.biased_attention, backend=config.speed.attention)
    speed = describe_speed(config.speed, world.device)
    lines.append(f"{decoding}; attention by {attention}{speed and '; '}{speed}")
    if hint := _smaller_batch(job):
        lines.append(hint)
    lines.append(f"from {f'step {job.start_step}' if job.start_step else 'the beginning'}, into {job.out}")
    return "\n".join(lines)


def _smaller_batch(job: Job) -> str:
    """What to say where a smaller batch would train better, or nothing."""
    total, samples = job.batch.total, job.shards.num_kept
    least = job.world.size * (2 if job.config.data.mixes else 1)
    smaller = max(1, min(8, total // 2) // least) * least
    reasons = [f"only {counted(job.num_steps, 'step')}"] if job.num_steps < FEW_STEPS else []
    if total > samples:
        reasons.append(f"a step of {total} clips repeats some of the {samples} samples")
    if not reasons or smaller >= total:
        return ""
    return f"{', and '.join(reasons)}: a smaller batch takes more steps, such as --set ds.train_batch_size={smaller}"


def _samples(job: Job) -> str:
    """How many samples there are to learn from, and of how many they were chosen."""
    data, shards = job.config.data, job.shards
    if shards.kept is None:
        return f"{len(shards)} samples"
    rule = f"data.shots = {data.shots}" if data.shots else f"data.fraction = {data.fraction:g}"
    chosen = f"{rule}, data.fraction_seed = {data.fraction_seed}"
    return f"{shards.num_kept} of {len(shards)} samples ({chosen})"


def _learning(job: Job) -> str:
    """The learning rate and how it changes."""
    optimizer, schedule = job.config.optimizer, job.config.schedule
    peak = optimizer.peak(job.batch.total)
    backbone = "" if optimizer.backbone_lr == 1 else f" (outside the head {peak * optimizer.backbone_lr:.3g})"
    return (
        f"learning rate {peak:.3g}{backbone}, after {schedule.warmup_epochs:g} epochs of warm-up, with a cosine per "
        f"{schedule.cosine}"
    )


def _write_run_json(out: Path, prepared: Prepared, world: World, command: Sequence[str], start_step: int) -> None:
    """Writes run.json, which begins the run's folder."""
    document: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "launcher": typed_launcher(command),
        "resumed_from_step": start_step,
        "config": prepared.config.as_dict(),
        "identity": prepared.identity,
        "parameters": dict(zip(("total", "trainable"), count_parameters(prepared.model), strict=True)),
        "samples": prepared.shards.num_kept,
        "num_classes": len(prepared.shards.classes),
        "shards_fingerprint": prepared.shards.fingerprint,
        "backbone_checksum": prepared.backbone,
        "world_size": world.size,
        "micro_batch": prepared.batch.micro,
        "accumulation": prepared.batch.accumulation,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "packages": installed_versions(PACKAGES),
        "git": _git_commit(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / RUN, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _git_commit() -> str | None:
    """The commit of this source tree, with `+changes` if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return f"{commit}+changes" if git("status", "--porcelain").strip() else commit
    except (OSError, subprocess.CalledProcessError):
        return None
