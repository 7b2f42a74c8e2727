"""Extraction: every row belongs to its frame, nothing of a set changes but what is stored, a cut run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.annotations import list_videos
from pipelines.extract import ExtractReport, ExtractSettings, extract_features, thinned
from pipelines.features import read_video
from pipelines.loader import ClipLoader
from pipelines.pack import PackSettings, pack_videos
from pipelines.plan import ClipOptions, Order, eval_turns, train_turns
from pipelines.read import ShardReader
from pipelines.shards import ShardSet, read_manifest
from tests.sets import make_set
from tests.videos import read_number, write_video

SIZE, WIDTH = 32, 5
LENGTHS = [70, 9, 150, 33, 1, 64]
WHOLE = ExtractSettings(crop=1.0)


class Stub:
    """An image model whose features are the number that a frame shows (0 where `numbers` is off), and colours."""

    def __init__(self, *, numbers: bool = True, stop_after: int = 10**9, size: int = SIZE) -> None:
        self.source: dict[str, Any] = {"model": "stub", "weights_xxh3": "0123", "width": WIDTH, "size": size}
        self.source |= {"mean": [0.5] * 3, "std": [0.25] * 3}
        self.calls: list[int] = []
        self._numbers, self._stop_after = numbers, stop_after

    def embed_frames(self, frames: Tensor) -> Tensor:
        if len(self.calls) == self._stop_after:
            raise KeyboardInterrupt
        self.calls.append(len(frames))
        numbers = [read_number(frame.numpy()) if self._numbers else 0 for frame in frames]
        colours = frames.double().mean((1, 2))
        return torch.cat([torch.tensor(numbers)[:, None], frames[:, 3, 5, :1], colours], 1)


def extract(folder: Path, out: Path, settings: ExtractSettings = WHOLE, **arguments: Any) -> ExtractReport:
    encoder = arguments.pop("encoder", None) or Stub()
    return extract_features(folder, out, encoder, settings, **arguments)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "set"
    return make_set(folder, LENGTHS, size=(64, 64), splits=("train", "val"), samples_a_shard=2)


@pytest.mark.parametrize(("profile", "every"), [("jpeg", 1), ("h264", 3), ("copy", 7)])
def test_every_row_is_of_its_own_frame(tmp_path: Path, profile: str, every: int) -> None:
    """Also of videos longer than a piece, in batches that hold several videos and parts of them."""
    folder = make_set(tmp_path / "set", LENGTHS, profile=profile, size=(64, 64))
    encoder = Stub()
    report = extract(folder, tmp_path / "out", ExtractSettings(every=every, crop=1.0, batch=50), encoder=encoder)
    of, features = ShardSet.open(folder, "train"), ShardSet.open(tmp_path / "out", "train")
    for sample_id, length in enumerate(LENGTHS):
        array, table = read_video(features[sample_id], ShardReader()), features[sample_id].frames
        assert array[:, 0].tolist() == table.source_frame.tolist() == list(range(0, length, every))
        ours, theirs = features[sample_id], of[sample_id]
        for name in ("key", "labels", "source_frames", "fps"):
            assert getattr(ours, name) == getattr(theirs, name)
    num = sum(-(-length // every) for length in LENGTHS)
    assert (report.frames, report.videos, report.rejects) == (num, 6, [])
    assert sum(encoder.calls) == num and max(encoder.calls) <= 50


@pytest.mark.parametrize(
    ("stored", "every", "left"),
    [("source", 1, "source"), ("source", 4, "source/4"), ("source/4", 2, "source/8"), ("7.5", 2, "3.75")],
)
def test_which_frames_are_left_is_said_as_for_videos(stored: str, every: int, left: str) -> None:
    assert thinned(stored, every) == left


def test_clips_have_the_features_that_their_videos_would_have(packed: Path, tmp_path: Path) -> None:
    """In evaluation the same as computed online; in training of the same frames, in the same order of samples."""
    settings = ExtractSettings(crop=0.875)
    extract(packed, tmp_path / "out", settings, encoder=Stub(numbers=False))
    options = ClipOptions(num_frames=4, interval=3, test_clips=2)
    videos, features = ShardSet.open(packed, "val"), ShardSet.open(tmp_path / "out", "val")
    turns = list(eval_turns(6, 2, micro_batch=4, rank=0, world=1))
    common: dict[str, Any] = {"micro_batch": 4, "size": SIZE, "options": options, "seed": 5}
    with ClipLoader(videos, turns, **common) as online, ClipLoader(features, turns, **common) as cached:
        for clips, rows in zip(online, cached, strict=True):
            computed = Stub(numbers=False).embed_frames(clips.frames.flatten(0, 1)).view(4, 4, WIDTH)
            assert torch.equal(computed.half(), rows.frames) and clips.keys == rows.keys
            assert torch.equal(clips.labels, rows.labels)
    order = Order([2, 2, 2], 5)
    steps = train_turns(order, global_batch=4, micro_batch=4, rank=0, world=1, start_step=0, num_steps=6)
    turns = list(steps)
    with ClipLoader(videos, turns, **common) as online, ClipLoader(features, turns, **common) as cached:
        for clips, rows in zip(online, cached, strict=True):
            assert [plan.frames for plan in clips.plans] == [plan.frames for plan in rows.plans]
            assert clips.turns == rows.turns and not any(plan.flip for plan in rows.plans)


def test_swapped_channels_and_a_manifest_that_says_so(tmp_path: Path) -> None:
    for name in ("red", "more"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        write_video(tmp_path / "videos" / name / "1.mp4", 9, (64, 64), dark=(200, 30, 30), bright=(250, 120, 90))
    pack_videos(tmp_path / "videos", list_videos(tmp_path / "videos"), tmp_path / "set", PackSettings(fps="source/2"))
    seen = {}
    for channels in ("rgb", "bgr"):
        settings = ExtractSettings(every=3, crop=0.75, channels=channels)
        extract(tmp_path / "set", tmp_path / channels, settings, encoder=Stub(numbers=False))
        features = ShardSet.open(tmp_path / channels, "train")
        seen[channels] = read_video(features[0], ShardReader())[:, 2:]
        assert features[0].frames.source_frame.tolist() == [0, 6]
    assert np.array_equal(seen["bgr"], seen["rgb"][:, ::-1]) and not np.array_equal(seen["bgr"], seen["rgb"])
    before, after = read_manifest(tmp_path / "set"), read_manifest(tmp_path / "bgr")
    assert after["features"] == {
        **{"model": "stub", "weights_xxh3": "0123", "width": WIDTH, "size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3},
        **{"channels": "bgr", "crop": 0.75, "source": before["fingerprint"]},
    }
    assert after["profile"] == {"name": "features", "fps": "source/6"}
    assert (after["classes"], after["multi_label"]) == (["more", "red"], False)
    assert (tmp_path / "bgr/rejects.tsv").read_text() == "key\treason\tdetail\n"


def spoil(folder: Path, split: str, sample_id: int) -> None:
    sample = ShardSet.open(folder, split)[sample_id]
    with sample.shard.open("r+b") as file:
        file.seek(sample.video_offset + int(sample.frames.offset[len(sample.frames) - 1]) + 40)
        file.write(b"\xff\xff\xff")


def test_a_damaged_video_is_left_out_and_listed(tmp_path: Path) -> None:
    """One is damaged in its last piece, of one not even the index can be read."""
    folder = make_set(tmp_path / "set", LENGTHS, size=(64, 64), samples_a_shard=3)
    spoil(folder, "train", 2)
    (folder / "train-000001.index.safetensors").write_bytes(b"x" * 999)
    seen = []
    report = extract(folder, tmp_path / "out", on_video=lambda report: seen.append(report.videos))
    features = ShardSet.open(tmp_path / "out", "train")
    assert [features[i].key for i in range(len(features))] == ["000000_numbers", "000001_numbers"]
    assert read_video(features[1], ShardReader())[:, 0].tolist() == list(range(9))
    lines = (tmp_path / "out/rejects.tsv").read_text().splitlines()[1:]
    assert lines[0].startswith("000002_numbers\tunreadable\tCorruptSample: train-000000.tar")
    assert lines[1].startswith("number 3 of split train\tbad_index\t") and len(lines) == 4
    assert seen == [1, 2, 3, 4, 5, 6] and len(report.rejects) == 4
    assert read_manifest(tmp_path / "out")["rejected"] == {"bad_index": 3, "unreadable": 1}


def test_a_split_without_a_sound_video_ends_it(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [5, 9], size=(64, 64))
    for sample_id in range(2):
        spoil(folder, "train", sample_id)
    with pytest.raises(ValueError, match=r"every one of the 2 videos of split train .* last, 000001_numb"):
        extract(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_broken_disk_ends_it_and_what_is_finished_is_kept(packed: Path, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [2] * 30, size=(64, 64), samples_a_shard=5)
    for tar in sorted(folder.glob("*.tar"))[1:]:
        tar.unlink()
    with pytest.raises(OSError, match=r"20 videos of .* in a row cannot be read .*1 finished shards are kept"):
        extract(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.packing").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_cut_goes_on_and_ends_with_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    settings = ExtractSettings(crop=1.0, batch=48)
    whole = Stub()
    extract(packed, tmp_path / "whole", settings, encoder=whole, workers=2)
    out = tmp_path / "out"
    for stop_after in (3, 5):
        cut = Stub(stop_after=stop_after)
        with pytest.raises(KeyboardInterrupt):
            extract(packed, out, settings, encoder=cut)
        assert not out.exists()
    with pytest.raises(ValueError, match=r"crop is 1.0 there and 0.5 now"):
        extract(packed, out, replace(settings, crop=0.5))
    last = Stub()
    report = extract(packed, out, settings, encoder=last)
    assert files(out) == files(tmp_path / "whole") and len(last.calls) < len(whole.calls)
    assert report.videos == 12 and report.frames == 2 * sum(LENGTHS)
    with pytest.raises(FileExistsError, match="exists"):
        extract(packed, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    with pytest.raises(ValueError, match=r"out holds no videos"):
        extract(out, tmp_path / "again")


def test_answers_that_are_no_numbers_end_it(packed: Path, tmp_path: Path) -> None:
    class Broken(Stub):
        def embed_frames(self, frames: Tensor) -> Tensor:
            return torch.full((len(frames), WIDTH), 70_000.0)  # more than float16 holds

    with pytest.raises(ValueError, match=r"no finite float16 numbers of 000000_numbers"):
        extract(packed, tmp_path / "out", encoder=Broken())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every 0-th"),
        ({"channels": "gbr"}, "allowed are rgb and bgr"),
        ({"crop": 0.0}, "crop 0.0"),
        ({"batch": 0}, "batch 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractSettings(**settings)
