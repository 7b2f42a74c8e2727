"""A clock that knows training, waiting for data and paused time, and leaves the first steps out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WARMUP_STEPS = 5  # allocation, kernel selection and the first decoded batches make these slow


@dataclass(frozen=True)
class Pace:
    """What a stretch of training steps cost; evaluation and checkpoints are not in it."""

    steps: int
    seconds: float
    waiting_seconds: float
    """Of them, blocked in fetching batches."""
    clips: int

    @property
    def clips_per_s(self) -> float | None:
        """None before anything was measured."""
        return self.clips / self.seconds if self.steps else None

    @property
    def step_ms(self) -> float | None:
        return 1000 * self.seconds / self.steps if self.steps else None

    @property
    def wait_ms(self) -> float | None:
        return 1000 * self.waiting_seconds / self.steps if self.steps else None

    @property
    def wait_share(self) -> float | None:
        """Waiting over wall time of the loop, 0 to 1."""
        return self.waiting_seconds / self.seconds if self.steps else None

    def since(self, earlier: Pace) -> Pace:
        """The stretch between an earlier reading and this one."""
        return Pace(
            self.steps - earlier.steps,
            self.seconds - earlier.seconds,
            self.waiting_seconds - earlier.waiting_seconds,
            self.clips - earlier.clips,
        )


class Clock:
    """Counts from construction. `waited` returns the seconds blocked in fetching batches so far."""

    def __init__(
        self, clips_per_step: int, waited: Callable[[], float], *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clips_per_step, self._waited, self._now = clips_per_step, waited, now
        self._steps = 0
        self._start, self._waited_before = now(), waited()
        self._paused_since_start = 0.0
        self.paused_seconds = 0.0
        """Evaluation and checkpoints, from the first step on."""

    def step_done(self) -> bool:
        """Counts a step; True for the one that ends the warm-up (the caller then waits for the device)."""
        self._steps += 1
        return self._steps == WARMUP_STEPS

    def start_measuring(self) -> None:
        """Forgets the time so far: what follows counts."""
        self._start, self._waited_before = self._now(), self._waited()
        self._paused_since_start = 0.0

    def read(self) -> Pace:
        """The pace since the warm-up ended; exact only where the device has just been waited for."""
        steps = max(0, self._steps - WARMUP_STEPS)
        seconds = self._now() - self._start - self._paused_since_start
        waiting = self._waited() - self._waited_before
        return Pace(steps, seconds, waiting, steps * self._clips_per_step) if steps else Pace(0, 0.0, 0.0, 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is neither training nor waiting."""
        start = self._now()
        try:
            yield
        finally:
            self._paused_since_start += self._now() - start
            self.paused_seconds += self._now() - start
