"""The measurements of tools/profile_throughput.py: a training run whose steps are taken one by one, and timed.

Everything measured is what training uses: the job's own loader, the parts of `train.step`, DeepSpeed's engine. Real
weights are trained, in memory only. On CUDA a stage is timed by events, as the device passes them, and nothing waits
within a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from model.flops import count_cost
from pipelines.loader import ClipBatch, ClipLoader, decodes_on_gpu
from pipelines.machine import cpu_seconds, machine_cpu_seconds, wait_for_rest
from pipelines.plan import plan_mix
from pipelines.pool import IMAGES_A_TASK
from pipelines.read import ClipRequest, ShardReader, request_clip
from train.bad_samples import BadSamples
from train.config import Batch, Config
from train.engine import start_world
from train.loop import Job
from train.schedule import learning_rate
from train.start import Prepared
from train.step import MicroBatch, Step

STAGES = ("fetch", "to_device", "augment", "forward", "backward", "optimizer")
"""Of a micro-batch, in order. Fetching is planning the clips of a later batch, and waiting for this one where it is not
ready; all others are the model's side."""
ENDLESS = 100_000.0  # epochs: a small set must not end while it is measured
MAX_REQUESTS = 128  # clips that are read and decoded alone


class Span(NamedTuple):
    """A stage of a micro-batch; seconds since the measurement began."""

    step: int
    stage: str
    start: float
    end: float


@dataclass(frozen=True)
class Phase:
    """One measurement: so many clips, as fast as they came."""

    clips: int
    seconds: float
    waited: float
    """Seconds that the trainer was blocked in fetching batches."""
    trainer_cpu: float
    """Seconds of user and system time."""
    workers_cpu: float
    others_cpu: float
    """Of programs that have nothing to do with us, on all cores of the machine."""
    spans: Sequence[Span] = ()

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds

    def step_seconds(self, stage: str) -> list[float]:
        """What a stage took in each step."""
        sums: dict[int, float] = {}
        for span in self.spans:
            if span.stage == stage:
                sums[span.step] = sums.get(span.step, 0.0) + span.end - span.start
        return list(sums.values())


class Stages:
    """Times stages: `with stages("forward"): …`."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._taken: list[tuple[int, str, Any, Any]] = []
        self.step = 0
        self._origin = self._now()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        with torch.profiler.record_function(stage):  # the name in a trace
            yield
        self._taken.append((self.step, stage, start, self._now()))

    def spans(self) -> list[Span]:
        """All so far; the device must have been waited for."""
        return [Span(step, stage, self._since(start), self._since(end)) for step, stage, start, end in self._taken]

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, moment: Any) -> float:
        return self._origin.elapsed_time(moment) / 1000 if self._on_cuda else moment - self._origin


Source = Callable[[Stages], MicroBatch]
"""Gives the next micro-batch on the device."""


class Rig:
    """A training run, set up as train/main.py does it, in one process; `scratch` stands for the folder of the run."""

    def __init__(self, prepared: Prepared, scratch: Path) -> None:
        world = start_world()
        config = prepared.config
        self.prepared, self.device = prepared, world.device
        cost = count_cost(prepared.model, 1, torch.bfloat16 if config.bf16 else torch.float32)
        self.gmac = cost.training_gmac
        """10⁹ multiply-adds of learning from one clip."""
        self.kept_bytes = cost.kept_bytes
        """What autograd keeps of it, at least."""
        self._schedule, self._done = config.schedule, 0
        self._loss = torch.zeros(())
        self._num_steps = max(1, round(config.schedule.epochs * prepared.shards.num_kept / prepared.batch.total))
        endless = replace(config, schedule=replace(config.schedule, epochs=ENDLESS))
        engine = prepared.start_engine(world)
        bad = BadSamples(world, scratch, config.data.max_bad_fraction)
        parts = (prepared.model, engine, prepared.shards, None)
        self.job = Job(endless, world, prepared.batch, *parts, scratch, {}, 0, bad)
        self.parts = Step(endless, prepared.model, engine, prepared.shards, world.device)

    @property
    def config(self) -> Config:
        return self.job.config

    @property
    def batch(self) -> Batch:
        return self.job.batch

    @property
    def workers(self) -> int:
        """Decode processes; 0 where the GPU decodes."""
        workers: int = self.job.loader_options()["workers"]
        return 0 if decodes_on_gpu(self.job.shards, self.device) else workers

    def change(self, batch: Batch | None = None, data: Mapping[str, Any] | None = None) -> None:
        """From now on another batch, other settings of [data]."""
        config = replace(self.config, data=replace(self.config.data, **(data or {})))
        self.job = replace(self.job, config=config, batch=batch or self.batch)
        self.job.engine.accumulate(self.batch.accumulation)

    def settle(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Frees what the last step left behind, which may have ended in its middle for want of memory."""
        self._loss = torch.zeros(())
        self.job.model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def from_loader(self, loader: ClipLoader) -> Source:
        """Micro-batches as training has them."""

        def fetch(stages: Stages) -> MicroBatch:
            with stages("fetch"):
                clips = self.job.bad_samples.next_batch(loader)
            with stages("to_device"):
                return self.parts.to_device(clips)

        return fetch

    def synthetic(self, clips: MicroBatch, size: int) -> Source:
        """One micro-batch of `size` clips, always the same, that lies on the device: copies of these clips."""
        rows = torch.arange(size) % len(clips.plans)
        there = rows.to(self.device)
        frames, targets = clips.frames[there], clips.targets[there]
        masks = {name: mask[there] for name, mask in clips.masks.items()}
        plans = [clips.plans[row] for row in rows.tolist()]
        return lambda stages: MicroBatch(frames, targets, masks, plans)

    def take_step(self, source: Source, stages: Stages) -> None:
        """An optimizer step, as `train.loop` takes it."""
        done = self._done % self._num_steps
        peak = self.config.optimizer.peak(self.batch.total)
        lr = learning_rate(done, self._num_steps, peak, self._schedule)
        mix = plan_mix(self.config.train.seed, self._done, self.config.data)
        for _ in range(self.batch.accumulation):
            batch = source(stages)
            with stages("augment"):
                self.parts.augment(batch, mix)
            with stages("forward"):
                self._loss = self.parts.loss(batch)  # what is left of the one before is freed, as in training
            with stages("backward"):
                self.job.engine.backward(self._loss)
            with stages("optimizer"):
                self.job.engine.update(lr)
        stages.step += 1
        self._done += 1


