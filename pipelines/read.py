"""Bytes of just the wanted frames, each checked against its checksum before any decoder sees it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from pipelines.shards import Sample, checksum

MAX_OPEN_SHARDS = 128


class CorruptSample(ValueError):
    """Bytes that are not those that were packed; the text says which."""


class ShardReader:
    """Reads byte ranges of shards; keeps the descriptors of the last used ones open. Not for several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def frames(self, sample: Sample, rows: Sequence[int]) -> list[bytes]:
        """The packets of the given rows of the frame table: for the jpeg profile, one JPEG each."""
        table = sample.frames
        packets = []
        for row in rows:
            start = sample.video_offset + int(table.offset[row])
            packets.append(self._read(sample, start, int(table.num_bytes[row]), int(table.checksum[row])))
        return packets

    def video(self, sample: Sample) -> bytes:
        """The whole video member."""
        return self._read(sample, sample.video_offset, sample.video_bytes, sample.checksum)

    def close(self) -> None:
        """Closes all shards."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, sample: Sample, start: int, length: int, expected: int) -> bytes:
        try:
            data = os.pread(self._descriptor(sample.shard), length, start)
        except OSError as error:
            raise CorruptSample(f"{sample.shard.name} cannot be read at byte {start}: {error.strerror}") from error
        if len(data) != length or checksum(data) != expected:
            raise CorruptSample(
                f"{sample.shard.name}, bytes {start}..{start + length}: checksum differs from the one at packing"
            )
        return data

    def _descriptor(self, shard: Path) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(shard, os.O_RDONLY)
        self._open[shard] = descriptor
        return descriptor
