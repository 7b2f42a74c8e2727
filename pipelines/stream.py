"""What a generator yields, of a process of its own: for work on one long video, of which a stranger's file may crash or
hang the decoder.

Results come in small groups, for handing one over costs 7 ms (the process looks for garbage each time: an open file of
PyAV is some). The process works while they are awaited, and on the next group; `ahead` has it work on meanwhile. No
more than two groups exist at any time, however long the video.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from pipelines.processes import Lost, map_isolated

STEP_SECONDS = 300.0
"""From one result to the next: 20,000 frames of 1080p."""
_GROUP = 16
_GROUP_SECONDS = 0.2

Task = TypeVar("Task")
Result = TypeVar("Result")

_running: dict[str, Iterator[Any]] = {}
"""In the process: the one generator, by the name of its function."""


class StreamError(ValueError):
    """Why a stream ended early: one line."""


def stream_isolated(
    function: Callable[[Task], Iterator[Result]], task: Task, *, timeout_seconds: float = STEP_SECONDS
) -> Generator[Result, None, None]:
    """What `function(task)` yields there; it must be importable, task and results picklable.

    Raises StreamError where it raises ValueError or OSError, ends its process, or takes longer for a group of results
    than the time allowed; with a process that is lost go the results of the last moment.
    """
    steps = map_isolated(partial(_step, function, task), itertools.count(), workers=1, timeout_seconds=timeout_seconds)
    with closing(steps):
        try:
            for answer in steps:
                if isinstance(answer, Lost):
                    raise StreamError(f"{answer.reason}: {answer.detail}")
                if not answer:
                    return
                yield from answer
        except (ValueError, OSError) as error:
            raise StreamError(str(error)) from error


def ahead(items: Iterator[Result], count: int) -> Generator[Result, None, None]:
    """The same items, `count` of them asked for in advance by a thread."""
    with ThreadPoolExecutor(1) as thread:
        asked: deque[Future[list[Result]]] = deque()
        try:
            while True:
                while len(asked) <= count:
                    asked.append(thread.submit(_take_one, items))
                taken = asked.popleft().result()
                if not taken:
                    return
                yield taken[0]
        finally:
            thread.shutdown(cancel_futures=True)


def _take_one(items: Iterator[Result]) -> list[Result]:
    return list(itertools.islice(items, 1))


def _step(function: Callable[[Task], Iterator[Result]], task: Task, number: int) -> list[Result]:
    """The next results; none after the last one."""
    if number == 0:
        _running["generator"] = function(task)
    results: list[Result] = []
    until = time.monotonic() + _GROUP_SECONDS
    try:
        for result in _running["generator"]:
            results.append(result)
            if len(results) == _GROUP or time.monotonic() > until:
                break
    except (ValueError, OSError) as error:
        if not results:
            raise
        _running["generator"] = _fail(error)  # when those before it were taken
    return results


def _fail(error: Exception) -> Iterator[Any]:
    yield from ()
    raise error
