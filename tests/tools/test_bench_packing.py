"""The packing benchmark runs, on videos of its own, and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

from tests.videos import write_video

ROOT = Path(__file__).resolve().parents[2]


def test_figures_and_where_they_come_from(tmp_path: Path) -> None:
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", 12)
    command = [sys.executable, "tools/bench_packing.py", str(tmp_path), "--rounds", "1", "--videos", "2", "--json"]
    done = subprocess.run([*command, str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True, check=True)
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["videos"] == 2
    assert document["runs"]["copy"]["videos a second"] > 0
    assert document["runs"]["jpeg"]["wall speed / bare jpeg"] > 0
    assert document["hardware"]["processor"] and document["versions"]["av"] and "--rounds 1" in document["command"]
    assert "wall speed / bare jpeg" in done.stdout


def test_no_videos(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench_packing.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "holds no videos" in done.stderr and "Traceback" not in done.stderr
