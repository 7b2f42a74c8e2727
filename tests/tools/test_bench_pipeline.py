"""The benchmark on few, short sources: what it prints, what it counts, and that it compares equals with equals."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.videos import read_number, write_video
from tools.bench_pipeline import Run, measure, summarise
from tools.parts.bench_checks import decoded_by_seeking, same_clips
from tools.parts.bench_contenders import (
    MEAN,
    STD,
    Setup,
    crop_and_flip,
    decord_frames,
    normalise,
    pyav_frames,
    source_of,
)
from tools.parts.bench_sources import keyframes_of

ROOT = Path(__file__).resolve().parents[2]
decord = pytest.importorskip("decord")


def bench(*arguments: str | Path, missing: Path) -> subprocess.CompletedProcess[str]:
    """Runs the tool where the modules in the folder `missing` cannot be imported."""
    command = [sys.executable, str(ROOT / "tools/bench_pipeline.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(missing)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd="/", env=environment)


def hide(folder: Path, module: str) -> Path:
    (folder / f"{module}.py").write_text(f"raise ImportError('no {module} today')")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A short run of one case on 4 sources of 72 frames, and the folder it was in."""
    folder = tmp_path_factory.mktemp("bench")
    size = ("--generated", "--clips", "4", "--frames", "72", "--rounds", "1", "--seconds", "0.2", "--workers", "1")
    which = ("--cases", "jpeg_dense16", "--rivals", "webdataset")
    files = ("--work", folder, "--json", folder / "result.json", "--plot", folder / "chart.png")
    return folder, bench(*size, *which, *files, missing=hide(folder, "webdataset"))


def test_a_run_ends_with_one_line_of_json(finished) -> None:
    folder, run = finished
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == json.loads((folder / "result.json").read_text())
    assert set(result["ratios"]) == set(result["loader_vs_bare"]) == set(result["same_clips"]) == {"jpeg_dense16"}
    assert 1 < result["ratios"]["jpeg_dense16"] < 1000
    assert 0.2 < result["loader_vs_bare"]["jpeg_dense16"] < 5
    assert result["same_clips"]["jpeg_dense16"]["frames"] == 2 * 8 * 16
    assert result["same_clips"]["jpeg_dense16"]["psnr_db"] > 34
    assert result["quality"]["jpeg"]["psnr_db"] > 34
    speeds = {name: facts["dense16"] for name, facts in result["contenders"].items()}
    assert set(speeds) == {"decord", "ours_jpeg", "bare_jpeg"}
    assert speeds["ours_jpeg"]["frames_decoded_per_frame_used"] == 1.0
    assert speeds["decord"]["frames_decoded_per_frame_used"] > 3
    assert result["sources"]["kbps"] > 50 and len(result["sources"]["kbps_of_each"]) == 4
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_rival_is_named_and_the_rest_goes_on(finished) -> None:
    run = finished[1]
    assert "(d) webdataset + PyAV: not available: no webdataset today" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1])["not_available"] == {"webdataset": "no webdataset today"}


def test_without_decord_it_says_what_to_install(tmp_path: Path) -> None:
    run = bench("--quick", missing=hide(tmp_path, "decord"))
    assert run.returncode == 2
    assert run.stderr.startswith("error: decord") and "make setup" in run.stderr and "Traceback" not in run.stderr


def test_other_clips_are_noticed(finished) -> None:
    setup = Setup(finished[0], ("jpeg",), workers=1, seconds=0)
    assert same_clips(setup, "jpeg", "uniform8")["lowest_db"] > 30
    shards = setup.shards("jpeg")
    one, other = (source_of(setup, shards[i]) for i in (0, 1))
    exchanged = one.read_bytes(), other.read_bytes()
    other.write_bytes(exchanged[0])
    one.write_bytes(exchanged[1])
    try:
        with pytest.raises(ValueError, match=r"only \d+\.\d dB like decord's"):
            same_clips(setup, "jpeg", "uniform8")
    finally:
        one.write_bytes(exchanged[0])
        other.write_bytes(exchanged[1])


def test_rivals_deliver_the_frames_asked_for(tmp_path: Path) -> None:
    data = write_video(tmp_path / "video.mp4", 60, bf="3", g="25").read_bytes()
    wanted = [3, 7, 24, 26, 59, 59]
    for decode in (decord_frames, pyav_frames):
        assert [read_number(frame) for frame in decode(data, wanted)] == wanted


def test_decoded_frames_are_counted_from_the_keyframes(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", 60, bf="3", g="25", sc_threshold="0")
    assert keyframes_of(video) == [0, 25, 50]
    assert decoded_by_seeking([0, 25, 50], [3, 7]) == 8
    assert decoded_by_seeking([0, 25, 50], [7, 3, 26, 26, 59]) == 8 + 2 + 10


def test_transforms_are_the_published_ones() -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (256, 340, 3), np.uint8)
    (crop,) = crop_and_flip([image], (340, 256), (10, 20, 224, 224), True)
    assert np.array_equal(crop, image[20:244, 10:234][:, ::-1])
    clip = normalise([crop, crop]).numpy()
    assert clip.shape == (3, 2, 224, 224)
    expected = ((crop - MEAN) / STD).transpose(2, 0, 1)
    assert np.allclose(clip[:, 1], expected, atol=1e-5)


def test_measuring_leaves_out_the_beginning_and_takes_whole_passes(finished) -> None:
    fetched = []

    def batches():
        while True:
            deadline = time.process_time() + (0.5 if not fetched else 0.01)  # start-up is expensive
            while time.process_time() < deadline:
                pass
            fetched.append(len(fetched))
            yield fetched[-1]

    run = measure(batches(), replace(Setup(finished[0], ("jpeg",), workers=1, seconds=0.05)))
    assert run.clips == 8 * (len(fetched) - 2) and run.clips % 4 == 0
    assert 0.01 <= run.cpu_seconds / (run.clips / 8) < 0.03


def test_ratios_are_medians_over_the_rounds() -> None:
    rounds = {
        ("decord", "dense16"): [Run(10, 1.0, 1.0), Run(10, 2.0, 1.0), Run(10, 1.0, 1.0)],
        ("ours_jpeg", "dense16"): [Run(100, 1.0, 1.0), Run(100, 2.0, 1.0), Run(900, 1.0, 1.0)],
        ("bare_jpeg", "dense16"): [Run(100, 0.5, 1.0)] * 3,
    }
    waste = {"dense16": dict.fromkeys(("decord", "ours_jpeg", "bare_jpeg"), 1.0)}
    result = summarise(["jpeg_dense16"], rounds, waste)
    assert result["ratios"] == {"jpeg_dense16": 10.0}
    assert result["loader_vs_bare"] == {"jpeg_dense16": 0.5}
    assert result["contenders"]["decord"]["dense16"]["clips_per_cpu_second"] == 10.0
