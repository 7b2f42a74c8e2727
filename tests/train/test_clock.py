"""The clock and its paces by themselves: what is in a number, and that there is none before it was measured."""

from __future__ import annotations

import pytest

from train.clock import WARMUP_STEPS, Clock, Pace


class Hands:
    """A time, and seconds waited, that the test moves."""

    def __init__(self) -> None:
        self.time, self.waited = 1000.0, 30.0  # neither starts at 0 in a run that is not its process's first

    def clock(self, clips_per_step: int = 4) -> Clock:
        return Clock(clips_per_step, lambda: self.waited, now=lambda: self.time)

    def warm_up(self, clock: Clock) -> None:
        """The first steps, 50 seconds each."""
        for _ in range(WARMUP_STEPS):
            self.time += 50
            if clock.step_done():
                clock.start_measuring()


NONE = Pace(0, 0.0, 0.0, 0)


def test_a_pace_without_steps_has_no_numbers() -> None:
    for pace in (NONE, Pace(3, 1.5, 0.5, 12).since(Pace(3, 1.5, 0.5, 12)), Pace(0, 9.0, 9.0, 0)):
        assert (pace.clips_per_s, pace.step_ms, pace.wait_ms, pace.wait_share) == (None,) * 4


def test_a_pace_per_step_and_per_second() -> None:
    pace = Pace(steps=8, seconds=2.0, waiting_seconds=0.5, clips=128)
    assert (pace.clips_per_s, pace.step_ms, pace.wait_ms, pace.wait_share) == (64.0, 250.0, 62.5, 0.25)


def test_the_stretch_between_two_readings_is_their_difference() -> None:
    earlier, later = Pace(2, 4.0, 1.0, 16), Pace(5, 5.5, 1.25, 40)
    assert later.since(earlier) == Pace(3, 1.5, 0.25, 24)
    assert later.since(NONE) == later
    assert later.since(earlier).clips_per_s == 16.0


def test_nothing_is_measured_before_the_warm_up_ended_and_a_step_followed() -> None:
    hands = Hands()
    clock = hands.clock()
    ended = []
    for _ in range(WARMUP_STEPS):
        assert clock.read() == NONE
        hands.time += 50
        ended.append(clock.step_done())
    assert ended == [False] * (WARMUP_STEPS - 1) + [True]
    clock.start_measuring()
    hands.time += 3
    assert clock.read() == NONE
    assert not clock.step_done()
    assert clock.read() == Pace(1, 3.0, 0.0, 4)


def test_only_waiting_since_the_warm_up_counts() -> None:
    hands = Hands()
    clock = hands.clock(clips_per_step=16)
    hands.waited += 200
    hands.warm_up(clock)
    hands.time, hands.waited = hands.time + 2, hands.waited + 0.5
    clock.step_done()
    assert clock.read() == Pace(1, 2.0, 0.5, 16)


def test_a_pause_that_ends_in_an_error_is_a_pause_as_well() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.warm_up(clock)
    with pytest.raises(OSError, match="disk"), clock.paused():
        hands.time += 70
        raise OSError("disk")
    with clock.paused():
        hands.time += 5
    hands.time += 1
    clock.step_done()
    assert clock.read().seconds == 1.0 and clock.paused_seconds == 75.0


def test_pauses_before_measuring_are_no_part_of_what_is_measured_but_of_all_pauses() -> None:
    hands = Hands()
    clock = hands.clock()
    with clock.paused():
        hands.time += 40
    hands.warm_up(clock)
    hands.time += 2
    clock.step_done()
    assert clock.read().seconds == 2.0 and clock.paused_seconds == 40.0


def test_clock_leaves_out_warmup_and_pauses() -> None:
    time, waited = 0.0, 0.0
    clock = Clock(8, lambda: waited, now=lambda: time)
    for _ in range(WARMUP_STEPS):
        time, waited = time + 100, waited + 50
        with clock.paused():
            time += 7
        assert clock.read().clips_per_s is None
        if clock.step_done():
            clock.start_measuring()
    for _ in range(4):
        time, waited = time + 2, waited + 0.5
        with clock.paused():
            time += 1000
        assert not clock.step_done()
    pace = clock.read()
    assert (pace.clips_per_s, pace.step_ms, pace.wait_ms, pace.wait_share) == (4.0, 2000.0, 500.0, 0.25)
    assert clock.paused_seconds == 4 * 1000 + WARMUP_STEPS * 7
    time, waited = time + 1, waited + 1
    clock.step_done()
    assert clock.read().since(pace).wait_share == 1.0