def measure_loader(rig: Rig, loader: ClipLoader, seconds: float) -> Phase:
    """The loader as training has it, and nobody who learns from its batches."""
    return _measure(rig, lambda stages: len(next(loader).plans), seconds, loader)


def measure_model(rig: Rig, source: Source, seconds: float) -> Phase:
    """Whole steps on input that lies on the device; the loader rests."""
    return _measure(rig, _whole_steps(rig, source), seconds, None)


def measure_inference(rig: Rig, source: Source, seconds: float) -> Phase:
    """Answers for input that lies on the device, as an evaluation computes them."""
    model = rig.job.model

    @torch.no_grad()
    def answer(stages: Stages) -> int:
        batch = source(stages)
        model(batch.frames)
        return len(batch.plans)

    model.eval()
    try:
        return _measure(rig, answer, seconds, None)
    finally:
        model.train()


def measure_whole(rig: Rig, loader: ClipLoader, seconds: float) -> Phase:
    """Steps as the trainer takes them."""
    return _measure(rig, _whole_steps(rig, rig.from_loader(loader)), seconds, loader)


def _whole_steps(rig: Rig, source: Source) -> Callable[[Stages], int]:
    def step(stages: Stages) -> int:
        rig.take_step(source, stages)
        return rig.batch.total

    return step


def _measure(rig: Rig, act: Callable[[Stages], int], seconds: float, loader: ClipLoader | None) -> Phase:
    """Repeats `act`, which returns the clips it dealt with, for at least so many seconds.

    First, unmeasured, until all that was decoded ahead is used up, so that the queue is what `act` makes of it.
    """
    ahead = rig.batch.micro * (rig.config.data.prefetch + 1 if loader is not None else 1)
    warm_up = Stages(rig.device)
    while ahead > 0:
        ahead -= act(warm_up)
    rig.settle()
    stages = Stages(rig.device)
    waited = loader.wait_seconds if loader is not None else 0.0
    own, ours, everybody = time.process_time(), cpu_seconds(), machine_cpu_seconds()
    start, clips = time.perf_counter(), 0
    while clips == 0 or time.perf_counter() - start < seconds:
        clips += act(stages)
    rig.settle()
    took = time.perf_counter() - start
    own, ours = time.process_time() - own, cpu_seconds() - ours
    others = machine_cpu_seconds() - everybody - ours
    waited = loader.wait_seconds - waited if loader is not None else 0.0
    return Phase(clips, took, waited, own, max(0.0, ours - own), max(0.0, others), stages.spans())


@dataclass(frozen=True)
class Round:
    """The three bounds, one after the other."""

    loader: Phase
    model: Phase
    whole: Phase
    utilization: float | None
    """Of the GPU, in percent, as its driver says while both work; None where it cannot be asked."""

    def waiting_share(self, device: str) -> float:
        """Share of the time end to end in which data are waited for: on CUDA by the device (its host, which is ahead of
        it, waits for it too), on a CPU by the trainer."""
        waiting = sum(self.whole.step_seconds("fetch")) if device == "cuda" else self.whole.waited
        return waiting / self.whole.seconds

    def expected(self, device: str) -> float:
        """Clips/s that loader and model allow together: on CUDA the slower of them, on a CPU, where both share the
        cores, one after the other."""
        one, other = self.loader.clips_per_s, self.model.clips_per_s
        return min(one, other) if device == "cuda" else 1 / (1 / one + 1 / other)


