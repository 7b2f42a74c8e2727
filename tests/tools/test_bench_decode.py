"""What the decode benchmark compares and counts; as a program it runs in test_gpu_report.py."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.sets import open_set
from tools.bench_decode import (
    OPTIONS,
    Clip,
    Subject,
    clips_per_second,
    compare,
    interleaved,
    make_graph,
    planned_clips,
    repeat_batches,
)


def test_the_graph_is_compared_with_the_cpu(tmp_path: Path) -> None:
    clips = planned_clips(open_set(tmp_path / "set", [150, 140, 129], size=(96, 80)), 4)
    graph = make_graph("jpeg", 48, 4, None)
    found = compare(clips, graph, 48)
    assert 0 < found["mean"] < 2

    def brighter(clips: list[Clip]) -> list[np.ndarray]:
        return [np.minimum(frames.astype(int) + 20, 255).astype(np.uint8) for frames in graph(clips)]

    assert compare(clips, brighter, 48)["mean"] > 10
    clips[1].request.shard.write_bytes(b"")
    with pytest.raises(ValueError, match="the CPU cannot decode clip 0"):
        compare(clips, graph, 48)


def test_batches_follow_each_other_without_end() -> None:
    seen = []

    def graph(clips: list[int]) -> list[np.ndarray]:
        seen.append(tuple(clips))
        return [np.full((2, 8, 8, 3), clip, np.uint8) for clip in clips]

    run = repeat_batches([0, 1, 2, 3, 4], graph, 2, 8, None)  # type: ignore[arg-type]
    for _ in range(3):
        run()
    assert seen == [(0, 1), (2, 3), (0, 1)] and OPTIONS.num_frames == 8


def test_a_rate_leaves_out_what_lay_ready_and_rounds_take_turns() -> None:
    calls: list[str] = []

    def work(name: str) -> None:
        calls.append(name)
        time.sleep(0.05 if len(calls) > 3 else 0.0)  # the first lay ready

    rate = clips_per_second(Subject("a way", 4, partial(work, "a"), drain=3), 0.2)
    assert 40 < rate < 80.1 and len(calls) >= 3 + 3
    calls.clear()
    subjects = [Subject(name, 1, partial(work, name)) for name in "ab"]
    assert [len(speeds) for speeds in interleaved(subjects, 2, 0.0)] == [2, 2]
    assert "".join(calls) == "ab" + "ab" + "ba"
