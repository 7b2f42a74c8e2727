"""Which bytes a planned clip needs, and reading them: each checked against its checksum before any decoder sees it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.plan import ClipPlan
from pipelines.shards import FEATURES, Sample, checksum

MAX_OPEN_SHARDS = 128
FILE = "file"
"""The profile of videos that are not packed: each a whole file (see `files.py`)."""
# Ranges no further apart than this are read at once. A read of 20 kB costs 1.8 µs, a byte of a gap 0.06 ns (both from
# the page cache, where a gap of 16 to 32 kB costs as much as a second read; a slow disk fetches it ahead anyway).
MERGED_GAP = 2**14

Packet = tuple[int, int, int]
"""Offset in the shard, bytes, checksum."""


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """Everything a decoder needs for one clip; made from plan and index by `request_clip`, small enough for a pipe.

    A decoder knows nothing else of the set: it opens no manifest and no index.
    """

    profile: str
    shard: Path
    packets: tuple[Packet, ...]
    """jpeg and features the wanted frames; h264 and hevc for each wanted frame all from its keyframe to it, each once;
    copy the whole video member; file none: its decoder reads of the file what it needs."""
    wanted: tuple[int, ...]
    """The distinct frames to decode, ascending: positions among `packets`, or for copy and file among the video's
    frames."""
    order: tuple[int, ...]
    """T positions in `wanted`: which of them each frame of the clip is."""
    width: int
    """Of the stored frames, upright, in pixels."""
    height: int
    box: tuple[int, int, int, int]
    """left, top, width, height."""
    flip: bool
    extradata: bytes


def request_clip(sample: Sample, plan: ClipPlan, profile: str) -> ClipRequest:
    """What to read and decode for a plan of this sample."""
    frames = sorted(set(plan.stored))
    place = {frame: k for k, frame in enumerate(frames)}
    packets: tuple[Packet, ...]
    if profile == FILE:
        packets, wanted = (), tuple(frames)
    elif profile == "copy":
        packets, wanted = ((sample.video_offset, sample.video_bytes, sample.checksum),), tuple(frames)
    else:
        table = sample.frames
        if profile in ("jpeg", FEATURES):
            rows, wanted = frames, tuple(range(len(frames)))
        else:
            rows, wanted = _rows_to_decode(frames, table.keyframe)
        columns = (sample.video_offset + table.offset[rows], table.num_bytes[rows], table.checksum[rows])
        packets = tuple(zip(*(column.tolist() for column in columns), strict=True))
    return ClipRequest(
        profile=profile,
        shard=sample.shard,
        packets=packets,
        wanted=wanted,
        order=tuple([place[frame] for frame in plan.stored]),
        width=sample.width,
        height=sample.height,
        box=plan.box,
        flip=plan.flip,
        extradata=sample.extradata,
    )


def _rows_to_decode(frames: Sequence[int], keyframe: NDArray[np.uint8]) -> tuple[list[int], tuple[int, ...]]:
    """The rows of all packets that these frames need, ascending, and the places of the frames among them.

    Groups of pictures are closed, so a frame needs what lies between its keyframe and itself, and a keyframe may
    follow any frame.
    """
    keyframes = np.flatnonzero(keyframe[: frames[-1] + 1])
    group = np.searchsorted(keyframes, frames, side="right") - 1
    firsts = np.where(group >= 0, keyframes[group], 0).tolist() if len(keyframes) else [0] * len(frames)
    rows: list[int] = []
    wanted = []
    for first, frame in zip(firsts, frames, strict=True):
        rows += range(max(first, rows[-1] + 1) if rows else first, frame + 1)
        wanted.append(len(rows) - 1)
    return rows, tuple(wanted)


class CorruptSample(ValueError):
    """Bytes that are not those that were packed; the text says which."""


class ShardReader:
    """Reads byte ranges of shards; keeps the descriptors of the last used ones open. Not for several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def packets(self, shard: Path, packets: Sequence[Packet]) -> list[memoryview]:
        """The bytes of each packet, views of what was read at once. Raises CorruptSample."""
        views: list[memoryview] = []
        first = 0
        while first < len(packets):
            start = packets[first][0]
            end = start + packets[first][1]
            last = first + 1
            while last < len(packets) and 0 <= packets[last][0] - end <= MERGED_GAP:
                end = packets[last][0] + packets[last][1]
                last += 1
            data = memoryview(self._read(shard, start, end - start))
            for offset, length, expected in packets[first:last]:
                view = data[offset - start : offset - start + length]
                if checksum(view) != expected:
                    raise CorruptSample(
                        f"{shard.name}, bytes {offset}..{offset + length}: checksum differs from the one at packing"
                    )
                views.append(view)
            first = last
        return views

    def close(self) -> None:
        """Closes all shards."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, shard: Path, start: int, length: int) -> bytes:
        try:
            descriptor = self._descriptor(shard)
            data = os.pread(descriptor, length, start)
            while len(data) < length:  # at the end of the file, or more than the 2 GiB that one call gives
                more = os.pread(descriptor, length - len(data), start + len(data))
                if not more:
                    end = os.fstat(descriptor).st_size
                    raise CorruptSample(f"{shard.name} ends at byte {end}, bytes up to {start + length} are needed")
                data += more
        except OSError as error:
            raise CorruptSample(f"{shard.name} cannot be read at byte {start}: {error.strerror}") from error
        return data

    def _descriptor(self, shard: Path) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            while self._open and (len(self._open) >= MAX_OPEN_SHARDS or self._oldest_is_deleted()):
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(shard, os.O_RDONLY)
        self._open[shard] = descriptor
        return descriptor

    def _oldest_is_deleted(self) -> bool:
        """Whether the shard used longest ago was evicted from a cache: while it is open its bytes stay on the disk."""
        return os.fstat(next(iter(self._open.values()))).st_nlink == 0
