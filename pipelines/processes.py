"""A function over many inputs, in processes of which any may die or hang without harm to the others.

The results come in the order of the inputs, whichever process is done first, and no process runs far ahead of who takes
them. An input that kills its process, or takes too long, is answered by a `Lost`; a new process takes its place.
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_SPAWN = multiprocessing.get_context("spawn")  # fork would copy the parent's threads and locks in unknown states
_MAX_BYTES = 16 * 2**30  # of address space a process: a file that wants more ends as a MemoryError


@dataclass(frozen=True, slots=True)
class Lost:
    """The answer to an input that has none."""

    reason: str
    """decoder_crash, timeout, or one of the function's own."""
    detail: str


@dataclass(slots=True)
class _Process:
    process: Any
    connection: Connection
    task: int | None = None
    deadline: float = math.inf


@contextlib.contextmanager
def deaf_children(*signals: signal.Signals) -> Iterator[None]:
    """Processes that this thread starts within never hear these signals, not even while they import; what comes for
    this thread is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def map_isolated(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    timeout_seconds: float = math.inf,
    ahead: int = 8,
) -> Generator[Result | Lost, None, None]:
    """`function` of every task, in order; it must be importable, its results picklable.

    At most `ahead` results a process wait to be taken. A ValueError or OSError that the function raises is raised here.
    """
    waiting = enumerate(tasks)
    done: dict[int, Any] = {}
    pool: list[_Process] = []
    wanted, started, more = 0, 0, True
    try:
        while True:
            while more and started < wanted + ahead * workers:
                idle = next((worker for worker in pool if worker.task is None), None)
                if idle is None and len(pool) == workers:
                    break
                number, task = next(waiting, (None, None))
                if number is None:
                    more = False
                    break
                if idle is None:
                    idle = _start(function)
                    pool.append(idle)
                started = number + 1
                idle.task, idle.deadline = number, time.monotonic() + timeout_seconds
                with contextlib.suppress(BrokenPipeError):  # it died while idle: seen below
                    idle.connection.send(task)
            if wanted in done:
                result = done.pop(wanted)
                wanted += 1
                if isinstance(result, Exception):
                    raise result
                yield result
            elif started == wanted:
                return
            else:
                _collect(pool, function, done, timeout_seconds)
    finally:
        for worker in pool:
            _end(worker)


def _start(function: Callable[[Any], Any]) -> _Process:
    here, there = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_work, args=(there, function), daemon=True)
    resource_tracker.ensure_running()  # with the first process, and that would unblock SIGINT
    with deaf_children(signal.SIGINT):  # the parent decides what Ctrl-C means
        process.start()
    there.close()
    return _Process(process, here)


def _end(worker: _Process) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _collect(
    pool: list[_Process], function: Callable[[Any], Any], done: dict[int, Any], timeout_seconds: float
) -> None:
    """Waits for the next result, death or timeout."""
    busy = [worker for worker in pool if worker.task is not None]
    first = min(worker.deadline for worker in busy)
    ready = wait(
        [worker.connection for worker in busy], max(0.0, first - time.monotonic()) if first < math.inf else None
    )
    for worker in busy:
        number, lost = worker.task, None
        assert number is not None
        if worker.connection in ready:
            try:
                done[number] = worker.connection.recv()
                worker.task = None
            except (EOFError, OSError):
                worker.process.join()
                lost = Lost("decoder_crash", f"the process died ({_cause(worker.process.exitcode)})")
        elif time.monotonic() >= worker.deadline:
            lost = Lost("timeout", f"took longer than {timeout_seconds:g} s")
        if lost is not None:
            done[number] = lost
            _end(worker)
            pool[pool.index(worker)] = _start(function)


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a process: answers what it is given until the parent closes the connection."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES if hard < 0 else min(_MAX_BYTES, hard), hard))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what was imported stays
    gc.disable()  # looking for cycles at every few hundred packets costs 4 % of a video
    while True:
        gc.collect()  # an open file of PyAV is one
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            result = function(task)
        except (ValueError, OSError) as error:
            result = error
        with contextlib.suppress(ConnectionError):
            connection.send(result)


def _end_with_parent() -> None:
    """Who is killed leaves no process behind that works for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"
