"""Results in order, whatever happens to the processes that make them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import processes
from pipelines.processes import Lost, map_isolated

ROOT = Path(__file__).resolve().parents[2]


def work(task: tuple[str, float]) -> float:
    what, number = task
    if what == "sleep":
        time.sleep(number)
    elif what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "refuse":
        raise ValueError(f"no {number}")
    elif what == "defect":
        raise AssertionError
    elif what == "greedy":
        try:
            return float(len(bytearray(64 * 2**30)))
        except MemoryError:
            return -1.0
    return number


def test_in_order_and_lazily() -> None:
    taken = []

    def tasks():  # type: ignore[no-untyped-def]
        for i in range(60):
            taken.append(i)
            yield ("sleep", 0.02) if i % 10 == 0 else ("", float(i))

    results = map_isolated(work, tasks(), workers=2, ahead=3)
    assert [next(results) for _ in range(10)] == [0.02, *map(float, range(1, 10))]
    assert len(taken) <= 10 + 2 * 3 + 1
    assert list(results) == [0.02 if i % 10 == 0 else float(i) for i in range(10, 60)]


def test_what_dies_or_hangs_costs_itself_alone() -> None:
    tasks = [("", 1.0), ("die", 0.0), ("", 2.0), ("sleep", 60.0), ("exit", 0.0), ("defect", 0.0), ("", 3.0)]
    started = time.monotonic()
    first, died, second, slept, ended, defect, third = map_isolated(work, tasks, workers=2, timeout_seconds=5)
    assert (first, second, third) == (1.0, 2.0, 3.0)
    assert died == Lost("decoder_crash", "the process died (SIGSEGV)")
    assert slept == Lost("timeout", "took longer than 5 s")
    assert ended == Lost("decoder_crash", "the process died (exit status 3)")
    assert isinstance(defect, Lost) and defect.reason == "decoder_crash"
    assert time.monotonic() - started < 50


def test_memory_is_bounded() -> None:
    assert list(map_isolated(work, [("greedy", 0.0)], workers=1)) == [-1.0]


def test_an_interrupt_is_not_for_the_processes_even_while_they_start() -> None:
    worker = processes._start(work)
    try:
        for _ in range(20):
            os.kill(worker.process.pid, signal.SIGINT)
            time.sleep(0.01)
        worker.connection.send(("", 5.0))
        assert worker.connection.recv() == 5.0
    finally:
        processes._end(worker)


def test_who_is_killed_leaves_no_process_behind() -> None:
    """Even one that would never look at its pipe again."""
    program = "import time, pipelines.processes as p; list(p.map_isolated(time.sleep, [600.0], workers=1))"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 30
    workers: list[str] = []
    while not workers and time.monotonic() < deadline:  # the resource tracker is a child too
        time.sleep(0.05)
        workers = [pid for pid in children.read_text().split() if b"spawn_main" in _command(pid)]
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    while any(_command(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(_command(pid) for pid in workers)


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_errors_for_users_are_raised_and_the_processes_end() -> None:
    results = map_isolated(work, [("", 0.0), ("refuse", 7.0), ("sleep", 60.0)], workers=3)
    assert next(results) == 0.0
    with pytest.raises(ValueError, match=r"no 7\.0"):
        next(results)
    assert list(map_isolated(work, [], workers=3)) == []
