"""Turns to batches: plans each clip, has it decoded ahead of time, hands the trainer `ClipBatch`es.

On the CPU, long-lived worker processes (`pipelines/worker.py`) write decoded clips into shared memory which the
trainer only maps; a worker that dies or hangs is replaced, and the clip that did it twice counts as a bad sample. On
CUDA (jpeg profile), DALI decodes on the GPU in a thread of the trainer's process; that path has not been run on a GPU.

A sample that cannot be decoded is reported once by key and replaced by a rule that needs no communication
(`plan.substitute`); when too many are bad, the run stops.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.plan import EVAL_EPOCH, ClipOptions, ClipPlan, Turn, plan_clip, substitute
from pipelines.shards import ShardSet
from pipelines.worker import Task, WorkerSetup

logger = logging.getLogger(__name__)

MAX_PREFETCH = 4
MAX_SUBSTITUTES = 20  # in a row for one clip: by then the set is not worth training on
JUDGED_FROM = 200  # samples planned before the share of bad ones is judged
HANG_SECONDS = 120.0  # a clip takes milliseconds; a decoder that needs this long will not come back


@dataclass(frozen=True)
class ClipBatch:
    """One micro-batch of B clips of T frames, as the model takes it."""

    frames: Tensor
    """uint8 RGB [B, T, S, S, 3]; valid until the next batch is fetched."""
    labels: Tensor
    """int64 [B]."""
    valid: Tensor
    """bool [B]: False where evaluation was padded or the sample could not be decoded; the row then holds anything."""
    turns: tuple[Turn, ...]
    """B (sample id, epoch): what really stands in each row, substitutes included."""
    plans: tuple[ClipPlan, ...]
    keys: tuple[str, ...]


class ClipLoader:
    """Iterates over the batches of `turns`; use as a context manager, or call `close`.

    `wait_seconds` is the time spent blocked in fetching batches so far.
    """

    def __init__(
        self,
        shards: ShardSet,
        turns: Iterable[Sequence[Turn | None]],
        *,
        micro_batch: int,
        size: int,
        options: ClipOptions,
        seed: int = 0,
        workers: int = 1,
        prefetch: int = 3,
        max_bad_fraction: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= prefetch <= MAX_PREFETCH:
            raise ValueError(f"data.prefetch = {prefetch}; allowed is 1 to {MAX_PREFETCH} batches")
        if workers < 1:
            raise ValueError(f"data.workers = {workers}; at least one process must decode")
        self._shards, self._options, self._seed = shards, options, seed
        self._turns = iter(turns)
        self._max_bad_fraction = max_bad_fraction
        shape = (prefetch + 1, micro_batch, options.num_frames, size, size, 3)
        device = torch.device(device)
        on_gpu = decodes_on_gpu(shards, device)
        self._decoder: _Decoder = _GpuThread(shards, shape, device) if on_gpu else _WorkerPool(shards, shape, workers)
        self._free = deque(range(prefetch + 1))
        self._pending: deque[_Pending] = deque()
        self._in_use: int | None = None
        self._planned = 0
        self.bad: dict[int, str] = {}
        """Reason for every sample id that could not be decoded."""
        self.largest_shift = 0
        """Most source frames between a frame that was planned and the stored one that was used."""
        self.wait_seconds = 0.0
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        if self._in_use is not None:
            self._free.append(self._in_use)
            self._in_use = None
        self._fill()
        if not self._pending:
            raise StopIteration
        batch = self._pending[0]
        start = time.perf_counter()
        while batch.open_rows:
            for slot, row, reason in self._decoder.collect():
                self._settle(slot, row, reason)
        self.wait_seconds += time.perf_counter() - start
        self._pending.popleft()
        self._in_use = batch.slot
        return self._batch(batch)

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._decoder.close()

    def _fill(self) -> None:
        """Plans and hands out batches until every slot is taken."""
        while self._free and (turns := next(self._turns, None)) is not None:
            plans = {row: self._plan(turn) for row, turn in enumerate(turns) if turn is not None}
            batch = _Pending(self._free.popleft(), list(turns), plans, open_rows=set(plans))
            self._pending.append(batch)
            self._planned += len(plans)
            self._decoder.submit(batch.slot, list(plans), list(plans.values()))

    def _plan(self, turn: Turn) -> ClipPlan:
        sample = self._shards[turn.sample_id]
        plan = plan_clip(sample, turn, self._seed, self._options)
        self.largest_shift = max(self.largest_shift, plan.largest_shift(sample))
        return plan

    def _settle(self, slot: int, row: int, reason: str | None) -> None:
        """A clip came back: done, or replaced (training), or struck out (evaluation)."""
        batch = next(pending for pending in self._pending if pending.slot == slot)
        turn = batch.turns[row]
        assert turn is not None
        if reason is None:
            batch.open_rows.discard(row)
            return
        self._report(turn, reason)
        if turn.epoch == EVAL_EPOCH:
            batch.turns[row] = None
            batch.open_rows.discard(row)
            return
        attempt = batch.attempts[row] = batch.attempts.get(row, 0) + 1
        if attempt > MAX_SUBSTITUTES:
            raise ValueError(f"{self._shards.folder}: {attempt} samples in a row cannot be decoded; last: {reason}")
        stand_in = batch.turns[row] = substitute(len(self._shards), turn, self._seed, attempt)
        batch.plans[row] = self._plan(stand_in)
        self._decoder.submit(slot, [row], [batch.plans[row]])

    def _report(self, turn: Turn, reason: str) -> None:
        if turn.sample_id not in self.bad:
            self.bad[turn.sample_id] = reason
            logger.warning("bad sample %s: %s", self._shards[turn.sample_id].key, reason)
        if self._planned >= JUDGED_FROM and len(self.bad) > self._max_bad_fraction * self._planned:
            keys = ", ".join(self._shards[i].key for i in list(self.bad)[:5])
            raise ValueError(
                f"{len(self.bad)} of {self._planned} samples of {self._shards.folder} cannot be decoded "
                f"(first: {keys}), more than data.max_bad_fraction = {self._max_bad_fraction}; pack the set again "
                "or raise the limit"
            )

    def _batch(self, batch: _Pending) -> ClipBatch:
        turns = tuple(turn or Turn(0, EVAL_EPOCH) for turn in batch.turns)
        samples = [self._shards[turn.sample_id] for turn in turns]
        return ClipBatch(
            frames=self._decoder.clips[batch.slot],
            labels=torch.tensor([sample.label for sample in samples]),
            valid=torch.tensor([turn is not None for turn in batch.turns]),
            turns=turns,
            plans=tuple(batch.plans.get(row) or self._plan(turn) for row, turn in enumerate(turns)),
            keys=tuple(sample.key for sample in samples),
        )


@dataclass
class _Pending:
    """A batch on its way."""

    slot: int
    turns: list[Turn | None]
    plans: dict[int, ClipPlan]
    open_rows: set[int]
    attempts: dict[int, int] = field(default_factory=dict)


Settled = tuple[int, int, str | None]
"""Slot, row, and why it failed or None."""


class _Decoder(Protocol):
    """Decodes clips into slots; `collect` blocks until some are settled."""

    clips: Tensor
    """uint8 [slots, B, T, S, S, 3]."""

    def submit(self, slot: int, rows: list[int], plans: list[ClipPlan]) -> None: ...

    def collect(self) -> list[Settled]: ...

    def close(self) -> None: ...


Shape = tuple[int, int, int, int, int, int]
"""Slots, clips, frames, height, width, channels."""


class _WorkerPool:
    """Worker processes and the memory they share with us; anonymous, so nothing outlives the processes."""

    def __init__(self, shards: ShardSet, shape: Shape, num_workers: int) -> None:
        self._setup = WorkerSetup(str(shards.folder.resolve()), shards.split, shape)
        self._descriptor = os.memfd_create("clips")
        os.ftruncate(self._descriptor, int(np.prod(shape)))
        self._memory = mmap.mmap(self._descriptor, 0)
        self.clips = torch.frombuffer(self._memory, dtype=torch.uint8).view(shape)
        self._workers: list[_Worker] = []
        for _ in range(num_workers):
            self._workers.append(_Worker(self._setup, self._descriptor))

    def submit(self, slot: int, rows: list[int], plans: list[ClipPlan]) -> None:
        """Deals the clips to the workers, the fewer the more a worker already has to do."""
        tasks: list[list[int]] = [[] for _ in self._workers]
        loads = [worker.load for worker in self._workers]
        for i in range(len(rows)):
            least = loads.index(min(loads))
            tasks[least].append(i)
            loads[least] += 1
        for worker, part in zip(self._workers, tasks, strict=True):
            if part:
                worker.send(Task(slot, tuple(rows[i] for i in part), tuple(plans[i] for i in part)))

    def collect(self) -> list[Settled]:
        busy = [worker for worker in self._workers if worker.tasks]
        ready = wait([worker.connection for worker in busy], timeout=1.0)
        settled: list[Settled] = []
        for worker in busy:
            if worker.connection in ready:
                settled += self._answer(worker)
            elif worker.hangs():
                settled += self._replace(worker, f"no answer for {HANG_SECONDS:.0f} s")
        return settled

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _answer(self, worker: _Worker) -> list[Settled]:
        try:
            failures = dict(worker.receive())
        except (EOFError, ConnectionResetError):
            return self._replace(worker, f"the decoder process died ({worker.exit_status()})")
        task = worker.tasks.popleft()
        return [(task.slot, row, failures.get(i)) for i, row in enumerate(task.rows)]

    def _replace(self, worker: _Worker, reason: str) -> list[Settled]:
        """Puts a fresh worker in the place of a dead or hanging one. Of the clips that it was at, each is tried again
        alone; one that was alone already is what did it."""
        if not worker.has_answered:
            worker.close()
            raise ValueError(f"a decode worker ended before its first answer: {reason}; its message is above")
        tasks = deque(worker.tasks)
        worker.close()
        fresh = self._workers[self._workers.index(worker)] = _Worker(self._setup, self._descriptor)
        fresh.has_answered = True
        at = tasks.popleft()
        settled: list[Settled] = []
        if len(at.rows) == 1:
            settled = [(at.slot, at.rows[0], reason)]
        else:
            logger.warning("%s; its %d clips are tried one by one", reason, len(at.rows))
            for row, plan in zip(at.rows, at.plans, strict=True):
                fresh.send(Task(at.slot, (row,), (plan,)))
        for task in tasks:
            fresh.send(task)
        return settled


class _Worker:
    """One worker process, its pipe, and the tasks it has not answered yet, oldest first."""

    def __init__(self, setup: WorkerSetup, memory_descriptor: int) -> None:
        self.connection, theirs = Pipe()
        descriptors = (theirs.fileno(), memory_descriptor)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.worker", *map(str, descriptors)],
            pass_fds=descriptors,
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.connection.send(setup)
        self.tasks: deque[Task] = deque()
        self.has_answered = False
        self._last_sign = time.monotonic()

    @property
    def load(self) -> int:
        """Clips that it still has to decode."""
        return sum(len(task.rows) for task in self.tasks)

    def send(self, task: Task) -> None:
        if not self.tasks:
            self._last_sign = time.monotonic()
        self.tasks.append(task)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: mended when its answer is awaited
            self.connection.send(task)

    def receive(self) -> list[tuple[int, str]]:
        answer: list[tuple[int, str]] = self.connection.recv()
        self.has_answered = True
        self._last_sign = time.monotonic()
        return answer

    def hangs(self) -> bool:
        return time.monotonic() - self._last_sign > HANG_SECONDS

    def exit_status(self) -> str:
        status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"status {status}"

    def close(self) -> None:
        self.connection.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _GpuThread:
    """DALI on the GPU in a thread of this process, on a stream of its own: decoded clips never leave the device."""

    def __init__(self, shards: ShardSet, shape: Shape, device: torch.device) -> None:
        from pipelines.decode import ClipDecoder

        number = torch.cuda.current_device() if device.index is None else device.index
        self.clips = torch.empty(shape, dtype=torch.uint8, device=device)
        self._decoder = ClipDecoder(shards, size=shape[3], num_frames=shape[2], gpu=number)
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._futures: deque[Future[list[Settled]]] = deque()

    def submit(self, slot: int, rows: list[int], plans: list[ClipPlan]) -> None:
        # The trainer may have queued work that still reads this slot; what is decoded into it must come after.
        slot_is_free = torch.cuda.current_stream(self.clips.device).record_event()
        self._futures.append(self._thread.submit(self._decode, slot, rows, plans, slot_is_free))

    def collect(self) -> list[Settled]:
        return self._futures.popleft().result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _decode(
        self, slot: int, rows: list[int], plans: list[ClipPlan], slot_is_free: torch.cuda.Event
    ) -> list[Settled]:
        with torch.cuda.stream(self._stream):
            decoded = torch.empty((len(rows), *self.clips.shape[2:]), dtype=torch.uint8, device=self.clips.device)
            failures = dict(self._decoder.decode_into(plans, decoded))
            self._stream.wait_event(slot_is_free)
            self.clips[slot, rows] = decoded
        self._stream.synchronize()  # the trainer reads on another stream, and only what is settled
        return [(slot, row, failures.get(i)) for i, row in enumerate(rows)]


def decodes_on_gpu(shards: ShardSet, device: torch.device) -> bool:
    """Whether DALI decodes on the device; else worker processes do, on the CPU."""
    return device.type == "cuda" and shards.profile == "jpeg"


def describe_decoding(shards: ShardSet, device: torch.device, workers: int) -> str:
    """What decodes this set for training on `device`: for the log."""
    if decodes_on_gpu(shards, device):
        return "DALI on the GPU"
    who = "DALI" if shards.profile == "jpeg" else "FFmpeg, then DALI,"
    return f"{who} on the CPU in {workers} worker process{'es' if workers > 1 else ''} a rank"


def default_workers(local_world: int, device: str) -> int:
    """Decode processes a rank starts when the recipe does not say: its share of the cores, less what trains."""
    cores = len(os.sched_getaffinity(0)) // local_world
    return max(1, cores - 1 if device == "cuda" else cores // 2)
