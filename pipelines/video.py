"""Media files in: the frames a player shows, upright. With `encode.py` the only files that import PyAV.

Every file is treated as hostile: only the containers of `_FORMATS` are opened, from bytes or an open file, and no
container can make the demuxer open another file or the network. Frames come out as a player shows them: of the stream
a player picks, edit lists honoured, in display order, with the display matrix to turn them upright. While they are
decoded the file is checked against its own tables, so a file cut short or damaged raises `VideoError` with a reason
instead of giving fewer or grey frames.

Cost on one core: 1080p HEVC about 15 ms a frame to decode. One thread everywhere: parallelism is over videos.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from pipelines.shards import MAX_SIDE

MAX_PIXELS = 2**26  # twice 8K; one frame in 10-bit 4:4:4 is then 400 MB
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"  # demuxers that read one file and nothing else
_FALLBACK_FPS = 25.0  # for a single frame without a rate
_EVERY_PACKET_A_FRAME = ("h264", "hevc")  # in mp4 and mkv; VP8 hides packets, MPEG-4 in AVI packs two frames in one
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Without these flags swscale's RGB is up to 2 too dark on average; with them it is exact to 0.5.
_TO_RGB = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)


class VideoError(ValueError):
    """A video that cannot be used; `reason` is one of `REASONS`."""

    REASONS = (
        "unreadable",  # not one of the accepted containers, or the file cannot be read
        "no_video_stream",
        "unknown_codec",
        "no_frames",
        "encrypted",
        "truncated",  # shorter than its own tables say
        "decode_error",
        "too_large",
    )

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in self.REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        """By default an exception is sent to another process as its message alone."""
        return VideoError, (self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a decoded frame is turned and mirrored to stand upright."""

    quarter_turns: int = 0
    """Counter-clockwise, 0 to 3, as in `numpy.rot90`."""
    mirrored: bool = False
    """Flipped left to right before turning."""

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turns an array [H, W, ...]."""
        if self.mirrored:
            array = array[:, ::-1]
        return np.rot90(array, self.quarter_turns)

    def upright_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as shown of a frame decoded at `width` × `height`; its own inverse."""
        return (height, width) if self.quarter_turns % 2 else (width, height)


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """One frame a player shows."""

    number: int
    """0-based, in display order."""
    seconds: float
    """When it appears, counted from the first one; increasing."""
    picture: av.VideoFrame
    """As decoded: not yet turned, in the source's own format."""


class Reader:
    """One open video: facts about it, and its frames once, in order; see `open_video`."""

    def __init__(self, container: Any, stream: Any, num_bytes: int) -> None:
        self._container = container
        self._stream = stream
        self._num_bytes = num_bytes
        self.orientation = Orientation()
        """Known once the first frame was decoded."""
        self.seconds = 0.0
        """Until the last frame so far ends."""
        self.num_frames = 0

    @property
    def codec(self) -> str:
        return self._stream.codec_context.name

    @property
    def fps(self) -> float:
        """Mean frames per second of the frames decoded so far."""
        return self.num_frames / self.seconds if self.seconds > 0 else self._nominal_fps

    @property
    def tick_seconds(self) -> float:
        """The step that the container's time stamps are rounded to."""
        return float(self._stream.time_base or 0)

    def frames(self) -> Iterator[ShownFrame]:
        """Decodes; after the last frame the file is known to be whole.

        Raises VideoError: `truncated`, `decode_error`, `encrypted`, `no_frames` or `too_large`.
        """
        _check_extent(self._stream, self._num_bytes)
        packet_pts: list[int] = []
        first_pts: int | None = None
        clock = _Clock(1 / self._nominal_fps)
        for picture in self._pictures(packet_pts):
            _check_size(picture.width, picture.height)
            if self.num_frames == 0:
                first_pts = picture.pts
                self.orientation = _orientation(picture)
            last = clock.seconds_of(picture)
            self.num_frames += 1
            self.seconds = last + (last / (self.num_frames - 1) if last > 0 else 1 / self._nominal_fps)
            yield ShownFrame(self.num_frames - 1, last, picture)
        self._check_end(packet_pts, first_pts)

    @property
    def _nominal_fps(self) -> float:
        return float(self._stream.average_rate or _FALLBACK_FPS)

    def _pictures(self, packet_pts: list[int]) -> Iterator[av.VideoFrame]:
        """Demuxes and decodes; notes the time stamp of every packet that should be shown."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.has_sidedata("encryption_info"):
                    raise VideoError("encrypted", "its packets are encrypted")
                if packet.size and not packet.is_discard and packet.pts is not None:
                    packet_pts.append(packet.pts)
                for picture in packet.decode():
                    if picture.is_corrupt:
                        raise VideoError("decode_error", f"the decoder calls frame {self.num_frames} damaged")
                    yield picture
        except av.error.FFmpegError as error:
            text = f"after {self.num_frames} frames: {error.strerror or error}"
            raise VideoError("decode_error", text) from error
        except IndexError as error:  # from PyAV's demuxer
            text = f"after {self.num_frames} frames: a stream begins that its header does not list"
            raise VideoError("decode_error", text) from error

    def _check_end(self, packet_pts: Sequence[int], first_pts: int | None) -> None:
        _check_extent(self._stream, self._num_bytes)  # again: a fragmented mp4 fills its table while it is read
        if self.num_frames == 0:
            raise VideoError("no_frames", f"its header promises {self._stream.frames} frames, none decodes")
        if self.codec not in _EVERY_PACKET_A_FRAME or first_pts is None:
            return
        # Players skip the leading frames of a cut inside a group of pictures; those come before the first shown one.
        expected = sum(pts >= first_pts for pts in packet_pts)
        if self._container.format.name.startswith(("mov", "matroska")) and self.num_frames < expected:
            raise VideoError("decode_error", f"only {self.num_frames} of {expected} frames decode")


class _Clock:
    """Seconds since the first frame, increasing whatever the time stamps do."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._origin: float | None = None
        self._last = 0.0

    def seconds_of(self, picture: av.VideoFrame) -> float:
        if self._origin is None:
            self._origin = picture.time or 0.0
            return 0.0
        seconds = self._last + self._step_seconds if picture.pts is None else picture.time - self._origin
        if seconds < self._last - 1.5 * self._step_seconds:  # another recording appended, with a clock of its own
            seconds = self._last + self._step_seconds
            self._origin = picture.time - seconds
        self._last = max(seconds, self._last + 0.0001)
        return self._last


