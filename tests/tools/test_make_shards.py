"""The packing program as a user runs it: a good run says what it did, a mistake ends in one line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.shards import ShardSet
from tests.videos import write_video

ROOT = Path(__file__).resolve().parents[2]


def make_shards(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/make_shards.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for name in ("jump", "run"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            write_video(root / name / f"{i}.mp4", 8)
    (root / "run/broken.mp4").write_bytes(b"")
    (root / "run/notes.txt").write_text("no video")
    return root


def test_good_run(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/shards"
    run = make_shards(videos, "--out", out, "--fps", "source/4", "--val-fraction", "0.25", "--workers", "2")
    assert (run.returncode, run.stderr) == (0, "0 of 9 videos\n") and "warning" not in run.stdout
    assert "8 videos, 2 s of video" in run.stdout
    assert "train: 6 samples in 1 shards (6)" in run.stdout
    assert "rejected: 1 (1 unreadable)" in run.stdout
    assert "left alone, no videos or not in a class folder: 1 files (1 .txt)" in run.stdout
    assert len(ShardSet.open(out, "train")) == 6
    assert len(ShardSet.open(out, "val")) == 2
    assert ShardSet.open(out, "val")[0].frames.source_frame.tolist() == [0, 4]


def test_annotations_copy_and_a_missing_file(videos: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.tsv"
    listed.write_text("path\tlabel\tsplit\njump/0.mp4\tx\ttrain\nrun/1.mp4\ty\ttrain\nrun/7.mp4\ty\ttrain\n")
    arguments = (videos, "--out", tmp_path / "out", "--annotations", listed, "--profile", "copy", "--workers", "1")
    refused = make_shards(*arguments)
    assert refused.returncode == 2 and "run/7.mp4" in refused.stderr
    run = make_shards(*arguments, "--max-missing", "1")
    assert run.returncode == 0 and "rejected: 1 (1 missing)" in run.stdout
    assert ShardSet.open(tmp_path / "out", "train").classes == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{videos}/none", "--out", "{tmp}/out"], "no such folder of videos"),
        (["{videos}", "--out", "{videos}"], "exists"),
        (["{videos}", "--out", "{tmp}/out", "--fps", "often"], "allowed are 'source'"),
        (["{videos}", "--out", "{tmp}/out", "--quality", "200"], "allowed are 1"),
        (["{videos}", "--out", "{tmp}/out", "--annotations", "{tmp}/none.csv"], "none.csv"),
        (["{videos}", "--out", "{tmp}/out", "--workers", "0"], "allowed is 1 or more"),
        (["{videos}", "--out", "{videos}/run/notes.txt/out"], "Not a directory"),
    ],
)
def test_mistakes_end_in_one_line(videos: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    run = make_shards(*(text.format(videos=videos, tmp=tmp_path) for text in arguments))
    assert run.returncode == 2
    *before, last = run.stderr.splitlines()
    assert last.startswith("error: ") and message in last
    assert before in ([], ["0 of 9 videos"])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.packing").exists()


def test_a_copy_that_is_not_verified_says_so(videos: Path, tmp_path: Path) -> None:
    arguments = (videos, "--out", tmp_path / "out", "--no-verify", "--workers", "1")
    refused = make_shards(*arguments)
    assert refused.returncode == 2 and "only copy can leave that out" in refused.stderr
    run = make_shards(*arguments, "--profile", "copy")
    assert run.returncode == 0 and "8 videos, not verified, 2 s of video" in run.stdout
    assert "warning: no val split, so training has nothing to evaluate on; add --val-fraction 0.2" in run.stdout
    assert not ShardSet.open(tmp_path / "out", "train").verified


def end_early(arguments: list[str], sign: Path) -> tuple[int, str]:
    """Runs the program and ends it, as a scheduler does, once a file has appeared: exit status and errors."""
    command = [sys.executable, str(ROOT / "tools/make_shards.py"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not sign.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    return process.wait(timeout=60), process.communicate()[1]


def test_ended_by_a_scheduler_finished_shards_are_kept_and_the_run_goes_on(tmp_path: Path) -> None:
    source, out, part = tmp_path / "videos", tmp_path / "out", tmp_path / ".out.packing"
    video = write_video(tmp_path / "one.avi", 60, (320, 240), codec="ffv1", pix_fmt="bgr0")
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        for i in range(5):
            (source / name / f"{i}.avi").write_bytes(video.read_bytes().ljust(700_000, b"\0"))
    video.unlink()
    arguments = [str(source), "--out", str(out), "--profile", "copy", "--max-shard-mb", "1", "--workers", "1"]
    status, errors = end_early(arguments, part / "journal.jsonl")
    assert status == 143
    if "finished shards" not in errors:  # not even a first one; on a busy machine the signal may come later
        assert [path.name for path in tmp_path.iterdir()] == ["videos"]
    status, errors = end_early(arguments, part / "shards/.train-000003.tar.part")
    assert status == 143 and errors.startswith("0 of 10 videos\n") and errors.count("\n") == 2
    assert f"finished shards are kept in {part}: the same command goes on from them" in errors
    refused = make_shards(*arguments, "--seed", "1")
    assert refused.returncode == 2 and "seed is 0 there and 1 now" in refused.stderr
    again = make_shards(*arguments)
    assert again.returncode == 0 and "10 videos" in again.stdout
    assert make_shards(*arguments[:2], str(tmp_path / "whole"), *arguments[3:]).returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    assert not part.exists()
