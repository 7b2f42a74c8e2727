"""What the estimate measures, on videos whose frames carry their number; and the program as a user runs it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipelines.encode import FrameChoice, encode_video
from pipelines.plan import ClipOptions
from pipelines.shards import Sample
from tests.shell import call_program
from tests.videos import read_number, write_noise, write_video
from tools import estimate_profile
from tools.estimate_profile import (
    Cost,
    Reading,
    Way,
    choose,
    default_rates,
    psnr,
    read_clips,
    recommend,
    reference_squares,
    store,
    stored_squares,
)


def stored(tmp_path: Path, source: Path, profile: str, fps: str = "source", quality: int = 90) -> Sample:
    video = encode_video(source, profile, choice=FrameChoice.parse(fps), quality=quality)
    return store(video, profile, tmp_path / f"{profile}-{fps.replace('/', '-')}-{quality}")


def test_psnr() -> None:
    image = np.full((4, 6, 3), 100, np.uint8)
    assert psnr(image, image) == 99
    assert psnr(image, image + np.uint8(1)) == pytest.approx(48.13, abs=0.01)  # 20 log10 255
    assert psnr(np.zeros_like(image), np.full_like(image, 255)) == 0
    half = image.copy()
    half[:2] += 2
    assert psnr(image, half) == psnr(half, image) == pytest.approx(48.13 - 3.01, abs=0.01)
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(image, image[:1])


@pytest.mark.parametrize("profile", ["jpeg", "h264"])
@pytest.mark.parametrize("rotation", [0, 90])
def test_the_frames_compared_are_the_same_ones_upright(tmp_path: Path, profile: str, rotation: int) -> None:
    source = write_video(tmp_path / "source.mp4", 40, (96, 96), rotation=rotation)
    sample = stored(tmp_path, source, profile, "source/3")
    found = stored_squares(sample, profile)
    references = reference_squares(source, [sample])[sample.shard]
    numbers = [read_number(square) for square in references]
    assert [read_number(square) for square in found] == numbers
    assert numbers == [0, 3, 6, 12, 15, 18, 21, 24, 27, 33, 36, 39]
    assert min(psnr(a, b) for a, b in zip(found, references, strict=True)) > 30


def test_psnr_follows_quality(tmp_path: Path) -> None:
    source = tmp_path / "noise.mp4"
    source.write_bytes(write_noise(tmp_path, "mp4"))
    decibels = []
    for quality in (1, 60, 100):
        sample = stored(tmp_path, source, "jpeg", quality=quality)
        references = reference_squares(source, [sample])[sample.shard]
        decibels.append(psnr(np.stack(stored_squares(sample, "jpeg")), np.stack(references)))
    assert decibels[0] + 3 < decibels[1] < decibels[2] - 3


def test_squares_of_a_wide_frame_are_its_centre(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mp4", 3, (128, 64))
    sample = stored(tmp_path, source, "jpeg")
    for found, reference in zip(
        stored_squares(sample, "jpeg"), reference_squares(source, [sample])[sample.shard], strict=True
    ):
        assert found.shape == reference.shape == (64, 64, 3)
        assert psnr(found, reference) > 30


@pytest.mark.parametrize(
    ("fps", "sampling", "trouble"),
    [
        ("source", "dense", ""),
        ("source/2", "dense", ""),
        ("source/4", "dense", ""),
        ("source/3", "dense", "uneven"),
        ("source/8", "dense", "repeats"),
        ("7.5", "dense", ""),
        ("10", "dense", "uneven"),
        ("source/4", "uniform", ""),
        ("source/16", "uniform", "repeats"),
    ],
)
def test_rates_that_cannot_serve_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fps: str, sampling: str, trouble: str
) -> None:
    monkeypatch.setattr(estimate_profile, "CPU_SECONDS", 0.0)
    sample = stored(tmp_path, write_video(tmp_path / "source.mp4", 150, (64, 48)), "jpeg", fps)
    reading = read_clips(sample, "jpeg", ClipOptions(num_frames=16, sampling=sampling, interval=4))
    assert reading.trouble(sampling) == trouble
    assert reading.clips == 8 and reading.cpu_seconds > 0
    assert reading.decoded == reading.used  # JPEGs: nothing that is not used


def test_a_short_video_wraps_around_without_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_profile, "CPU_SECONDS", 0.0)
    for num_frames in (1, 6, 50):
        source = write_video(tmp_path / f"{num_frames}.mp4", num_frames, (64, 48))
        video = encode_video(source, "jpeg", choice=FrameChoice.parse("source/4"))
        sample = store(video, "jpeg", tmp_path / str(num_frames))
        assert read_clips(sample, "jpeg", ClipOptions(num_frames=16, interval=4)).trouble("dense") == ""


def test_frames_decoded_for_each_frame_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GOPs of 8: the frames 0, 4, 8, 12 of an h264 sample need 0..4 and 8..12."""
    monkeypatch.setattr(estimate_profile, "CPU_SECONDS", 0.0)
    source = write_video(tmp_path / "source.mp4", 13, (64, 48))
    options = ClipOptions(num_frames=4, interval=4)
    for profile, decoded in (("h264", 10), ("copy", 13)):
        monkeypatch.setattr(estimate_profile, "PLANNED_CLIPS", 1)
        sample = stored(tmp_path, source, profile)
        reading = read_clips(sample, profile, options)  # 13 < 16 frames: every clip starts at 0
        assert (reading.decoded, reading.used) == (decoded, 4)
        assert reading.decoded_per_used == decoded / 4