def measure_round(rig: Rig, loader: ClipLoader, source: Source, seconds: float, tell: Callable[[str], None]) -> Round:
    """Loader, model, both."""
    tell("loader only")
    alone = measure_loader(rig, loader, seconds)
    wait_for_rest()  # its queue fills
    tell("model only")
    model = measure_model(rig, source, seconds)
    tell("end to end")
    whole = measure_whole(rig, loader, seconds)
    return Round(alone, model, whole, _utilization(rig.device))


def _utilization(device: torch.device) -> float | None:
    """Over the last second or so."""
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.utilization(device))
    except Exception:  # the driver's library may be missing, and has errors of its own kinds
        return None


def keep_batch(rig: Rig, loader: ClipLoader) -> tuple[MicroBatch, ClipBatch]:
    """A micro-batch that stays, and the batch of the loader that it is of, which does not."""
    clips = rig.job.bad_samples.next_batch(loader)
    batch = rig.parts.to_device(clips)
    return replace(batch, frames=batch.frames.clone(), targets=batch.targets.clone()), clips


def gather_requests(rig: Rig, loader: ClipLoader) -> list[ClipRequest]:
    """What must be read and decoded for the next clips of the training's plan: at least 32, at most 128."""
    requests: list[ClipRequest] = []
    shards = rig.job.shards
    while len(requests) < MAX_REQUESTS // 4:
        plans = [plan for plan in next(loader).plans if plan.sample_id >= 0]
        requests += [request_clip(shards[plan.sample_id], plan, shards.profile) for plan in plans]
    return requests[:MAX_REQUESTS]


def frames_decoded(request: ClipRequest) -> int:
    """How many frames a decoder goes through for a clip."""
    return request.wanted[-1] + 1 if request.profile == "copy" else len(request.packets)


def time_reading(requests: Sequence[ClipRequest], seconds: float) -> list[float]:
    """Seconds a clip to read and check bytes, from the page cache, one thread: one number a pass over all clips."""
    reader = ShardReader()

    def read() -> None:
        for request in requests:
            reader.packets(request.shard, request.packets)

    try:
        return [took / len(requests) for took in _repeat(read, seconds)]
    finally:
        reader.close()


def time_decoding(rig: Rig, requests: Sequence[ClipRequest], seconds: float) -> list[float]:
    """Seconds a clip to read, decode, crop and resize, one number a pass over all clips.

    One thread of the CPU, or the GPU where that decodes; clips in groups as decoders get them.
    """
    from pipelines.decode import ClipDecoder  # loads DALI, which the trainer's process does without

    size, frames = rig.job.model.geometry.image_size, rig.config.data.num_frames
    on_gpu = decodes_on_gpu(rig.job.shards, rig.device)
    decoder = ClipDecoder(size, frames, gpu=torch.cuda.current_device() if on_gpu else None)
    group = rig.batch.micro if on_gpu else max(1, IMAGES_A_TASK // frames)
    shape = (group, frames, size, size, 3)
    rows: Any = torch.empty(shape, dtype=torch.uint8, device=rig.device) if on_gpu else np.empty(shape, np.uint8)

    def decode() -> None:
        for start in range(0, len(requests), group):
            decoder.decode_into(requests[start : start + group], rows)
        rig.settle()

    return [took / len(requests) for took in _repeat(decode, seconds)]


def time_copying(rig: Rig, clips: ClipBatch, seconds: float) -> list[float]:
    """Seconds to bring one micro-batch of the loader to the device, its masks drawn."""

    def copy() -> None:
        rig.parts.to_device(clips)
        rig.settle()

    return _repeat(copy, seconds)


def _repeat(action: Callable[[], None], seconds: float, at_least: int = 5) -> list[float]:
    """Seconds that each of several calls takes, after a first one."""
    action()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < at_least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return taken


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large plain product of matrices, the best of several."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * side**3 / min(_repeat(multiply, 0.5))


def trace_steps(rig: Rig, loader: ClipLoader, path: Path, steps: int = 3) -> None:
    """Writes a Chrome trace of a few end-to-end steps, after one that is not traced."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if rig.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    source, stages = rig.from_loader(loader), Stages(rig.device)
    rig.take_step(source, stages)
    rig.settle()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(steps):
            rig.take_step(source, stages)
        rig.settle()
    profile.export_chrome_trace(str(path))
