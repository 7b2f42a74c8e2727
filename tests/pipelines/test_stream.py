"""A generator in a process of its own: its results, its failures, and the work done meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from pipelines.stream import StreamError, ahead, stream_isolated


def count(task: tuple[int, str]) -> Iterator[tuple[int, int]]:
    upto, then = task
    for number in range(upto):
        yield number, os.getpid()
    if then == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif then == "hang":
        time.sleep(60)
    elif then == "refuse":
        raise ValueError("no more")


def test_results_come_in_order_from_one_other_process() -> None:
    numbers, processes = zip(*stream_isolated(count, (50, "")), strict=True)
    assert numbers == tuple(range(50)) and len(set(processes)) == 1 and processes[0] != os.getpid()


@pytest.mark.parametrize(
    ("then", "reason"),
    [("die", "decoder_crash: the process died .SIGSEGV"), ("hang", "timeout: took longer"), ("refuse", "no more")],
)
def test_what_ends_it_early_is_told_after_the_results_before_it(then: str, reason: str) -> None:
    found = []
    with pytest.raises(StreamError, match=reason):
        for number, _ in stream_isolated(count, (18, then), timeout_seconds=1.5 if then == "hang" else 60):
            found.append(number)
    if then != "hang":  # on a busy machine it may not have begun by then
        assert found == list(range(18 if then == "refuse" else 16)), "of a lost process all but the last group"


def test_a_thread_asks_for_some_in_advance() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    results = ahead(items(), 2)
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == [0, 1, 2] and list(results) == [1, 2, 3, 4, 5]


def test_a_failure_in_the_thread_is_raised_where_the_items_are_taken() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    results = ahead(items(), 2)
    assert next(results) == 1
    with pytest.raises(ValueError, match="broken"):
        next(results)
