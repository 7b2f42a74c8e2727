"""The plan as JSON: the official rules, written out here as the official code computes them, for every length."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.shell import call_program
from tools.show_plan import dense_clips, main, uniform_clip


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return json.loads(printed)


def official_dense(num: int, clip_len: int, interval: int, clips: int) -> list[int]:
    """MMAction 0.x, `SampleFrames` in test mode with out-of-bound option loop."""
    span = clip_len * interval
    average = (num - span + 1) / float(clips)
    offsets = (np.arange(clips) * average + average / 2.0).astype(int) if num > span - 1 else np.zeros(clips, int)
    return [int(offset + k * interval) % num for offset in offsets for k in range(clip_len)]


def official_uniform(num: int, clip_len: int) -> list[int]:
    """`UniformSample` in test mode."""
    segment = float(num - 1) / clip_len
    bounds = [int(np.round(segment * i)) for i in range(clip_len + 1)]
    return [(start + end) // 2 for start, end in pairwise(bounds)]


def test_dense_example_of_a_kinetics_video(capsys: pytest.CaptureFixture[str]) -> None:
    clips = show(capsys, *"dense --frames 300 --clip-len 8 --interval 16 --clips 3".split())
    assert clips == [start + 16 * k for start in (28, 86, 144) for k in range(8)]


def test_short_videos_give_the_same_clip_each_time_and_wrap_around(capsys: pytest.CaptureFixture[str]) -> None:
    clips = show(capsys, *"dense --frames 50 --clip-len 8 --interval 16 --clips 3".split())
    assert clips == 3 * [0, 16, 32, 48, 14, 30, 46, 12]
    assert show(capsys, *"dense --frames 1 --clip-len 2 --interval 4".split()) == [0, 0]


@pytest.mark.parametrize(
    ("num", "expected"), [(45, [3, 8, 13, 19, 25, 30, 35, 41]), (6, [0, 1, 1, 2, 2, 3, 4, 4]), (1, [0] * 8)]
)
def test_uniform_examples(capsys: pytest.CaptureFixture[str], num: int, expected: list[int]) -> None:
    assert show(capsys, "uniform", "--frames", str(num), "--clip-len", "8") == expected


@pytest.mark.parametrize(("clip_len", "interval"), [(8, 16), (16, 8), (32, 4), (8, 4)])
def test_every_length_up_to_1000_is_sampled_as_officially(clip_len: int, interval: int) -> None:
    for num in range(1, 1001):
        for clips in (1, 3, 10):
            assert dense_clips(num, clip_len, interval, clips) == official_dense(num, clip_len, interval, clips), num
        assert uniform_clip(num, clip_len) == official_uniform(num, clip_len), num


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("224x298", [[0, 0], [74, 0], [37, 0]]),
        ("256x340", [[0, 0], [74, 0], [37, 0]]),  # 298 wide at a short side of 224
        ("340x256", [[0, 0], [0, 74], [0, 37]]),
        ("240x321", [[0, 0], [76, 0], [38, 0]]),  # 299.6 wide, which is 300
        ("224x225", [[0, 0], [0, 0], [0, 0]]),
        ("224x227", [[0, 0], [2, 0], [1, 0]]),
        ("96x96", [[0, 0], [0, 0], [0, 0]]),
    ],
)
def test_crops_stand_left_right_and_in_the_middle(
    capsys: pytest.CaptureFixture[str], size: str, expected: list[list[int]]
) -> None:
    assert show(capsys, "crops", "--size", size) == expected


def test_crops_of_another_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(capsys, "crops", "--size", "256x340", "--crop", "256") == [[0, 0], [84, 0], [42, 0]]


def test_learning_rate_is_that_of_the_official_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[schedule]\nepochs = 50\ncosine = "step"\n[optimizer]\nlr = 3e-4\n')
    at = ("lr", "--recipe", str(recipe), "--iters-per-epoch", "269", "--at")
    assert show(capsys, *at, "19") == [pytest.approx(3.763e-5, abs=5e-9)]
    assert show(capsys, *at, "0") == [pytest.approx(3e-5)]
    assert show(capsys, *at, "269") == [pytest.approx(3e-4 * (0.1 + 0.9 / 2.5) * (1 + math.cos(math.pi / 50)) / 2)]
    assert show(capsys, *at, "13449") == [pytest.approx(2.96e-7, abs=5e-10)]
    with pytest.raises(ValueError, match=r"--at 13450: the run of .* has iterations 0 to 13449"):
        main([*at, "13450"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("dense --frames 0 --clip-len 8 --interval 16", "'0': a whole number from 1 on is allowed"),
        ("dense --frames 300 --clip-len 8 --interval 16 --clips 101", "data.test_clips = 101; allowed is 1 to 100"),
        ("uniform --frames 45 --clip-len 2000", "data.num_frames = 2000; allowed is 1 to 1024"),
        ("crops --size 224", "'224': HEIGHTxWIDTH in pixels is allowed"),
        ("lr --recipe none --iters-per-epoch 9 --at 0", "no such recipe: none"),
        ("lr --recipe demo --iters-per-epoch 9 --at -1", "--at"),
        ("", "required: WHAT"),
    ],
)
def test_bad_input_is_one_line(arguments: str, said: str) -> None:
    done = call_program(main, *arguments.split())
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
