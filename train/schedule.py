"""When what happens: the learning rate and the steps to evaluate at, as functions of the step alone."""

from __future__ import annotations

import math

from train.config import ScheduleConfig


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, 0-based: a cosine from `peak` to 0 times a linear warm-up."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    warmup_steps = num_steps * schedule.warmup_epochs / schedule.epochs
    if step >= warmup_steps:
        return peak * cosine
    return peak * cosine * (schedule.warmup_start + (1 - schedule.warmup_start) * step / warmup_steps)


def crosses(position: int, before: int, every: float) -> bool:
    """Whether a multiple of `every` lies in before < x <= position; never if `every` is 0."""
    return every > 0 and math.floor(position / every) > math.floor(before / every)
