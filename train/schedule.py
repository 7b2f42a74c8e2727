"""When what happens: the learning rate and the steps to evaluate at, as functions of the step alone."""

from __future__ import annotations

import math

from train.config import ScheduleConfig


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, 0-based: a cosine from `peak` to 0 times a linear warm-up.

    With `cosine = "epoch"` the cosine stands still within an epoch and the warm-up moves it step by step, as in the
    official runs (MMCV's `CosineAnnealing` with a linear warm-up in iterations): it never reaches 0, and a warm-up that
    ends between two steps of an epoch leaves its last factor standing until the next epoch begins.
    """
    warmup_steps = num_steps * schedule.warmup_epochs / schedule.epochs
    done = step / num_steps
    if schedule.cosine == "epoch":
        epoch, last_warm = (int(s * schedule.epochs / num_steps) for s in (step, math.floor(warmup_steps)))
        done = epoch / schedule.epochs
        if epoch == last_warm and not warmup_steps.is_integer():
            step = min(step, math.floor(warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    if step >= warmup_steps:
        return peak * cosine
    return peak * cosine * (schedule.warmup_start + (1 - schedule.warmup_start) * step / warmup_steps)


def crosses(position: int, before: int, every: float) -> bool:
    """Whether a multiple of `every` lies in before < x <= position; never if `every` is 0."""
    return every > 0 and math.floor(position / every) > math.floor(before / every)
