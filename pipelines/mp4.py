"""The smallest mp4 around packets that were cut out of a video, for decoders that take files only (DALI's).

ISO/IEC 14496-12 (boxes) and 14496-15 (`avc1`, `hvc1`): one track, one chunk, frames in display order, one tick each.
20 µs a clip; no muxer, no encoder context.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_SAMPLE_ENTRY = {"h264": (b"avc1", b"avcC"), "hevc": (b"hvc1", b"hvcC")}
_MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)  # as it is
_TICKS = 30  # a second; nobody looks at the time


def wrap_packets(packets: Sequence[bytes | memoryview], extradata: bytes, codec: str, size: tuple[int, int]) -> bytes:
    """An mp4 of `packets`, each a frame of `size` (width, height), the first a keyframe.

    `codec` is h264 or hevc, `extradata` its parameter sets as an mp4 holds them (avcC, hvcC).
    """
    head = _box(b"ftyp", b"isom", bytes(4), b"isomiso2mp41")
    sizes = [len(packet) for packet in packets]
    moov_bytes = len(_moov(sizes, extradata, codec, size, first=0))
    moov = _moov(sizes, extradata, codec, size, first=len(head) + moov_bytes + 8)
    return b"".join([head, moov, struct.pack(">I4s", 8 + sum(sizes), b"mdat"), *packets])


def _moov(sizes: Sequence[int], extradata: bytes, codec: str, size: tuple[int, int], *, first: int) -> bytes:
    """The table of contents; `first` is the byte at which the packets begin."""
    count = len(sizes)
    entry, parameters = _SAMPLE_ENTRY[codec]
    picture = _box(
        entry,
        struct.pack(">6xH16xHHIIIH32xHh", 1, *size, 0x480000, 0x480000, 0, 1, 24, -1),  # 72 dpi, no name, 24 bits
        _box(parameters, extradata),
    )
    table = _box(
        b"stbl",
        _box(b"stsd", struct.pack(">4xI", 1), picture),
        _box(b"stts", struct.pack(">4x3I", 1, count, 1)),
        _box(b"stss", struct.pack(">4x2I", 1, 1)),  # keyframes: others than the first need not be known
        _box(b"stsc", struct.pack(">4x4I", 1, 1, count, 1)),
        _box(b"stsz", struct.pack(f">4x2I{count}I", 0, count, *sizes)),
        _box(b"stco", struct.pack(">4x2I", 1, first)),
    )
    data_here = _box(b"dinf", _box(b"dref", struct.pack(">4xI", 1), _box(b"url ", struct.pack(">I", 1))))
    media = _box(
        b"mdia",
        _box(b"mdhd", struct.pack(">12xIIHxx", _TICKS, count, 0x55C4)),  # language: undetermined
        _box(b"hdlr", struct.pack(">8x4s12xx", b"vide")),
        _box(b"minf", _box(b"vmhd", struct.pack(">I8x", 1)), data_here, table),
    )
    track_head = struct.pack(
        ">I8xI4xI16x36sII", 3, 1, count, _MATRIX, size[0] << 16, size[1] << 16
    )  # enabled, in movie
    movie_head = struct.pack(">12xIIIH10x36s24xI", _TICKS, count, 0x10000, 0x100, _MATRIX, 2)
    return _box(b"moov", _box(b"mvhd", movie_head), _box(b"trak", _box(b"tkhd", track_head), media))


def _box(kind: bytes, *contents: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, contents)), kind) + b"".join(contents)
