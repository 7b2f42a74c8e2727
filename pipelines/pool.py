"""The decode workers as the trainer sees them: clips are dealt out, settled rows come back, what breaks is replaced.

Each worker (`worker.py`) is a process that decodes straight into memory shared with us. A worker that dies is seen at
once by its closed socket, one that hangs within `HANG_SECONDS` (see `Watch`); it is killed and waited for, so that it
can write no more, and a fresh one takes over its clips. Those it was at are tried again one by one, and one that ended
its worker twice while it was alone is what did it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from socket import socketpair

import numpy as np

from pipelines.processes import deaf_children
from pipelines.read import ClipRequest
from pipelines.worker import CELL_BYTES, PIXEL_CHANNELS, Channel, Shape, Task, cells_start

logger = logging.getLogger(__name__)

Settled = tuple[int, int, str | None]
"""Slot, row, and why it failed or None."""

IMAGES_A_TASK = 64  # some 15 ms of work: what a task costs beside it (0.1 ms) is lost in that, and loads balance
FEATURES_A_TASK = 512  # rows; some 0.6 ms
HANG_SECONDS = 3.0  # in which a worker could have gone on and did not; a step takes milliseconds
START_SECONDS = 30.0  # the same, before it is ready: it imports DALI and FFmpeg
DISK_SECONDS = 60.0  # waiting for the disk, which a fresh worker would do too
MAX_STARTS = 5  # in a row that end before the worker was ready
MAX_ALONE = 2  # times that a clip may end its worker while it is the only one at work
_POLL_SECONDS = 0.25
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # there is a worker for every core already
_ROOT = Path(__file__).resolve().parents[1]


class WorkerPool:
    """Worker processes and the memory they share with us; anonymous, so nothing outlives the processes.

    Not for several threads; the workers end with the thread that started them.
    """

    def __init__(self, shape: Shape, num_workers: int) -> None:
        self._shape = shape
        self._descriptor = os.memfd_create("clips")
        os.ftruncate(self._descriptor, cells_start(shape) + num_workers * CELL_BYTES)
        self._memory = mmap.mmap(self._descriptor, 0)
        self.clips = np.frombuffer(self._memory, np.uint8, count=int(np.prod(shape))).reshape(shape)
        """uint8 [slots, clips, frames, height, width, channels], see `worker.Shape`."""
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            for cell in range(num_workers):
                self._workers.append(self._start(cell))
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        """Of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, slot: int, rows: Sequence[int], requests: Sequence[ClipRequest]) -> None:
        """Deals requests[i] for rows[i] of a slot to the workers, in groups, each to the one with the least to do."""
        share = -(-len(rows) // len(self._workers))
        frames = IMAGES_A_TASK if self._shape[-1] == PIXEL_CHANNELS else FEATURES_A_TASK
        largest = max(1, min(share, frames // self._shape[2]))
        start = 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or rows[i] != rows[i - 1] + 1 or i - start == largest:
                worker = min(self._workers, key=attrgetter("load"))
                worker.send(_Job(Task(slot, rows[start], tuple(requests[start:i]))))
                start = i

    def collect(self, *, wait: bool) -> list[Settled]:
        """What has been settled since the last call, if need be after waiting for a short time."""
        settled: list[Settled] = []
        for key, _ in self._selector.select(_POLL_SECONDS if wait else 0):
            worker: _Worker = key.data
            answers, lives = worker.receive()
            settled += answers
            if not lives:
                settled += self._replace(worker, f"the decoder process died ({worker.end(grace_seconds=1.0)})")
        for worker in self._workers:
            worker.flush()
            if worker.jobs and (reason := worker.watch.verdict(worker.steps)):
                settled += self._replace(worker, reason)
        return settled

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()
            worker.channel.socket.close()
        self._workers.clear()
        self._selector.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _start(self, cell: int, starts: int = 1) -> _Worker:
        first = cells_start(self._shape) + cell * CELL_BYTES
        steps = memoryview(self._memory)[first : first + 8].cast("Q")
        steps[0] = 0
        worker = _Worker(self._shape, self._descriptor, cell, steps, starts)
        self._selector.register(worker.channel.socket, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: _Worker, reason: str) -> list[Settled]:
        """Puts a fresh worker in the place of a dead or hanging one, with what that had to do."""
        was_ready, status = worker.steps > 0, worker.end()
        self._selector.unregister(worker.channel.socket)
        worker.channel.socket.close()
        starts = 1 if was_ready else worker.starts + 1
        if starts > MAX_STARTS or not (was_ready or status.startswith("signal")):
            raise ValueError(f"a decode worker ended before it was ready: {reason}; its message is above")
        fresh = self._workers[self._workers.index(worker)] = self._start(worker.cell, starts)
        jobs = list(worker.jobs)
        settled: list[Settled] = []
        if was_ready and jobs:
            at = jobs.pop(0)
            if at.may_be_tried_again:
                logger.warning("%s; the clips it was at (%d) are tried one by one", reason, len(at.task.requests))
                jobs = at.one_by_one() + jobs
            else:
                settled = [(at.task.slot, at.task.first_row, reason)]
        for job in jobs:
            fresh.send(job)
        return settled


@dataclass(frozen=True, slots=True)
class _Job:
    """A task and how often it ended its worker as the only clip at work."""

    task: Task
    times_alone: int = 0

    @property
    def may_be_tried_again(self) -> bool:
        return len(self.task.requests) > 1 or self.times_alone + 1 < MAX_ALONE

    def one_by_one(self) -> list[_Job]:
        task, alone = self.task, len(self.task.requests) == 1
        return [
            _Job(Task(task.slot, task.first_row + i, (request,)), self.times_alone + alone)
            for i, request in enumerate(task.requests)
        ]


class _Worker:
    """One worker process, its channel, and what it has not answered yet, oldest first."""

    def __init__(self, shape: Shape, memory_descriptor: int, cell: int, steps: memoryview, starts: int) -> None:
        self.cell, self.starts = cell, starts
        self._steps = steps
        ours, theirs = socketpair()
        self.channel = Channel(ours)
        descriptors = (theirs.fileno(), memory_descriptor)
        arguments = (os.getpid(), *descriptors, cell, *shape)
        # A launcher, or the kernel, sends these to all, and the trainer may need its workers for the step it is at.
        with theirs, deaf_children(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.worker", *map(str, arguments)],
                pass_fds=descriptors,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                env=os.environ | _ONE_THREAD,
            )
        self.jobs: deque[_Job] = deque()
        self.load = 0
        """Clips that it still has to decode."""
        self.watch = Watch(self.process.pid)

    @property
    def steps(self) -> int:
        """How often the worker got on; 0 until it is ready."""
        return int(self._steps[0])

    def send(self, job: _Job) -> None:
        if not self.jobs:
            self.watch.restart()
        self.jobs.append(job)
        self.load += len(job.task.requests)
        with contextlib.suppress(ConnectionError):  # it died: mended when its answer is awaited
            self.channel.send(job.task.pack(), wait=False)

    def flush(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.channel.flush(wait=False)

    def receive(self) -> tuple[list[Settled], bool]:
        """What it has settled, and whether it lives."""
        try:
            answers = self.channel.receive(wait=False)
        except EOFError:
            return [], False
        settled: list[Settled] = []
        for failures in answers:
            task = self.jobs.popleft().task
            self.load -= len(task.requests)
            reasons = dict(failures)
            settled += [(task.slot, task.first_row + i, reasons.get(i)) for i in range(len(task.requests))]
        return settled, True

    def end(self, grace_seconds: float = 0.0) -> str:
        """Waits for its end, after this time kills it (it has nothing to put in order), and says how it ended.

        Raises OSError when the kernel does not let go of it: then storage does not answer.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace_seconds)
        self.process.kill()  # nothing happens if it has ended
        try:
            status = self.process.wait(timeout=DISK_SECONDS)
        except subprocess.TimeoutExpired:
            raise OSError("a decode worker waits for storage and cannot be ended: is a disk or server gone?") from None
        return f"signal {-status}" if status < 0 else f"status {status}"


class Watch:
    """Tells a worker that hangs from one that is slow, gets no core, or waits for the disk.

    A worker counts its steps (a packet, a frame, a read). While the count stands still, time in which the process could
    have gone on is added up: all of it while its threads sleep or are stopped; while one wants to run, twice its CPU
    time, but no more than all (an endless loop shows even where two processes share a core; a worker that gets no core
    is not blamed); none while one waits for the disk. If we did not look for long, for the whole job was stopped or a
    training step took its time, sleep counts for no more than two thirds of what is allowed: then it still has the last
    third to show itself.
    """

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._steps = -1
        self.restart()

    def restart(self) -> None:
        """The worker has only now been given something to do."""
        self._seen = time.monotonic()
        self._cpu_seconds: float | None = None
        self._idle_seconds = self._disk_seconds = 0.0

    def verdict(self, steps: int) -> str:
        """Why the worker should be given up, or nothing; to be asked every `_POLL_SECONDS`."""
        now = time.monotonic()
        if steps != self._steps:
            self._steps = steps
            self.restart()
            return ""
        seconds = now - self._seen
        if seconds < _POLL_SECONDS:
            return ""
        self._seen = now
        waits, cpu_seconds = self._look()
        used = cpu_seconds - (cpu_seconds if self._cpu_seconds is None else self._cpu_seconds)
        self._cpu_seconds = cpu_seconds
        if waits == "D":
            self._disk_seconds += min(seconds, HANG_SECONDS * 2 / 3)
        elif waits == "R":
            self._idle_seconds += min(seconds, 2 * used)
        else:
            self._idle_seconds += min(seconds, HANG_SECONDS * 2 / 3)
        if self._disk_seconds > DISK_SECONDS:
            return f"storage did not answer for {DISK_SECONDS:.0f} s"
        allowed = HANG_SECONDS if steps else START_SECONDS
        return f"the decoder hung: no progress in {allowed:.0f} s" if self._idle_seconds > allowed else ""

    def _look(self) -> tuple[str, float]:
        """What the process does: R if a thread of it wants to run, else D if one waits for the disk, else S; and the
        CPU seconds it has used."""
        states = set()
        for thread in (self._folder / "task").iterdir():
            with contextlib.suppress(OSError):  # that thread ended
                states.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
        values = (self._folder / "stat").read_text().rpartition(")")[2].split()
        state = next((state for state in "RD" if state in states), "S")
        return state, (int(values[11]) + int(values[12])) / _TICKS_A_SECOND
