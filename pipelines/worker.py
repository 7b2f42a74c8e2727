"""A decode worker: a process that turns planned clips into pixels in shared memory, until its pipe closes.

Started by the loader as `python -m pipelines.worker PIPE MEMORY` with two inherited descriptors, so it shares nothing
with the trainer but a pipe of plans and a block of memory: if a decoder crashes or hangs on a stranger's bytes, only
this process does. It imports neither torch nor DeepSpeed (start 1 s, 200 MB).
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from pipelines.decode import ClipDecoder
from pipelines.plan import ClipPlan
from pipelines.shards import ShardSet


@dataclass(frozen=True)
class WorkerSetup:
    """First message to a worker."""

    folder: str
    split: str
    shape: tuple[int, int, int, int, int, int]
    """Slots, clips, frames, height, width, channels of the shared memory."""


@dataclass(frozen=True)
class Task:
    """Clips to decode: plans[i] into row rows[i] of a slot. The answer is a list of (i, reason) that failed."""

    slot: int
    rows: tuple[int, ...]
    plans: tuple[ClipPlan, ...]


def serve(connection: Connection, memory_descriptor: int) -> None:
    """Answers tasks until the other end of the pipe closes."""
    setup: WorkerSetup = connection.recv()
    memory = mmap.mmap(memory_descriptor, 0)
    clips = np.frombuffer(memory, np.uint8).reshape(setup.shape)
    shards = ShardSet.open(setup.folder, setup.split)
    decoder = ClipDecoder(shards, size=setup.shape[3], num_frames=setup.shape[2])
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        decoded = np.empty((len(task.rows), *setup.shape[2:]), np.uint8)
        failures = decoder.decode_into(task.plans, decoded)
        clips[task.slot, list(task.rows)] = decoded
        connection.send(failures)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our pipe
    with contextlib.suppress(ConnectionError):  # the trainer ended while we were at a task
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
