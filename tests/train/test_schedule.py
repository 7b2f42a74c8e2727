"""The learning rate of every step, by the step and by the epoch, and the steps that evaluate."""

from __future__ import annotations

import math

import pytest

from train.config import ScheduleConfig
from train.schedule import crosses, learning_rate

ITERS = 269
"""Steps an epoch of the official Diving-48 run, whose warm-up of 2.5 epochs ends between two steps."""


def official(epochs: int, iters: int, peak: float, warmup: float = 2.5, start: float = 0.1) -> list[float]:
    """The rates of a run, kept and changed as MMCV's hooks do: when an epoch starts, and while it warms up."""
    rates, rate = [], 0.0
    for epoch in range(epochs):
        rate = regular = 0.5 * peak * (1 + math.cos(math.pi * epoch / epochs))
        for i in range(iters):
            done = epoch * iters + i
            if done == warmup * iters:
                rate = regular
            elif done < warmup * iters:
                rate = regular * (1 - (1 - done / (warmup * iters)) * (1 - start))
            rates.append(rate)
    return rates


def by_epoch(epochs: float, num_steps: int, peak: float, **settings: float) -> list[float]:
    schedule = ScheduleConfig(epochs=epochs, cosine="epoch", **settings)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, peak, schedule) for step in range(num_steps)]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    schedule = ScheduleConfig(epochs=10, warmup_epochs=1, warmup_start=0.1)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[100] == pytest.approx(0.0)
    assert rates[5] == pytest.approx(0.55 * (1 + math.cos(math.pi * 0.05)))
    assert max(rates) == rates[10] == pytest.approx(1 + math.cos(math.pi / 10))
    assert learning_rate(0, 100, 2.0, ScheduleConfig(epochs=10, warmup_epochs=0)) == 2.0


def test_official_schedule_is_reproduced_iteration_by_iteration() -> None:
    rates = by_epoch(50, 50 * ITERS, 3e-4)
    assert rates == pytest.approx(official(50, ITERS, 3e-4), rel=1e-12)
    assert rates[19] == pytest.approx(3.763e-5, abs=5e-9), "as a log of an official run has it"
    assert rates[-1] == pytest.approx(2.96e-7, abs=5e-10)


def test_a_warmup_that_ends_within_a_step_stays_until_the_next_epoch() -> None:
    rates = by_epoch(50, 50 * ITERS, 3e-4)
    ends = 3 * ITERS  # 2.5 epochs are 672.5 steps
    assert len(set(rates[672:ends])) == 1 and rates[672] / rates[673] == 1
    assert rates[672] == pytest.approx(0.9993 * 0.5 * 3e-4 * (1 + math.cos(math.pi * 2 / 50)), rel=1e-4)
    assert rates[ends] == pytest.approx(0.5 * 3e-4 * (1 + math.cos(math.pi * 3 / 50)))


@pytest.mark.parametrize(("iters", "warmup"), [(270, 2.5), (7, 1.0), (1, 2.5), (3, 0.0), (5, 0.5)])
def test_official_schedule_for_other_warmups(iters: int, warmup: float) -> None:
    assert by_epoch(30, 30 * iters, 1.0, warmup_epochs=warmup) == pytest.approx(official(30, iters, 1.0, warmup))


def test_epochs_of_the_cosine_are_those_of_the_samples() -> None:
    """26 samples in steps of 8, 4 epochs: 13 steps, the epochs begin in steps 0, 4, 7 and 10."""
    rates = by_epoch(4, 13, 1.0, warmup_epochs=0)
    assert [step for step in range(13) if step == 0 or rates[step] != rates[step - 1]] == [0, 4, 7, 10]
    assert by_epoch(0.5, 2, 1.0, warmup_epochs=0) == [1.0, 1.0]


def test_evaluation_steps_are_those_that_complete_epochs() -> None:
    assert [step for step in range(1, 14) if crosses(step * 8, (step - 1) * 8, 2 * 26)] == [7, 13]
    assert not any(crosses(step, step - 1, 0) for step in range(1, 9))
