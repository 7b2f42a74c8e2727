"""Packing: the same bytes for any number of workers, every reject with its reason, and nothing half done."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from pipelines import pack
from pipelines.annotations import Listing, Video, list_videos
from pipelines.pack import PackReport, PackSettings, pack_videos, plan_order
from pipelines.processes import map_isolated
from pipelines.shards import ShardSet, ShardWriter
from pipelines.video import decode_file
from tests.sets import decode_packets
from tests.videos import read_number, write_video

SETTINGS = {
    "jpeg": PackSettings(profile="jpeg", fps="source/2", short_side=32),
    "h264": PackSettings(profile="h264", fps="source/2"),
    "hevc": PackSettings(profile="hevc", fps="source/2"),
    "copy": PackSettings(profile="copy"),
    "copy, not verified": PackSettings(profile="copy", verify=False),
}


@pytest.fixture(scope="module", autouse=True)
def quick_workers() -> Iterator[None]:
    """Workers are forked, which starts them in no time; one test, and the program's own, use those of real runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.processes._SPAWN", multiprocessing.get_context("fork"))
        yield


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
    """The same source with all settings, by one worker."""
    root = tmp_path_factory.mktemp("packed")
    for name, settings in SETTINGS.items():
        pack_videos(source, list_videos(source), root / name, settings, workers=1)
    return {name: root / name for name in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_bytes_for_any_number_of_workers(
    source: Path, packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "jpeg":
        monkeypatch.setattr("pipelines.processes._SPAWN", multiprocessing.get_context("spawn"))
    pack_videos(source, list_videos(source), tmp_path / "out", SETTINGS[name], workers=3)
    assert contents(tmp_path / "out") == contents(packed[name])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", SETTINGS)
def test_stored_videos_play_and_say_what_they_are(packed: dict[str, Path], name: str) -> None:
    profile = SETTINGS[name].profile
    played = {}
    for tar in packed[name].glob("*.tar"):
        with tarfile.open(tar) as archive:
            names = archive.getnames()
            for video in (n for n in names if n.endswith(".mp4")):
                key = video.removesuffix(".mp4")
                assert key + ".cls" in names
                facts = json.load(archive.extractfile(key + ".json"))  # type: ignore[arg-type]
                with av.open(archive.extractfile(video)) as container:
                    numbers = [read_number(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
                played[facts["source"]] = (facts, numbers)
    assert len(played) == 9
    facts, numbers = played["train/run/clip.4 (é).mp4"]
    assert numbers == (list(range(14)) if profile == "copy" else list(range(0, 14, 2)))
    expected = {
        "labels": [1],
        "label_names": ["run"],
        "split": "train",
        "profile": profile,
        "frames": len(numbers),
        "source_frames": 14,
        "fps": 30.0 if profile == "copy" else 15.0,
        "source_fps": 30.0,
        "seconds": pytest.approx(14 / 30, abs=1e-5),
    }
    assert {name: facts[name] for name in expected} == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_the_index_leads_to_the_frames(packed: dict[str, Path], name: str) -> None:
    shards = ShardSet.open(packed[name], "train")
    assert shards.classes == ("jump", "run")
    assert shards.verified == SETTINGS[name].verify
    for i in range(len(shards)):
        sample = shards[i]
        data = sample.shard.read_bytes()[sample.video_offset : sample.video_offset + sample.video_bytes]
        last = len(sample.frames) - 1
        image = decode_file(data, [last])[0]
        assert image.shape == (sample.height, sample.width, 3)
        assert read_number(image) == sample.frames.source_frame[last]
        if name == "h264":
            table = sample.frames
            packets = [data[o : o + n] for o, n in zip(table.offset, table.num_bytes, strict=True)]
            assert (decode_packets(packets, sample.extradata, [last])[0] == image).all()


def test_manifest_and_rejects(packed: dict[str, Path]) -> None:
    manifest = json.loads((packed["jpeg"] / "manifest.json").read_text())
    assert manifest["profile"] == {"name": "jpeg", "fps": "source/2", "short_side": 32, "quality": None}
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
    videos = [Video(Path(f"{i}.mp4"), ("a",), "val" if i % 3 == 0 else "train") for i in range(60)]
    order = plan_order(videos, 0)
    assert [video.split for video in order] == ["train"] * 40 + ["val"] * 20
    assert sorted(order, key=lambda v: v.path) == sorted(videos, key=lambda v: v.path)
    assert plan_order(videos, 0) == order != plan_order(videos, 1)
    assert order[:40] != [video for video in videos if video.split == "train"]


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven videos of 400 kB, two to a shard of `HEAVY`, and two bad ones."""
    root = tmp_path_factory.mktemp("heavy")
    video = write_video(root / "one.avi", 10, (256, 256), codec="ffv1", pix_fmt="bgr0").read_bytes()
    for i, place in enumerate(["train/a"] * 4 + ["train/b"] * 3 + ["val/a"] * 2 + ["val/b"] * 2):
        (root / "videos" / place).mkdir(parents=True, exist_ok=True)
        (root / f"videos/{place}/{i}.avi").write_bytes(video.ljust(400_000 + i, b"\0"))  # players skip such zeros
    for place in ("train/b", "val/a"):
        (root / "videos" / place / "bad.mp4").write_text("<html>")
    return root / "videos"


HEAVY = PackSettings(profile="copy", max_shard_bytes=1_000_000)


@pytest.fixture(scope="module")
def heavy_packed(heavy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing disturbs makes of `heavy`."""
    out = tmp_path_factory.mktemp("heavy_packed") / "out"
    pack_videos(heavy, list_videos(heavy), out, HEAVY)
    return contents(out)


def test_shards_stay_below_their_limit(heavy: Path, tmp_path: Path) -> None:
    report = pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY, workers=2)
    assert [shard.samples for shard in report.shards["train"]] == [2, 2, 2, 1]
    assert [shard.name for shard in report.shards["val"]] == ["val-000000.tar", "val-000001.tar"]
    assert max(shard.bytes for shards in report.shards.values() for shard in shards) <= 1_000_000
    assert len(ShardSet.open(tmp_path / "out", "train")) == 7


def with_pipe(tmp_path: Path) -> tuple[Path, Listing, Path]:
    """A source in which one of three videos is a named pipe: whoever opens it waits for a writer."""
    source = tmp_path / "videos"
    (source / "a").mkdir(parents=True)
    write_video(source / "a/0.mp4", 5)
    os.mkfifo(source / "a/1.mp4")
    write_video(source / "a/2.mp4", 5)
    videos = tuple(Video(Path(f"a/{i}.mp4"), ("a",), "train") for i in range(3))
    return source, Listing(videos, ("a",)), source / "a/1.mp4"


def test_a_worker_that_hangs_costs_one_video(tmp_path: Path) -> None:
    source, listing, _ = with_pipe(tmp_path)
    report = pack_videos(source, listing, tmp_path / "out", PackSettings(timeout_seconds=4), workers=1)
    assert report.samples == {"train": 2}
    assert [(str(path), reject.reason) for path, reject in report.rejects] == [("a/1.mp4", "timeout")]


def test_a_worker_that_dies_costs_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipelines.processes._SPAWN", multiprocessing.get_context("spawn")
    )  # a fork would print pytest's stack
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
    assert report.reasons == {"missing": 2}  # one was gone before, one went meanwhile


def test_a_split_without_a_good_video_is_an_error(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "videos" / split / name).mkdir(parents=True)
            write_video(tmp_path / "videos" / split / name / "0.mp4", 5)
    for name in "ab":
        (tmp_path / "videos/val" / name / "0.mp4").write_text("<html>")
    listing = list_videos(tmp_path / "videos")
    with pytest.raises(
        ValueError, match=r"every one of the 2 videos of split val was rejected \(2 unreadable\)"
    ) as error:
        pack_videos(tmp_path / "videos", listing, tmp_path / "out", SETTINGS["jpeg"])
    rejects = tmp_path / ".out.packing/rejects.tsv"
    for words in (f"listed in {rejects}. Repair", "goes on from 1 finished shards", "--val-fraction", "--restart"):
        assert words in str(error.value)
    assert rejects.read_text().splitlines()[1:] == [
        f"val/{name}/0.mp4\tunreadable\tan HTML page, not a video" for name in "ab"
    ]
    for name in "ab":  # put right, the run goes on
        write_video(tmp_path / "videos/val" / name / "0.mp4", 5)
    report = pack_videos(tmp_path / "videos", listing, tmp_path / "out", SETTINGS["jpeg"])
    assert (report.samples, report.rejects) == ({"train": 2, "val": 2}, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "videos"]


def test_without_any_good_video_the_rejects_are_left_and_any_other_run_may_follow(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/0.mp4").write_text("<html>")
    listing = Listing((Video(Path("0.mp4"), ("a",), "train"),), ("a",))
    with pytest.raises(ValueError, match=r"every one of the 1 videos of split train .* 0\.mp4: unreadable: ") as error:
        pack_videos(tmp_path / "videos", listing, tmp_path / "out", SETTINGS["jpeg"])
    assert "--restart" not in str(error.value) and "--val-fraction" not in str(error.value)
    part = tmp_path / ".out.packing"
    assert "0.mp4\tunreadable" in (part / "rejects.tsv").read_text()
    write_video(tmp_path / "videos/1.mp4", 5)
    other = Listing((Video(Path("1.mp4"), ("a",), "train"),), ("a",))
    pack_videos(tmp_path / "videos", other, tmp_path / "out", SETTINGS["copy"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "videos"]


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


class Stop(BaseException):
    """Ends a run from within."""


def stop_after(videos: int) -> Callable[[PackReport], None]:
    def on_video(report: PackReport) -> None:
        if sum(report.samples.values()) + len(report.rejects) == videos:
            raise Stop

    return on_video


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The videos that were given to workers, appended as runs go on."""
    paths: list[Path] = []

    def wrapped(encode: Any, given: Sequence[Path], **how: Any) -> Iterator[Any]:
        paths.extend(given)
        return map_isolated(encode, given, **how)

    monkeypatch.setattr(pack, "map_isolated", wrapped)
    return paths


@pytest.mark.parametrize("videos", [1, 3, 5, 9, 13])
def test_a_run_that_was_ended_is_continued(
    heavy: Path, heavy_packed: dict[str, bytes], tmp_path: Path, encoded: list[Path], videos: int
) -> None:
    out, part = tmp_path / "out", tmp_path / ".out.packing"
    listing = list_videos(heavy)
    with pytest.raises(Stop):
        pack_videos(heavy, listing, out, HEAVY, workers=2, on_video=stop_after(videos))
    assert not out.exists() and part.exists() == (videos > 2)
    finished = contents(part / "shards") if part.exists() else {}
    assert finished == {name: data for name, data in heavy_packed.items() if name in finished}
    encoded.clear()
    seen: list[int] = []
    report = pack_videos(heavy, listing, out, HEAVY, on_video=lambda r: seen.append(len(r.stored_frames)))
    assert contents(out) == heavy_packed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    kept = sum(name.endswith(".tar") for name in finished)
    assert len(seen) == 13 and 13 - 3 * kept <= len(encoded) <= 13 - 2 * kept
    assert (sum(report.samples.values()), report.reasons) == (11, {"unreadable": 2})
    assert report.bytes_in == sum(path.stat().st_size for path in heavy.rglob("*.avi"))


@pytest.fixture
def unfinished(heavy: Path, tmp_path: Path) -> Path:
    """What a run leaves that was ended at its sixth video: two finished shards."""
    with pytest.raises(Stop):
        pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY, on_video=stop_after(6))
    assert len(list((tmp_path / ".out.packing/shards").glob("*.tar"))) == 2
    return tmp_path / ".out.packing"


def cut_journal(part: Path) -> None:
    path = part / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def spoil_journal(part: Path) -> None:
    with (part / "journal.jsonl").open("ab") as file:
        file.write(b'{"split": "train", "info": {"na')


def spoil_tar(part: Path) -> None:
    path = part / "shards/train-000001.tar"
    path.write_bytes(path.read_bytes()[:5000] + b"!" + path.read_bytes()[5001:])


def lose_index(part: Path) -> None:
    (part / "shards/train-000000.index.safetensors").unlink()


def leave_torn_files(part: Path) -> None:
    (part / "shards/.train-000002.tar.part").write_bytes(b"torn")
    (part / "shards/train-000002.tar").write_bytes(b"complete, but not in the journal")


def lose_header(part: Path) -> None:
    (part / "journal.jsonl").write_bytes(b'{"journal": 1, "profi')


@pytest.mark.parametrize(
    ("damage", "videos_again"),
    [
        (cut_journal, 11),
        (spoil_journal, 8),
        (spoil_tar, 11),
        (lose_index, 13),
        (leave_torn_files, 8),
        (lose_header, 13),
    ],
)
def test_what_is_not_whole_is_made_again(
    heavy: Path,
    heavy_packed: dict[str, bytes],
    unfinished: Path,
    encoded: list[Path],
    damage: Callable[[Path], None],
    videos_again: int,
) -> None:
    damage(unfinished)
    pack_videos(heavy, list_videos(heavy), unfinished.parent / "out", HEAVY)
    assert contents(unfinished.parent / "out") == heavy_packed
    assert abs(len(encoded) - videos_again) <= 1  # a bad video may stand before or after the border of a shard


def test_another_run_is_refused_and_can_be_begun_again(heavy: Path, unfinished: Path) -> None:
    listing, out = list_videos(heavy), unfinished.parent / "out"
    before = contents(unfinished / "shards")
    for settings, changed, message in (
        (replace(HEAVY, seed=1), listing, "seed is 0 there and 1 now"),
        (PackSettings(max_shard_bytes=1_000_000), listing, "profile is copy there and jpeg now"),
        (replace(HEAVY, verify=False), listing, "verify is True there and False now"),
        (HEAVY, replace(listing, videos=listing.videos[1:]), "number of videos is 13 there and 12 now"),
        (HEAVY, replace(listing, classes=("b", "a")), "digest of classes is"),
        (HEAVY, replace(listing, missing=(Path("x"),)), "number of missing files is 0 there and 1 now"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            pack_videos(heavy, changed, out, settings)
        assert "--restart" in str(error.value)
    assert contents(unfinished / "shards") == before
    report = pack_videos(heavy, listing, out, replace(HEAVY, seed=1), restart=True)
    assert sum(report.samples.values()) == 11 and not unfinished.exists()


def test_a_source_that_changed_meanwhile_is_refused(heavy: Path, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(heavy, source)
    listing = list_videos(source)
    with pytest.raises(Stop):
        pack_videos(source, listing, tmp_path / "out", HEAVY, on_video=stop_after(6))
    first = plan_order(listing.videos, 0)[0].path
    with (source / first).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="has changed since it was packed; add --restart"):
        pack_videos(source, listing, tmp_path / "out", HEAVY)


def test_two_at_once_are_told_apart(heavy: Path, tmp_path: Path) -> None:
    def on_video(report: PackReport) -> None:
        with pytest.raises(FileExistsError, match="another program is packing in"):
            pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY, restart=True)

    pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY, on_video=on_video)
    assert len(ShardSet.open(tmp_path / "out", "train")) == 7


def test_killed_at_the_very_end_the_set_is_there(heavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("pipelines.journal.Journal.remove", stop)
        pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.packing"}
    with pytest.raises(FileExistsError, match="out exists"):
        pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_keeps_the_finished_shards(
    heavy: Path, heavy_packed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter._write

    def full(writer: ShardWriter, data: bytes) -> None:
        if "val" in writer._path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, data)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"no space left .*; 4 finished shards are kept in"),
    ):
        patch.setattr(ShardWriter, "_write", full)
        pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY)
    assert not list((tmp_path / ".out.packing/shards").glob(".*"))
    pack_videos(heavy, list_videos(heavy), tmp_path / "out", HEAVY)
    assert contents(tmp_path / "out") == heavy_packed


def test_a_source_that_goes_away_ends_the_run_and_loses_nothing(
    heavy: Path, heavy_packed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.pack._LOST_IN_A_ROW", 3)
    source, listing = tmp_path / "here", list_videos(heavy)
    source.symlink_to(heavy)

    def unmount(report: PackReport) -> None:
        if len(report.stored_frames) == 5 and source.exists():
            source.unlink()

    with pytest.raises(
        OSError, match=r"3 videos in a row cannot be read, .*gone since it was listed.* shards are kept"
    ):
        pack_videos(source, listing, tmp_path / "out", HEAVY, on_video=unmount)
    source.symlink_to(heavy)
    report = pack_videos(source, listing, tmp_path / "out", HEAVY)
    assert report.reasons == {"unreadable": 2}
    assert contents(tmp_path / "out") == heavy_packed


class BadSectors(io.BytesIO):
    """A file on a failing disk: it reads well at first."""

    def read(self, size: int | None = -1) -> bytes:
        if size == -1 or self.tell() > 2000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize("profile", ["jpeg", "copy"])
def test_read_errors_are_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    path = write_video(tmp_path / "clip.avi", 30, codec="mpeg4")
    data = path.read_bytes()
    monkeypatch.setattr(Path, "open", lambda *_: BadSectors(data))
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())
    result = pack._encode(PackSettings(profile=profile), path)
    assert isinstance(result, pack.Reject)
    assert (result.reason, result.detail) == ("read_error", "Input/output error")


def test_progress_is_told_after_every_video(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def on_video(report: PackReport) -> None:
        seen.append(sum(report.samples.values()) + len(report.rejects))

    pack_videos(source, list_videos(source), tmp_path / "out", SETTINGS["copy"], workers=2, on_video=on_video)
    assert seen == list(range(1, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "webp"}, "allowed are jpeg, h264, hevc, copy"),
        ({"fps": "fast"}, "allowed are 'source'"),
        ({"quality": 0}, "allowed are 1"),
        ({"short_side": 8}, "allowed are 16"),
        ({"max_shard_bytes": 10}, "allowed is 1 MB"),
        ({"seed": -1}, "allowed are 0"),
        ({"profile": "copy", "quality": 90}, "leave out"),
        ({"profile": "copy", "fps": "7.5"}, "leave out"),
        ({"profile": "copy", "short_side": 256}, "leave out"),
        ({"profile": "jpeg", "verify": False}, "only copy can leave that out"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackSettings(**options)
