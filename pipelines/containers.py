"""What a media container says of itself in its own bytes, before any demuxer sees it: how long it is, and encryption.

Demuxers forgive a file that was cut short and play what is left. The containers that state a length (AVI, Matroska,
mp4, ASF) or consist of parts that do (FLV, Ogg, MPEG-TS) give it away here; a cut that falls between two parts of FLV,
Ogg or MPEG-TS does not show, nor does any in an MPEG program stream. Nothing is decoded, and what is read is bounded
whatever the file says. Layouts: ISO/IEC 14496-12 (mp4), RFC 8794 (EBML), RFC 3533 (Ogg), Adobe FLV 10.1 annex E.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

_MAX_PARTS = 1_000_000  # tags, pages or boxes looked at: hours of video; a hostile file may hold more
_MAX_BOX_BYTES = 2**48  # what says more is no box
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_TS_PACKETS = (188, 192)  # plain, and with a time stamp before each
_MP4_TREE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")  # boxes on the way to a track's sample entries
_MP4_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")


def cut_short(file: BinaryIO, num_bytes: int) -> str | None:
    """What of the file is missing at its end, or None where nothing tells.

    An mp4 is not looked at: players find all frames in many whose last box is cut, see `last_box_is_cut`.
    """
    head = _read(file, 0, 400)
    if head[:4] == b"RIFF" and len(head) >= 8:
        (size,) = struct.unpack_from("<I", head, 4)
        declared = 8 + size if size < 0xFFFFFFF0 else 0  # as good as infinite: a recording that was not closed
    elif head[:4] == b"\x1aE\xdf\xa3":
        declared = _matroska_bytes(head)
    elif head[:16] == _ASF_HEADER and len(head) >= 24:
        declared = _asf_bytes(file, struct.unpack_from("<Q", head, 16)[0])
    elif head[:3] == b"FLV" and len(head) >= 9:
        return _cut_part(file, num_bytes, 4 + int.from_bytes(head[5:9], "big"), 11, _flv_tag_bytes)
    elif head[:4] == b"OggS":
        return _cut_part(file, num_bytes, 0, 27, _ogg_page_bytes)
    else:
        return _cut_packet(head, num_bytes)
    if declared > num_bytes:
        return f"its header promises {declared} bytes, it has {num_bytes}"
    return None


def no_video_at_all(file: BinaryIO) -> str | None:
    """What a file is that stands where a video should, as downloads leave it; None where that is not known."""
    head = _read(file, 0, 400).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "a Git LFS pointer: run git lfs pull"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not a video"
    return None


def last_box_is_cut(file: BinaryIO, num_bytes: int) -> bool:
    """Whether the last top-level box of an mp4 promises more bytes than there are."""
    at = 0
    for at, size, kind, _ in _boxes(file, 0, num_bytes):
        if at == 0 and kind not in _MP4_FIRST:
            return False
        at += size
    return at > num_bytes


def mp4_is_encrypted(file: BinaryIO, num_bytes: int) -> bool:
    """Whether a track's sample entry is `encv`; some decoders turn such data into noise without an error."""
    spans = [(0, num_bytes)]
    boxes = 0
    while spans and boxes < 10_000:
        for at, size, kind, header in _boxes(file, *spans.pop()):
            boxes += 1
            if kind in _MP4_TREE:
                spans.append((at + header, min(at + size, num_bytes)))
            elif kind == b"stsd" and _read(file, at + header + 12, 4) == b"encv":
                return True
            if boxes >= 10_000:
                break
    return False


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, bytes, int]]:
    """Position, size, kind and header bytes of the mp4 boxes that start between two positions."""
    for _ in range(_MAX_PARTS):
        head = _read(file, start, 16)
        if end - start < 8 or len(head) < 8:
            return
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = end - start  # up to the end
        if not header <= size < _MAX_BOX_BYTES:
            return
        yield start, size, head[4:8], header
        start += size


def _cut_part(
    file: BinaryIO, num_bytes: int, start: int, header_bytes: int, bytes_of: Callable[[bytes], int]
) -> str | None:
    """Follows parts from one to the next; `bytes_of` gives the length of the one that begins with 300 bytes, or 0."""
    for _ in range(_MAX_PARTS):
        if start >= num_bytes:
            break
        head = _read(file, start, 300)
        size = bytes_of(head) if len(head) >= header_bytes else num_bytes
        if size == 0:
            return None  # something else follows: players skip it
        if start + size > num_bytes:
            return f"its last part begins at byte {start} and does not end before the file does at {num_bytes}"
        start += size
    return None


def _flv_tag_bytes(head: bytes) -> int:
    known = head[0] & 0x1F in (8, 9, 18)  # sound, pictures, script
    return 11 + int.from_bytes(head[1:4], "big") + 4 if known else 0


def _ogg_page_bytes(head: bytes) -> int:
    segments = head[26]
    return 27 + segments + sum(head[27 : 27 + segments]) if head[:4] == b"OggS" else 0


def _cut_packet(head: bytes, num_bytes: int) -> str | None:
    for size in _TS_PACKETS:
        first = size - 188
        if len(head) > first + size and head[first] == head[first + size] == 0x47 and num_bytes % size:
            return f"its {num_bytes} bytes are no whole number of packets of {size}"
    return None


def _asf_bytes(file: BinaryIO, header_bytes: int) -> int:
    """Up to where header and data reach; 0 for a live recording."""
    if not 24 <= header_bytes < 2**40:
        return 0
    data = _read(file, header_bytes, 24)
    if len(data) < 24:
        return header_bytes + 24
    (data_bytes,) = struct.unpack_from("<Q", data, 16)
    return header_bytes + data_bytes if data_bytes >= 24 else 0


def _matroska_bytes(head: bytes) -> int:
    header_bytes, at = _matroska_size(head, 4)
    at += header_bytes if header_bytes is not None else len(head)
    if head[at : at + 4] != b"\x18S\x80g":
        return 0
    size, start = _matroska_size(head, at + 4)
    return start + size if size is not None else 0


def _matroska_size(head: bytes, at: int) -> tuple[int | None, int]:
    """Reads a size field: its value (None: unknown) and the position after it."""
    length = 9 - head[at].bit_length() if at < len(head) else 0
    if not 1 <= length <= 8 or at + length > len(head):
        return None, at
    value = int.from_bytes(head[at : at + length], "big") & ((1 << (7 * length)) - 1)
    return (None if value == (1 << (7 * length)) - 1 else value), at + length


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
