"""What is asked for of a plan, and reading it: right bytes, or a reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines import read
from pipelines.plan import ClipPlan
from pipelines.read import ClipRequest, CorruptSample, ShardReader, request_clip
from pipelines.shards import Sample
from tests.sets import open_set


def request(sample: Sample, profile: str, stored: tuple[int, ...]) -> ClipRequest:
    plan = ClipPlan(sample.sample_id, 0, frames=stored, stored=stored, box=(3, 5, 40, 30), flip=True)
    return request_clip(sample, plan, profile)


def member(sample: Sample) -> bytes:
    return sample.shard.read_bytes()[sample.video_offset : sample.video_offset + sample.video_bytes]


def test_jpeg_asks_for_the_wanted_frames_alone(tmp_path: Path) -> None:
    sample = open_set(tmp_path / "set", [9])[0]
    asked = request(sample, "jpeg", (7, 2, 2, 5))
    assert (asked.wanted, asked.order, asked.box, asked.flip) == ((0, 1, 2), (2, 0, 0, 1), (3, 5, 40, 30), True)
    table = sample.frames
    for row, packet in zip((2, 5, 7), ShardReader().packets(asked.shard, asked.packets), strict=True):
        assert packet == member(sample)[table.offset[row] : table.offset[row] + table.num_bytes[row]]
        assert packet[:2] == b"\xff\xd8" and packet[-2:] == b"\xff\xd9"


@pytest.mark.parametrize("stored", [(0,), (7,), (8,), (3, 9, 30), (9, 8, 10, 9), (1, 5, 17, 18), tuple(range(31))])
def test_h264_asks_for_the_way_from_the_keyframe_to_each_wanted_frame(tmp_path: Path, stored: tuple[int, ...]) -> None:
    sample = open_set(tmp_path / "set", [31], profile="h264")[0]  # a keyframe at every 8th frame
    asked = request(sample, "h264", stored)
    needed = sorted({row for frame in stored for row in range(frame - frame % 8, frame + 1)})
    assert [packet[0] - sample.video_offset for packet in asked.packets] == sample.frames.offset[needed].tolist()
    assert [needed[k] for k in asked.wanted] == sorted(set(stored))
    assert [needed[asked.wanted[k]] for k in asked.order] == list(stored)
    assert asked.extradata == sample.extradata != b""


def test_without_a_keyframe_the_video_is_decoded_from_its_start(tmp_path: Path) -> None:
    sample = open_set(tmp_path / "set", [5], profile="h264")[0]
    none = replace(sample, frames=replace(sample.frames, keyframe=np.zeros(5, np.uint8)))
    assert len(request(none, "h264", (3,)).packets) == 4


def test_copy_asks_for_the_whole_video(tmp_path: Path) -> None:
    sample = open_set(tmp_path / "set", [9], profile="copy")[0]
    asked = request(sample, "copy", (7, 2, 2, 5))
    assert (asked.wanted, asked.order) == ((2, 5, 7), (2, 0, 0, 1))
    assert ShardReader().packets(asked.shard, asked.packets) == [member(sample)]


def test_neighbours_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train-000000.tar"
    data = np.random.default_rng(0).bytes(200_000)
    path.write_bytes(data)
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def count(descriptor: int, length: int, start: int) -> bytes:
        reads.append((start, length))
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", count)
    far = 3100 + read.MERGED_GAP + 1
    spans = [(100, 1000), (1100, 900), (3000, 100), (far, 50), (far + 50, 0), (10, 20), (15, 10)]
    packets = ShardReader().packets(path, [(o, n, read.checksum(data[o : o + n])) for o, n in spans])
    assert packets == [data[o : o + n] for o, n in spans]
    assert reads == [(100, 3000), (far, 50), (10, 20), (15, 10)]  # back in the file, or over it again: read anew


def test_changed_cut_and_missing_bytes_are_named(tmp_path: Path) -> None:
    sample = open_set(tmp_path / "set", [6])[0]
    good = request(sample, "jpeg", (1, 2, 3))
    first, second, third = good.packets
    reader = ShardReader()
    with pytest.raises(CorruptSample, match=rf"train-000000.tar, bytes {second[0]}..{second[0] + second[1]}: checksum"):
        reader.packets(good.shard, (first, (*second[:2], second[2] ^ 1), third))
    size = good.shard.stat().st_size
    with pytest.raises(CorruptSample, match=rf"train-000000.tar ends at byte {size}, .* {third[0] + 10**7} are needed"):
        reader.packets(good.shard, (first, (third[0], 10**7, 0)))
    with pytest.raises(CorruptSample, match=rf"ends at byte {size}, .* {size + 6} are needed"):
        reader.packets(good.shard, ((size + 5, 1, 0),))
    with pytest.raises(CorruptSample, match=r"gone.tar cannot be read at byte \d+: No such file"):
        reader.packets(tmp_path / "gone.tar", good.packets)
    assert len(reader.packets(good.shard, good.packets)) == 3
    os.truncate(good.shard, third[0] + 1)  # while it is open
    with pytest.raises(CorruptSample, match=f"ends at byte {third[0] + 1}, "):
        reader.packets(good.shard, good.packets)


def test_what_one_read_does_not_give_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux returns at most 2 GiB at a time, a network disk what it likes."""
    path = tmp_path / "train-000000.tar"
    path.write_bytes(bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, start: pread(descriptor, min(length, 7), start))
    assert ShardReader().packets(path, [(3, 50, read.checksum(bytes(range(3, 53))))]) == [bytes(range(3, 53))]


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_OPEN_SHARDS", 2)
    shards = open_set(tmp_path / "set", [4] * 5, samples_a_shard=1)
    reader = ShardReader()
    for i in (0, 1, 2, 0, 3, 4, 0):
        asked = request(shards[i], "jpeg", (0, 3))
        reader.packets(asked.shard, asked.packets)
        assert len(reader._open) <= 2
    reader.close()
    assert not reader._open


def test_a_deleted_shard_is_let_go(tmp_path: Path) -> None:
    """What a cache evicts keeps its place on the disk for as long as somebody has it open."""
    shards = open_set(tmp_path / "set", [4] * 2, samples_a_shard=1)
    reader = ShardReader()
    first, second = (request(shards[i], "jpeg", (0,)) for i in (0, 1))
    reader.packets(first.shard, first.packets)
    first.shard.unlink()
    reader.packets(second.shard, second.packets)
    assert list(reader._open) == [second.shard]
    reader.close()
