"""Loose video files as a set: which files, what they are, and the clips that the loader makes of them."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.decode import ClipDecoder
from pipelines.files import FileSet, file_sample, find_videos, printable, probe, probe_times
from pipelines.loader import ClipLoader
from pipelines.plan import EVAL_EPOCH, ClipOptions, Turn, eval_turns, plan_clip
from pipelines.read import FILE, request_clip
from pipelines.video import open_video
from tests.videos import read_number, write_video


def test_folders_are_walked_and_files_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("b/2.mp4", "b/1.MKV", "a.webm", ".hidden/x.mp4", "b/.x.mp4", "notes.txt", "odd.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_videos([tmp_path / "odd.bin", tmp_path, tmp_path / "a.webm"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["odd.bin", "a.webm", "b/1.MKV", "b/2.mp4"]
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(FileNotFoundError, match=r"no such video file or folder: .*pipe"):
        find_videos([tmp_path / "pipe.mp4"])
    with pytest.raises(ValueError, match=r"holds no video; they are known by \.3gp"):
        find_videos([tmp_path / "b", make_empty(tmp_path)])


def make_empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_names_cannot_steer_a_terminal() -> None:
    assert printable(Path("vidéo 視/a\x1b[2J\n.mp4")) == "vidéo 視/a\\x1b[2J\\n.mp4"
    assert printable(Path(os.fsdecode(b"a\xff.mp4"))) == "a\\xff.mp4"


@pytest.mark.parametrize(("name", "more"), [("a.mp4", {"skipped": 5}), ("a.mkv", {}), ("a.avi", {"codec": "mpeg4"})])
def test_facts_and_times_are_those_of_the_decoded_frames(tmp_path: Path, name: str, more: dict[str, object]) -> None:
    times = None if name == "a.mp4" else [0.04 * k + 0.001 * k * k for k in range(20)]
    path = write_video(tmp_path / name, 20, (48, 96), times=times, rotation=90 * (name == "a.mp4"), **more)  # type: ignore[arg-type]
    facts, found = probe_times(path)
    with open_video(path) as reader:
        expected = [frame.seconds for frame in reader.frames()]
        assert found == pytest.approx(expected, abs=1e-6)
        assert facts == (48, 96, len(expected), pytest.approx(reader.fps), pytest.approx(reader.seconds)) == probe(path)


def test_the_loader_decodes_them_and_strikes_out_what_is_no_video(tmp_path: Path) -> None:
    paths = [write_video(tmp_path / f"{k}.mp4", 20 + k, (64, 64)) for k in range(3)]
    paths[1].write_text("ffconcat version 1.0\nfile 0.mp4\n")
    options = ClipOptions(num_frames=4, sampling="uniform", test_clips=2, eval_crop=1.0)
    turns = eval_turns(3, 2, micro_batch=4, rank=0, world=1)
    with (
        closing(FileSet(paths, ["x", "y"], multi_label=False, workers=1)) as files,
        ClipLoader(files, turns, micro_batch=4, size=64, options=options, max_bad_fraction=1.0) as loader,
    ):
        seen = [
            (key, [read_number(frame) for frame in clip], plan.frames)
            for batch in loader
            for clip, key, plan in zip(batch.frames.numpy().copy(), batch.keys, batch.plans, strict=True)
            if key
        ]
        assert [key for key, _, _ in seen] == [str(path) for path in (paths[0], paths[0], paths[2], paths[2])]
        assert all(numbers == list(frames) for _, numbers, frames in seen)
        assert list(loader.bad) == [1] and loader.bad[1].reason.startswith("unreadable: ")


def test_a_file_that_shrank_since_it_was_looked_at_is_a_bad_sample(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20, (64, 64))
    with closing(FileSet([path], ["x", "y"], multi_label=False, workers=1)) as files:
        assert files[0].source_frames == 20 and files[0].shard == path
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        options = ClipOptions(num_frames=4, sampling="uniform")
        with ClipLoader(
            files, eval_turns(1, micro_batch=1, rank=0, world=1), micro_batch=1, size=64, options=options
        ) as loader:
            assert not next(loader).valid.any() and "VideoError" in loader.bad[0].reason


def test_views_of_a_file_are_decoded_in_one_pass_and_fail_by_themselves(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 60, (64, 64), bf="0", g="10")
    options = ClipOptions(num_frames=4, interval=4, test_clips=3, eval_crop=1.0)
    sample = file_sample(path, probe(path))
    plans = [plan_clip(sample, Turn(0, EVAL_EPOCH, view), 0, options) for view in range(3)]
    requests = [request_clip(sample, plan, FILE) for plan in plans]
    steps: list[int] = []
    decoder = ClipDecoder(64, 4, on_progress=lambda: steps.append(1))

    def decode() -> tuple[list[list[int]], list[int]]:
        rows = np.zeros((3, 4, 64, 64, 3), np.uint8)
        failed = [i for i, _ in decoder.decode_into(requests, rows)]
        return [[read_number(frame) for frame in row] for i, row in enumerate(rows) if i not in failed], failed

    assert decode() == ([list(plan.frames) for plan in plans], [])
    assert len(steps) == plans[2].frames[-1] + 1
    requests[1] = replace(requests[1], wanted=(*requests[1].wanted[:3], 99))  # which the file does not have
    assert decode() == ([list(plan.frames) for plan in plans[::2]], [1])


def test_a_sample_holds_nothing_of_the_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20, (64, 64))
    sample = file_sample(path, probe(path), 7)
    assert (sample.sample_id, sample.video_bytes, sample.labels, sample.fps) == (7, 0, (), pytest.approx(30))
    np.testing.assert_array_equal(sample.frames.source_frame, np.arange(20))
