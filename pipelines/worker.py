"""A decode worker: a process that turns requests into pixels in shared memory, until its socket closes.

Started by the pool (`pool.py`) as `python -m pipelines.worker` with two inherited descriptors, so it shares nothing
with the trainer but a socket of requests and a block of memory: if a decoder crashes or hangs on a stranger's bytes,
only this process does. It opens no manifest and no index and imports neither torch nor DeepSpeed (start 0.6 s of CPU
time, 130 MB), and for clips of frame features no decoder either. It hears no signal that is for the trainer, and dies
with it, however that ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from multiprocessing.reduction import ForkingPickler
from operator import attrgetter
from socket import MSG_DONTWAIT, socket
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.read import ClipRequest

if TYPE_CHECKING:
    from pipelines.decode import ClipDecoder
    from pipelines.features import FeatureDecoder

Shape = tuple[int, int, int, int, int, int]
"""Slots, clips, frames, height, width, channels of the shared memory; of features 1, 1 and their bytes a frame."""
PIXEL_CHANNELS = 3  # of uint8: what has another number of bytes, always an even one, is float16 features

CELL_BYTES = 64  # behind the clips, one cell a worker: its count of steps; a cache line, so that none disturbs another
_MAX_REASON = 500  # characters
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_values_of = attrgetter(*(field.name for field in fields(ClipRequest)))


@dataclass(frozen=True, slots=True)
class Task:
    """Clips to decode: requests[i] into row first_row + i of a slot.

    The answer is a list of (i, reason) of those that failed.
    """

    slot: int
    first_row: int
    requests: tuple[ClipRequest, ...]

    def pack(self) -> tuple[Any, ...]:
        """Plain values, which travel at a third of the cost of objects."""
        return self.slot, self.first_row, [_values_of(request) for request in self.requests]

    @classmethod
    def unpack(cls, packed: tuple[Any, ...]) -> Task:
        """The opposite of `pack`."""
        slot, first_row, requests = packed
        return cls(slot, first_row, tuple(ClipRequest(*values) for values in requests))


class Channel:
    """Whole Python values over a stream socket. Both ends are processes of ours, so what arrives is trusted."""

    def __init__(self, end: socket) -> None:
        self.socket = end
        self._incoming, self._outgoing = bytearray(), bytearray()

    def send(self, value: object, *, wait: bool) -> None:
        """Sends what the other end takes now, or waits until it took all; `flush` sends the rest."""
        data = ForkingPickler.dumps(value)
        self._outgoing += len(data).to_bytes(4, "little")
        self._outgoing += data
        self.flush(wait=wait)

    def flush(self, *, wait: bool) -> None:
        """Raises BrokenPipeError or ConnectionResetError when nobody listens any more."""
        while self._outgoing:
            try:
                sent = self.socket.send(self._outgoing, 0 if wait else MSG_DONTWAIT)
            except BlockingIOError:
                return
            del self._outgoing[:sent]

    def receive(self, *, wait: bool) -> list[Any]:
        """The values that have arrived whole; with `wait` at least one. Raises EOFError when no more will come."""
        values: list[Any] = []
        while not values or not wait:
            try:
                data = self.socket.recv(2**16, 0 if wait else MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                if values:
                    break  # the end shows again in the next call
                raise EOFError
            self._incoming += data
            values += self._take_whole()
        return values

    def _take_whole(self) -> list[Any]:
        values = []
        while len(self._incoming) >= 4:
            end = 4 + int.from_bytes(self._incoming[:4], "little")
            if len(self._incoming) < end:
                break
            values.append(ForkingPickler.loads(self._incoming[4:end]))
            del self._incoming[:end]
        return values


def serve(channel: Channel, memory_descriptor: int, cell: int, shape: Shape) -> None:
    """Answers tasks until the other end closes. Counts up its cell when it is ready, and then at every step."""
    memory = mmap.mmap(memory_descriptor, 0)
    clips = np.frombuffer(memory, np.uint8, count=int(np.prod(shape))).reshape(shape)
    start = cells_start(shape) + cell * CELL_BYTES
    steps = memoryview(memory)[start : start + 8].cast("Q")

    def step() -> None:
        steps[0] += 1

    decoder = _decoder(shape, step)
    step()
    while True:
        for packed in channel.receive(wait=True):
            step()
            task = Task.unpack(packed)
            rows = clips[task.slot, task.first_row : task.first_row + len(task.requests)]
            failures = [(i, reason[:_MAX_REASON]) for i, reason in decoder.decode_into(task.requests, rows)]
            step()
            channel.send(failures, wait=True)


def _decoder(shape: Shape, on_progress: Callable[[], None]) -> ClipDecoder | FeatureDecoder:
    """Imported here: of pixels, it is most of the start."""
    if shape[-1] == PIXEL_CHANNELS:
        from pipelines.decode import ClipDecoder

        return ClipDecoder(shape[3], shape[2], on_progress=on_progress)
    from pipelines.features import FeatureDecoder

    return FeatureDecoder(shape[-1] // 2, on_progress=on_progress)


def cells_start(shape: Shape) -> int:
    """Where the cells of the workers begin in the shared memory, in bytes."""
    return -(-int(np.prod(shape)) // CELL_BYTES) * CELL_BYTES


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends, even while a decoder hangs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit()


def _main(parent: int, socket_descriptor: int, memory_descriptor: int, cell: int, *shape: int) -> None:
    _die_with(parent)
    slots, clips, frames, height, width, channels = shape
    try:
        channel = Channel(socket(fileno=socket_descriptor))
        serve(channel, memory_descriptor, cell, (slots, clips, frames, height, width, channels))
    except (EOFError, ConnectionError):  # the trainer is done with us
        pass


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
