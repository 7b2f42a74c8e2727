"""The contact sheet shows what the model gets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.augment import CLIP_MEAN
from tests.sets import make_set
from tests.shell import call_program
from tests.videos import read_number
from tools.view_clips import main


def view(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call_program(main, *arguments)


def test_the_sheet_holds_the_frames_of_the_evaluation_view(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [40, 23, 9], size=(64, 64), splits=("train", "val"))
    done = view(
        *(str(folder), "--eval", "--clips", "3", "--size", "96", "--out", str(tmp_path / "a/clips.png")),
        *("--set", "data.num_frames=4", "--set", "data.eval_crop=1.0"),
    )
    assert done.returncode == 0, done.stderr
    assert "3 clips of 4 frames" in done.stdout and "split val" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "a/clips.png"))
    assert sheet.shape == (3 * (96 + 18 + 4), 4 * (96 + 4), 3)
    tiles = [[sheet[r * 118 + 18 : r * 118 + 114, c * 100 : c * 100 + 96] for c in range(4)] for r in range(3)]
    numbers = [[read_number(tile) for tile in row] for row in tiles]
    assert numbers == [[5, 15, 24, 34], [3, 8, 13, 19], [1, 3, 5, 7]]


def test_the_sheet_shows_augmented_and_mixed_clips(tmp_path: Path) -> None:
    """Three clips are asked for, and mixing adds the neighbour of the third; erased boxes are of one colour."""
    folder = make_set(tmp_path / "set", [40, 23, 9, 8], size=(64, 64))
    changes = ("--set", "data.random_erasing=1", "--set", "data.cutmix_alpha=1.0", "--set", "data.num_frames=4")
    done = view(str(folder), "--clips", "3", "--size", "96", *changes, "--out", str(tmp_path / "clips.png"))
    assert done.returncode == 0 and "4 clips of 4 frames" in done.stdout, done.stderr
    sheet = np.asarray(Image.open(tmp_path / "clips.png"))
    erased = (sheet == CLIP_MEAN).all(-1)
    assert sheet.shape[0] == 4 * 118 and all(erased[118 * row + 18 : 118 * row + 114].sum() > 200 for row in range(4))


def test_evaluation_shows_every_view(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [40, 23], size=(96, 64))
    views = ("--set", "data.test_clips=2", "--set", "data.test_crops=3", "--eval", "--split", "train", "--clips", "8")
    done = view(str(folder), *views, "--size", "48", "--out", str(tmp_path / "x.png"))
    assert done.returncode == 0 and "8 clips of 8 frames" in done.stdout, done.stderr


def test_the_sheet_shows_kept_samples_alone(tmp_path: Path) -> None:
    """Half of four classes of two samples each, and no more; the test views are of all."""
    folder = make_set(tmp_path / "set", [9] * 8, size=(64, 64), classes=4)
    half = (
        str(folder),
        "--split",
        "train",
        "--clips",
        "8",
        "--out",
        str(tmp_path / "x.png"),
        "--set",
        "data.fraction=0.5",
    )
    done = view(*half)
    assert done.returncode == 0 and "4 clips of 8 frames" in done.stdout, done.stderr
    assert "8 clips of 8 frames" in view(*half, "--eval").stdout


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [8])
    for arguments, text in [
        ([str(tmp_path / "nowhere")], "no such folder of shards"),
        ([str(folder), "--eval"], "has no split 'val'; it has: train"),
        ([str(folder), "--set", "data.sampling=odd"], "data.sampling = 'odd'; allowed are dense, uniform"),
    ]:
        done = view(*arguments, "--out", str(tmp_path / "x.png"))
        assert done.returncode == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "x.png").exists()


def test_a_set_without_a_good_clip_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_set(tmp_path / "set", [8, 8])
    shard = folder / "train-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    done = view(str(folder), "--eval", "--split", "train", "--size", "48", "--out", str(tmp_path / "x.png"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checksum differs" in caplog.text and "none of the 2 clips" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "x.png").exists()