@contextmanager
def open_video(source: Path | bytes) -> Iterator[Reader]:
    """Opens a video file, or its bytes, for reading. Raises VideoError or, where the file cannot be opened, OSError."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        if num_bytes == 0:
            raise VideoError("unreadable", "the file is empty")
        _check_declared_size(file.read(64), num_bytes)
        if _mp4_is_encrypted(file, num_bytes):
            raise VideoError("encrypted", "its video track is encrypted")
        file.seek(0)
        try:
            container = av.open(
                file,
                "r",
                options={"format_whitelist": _FORMATS, "protocol_whitelist": ""},
                metadata_errors="replace",
            )
        except av.error.FFmpegError as error:
            text = f"not a whole file of a known video container: {error.strerror or error}"
            raise VideoError("unreadable", text) from error
        with container:
            yield Reader(container, _pick_stream(container), num_bytes)


def decode_file(data: bytes, wanted: Sequence[int]) -> NDArray[np.uint8]:
    """Decodes a whole video file up to the last wanted frame.

    `wanted` are frame numbers in display order, sorted, each once. Returns uint8 [n, H, W, 3], RGB, upright; frames
    that change size in mid-stream are scaled to the first one's. Raises VideoError, also for frames past the end.
    """
    _check_wanted(wanted)
    images: list[NDArray[np.uint8]] = []
    with open_video(data) as reader:
        size = None
        for frame in reader.frames():
            size = size or (frame.picture.width, frame.picture.height)
            if frame.number == wanted[len(images)]:
                images.append(_to_rgb(frame.picture, size, reader.orientation))
                if len(images) == len(wanted):
                    return np.stack(images)
        raise VideoError("truncated", f"frame {wanted[len(images)]} is wanted, the video has {reader.num_frames}")


def decode_packets(packets: Sequence[bytes], extradata: bytes, wanted: Sequence[int]) -> NDArray[np.uint8]:
    """Decodes H.264 packets of the h264 profile, the first of them a keyframe.

    `wanted` are positions among `packets`, sorted, each once. Returns uint8 [n, H, W, 3], RGB: the same bits as
    `decode_file` on the stored file. Raises VideoError.
    """
    _check_wanted(wanted)
    if wanted[-1] >= len(packets):
        raise ValueError(f"frame {wanted[-1]} is wanted of {len(packets)} packets")
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    decoder.extradata = extradata
    images: list[NDArray[np.uint8]] = []
    number = 0
    try:
        for packet in (*(av.Packet(data) for data in packets[: wanted[-1] + 1]), None):
            for picture in decoder.decode(packet):
                if picture.is_corrupt:
                    raise VideoError("decode_error", f"the decoder calls frame {number} damaged")
                if len(images) < len(wanted) and number == wanted[len(images)]:
                    images.append(_to_rgb(picture, (picture.width, picture.height), Orientation()))
                number += 1
    except av.error.FFmpegError as error:
        raise VideoError("decode_error", f"after {number} frames: {error.strerror or error}") from error
    if len(images) < len(wanted):
        raise VideoError("decode_error", f"{number} frames came out of {wanted[-1] + 1} packets")
    return np.stack(images)


def _to_rgb(picture: av.VideoFrame, size: tuple[int, int], orientation: Orientation) -> NDArray[np.uint8]:
    rgb = picture.reformat(width=size[0], height=size[1], format="rgb24", interpolation=_TO_RGB, threads=1)
    return np.ascontiguousarray(orientation.apply(rgb.to_ndarray()))  # DALI takes no strided views


def _pick_stream(container: Any) -> Any:
    """The stream a player shows: the default one, the largest of several; a cover picture is none."""
    streams = [s for s in container.streams.video if not s.disposition & _STILL]
    if not streams:
        raise VideoError(
            "no_video_stream",
            f"it holds {len(container.streams)} streams, none of them moving pictures",
        )
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise VideoError("unknown_codec", "there is no decoder for its codec")
    stream = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
    _check_size(stream.width, stream.height)
    stream.codec_context.thread_count = 1
    return stream


def _orientation(picture: av.VideoFrame) -> Orientation:
    """From the display matrix, rounded to quarter turns; a broken matrix counts as none."""
    side_data = cast(Any, picture.side_data).get("DISPLAYMATRIX")  # its type stub does not know this entry
    if side_data is None:
        return Orientation()
    a, b, _, c, d, *_ = (value / 65536 for value in struct.unpack("9i", bytes(side_data)))
    determinant = a * d - b * c
    if determinant == 0:
        return Orientation()
    if determinant < 0:
        a, b = -a, -b
    return Orientation(round(-math.atan2(b, a) / (math.pi / 2)) % 4, determinant < 0)  # the matrix turns clockwise


def _check_size(width: int, height: int) -> None:
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        text = f"{width} x {height} pixels; allowed are {MAX_SIDE} a side and {MAX_PIXELS} in all"
        raise VideoError("too_large", text)


def _check_extent(stream: Any, num_bytes: int) -> None:
    """Every entry of the container's index must lie inside the file."""
    entries = stream.index_entries
    outside = sum(entry.pos + entry.size > num_bytes for entry in entries)
    if outside:
        text = f"{outside} of the {len(entries)} frames in its index lie beyond its end at byte {num_bytes}"
        raise VideoError("truncated", text)


