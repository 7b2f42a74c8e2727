"""How far a program is: a bar on a terminal; elsewhere, such as in a log, a line on standard error now and then."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

EVERY_SECONDS = 10.0
"""From one line to the next, at least."""


class Progress:
    """Counts up to a total, as a context manager."""

    def __init__(self, total: int, unit: str) -> None:
        self._bar = tqdm(total=total, unit=unit, disable=None)
        self._total, self._unit, self.done = total, unit, 0
        self._said, self._said_at = 0, time.monotonic()
        if self._bar.disable:
            print(f"0 of {total:,} {unit}s", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar; more than once does no harm."""
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done; `note` is shown behind the numbers."""
        self.done += count
        if not self._bar.disable:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif (passed := time.monotonic() - self._said_at) >= EVERY_SECONDS:
            rate = (self.done - self._said) / passed
            left = (self._total - self.done) / rate if rate else 0.0
            shown = f"{rate:.1f} {self._unit}s a second" if rate >= 1 else f"{1 / rate:.1f} s a {self._unit}"
            print(
                f"{self.done:,} of {self._total:,} {self._unit}s, {shown}, {_duration(left)} left"
                + (f", {note}" if note else ""),
                file=sys.stderr,
                flush=True,
            )
            self._said, self._said_at = self.done, time.monotonic()


def _duration(seconds: float) -> str:
    """`1:05` minutes or `2:03:00` hours."""
    return str(tqdm.format_interval(seconds))
