"""Packing: the same bytes for any number of workers, every reject with its reason, and nothing half done."""

import errno
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from pipelines.annotations import Listing, Video, list_videos
from pipelines.pack import PackReport, PackSettings, pack_videos, plan_order
from pipelines.shards import ShardSet, ShardWriter
from pipelines.video import decode_file, decode_packets
from tests.videos import read_number, write_video

SETTINGS = {
    "jpeg": PackSettings(profile="jpeg", fps="source/2", short_side=32),
    "h264": PackSettings(profile="h264", fps="source/2"),
    "copy": PackSettings(profile="copy"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good videos in two splits and two classes, and two bad ones."""
    root = tmp_path_factory.mktemp("videos")
    for i, place in enumerate(["train/jump"] * 3 + ["train/run"] * 3 + ["val/jump"] * 2 + ["val/run"]):
        (root / place).mkdir(parents=True, exist_ok=True)
        write_video(root / place / f"clip.{i} (é).mp4", 10 + i)
    (root / "train/run/page.mp4").write_text("<html>")
    whole = write_video(root / "val/jump/cut.mkv", 40).read_bytes()
    (root / "val/jump/cut.mkv").write_bytes(whole[: len(whole) // 2])
    (root / "train/jump/readme.txt").write_text("no video")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same source in every profile, by one worker."""
    root = tmp_path_factory.mktemp("packed")
    for profile, settings in SETTINGS.items():
        pack_videos(source, list_videos(source), root / profile, settings, workers=1)
    return {profile: root / profile for profile in SETTINGS}


@pytest.mark.parametrize("profile", SETTINGS)
def test_same_bytes_for_any_number_of_workers(
    source: Path, packed: dict[str, Path], tmp_path: Path, profile: str
) -> None:
    pack_videos(source, list_videos(source), tmp_path / "out", SETTINGS[profile], workers=3)
    assert contents(tmp_path / "out") == contents(packed[profile])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("profile", SETTINGS)
def test_stored_videos_play_and_say_what_they_are(source: Path, packed: dict[str, Path], profile: str) -> None:
    played = {}
    for tar in packed[profile].glob("*.tar"):
        with tarfile.open(tar) as archive:
            names = archive.getnames()
            for name in (n for n in names if n.endswith(".mp4")):
                key = name.removesuffix(".mp4")
                assert key + ".cls" in names
                facts = json.load(archive.extractfile(key + ".json"))  # type: ignore[arg-type]
                with av.open(archive.extractfile(name)) as container:
                    numbers = [read_number(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
                played[facts["source"]] = (facts, numbers)
    assert len(played) == 9
    facts, numbers = played["train/run/clip.4 (é).mp4"]
    assert numbers == (list(range(14)) if profile == "copy" else list(range(0, 14, 2)))
    expected = {
        "label": 1,
        "label_name": "run",
        "split": "train",
        "profile": profile,
        "frames": len(numbers),
        "source_frames": 14,
        "fps": 30.0 if profile == "copy" else 15.0,
        "source_fps": 30.0,
        "seconds": pytest.approx(14 / 30, abs=1e-5),
    }
    assert {name: facts[name] for name in expected} == expected


@pytest.mark.parametrize("profile", SETTINGS)
def test_the_index_leads_to_the_frames(packed: dict[str, Path], profile: str) -> None:
    shards = ShardSet.open(packed[profile], "train")
    assert shards.classes == ("jump", "run")
    for i in range(len(shards)):
        sample = shards[i]
        data = sample.shard.read_bytes()[sample.video_offset : sample.video_offset + sample.video_bytes]
        last = len(sample.frames) - 1
        image = decode_file(data, [last])[0]
        assert image.shape == (sample.height, sample.width, 3)
        assert read_number(image) == sample.frames.source_frame[last]
        if profile == "h264":
            table = sample.frames
            packets = [data[o : o + n] for o, n in zip(table.offset, table.num_bytes, strict=True)]
            assert (decode_packets(packets, sample.extradata, [last])[0] == image).all()


def test_manifest_and_rejects(packed: dict[str, Path]) -> None:
    manifest = json.loads((packed["jpeg"] / "manifest.json").read_text())
    assert manifest["profile"] == {"name": "jpeg", "fps": "source/2", "short_side": 32, "quality": 90}
    assert {split: entry["samples"] for split, entry in manifest["splits"].items()} == {"train": 6, "val": 3}
    assert manifest["rejected"] == {"truncated": 1, "unreadable": 1}
    assert {"project", "av", "libavcodec"} <= manifest["versions"].keys()
    rejects = [line.split("\t") for line in (packed["jpeg"] / "rejects.tsv").read_text().splitlines()]
    assert rejects[0] == ["path", "reason", "detail"]
    assert [line[:2] for line in rejects[1:]] == [
        ["train/run/page.mp4", "unreadable"],
        ["val/jump/cut.mkv", "truncated"],
    ]


def test_order_is_shuffled_by_the_seed_within_each_split() -> None:
    videos = [Video(Path(f"{i}.mp4"), "a", "val" if i % 3 == 0 else "train") for i in range(60)]
    order = plan_order(videos, 0)
    assert [video.split for video in order] == ["train"] * 40 + ["val"] * 20
    assert sorted(order, key=lambda v: v.path) == sorted(videos, key=lambda v: v.path)
    assert plan_order(videos, 0) == order != plan_order(videos, 1)
    assert order[:40] != [video for video in videos if video.split == "train"]


def test_shards_stay_below_their_limit(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "videos" / name).mkdir(parents=True)
        for i in range(3):
            write_video(tmp_path / "videos" / name / f"{i}.avi", 10, (256, 256), codec="ffv1", pix_fmt="bgr0")
    for path in (tmp_path / "videos").rglob("*.avi"):  # zeros behind the end: players do not mind
        path.write_bytes(path.read_bytes().ljust(400_000, b"\0"))
    settings = PackSettings(profile="copy", max_shard_bytes=1_000_000)
    report = pack_videos(tmp_path / "videos", list_videos(tmp_path / "videos"), tmp_path / "out", settings, workers=2)
    shards = report.shards["train"]
    assert [shard.samples for shard in shards] == [2, 2, 2]
    assert [shard.name for shard in shards] == [f"train-{i:06d}.tar" for i in range(3)]
    assert max(shard.bytes for shard in shards) <= 1_000_000
    assert len(ShardSet.open(tmp_path / "out", "train")) == 6


def with_pipe(tmp_path: Path) -> tuple[Path, Listing, Path]:
    """A source in which one of three videos is a named pipe: whoever opens it waits for a writer."""
    source = tmp_path / "videos"
    (source / "a").mkdir(parents=True)
    write_video(source / "a/0.mp4", 5)
    os.mkfifo(source / "a/1.mp4")
    write_video(source / "a/2.mp4", 5)
    videos = tuple(Video(Path(f"a/{i}.mp4"), "a", "train") for i in range(3))
    return source, Listing(videos, ("a",)), source / "a/1.mp4"


def test_a_worker_that_hangs_costs_one_video(tmp_path: Path) -> None:
    source, listing, _ = with_pipe(tmp_path)
    report = pack_videos(source, listing, tmp_path / "out", PackSettings(timeout_seconds=4), workers=1)
    assert report.samples == {"train": 2}
    assert [(str(path), reject.reason) for path, reject in report.rejects] == [("a/1.mp4", "timeout")]


def test_a_worker_that_dies_costs_one_video(tmp_path: Path) -> None:
    source, listing, _ = with_pipe(tmp_path)
    seed = next(seed for seed in range(99) if plan_order(listing.videos, seed)[1].path == Path("a/1.mp4"))

    def kill_the_worker() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGSEGV)

    def on_video(report: PackReport) -> None:
        if sum(report.samples.values()) == 1 and not report.rejects:  # the pipe is next, and nobody writes to it
            threading.Timer(1.0, kill_the_worker).start()

    report = pack_videos(source, listing, tmp_path / "out", PackSettings(seed=seed), workers=1, on_video=on_video)
    assert report.samples == {"train": 2}
    assert [(str(path), reject.reason) for path, reject in report.rejects] == [("a/1.mp4", "decoder_crash")]
    assert "SIGSEGV" in (tmp_path / "out/rejects.tsv").read_text()


def test_missing_files_are_rejects_too(tmp_path: Path) -> None:
    source, listing, pipe = with_pipe(tmp_path)
    pipe.unlink()
    listing = Listing(listing.videos, ("a",), missing=(Path("a/9.mp4"),))
    report = pack_videos(source, listing, tmp_path / "out", PackSettings(), workers=1)
    assert report.reasons == {"missing": 1, "unreadable": 1}  # one was gone before, one went meanwhile


def test_a_split_without_a_good_video_is_an_error(source: Path, tmp_path: Path) -> None:
    videos = (Video(Path("train/jump/clip.0 (é).mp4"), "a", "train"), Video(Path("train/run/page.mp4"), "b", "val"))
    with pytest.raises(ValueError, match=r"every one of the 1 videos of split val was rejected .*page\.mp4"):
        pack_videos(source, Listing(videos, ("a", "b")), tmp_path / "out", SETTINGS["jpeg"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(source: Path, tmp_path: Path) -> None:
    for name in ("out", ".out.packing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("keep")
        with pytest.raises(FileExistsError, match=f"{name} exists"):
            pack_videos(source, list_videos(source), tmp_path / "out", SETTINGS["jpeg"])
        assert (tmp_path / name / "mine").read_text() == "keep"
        (tmp_path / name / "mine").unlink()
        (tmp_path / name).rmdir()


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(errno.ENOSPC, "No space left"), "no space left for"), (KeyboardInterrupt(), None)],
)
def test_nothing_is_left_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str | None
) -> None:
    def fail_at_the_third(add: Callable[..., None]) -> Callable[..., None]:
        def wrapped(writer: ShardWriter, *args: Any) -> None:
            if len(writer) == 2:
                raise error
            add(writer, *args)

        return wrapped

    monkeypatch.setattr(ShardWriter, "add", fail_at_the_third(ShardWriter.add))
    with pytest.raises(type(error), match=message):
        pack_videos(source, list_videos(source), tmp_path / "out", SETTINGS["copy"], workers=2)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_progress_is_told_after_every_video(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def on_video(report: PackReport) -> None:
        seen.append(sum(report.samples.values()) + len(report.rejects))

    pack_videos(source, list_videos(source), tmp_path / "out", SETTINGS["copy"], workers=2, on_video=on_video)
    assert seen == list(range(1, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "webp"}, "allowed are jpeg, h264, copy"),
        ({"fps": "fast"}, "allowed are 'source'"),
        ({"quality": 0}, "allowed are 1"),
        ({"short_side": 8}, "allowed are 16"),
        ({"max_shard_bytes": 10}, "allowed is 1 MB"),
        ({"seed": -1}, "allowed are 0"),
        ({"profile": "copy", "quality": 90}, "leave out"),
        ({"profile": "copy", "fps": "7.5"}, "leave out"),
        ({"profile": "copy", "short_side": 256}, "leave out"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackSettings(**options)