def cost(num_bytes: int, decibels: float | None, clips: int, still: int = 0) -> Cost:
    reading = Reading(clips=clips, cpu_seconds=1.0, steps=10, still=still)
    return Cost(100, num_bytes, [1.0], [] if decibels is None else [decibels], {"dense": reading})


def test_recommendation() -> None:
    costs = {
        Way("jpeg", "source"): cost(150, 40, 100),
        Way("jpeg", "source/4"): cost(120, 39, 95),
        Way("jpeg", "source/8"): cost(60, 39, 200, still=5),
        Way("h264", "source"): cost(50, 39, 50),
        Way("h264", "source/4"): cost(40, 37, 60),
        Way("copy", "source"): cost(101, None, 2),
    }

    def chosen(min_psnr: float, max_bytes: float) -> str:
        return recommend(costs, "dense", min_psnr, max_bytes).split(",")[0].removeprefix("Recommended: ")

    assert chosen(38, 1.6) == "--profile jpeg --fps source/4"  # 5 % slower than the fastest, and smaller
    assert chosen(39.5, 1.6) == "--profile jpeg --fps source"
    assert chosen(38, 1.1) == "--profile h264 --fps source"
    assert chosen(36, 1.1) == "--profile h264 --fps source/4"
    assert chosen(45, 1.6) == "--profile copy"
    assert "(--profile jpeg --fps source gives 100, but 40.0 dB: try a higher --quality)" in recommend(
        costs, "dense", 45, 1.6
    )
    assert recommend(costs, "dense", 38, 1.6).endswith(
        "the smallest of the fastest at 38 dB or more and at most 1.6 times the source's bytes: 95 dense clips a "
        "CPU-second, 39.0 dB, 1.20 times the bytes."
    )
    assert recommend(costs, "dense", 38, 0.3).startswith(
        "No recommendation: of 6 ways to store, 5 serve dense clips, 4 of these keep 38 dB, none within 0.3 times"
    )


def test_what_is_much_faster_and_nearly_as_good_is_recommended_with_a_higher_quality() -> None:
    slow, fast = Way("hevc", "source/2"), Way("jpeg", "source/2")

    def advice(decibels: float, clips: int, num_bytes: int = 90) -> str:
        return recommend({slow: cost(30, 38.2, 33), fast: cost(num_bytes, decibels, clips)}, "dense", 38, 1.6)

    assert advice(37.2, 265) == (
        "Recommended: --profile jpeg --fps source/2, and a higher --quality to close the gap of 0.8 dB to 38: 265 "
        "dense clips a CPU-second (37.2 dB, 0.90 times the bytes) beside 33 of --profile hevc --fps source/2 (38.2 dB, "
        "0.30 times)."
    )
    for far, no_gain, large in ((36.9, 265, 90), (37.2, 60, 90), (37.2, 265, 170)):
        assert advice(far, no_gain, large).startswith("Recommended: --profile hevc --fps source/2, the fastest")


def test_rates_tried_unless_told() -> None:
    assert default_rates(4) == ["source", "source/2", "source/4"]
    assert default_rates(6) == ["source", "source/2"]
    assert default_rates(1) == ["source"]


def test_choice_of_videos(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    for i in range(20):
        (tmp_path / f"deep/er/{i:02d}.mp4").touch()
    (tmp_path / "notes.txt").touch()
    drawn = choose([tmp_path, tmp_path / "deep"], 5)
    assert len(set(drawn)) == 5 and drawn == sorted(drawn) and drawn == choose([tmp_path, tmp_path / "deep"], 5)
    assert choose([tmp_path / "notes.txt"], 5) == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no videos in .*empty"):
        choose([tmp_path / "empty"], 5)


def estimate(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return call_program(estimate_profile.main, *args)


def test_table_json_and_videos_left_out(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", 70, (96, 64))
    (videos / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out.json"
    options = ("--profiles", "jpeg,h264,copy", "--fps", "source,source/4,source/8", "--json", out)
    run = estimate(videos, "--min-psnr", "20", "--max-bytes", "9x", *options)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"left out: {videos / 'broken.mp4'}: unreadable")
    assert [line.split()[:2] for line in lines[5:12]] == [
        *([profile, fps] for profile in ("jpeg", "h264") for fps in ("source", "source/4", "source/8")),
        ["copy", "source"],
    ]
    assert lines[-1].startswith("Recommended: --profile ")
    document = json.loads(out.read_text())
    assert document["videos"] == [str(videos / "a.mp4")]
    assert list(document["left_out"]) == [str(videos / "broken.mp4")]
    assert document["recommendation"] == lines[-1]
    by_way = {(way["profile"], way["fps"]): way for way in document["ways"]}
    assert by_way["jpeg", "source/4"]["dense"]["decoded_per_used"] == 1
    assert by_way["jpeg", "source/8"]["dense"]["trouble"] == "repeats"
    assert by_way["jpeg", "source"]["stored_bytes"] > 2 * by_way["jpeg", "source/4"]["stored_bytes"]
    assert by_way["h264", "source"]["dense"]["decoded_per_used"] > 1
    assert by_way["h264", "source"]["psnr_db"] > 20
    assert by_way["copy", "source"]["bytes_ratio"] == 1 and by_way["copy", "source"]["psnr_db"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "no such video or folder"),
        (["{tmp}"], "no videos in"),
        (["{tmp}/empty.txt"], "none of the 1 videos can be used"),
        (["{tmp}/empty.txt", "--num-frames", "0"], "num_frames = 0"),
        (["{tmp}/empty.txt", "--profiles", "gif"], "profile 'gif': allowed are"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.txt").touch()
    run = estimate("--profiles", "jpeg", *(text.format(tmp=tmp_path) for text in arguments))
    assert run.returncode == 2
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in run.stderr
