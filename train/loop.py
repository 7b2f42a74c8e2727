"""The training loop: fetch, learn, log, save, evaluate."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from model.video import VideoModel
from pipelines.loader import ClipBatch, ClipLoader, default_workers
from pipelines.plan import MixPlan, Order, num_steps, plan_mix, train_turns
from pipelines.shards import ShardSet
from train.bad_samples import FILE_NAME, BadSamples
from train.checkpoint import save_checkpoint
from train.clock import Clock, Pace
from train.config import Batch, Config
from train.control import CUT_SHORT, Control
from train.engine import Engine, World
from train.evaluate import evaluate
from train.metrics import MetricsLog, eval_line, train_line
from train.run_folder import PREDICTIONS
from train.schedule import crosses, learning_rate
from train.skipped import Losses, Read
from train.stem_cache import StemCache
from train.step import Step


@dataclass(frozen=True)
class Job:
    """Everything that a run consists of."""

    config: Config
    world: World
    batch: Batch
    model: VideoModel
    engine: Engine
    shards: ShardSet
    """The training split."""
    val_shards: ShardSet | None
    """The split to evaluate on, if any."""
    out: Path
    run: Mapping[str, Any]
    """What the run is, for its checkpoints: see `checkpoint.identity`."""
    start_step: int
    """Optimizer steps done before."""
    bad_samples: BadSamples
    cache: StemCache | None = None
    """What the frozen part of the model made of clips."""
    control: Control = field(default_factory=Control)
    """How the run is stopped before its end."""
    skipped_before: int = 0
    """Steps that were skipped before, see `Losses`."""

    @property
    def train_cache(self) -> StemCache | None:
        """The same where training clips come again."""
        return self.cache if self.config.data.fixed_views else None

    @property
    def num_steps(self) -> int:
        return num_steps(self.config.schedule.epochs, self.shards.num_kept, self.batch.total)

    @property
    def log_every(self) -> int:
        """Steps between log lines: a short run still has five."""
        return min(self.config.train.log_every, max(1, self.num_steps // 5))

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints, in the same way; 0: only at the end."""
        return min(self.config.train.checkpoint_every, max(1, self.num_steps // 5))

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        seen, before = step * self.batch.total, (step - 1) * self.batch.total
        return step == self.num_steps or crosses(seen, before, self.config.train.eval_every * self.shards.num_kept)

    def loader_options(self) -> dict[str, Any]:
        """How clips are cut and read, in training and evaluation alike."""
        data, device = self.config.data, self.world.device
        return {
            "options": data,
            "seed": self.config.train.seed,
            "workers": data.workers or default_workers(self.world.local_size, device.type),
            "prefetch": data.prefetch,
            "max_bad_fraction": data.max_bad_fraction,
            "ranks": self.world.size,
            "device": device,
        }

    def train_loader(self) -> ClipLoader:
        """This rank's training micro-batches, from the next step to the last."""
        sizes, window = [shard.samples for shard in self.shards.shards], self.config.data.shuffle_shards
        turns = train_turns(
            Order(sizes, self.config.train.seed, window=window, kept=self.shards.kept),
            global_batch=self.batch.total,
            micro_batch=self.batch.micro,
            rank=self.world.rank,
            world=self.world.size,
            start_step=self.start_step,
            num_steps=self.num_steps,
        )
        size, planned = self.model.geometry.image_size, self.start_step * self.batch.total
        known = self.train_cache and partial(self.train_cache.known, self.shards.split)
        options = self.loader_options() | {"planned_before": planned, "known": known}
        return ClipLoader(self.shards, turns, micro_batch=self.batch.micro, size=size, **options)


def train(job: Job, log: MetricsLog | None) -> None:
    """Trains to the last step; rank 0 has a log.

    The host waits for the device only on steps that are logged (every one that saves or evaluates is), or traced, and
    once after the warm-up. Raises `Stopped` when the run was asked to stop, after it was saved; ValueError when too
    many steps in a row had to be skipped, after their state before them was.
    """
    config, world, device, batch = job.config, job.world, job.world.device, job.batch
    if job.start_step >= job.num_steps:
        if log is not None:
            print(f"this run is finished: all {job.num_steps} steps are done; for more, start another", flush=True)
        if not (job.out / PREDICTIONS).exists():  # the evaluation at its end failed
            _evaluate(job, job.num_steps, log)
        job.control.finish()
        return
    peak = config.optimizer.peak(batch.total)
    parts = Step(config, job.model, job.engine, job.shards, device, job.train_cache)
    losses = Losses(world, job.skipped_before)
    _make_up_evaluation(job, log)
    with job.train_loader() as loader:
        clock = Clock(batch.total, lambda: loader.wait_seconds)
        logged = clock.read()
        job.control.start(job.start_step + 1)
        for step in range(job.start_step + 1, job.num_steps + 1):
            lr = learning_rate(step - 1, job.num_steps, peak, config.schedule)
            mix = plan_mix(config.train.seed, step - 1, config.data)

            for _ in range(batch.accumulation):
                clips = job.bad_samples.next_batch(loader)
                micro_batch = parts.to_device(clips)
                parts.augment(micro_batch, mix)
                loss = parts.loss(micro_batch)
                job.engine.backward(loss)
                job.engine.update(lr)
                losses.add(loss, clips.keys)
                if config.run.trace:
                    _trace(job, step, clips, mix, loss.item())
            losses.end_step(step, job.engine.skipped)

            if clock.step_done():
                losses.wait()  # the device has done the warm-up steps
                clock.start_measuring()
            ends, evaluates = step == job.num_steps, job.evaluates_after(step)
            stops = job.control.ends_after(step) and not ends
            saves = ends or stops or crosses(step, step - 1, job.checkpoint_every)
            if saves or evaluates or step % job.log_every == 0:
                job.bad_samples.meet(loader, job.shards, job.start_step * batch.total)
                read = losses.read()
                whole = clock.read()
                if log is not None:
                    _log(job, log, step, losses, read, lr, whole.since(logged), whole)
                logged = whole
                if losses.in_a_row > config.train.max_skipped_steps:
                    _give_up(job, losses, step - losses.in_a_row)
                saves &= ends or stops or not losses.in_a_row  # those of before are worth more
            if saves:
                with clock.paused():
                    _save(job, losses, step)
            if evaluates and not stops:
                with clock.paused():
                    stops = not _evaluate(job, step, log)
                    if stops and not saves:
                        _save(job, losses, step)
            if stops:
                raise job.control.stopped(step)
        job.control.finish()
        if log is not None and job.bad_samples.met:
            of = f"{len(job.bad_samples.met)} of {job.shards.num_kept} samples"
            print(f"{of} could not be decoded and were replaced by others: {job.out / FILE_NAME} lists them")
        if log is not None:
            values = {"skipped_steps": losses.skipped, **_pace_values(clock.read())}
            log.write("end", job.num_steps, paused_seconds=clock.paused_seconds, **values)


def _give_up(job: Job, losses: Losses, step: int) -> NoReturn:
    """Ends the run as it was after `step`, the last that was not skipped."""
    saved = "no step was learned before"
    if step > job.start_step:
        _save(job, losses, step)
        saved = f"the state before, of step {step}, is saved"
    elif job.start_step:
        saved = f"the state before is that of step {step}, which the run began with"
    count = f"{losses.in_a_row} steps in a row were" if losses.in_a_row > 1 else "a step was"
    raise ValueError(
        f"{count} skipped, for a loss or gradient is no finite number (allowed is "
        f"train.max_skipped_steps = {job.config.train.max_skipped_steps}); {saved}. Start anew with a lower "
        "optimizer.lr, a longer schedule.warmup_epochs or ds.gradient_clipping=1.0; if the machine was at fault, go on "
        "with --resume"
    )


def _log(job: Job, log: MetricsLog, step: int, losses: Losses, read: Read, lr: float, pace: Pace, whole: Pace) -> None:
    epoch = step * job.batch.total / job.shards.num_kept
    counts = {"bad_samples": len(job.bad_samples.met), "skipped_steps": losses.skipped}
    loss = None if math.isnan(read.loss) else read.loss
    log.write("train", step, epoch=epoch, loss=loss, lr=lr, **counts, **_pace_values(pace))
    for told in read.told:
        print(f"warning: {told}", file=sys.stderr, flush=True)
    line = train_line(step=step, num_steps=job.num_steps, epoch=epoch, loss=read.loss, lr=lr, pace=pace, whole=whole)
    print(line, flush=True)


def _pace_values(pace: Pace) -> dict[str, float | None]:
    names = ("steps", "clips_per_s", "step_ms", "wait_ms", "wait_share")
    return {("measured_steps" if name == "steps" else name): getattr(pace, name) for name in names}


def _save(job: Job, losses: Losses, step: int) -> None:
    job.world.on_first(
        lambda: save_checkpoint(
            job.out,
            step,
            job.model,
            job.engine.optimizer,
            run=job.run,
            config=job.config,
            world_size=job.world.size,
            batch=job.batch,
            bad_samples=job.bad_samples.met,
            classes=job.shards.classes,
            keep=job.config.train.keep,
            skipped_steps=losses.skipped,
        )
    )


def _make_up_evaluation(job: Job, log: MetricsLog | None) -> None:
    """Evaluates first where the run was stopped between saving its last step and the evaluation after it."""
    if job.start_step and job.evaluates_after(job.start_step):
        missing = log is not None and not log.evaluated
        if json.loads(job.world.gather(json.dumps(missing))[0]):
            _evaluate(job, job.start_step, log)


def _evaluate(job: Job, step: int, log: MetricsLog | None) -> bool:
    """Evaluates if there is something to evaluate on: on one view a video, as the official code validates, and after
    the last step on all `data.test_clips` × `data.test_crops`; those answers are kept in predictions.npz. False, on all
    ranks, if it was cut short because the run is to stop."""
    shards = job.val_shards
    if shards is None:
        return True
    options = job.loader_options()
    if step < job.num_steps:
        options["options"] = replace(job.config.data, test_clips=1, test_crops=1)
    options = {"loader_options": options, "on_batch": job.control.check, "cache": job.cache}
    try:
        result = evaluate(job.model, shards, job.world, micro_batch=job.batch.micro, **options)
    except ValueError as error:
        if str(error) == CUT_SHORT:
            return False
        raise
    job.bad_samples.meet_evaluated(result.bad, shards)
    if log is None:
        return True
    metrics = result.metrics()
    log.write("eval", step, epoch=step * job.batch.total / job.shards.num_kept, **metrics)
    print(eval_line(step, metrics, len(shards.classes)), flush=True)
    if step == job.num_steps:
        result.save(job.out / PREDICTIONS, shards)
    return True


def _trace(job: Job, step: int, clips: ClipBatch, mix: MixPlan | None, loss: float) -> None:
    """One line a micro-batch: what this rank saw, and its loss to the last bit."""
    entry = {
        "step": step,
        "loss": loss,
        "samples": [turn.sample_id for turn in clips.turns],
        "epochs": [turn.epoch for turn in clips.turns],
        "frames": [plan.frames for plan in clips.plans],
        "boxes": [plan.box for plan in clips.plans],
        "flips": [plan.flip for plan in clips.plans],
        "ops": [plan.ops for plan in clips.plans],
        "erased": [plan.erase for plan in clips.plans],
        "mix": mix and (mix.weight, mix.region),
    }
    with (job.out / f"trace-{job.world.rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
