"""The quick demo goes the whole way, and what the full one promises follows from what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.shell import shell_environment
from tools.run_demo import LADDER, MARKER, prepare_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_quick_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "tools/run_demo.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, env=shell_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["rungs"]) == list(LADDER) == ["frozen", "spatial", "temporal", "joint"]
    trainable = [row["trainable"] for row in summary["rungs"].values()]
    assert trainable == sorted(set(trainable)), "each rung trains more than the one before"
    for rung in ("frozen", "spatial"):
        assert summary["rungs"][rung]["top1"] <= 0.5, "a space-only model cannot tell a clip from its reversal"
    for row in summary["rungs"].values():
        assert row["clips_per_s"] > 0 and 0 <= row["wait_share"] <= 1
    assert summary["seconds"] > 0
    assert "AIM" in done.stdout and "$ deepspeed --num_accelerators 1 train/main.py --recipe demo" in done.stdout
    width, height = Image.open(out / "report.png").size
    assert width > 1000 and height > 800


def test_only_an_earlier_demo_is_cleared(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not of an earlier demo"):
        prepare_folder(mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    (mine / MARKER).touch()
    prepare_folder(mine)
    assert [path.name for path in mine.iterdir()] == [MARKER]
