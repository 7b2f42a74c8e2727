"""The losses since the last log line, and the steps among them that were skipped because a number was not finite.

`Engine.update` decides on the averaged gradients, which are the same on all ranks, so all skip the same steps. Here is
kept what the log says of it. Nothing waits for the device before `read`, which is called in steps that are logged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from train.engine import World

MAX_NAMED = 8  # samples of a skipped step


@dataclass(frozen=True)
class Read:
    """What happened since the last time."""

    loss: float
    """Mean of the losses that are finite numbers, over all ranks; NaN where none is."""
    told: tuple[str, ...]
    """A line for each skipped step: its number, and on which rank which samples had a loss that is not finite."""


@dataclass
class Losses:
    """Of a run's micro-batches; every process has one."""

    world: World
    skipped: int = 0
    """Steps of the run that were skipped so far."""
    in_a_row: int = 0
    """The last so many steps were skipped."""
    _losses: list[tuple[Tensor, Sequence[str]]] = field(default_factory=list)  # of the step that is going on
    _steps: list[tuple[int, Tensor, list[tuple[Tensor, Sequence[str]]]]] = field(default_factory=list)
    _sum: Tensor | None = None
    _count: int = 0

    def add(self, loss: Tensor, keys: Sequence[str]) -> None:
        """The loss of a micro-batch of the samples of these keys."""
        loss = loss.detach()
        finite = torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
        self._sum = finite if self._sum is None else self._sum + finite
        self._count += 1
        self._losses.append((loss, keys))

    def end_step(self, step: int, skipped: Tensor) -> None:
        """All micro-batches of a step are done; `skipped`: a scalar, 0 if its weights were learned."""
        self._steps.append((step, skipped, self._losses))
        self._losses = []

    def wait(self) -> None:
        """Until the device has computed the losses that were added."""
        if self._sum is not None:
            self._sum.item()

    def read(self) -> Read:
        """What happened since the last time; all processes call it in the same step."""
        assert self._sum is not None and not self._losses, "to be read after whole steps"
        flags = torch.stack([skipped for _, skipped, _ in self._steps]).tolist()
        bad: list[tuple[int, list[str]]] = []
        lost = 0
        for (step, _, losses), flag in zip(self._steps, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if flag:
                found = [keys for loss, keys in losses if not math.isfinite(loss.item())]
                lost += len(found)
                bad.append((step, [key for keys in found for key in keys]))
        self.skipped += len(bad)
        kept = self._count - lost
        mean = self._sum / max(kept, 1)
        known = torch.tensor(float(kept > 0), device=mean.device)
        total, ranks = self.world.sum(torch.stack([mean, known])).tolist()
        told = self._tell(bad) if bad else ()
        self._steps, self._sum, self._count = [], None, 0
        return Read(total / ranks if ranks else math.nan, told)

    def _tell(self, bad: list[tuple[int, list[str]]]) -> tuple[str, ...]:
        """A line a step; the steps are the same on all ranks."""
        answers = [json.loads(text) for text in self.world.gather(json.dumps([keys for _, keys in bad]))]
        lines = []
        for i, (step, _) in enumerate(bad):
            where = [f"rank {rank}: {_some(keys[i])}" for rank, keys in enumerate(answers) if keys[i]]
            what = f"the loss is no finite number on {'; '.join(where)}" if where else "a gradient is no finite number"
            lines.append(f"step {step} was skipped: {what}")
        return tuple(lines)


def _some(keys: Sequence[str]) -> str:
    more = f", … ({len(keys)} samples)" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more
