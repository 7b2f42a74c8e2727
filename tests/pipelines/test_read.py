"""Reading byte ranges: right bytes, or a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import read
from pipelines.read import CorruptSample, ShardReader
from tests.sets import open_set


def test_frames_are_their_part_of_the_video(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [9, 5, 12], samples_a_shard=2)
    reader = ShardReader()
    for sample in (shards[i] for i in (2, 0, 1)):
        video = reader.video(sample)
        assert len(video) == sample.video_bytes and video[4:8] == b"ftyp"
        packets = reader.frames(sample, [4, 0])
        for row, packet in zip((4, 0), packets, strict=True):
            start = int(sample.frames.offset[row])
            assert packet == video[start : start + len(packet)] and packet[:2] == b"\xff\xd8"
    reader.close()


def test_changed_cut_and_missing_bytes_are_named(tmp_path: Path) -> None:
    sample = open_set(tmp_path / "set", [6])[0]
    with pytest.raises(CorruptSample, match=r"train-000000.tar, bytes \d+\.\.\d+: checksum differs"):
        ShardReader().video(replace(sample, checksum=sample.checksum ^ 1))
    with pytest.raises(CorruptSample, match="checksum differs"):
        ShardReader().video(replace(sample, video_bytes=10**7))
    with pytest.raises(CorruptSample, match=r"gone.tar cannot be read at byte \d+: No such file"):
        ShardReader().video(replace(sample, shard=tmp_path / "gone.tar"))


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_OPEN_SHARDS", 2)
    shards = open_set(tmp_path / "set", [4] * 5, samples_a_shard=1)
    reader = ShardReader()
    for i in (0, 1, 2, 0, 3, 4, 0):
        reader.video(shards[i])
        assert len(reader._open) <= 2
    reader.close()
    assert not reader._open
