"""The motion clips: pairs are exact reversals, and nothing but the order of frames tells the class."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.cli import run_cli
from tools.make_motion_videos import (
    ALLOWED_FRAMES,
    CLASSES,
    PAIRS,
    main,
    make_motion_videos,
    plan_drawings,
    sampled_frames,
    scenes_of,
)
from tools.parts.shapes import draw

COUNTS = {"train": 16, "val": 16}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("motion") / "videos"
    return make_motion_videos(out, **COUNTS, progress=False)


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def annotations(videos: Path) -> list[tuple[str, str, str]]:
    header, *lines = (videos / "annotations.tsv").read_text().splitlines()
    assert header == "path\tlabel\tsplit"
    return [tuple(line.split("\t")) for line in lines]


def digests(videos: Path) -> dict[str, str]:
    files = (path for path in videos.rglob("*") if path.is_file())
    return {str(p.relative_to(videos)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_clip_has_its_exact_reversal_in_the_paired_class(videos: Path, split: str) -> None:
    partner = dict(PAIRS) | {second: first for first, second in PAIRS}
    clips = [(path, label) for path, label, where in annotations(videos) if where == split]
    for path, label in clips:
        clip = decode(videos / path)
        reversal = decode(videos / path.replace(f"/{label}/", f"/{partner[label]}/"))
        np.testing.assert_array_equal(clip, reversal[::-1])
        assert not np.array_equal(clip, reversal)


def test_clips_are_h264_and_close_to_the_drawing(videos: Path) -> None:
    for drawing in plan_drawings(**COUNTS, size=64, frames=16, seed=0)[:4]:
        path = videos / drawing.path(PAIRS[drawing.pair][0])
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        error = decode(path).astype(float) - draw(scenes_of(drawing), 64)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 30  # dB; 4:2:0 colour takes most of it


def test_annotations_name_every_file_and_balance_the_classes(videos: Path) -> None:
    rows = annotations(videos)
    assert {path for path, _, _ in rows} == {str(path.relative_to(videos)) for path in videos.rglob("*.mp4")}
    per_class = Counter((split, label) for _, label, split in rows)
    assert per_class == {(s, c): COUNTS[s] // len(CLASSES) for s in COUNTS for c in CLASSES}


@pytest.mark.parametrize("frames", ALLOWED_FRAMES)
def test_the_test_rule_picks_mirrored_frames(frames: int) -> None:
    chosen = sampled_frames(frames)
    assert chosen == [frames - 1 - frame for frame in reversed(chosen)]
    assert len(set(chosen)) == len(chosen) == 8


@pytest.mark.parametrize("frames", ALLOWED_FRAMES)
def test_large_shapes_turn_at_most_45_degrees_between_sampled_frames(frames: int) -> None:
    drawings = plan_drawings(train=160, val=0, size=64, frames=frames, seed=3)
    for drawing in (d for d in drawings if PAIRS[d.pair][0] == "turns_clockwise"):
        scenes = scenes_of(drawing)
        turns = np.diff(scenes.angle[sampled_frames(frames)])
        assert turns.min() > 0 and turns.max() <= 45
        assert scenes.radius.min() >= 0.3


def test_no_two_drawings_share_a_random_key() -> None:
    drawings = plan_drawings(train=800, val=400, size=64, frames=16, seed=0)
    keys = {split: {d.key for d in drawings if d.split == split} for split in ("train", "val")}
    assert not keys["train"] & keys["val"]
    assert len(keys["train"] | keys["val"]) == len(drawings)


def test_bytes_do_not_depend_on_the_number_of_workers(videos: Path, tmp_path: Path) -> None:
    again = make_motion_videos(tmp_path / "again", **COUNTS, workers=2, progress=False)
    assert digests(again) == digests(videos)


def test_another_seed_makes_other_clips(videos: Path, tmp_path: Path) -> None:
    other = make_motion_videos(tmp_path / "other", train=0, val=8, seed=1, progress=False)
    mine = {p: d for p, d in digests(other).items() if p.endswith(".mp4")}
    assert not set(mine.values()) & set(digests(videos).values())


def test_refuses_to_write_into_a_folder_that_holds_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: main(["--out", str(tmp_path), "--train", "0", "--val", "8", "--workers", "1"]))
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tools.make_motion_videos.encode_mp4", fail)
    with pytest.raises(OSError, match="disk full"):
        make_motion_videos(tmp_path / "out", train=0, val=8, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("--val", "12", "multiple of 8"), ("--frames", "20", "16, 32, 48"), ("--size", "63", "even")],
)
def test_bad_numbers_are_refused_in_one_line(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: main(["--out", str(tmp_path / "out"), option, value]))
    message = capsys.readouterr().err
    assert f"{option} {value}" in message and allowed in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