def _check_declared_size(head: bytes, num_bytes: int) -> None:
    """AVI and Matroska say in their first bytes how long they are; an open-ended size (live recording) passes."""
    declared = 0
    if head[:4] == b"RIFF" and len(head) >= 8:
        (size,) = struct.unpack_from("<I", head, 4)
        declared = 8 + size if size < 0xFFFFFFF0 else 0
    elif head[:4] == b"\x1aE\xdf\xa3":
        header_bytes, at = _matroska_size(head, 4)
        at += header_bytes if header_bytes is not None else len(head)
        if head[at : at + 4] == b"\x18S\x80g":
            size, start = _matroska_size(head, at + 4)
            declared = start + size if size is not None else 0
    if declared > num_bytes:
        raise VideoError("truncated", f"its header promises {declared} bytes, it has {num_bytes}")


def _matroska_size(head: bytes, at: int) -> tuple[int | None, int]:
    """Reads a size field: its value (None: unknown) and the position after it."""
    length = 9 - head[at].bit_length() if at < len(head) else 0
    if not 1 <= length <= 8 or at + length > len(head):
        return None, at
    value = int.from_bytes(head[at : at + length], "big") & ((1 << (7 * length)) - 1)
    return (None if value == (1 << (7 * length)) - 1 else value), at + length


def _mp4_is_encrypted(file: Any, num_bytes: int) -> bool:
    """Whether a track's sample entry is `encv`; some decoders turn such data into noise without an error."""
    containers = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
    spans = [(0, num_bytes)]
    for _ in range(10_000):  # boxes; a hostile file may hold more, a video does not
        if not spans:
            break
        start, end = spans.pop()
        if end - start < 8:
            continue
        file.seek(start)
        head = file.read(40)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        header = 16 if size == 1 else 8
        size = int.from_bytes(head[8:16], "big") if size == 1 else size or end - start
        if size < header:
            break
        spans.append((start + size, end))
        if kind in containers:
            spans.append((start + header, min(start + size, end)))
        elif kind == b"stsd" and head[header + 12 : header + 16] == b"encv":
            return True
    return False


def _check_wanted(wanted: Sequence[int]) -> None:
    if not len(wanted) or wanted[0] < 0 or any(b <= a for a, b in pairwise(wanted)):
        raise ValueError(f"wanted frames must be sorted, each once, from 0 on, at least one; got {list(wanted)[:20]}")
