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
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Interpolation
from numpy.typing import NDArray

from pipelines.containers import cut_short, last_box_is_cut, mp4_is_encrypted, no_video_at_all
from pipelines.shards import MAX_SIDE

MAX_PIXELS = 2**26  # twice 8K; one frame in 10-bit 4:4:4 is then 400 MB
MAX_FRAMES = 2**20  # 10 hours; a few kB of a hostile file can stand for millions of empty frames
MAX_SECONDS = 43_200  # 12 hours; mp4 cannot store more than 13 between two frames at our 90,000 ticks a second
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"  # demuxers that read one file and nothing else
_DECODED_PIXELS = 2 * MAX_PIXELS  # what decoders may take memory for: a frame may be larger than the header says
_OPEN_OPTIONS = {
    "format_whitelist": _FORMATS,
    "protocol_whitelist": "",  # no container may open anything but its own bytes
    "max_streams": "200",  # each costs a decoder context; a film with all its fonts and subtitles has some 80
    "max_pixels": str(_DECODED_PIXELS),  # while the file is probed
}
_LAST_BOX_IS_CUT = "its last box promises more bytes than there are"
_DECODER_MARGIN = 128  # pixels a side that FFmpeg's decoders add to a frame for alignment
_BT601 = (2, 5, 6)  # AVColorSpace: not said, BT.470BG, SMPTE 170M
_FALLBACK_FPS = 25.0  # for a single frame without a rate
_EVERY_PACKET_A_FRAME = ("h264", "hevc")  # in mp4 and mkv; VP8 hides packets, MPEG-4 in AVI packs two frames in one
_A_FRAME_A_PACKET = (*_EVERY_PACKET_A_FRAME, "vp9", "libdav1d")  # hidden frames share one with a shown one
_STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Without these flags swscale's RGB is up to 2 too dark on average; with them it is exact to 0.5.
_TO_RGB = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)

Bytes = bytes | memoryview


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
        self.times = array("d")
        """When each frame so far appears, in seconds from the first one; increasing."""
        # AVI has a time for every packet but not for the frame in it: shown in another order, frames would jump about.
        self._timed_in_file_order = container.format.name == "avi" and self.codec in _EVERY_PACKET_A_FRAME

    @property
    def codec(self) -> str:
        return self._stream.codec_context.name

    @property
    def num_frames(self) -> int:
        """So far."""
        return len(self.times)

    @property
    def has_a_frame_a_packet(self) -> bool:
        """Whether `skim` counts the frames that decoding gives."""
        return self._in_a_file_with_an_index and self.codec in _A_FRAME_A_PACKET

    @property
    def _in_a_file_with_an_index(self) -> bool:
        return self._container.format.name.startswith(("mov", "matroska"))

    @property
    def fps(self) -> float:
        """Mean frames per second of the frames decoded so far."""
        return self.num_frames / self.seconds if self.seconds > 0 else self.nominal_fps

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
        clock = _Clock(1 / self.nominal_fps)
        for picture in self._pictures(packet_pts):
            _check_size(picture.width, picture.height)
            if self.num_frames == 0:
                first_pts = picture.pts
                self.orientation = _orientation(picture)
            time = packet_pts[self.num_frames] * self.tick_seconds if self._timed_in_file_order else picture.time
            last = clock.tick(time)
            self.times.append(last)
            self._end_at(last)
            yield ShownFrame(self.num_frames - 1, last, picture)
        self._check_end(packet_pts, first_pts)

    def decode_all(self) -> tuple[int, int]:
        """Decodes every frame and keeps none; returns the upright width and height of the first.

        Leaves out the loop filter, which smooths pictures and finds no errors: a sixth of the time.
        """
        context = self._stream.codec_context
        context.options = {**context.options, "skip_loop_filter": "all"}
        size = (0, 0)
        for frame in self.frames():
            if frame.number == 0:
                size = self.orientation.upright_size(frame.picture.width, frame.picture.height)
        return size

    def skim(self) -> tuple[int, int]:
        """Decodes the first frame and counts the others by their packets, which proves nothing of what they hold.

        Returns the upright width and height. Raises VideoError as `frames` does, for less.
        """
        _check_extent(self._stream, self._num_bytes)
        context = self._stream.codec_context
        packet_pts: list[int] = []
        pictures: list[av.VideoFrame] = []
        num_skipped = 0
        with self._explained():
            for packet in self._packets(packet_pts):
                num_skipped += not packet_pts
                if packet.size and not pictures:
                    pictures = packet.decode()
                    if packet_pts and not pictures:
                        pictures = context.decode(None)  # a decoder that reorders would wait for some 20 more frames
                        context.flush_buffers()
        if not pictures:
            self._check_end(packet_pts, None)  # which says why
        picture = pictures[0]
        _check_size(picture.width, picture.height)
        self.orientation = _orientation(picture)
        # Players skip frames that refer to some before the first keyframe; an edit list begins anywhere.
        first_pts = min(packet_pts) if num_skipped else packet_pts[0]
        shown = sorted(pts for pts in packet_pts if pts >= first_pts)
        self.times.extend((pts - first_pts) * self.tick_seconds for pts in shown)
        self._end_at(self.times[-1])
        return self.orientation.upright_size(picture.width, picture.height)

    def _end_at(self, last: float) -> None:
        """Takes note of when the last frame so far appears, in seconds."""
        self.seconds = last + (last / (self.num_frames - 1) if last > 0 else 1 / self.nominal_fps)
        if self.num_frames > MAX_FRAMES or last > MAX_SECONDS:
            text = f"{self.num_frames} frames or more in {last:.0f} s; allowed are {MAX_FRAMES} in {MAX_SECONDS} s"
            raise VideoError("too_large", f"{text}: cut it into clips")

    @property
    def nominal_fps(self) -> float:
        """Frames per second as the file says before any is decoded."""
        return float(self._stream.average_rate or _FALLBACK_FPS)

    def _pictures(self, packet_pts: list[int]) -> Generator[av.VideoFrame]:
        """Demuxes and decodes."""
        with self._explained():
            for packet in self._packets(packet_pts):
                for picture in packet.decode():
                    if picture.is_corrupt:
                        raise VideoError("decode_error", f"the decoder calls frame {self.num_frames} damaged")
                    yield picture

    def _packets(self, packet_pts: list[int]) -> Iterator[Any]:
        """Demuxes; notes the time stamp of every packet that should be shown."""
        with closing(self._container.demux(self._stream)) as packets:  # PyAV leaks a suspended one that is dropped
            for packet in packets:
                if packet.is_keyframe and packet.has_sidedata("encryption_info"):
                    raise VideoError("encrypted", "its packets are encrypted")
                pts = packet.dts if self._timed_in_file_order else packet.pts
                if packet.size and not packet.is_discard and pts is not None:
                    packet_pts.append(pts)
                yield packet

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """PyAV's errors as VideoError."""
        try:
            yield
        except av.error.FFmpegError as error:
            text = f"after {self.num_frames} frames: {error.strerror or error}"
            if not self._stream.width:
                text += f"; its frame size is unknown or above {_DECODED_PIXELS} pixels"
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
        if self._in_a_file_with_an_index and self.num_frames < expected:
            raise VideoError("decode_error", f"only {self.num_frames} of {expected} frames decode")


class _Clock:
    """Seconds since the first frame, increasing whatever the time stamps do."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._origin: float | None = None
        self._last = 0.0

    def tick(self, time: float | None) -> float:
        """When the next frame appears, which says that it does at `time` or does not say."""
        if self._origin is None:
            self._origin = time or 0.0
            return 0.0
        seconds = self._last + self._step_seconds if time is None else time - self._origin
        if time is not None and seconds < self._last - 1.5 * self._step_seconds:
            seconds = self._last + self._step_seconds  # another recording appended, with a clock of its own
            self._origin = time - seconds
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
        cut = cut_short(file, num_bytes)
        if cut is not None:
            raise VideoError("truncated", cut)
        if mp4_is_encrypted(file, num_bytes):
            raise VideoError("encrypted", "its video track is encrypted")
        file.seek(0)
        try:
            container = av.open(file, "r", options=_OPEN_OPTIONS, metadata_errors="replace")
        except av.error.FFmpegError as error:
            if last_box_is_cut(file, num_bytes):
                raise VideoError("truncated", _LAST_BOX_IS_CUT) from error
            known = no_video_at_all(file)
            text = known or f"not a whole file of a known video container: {error.strerror or error}"
            raise VideoError("unreadable", text) from error
        with container:
            try:
                yield Reader(container, _pick_stream(container), num_bytes)
            except VideoError as error:
                if error.reason in ("no_frames", "no_video_stream") and last_box_is_cut(file, num_bytes):
                    raise VideoError("truncated", _LAST_BOX_IS_CUT) from error
                raise


class Yuv420(NamedTuple):
    """A frame as the h264 and hevc profiles store it: 8 bits, full range, BT.601, chroma centred between its four
    luma pixels. Views of the decoder's memory."""

    y: NDArray[np.uint8]
    """[H, W]."""
    cb: NDArray[np.uint8]
    """[⌈H / 2⌉, ⌈W / 2⌉], as is `cr`."""
    cr: NDArray[np.uint8]


def decode_file(data: bytes, wanted: Sequence[int]) -> NDArray[np.uint8]:
    """`file_frames` as one array, uint8 [n, H, W, 3]."""
    return np.stack(list(file_frames(data, wanted)))


def file_frames(
    source: Path | bytes, wanted: Sequence[int], *, on_frame: Callable[[], None] | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Decodes a video file, or its bytes, up to the last wanted frame.

    `wanted` are frame numbers in display order, sorted, each once; `on_frame` is called after every frame decoded.
    Yields uint8 [H, W, 3], RGB, upright, perhaps strided; frames that change size in mid-stream are scaled to the
    first one's. Raises VideoError, also for frames past the end, and OSError where the file cannot be opened.
    """
    _check_wanted(wanted)
    found = 0
    with open_video(source) as reader:
        size = None
        for frame in reader.frames():
            if on_frame is not None:
                on_frame()
            size = size or (frame.picture.width, frame.picture.height)
            if frame.number == wanted[found]:
                yield reader.orientation.apply(to_rgb(frame.picture, size))
                found += 1
                if found == len(wanted):
                    return
        raise VideoError("truncated", f"frame {wanted[found]} is wanted, the video has {reader.num_frames}")


def packet_frames(
    packets: Sequence[Bytes],
    extradata: bytes,
    wanted: Sequence[int],
    *,
    codec: str = "h264",
    size: tuple[int, int] | None = None,
    on_frame: Callable[[], None] | None = None,
) -> Iterator[av.VideoFrame]:
    """Decodes packets of the h264 or hevc profile, in display order, the first of each group a keyframe.

    `wanted` are positions among `packets`, sorted, each once. `size` is the width and height that the frames should
    have: one that is much larger is refused before memory is taken for it. `on_frame` is called after every frame
    decoded. What is yielded holds the bits that decoding the whole file gives. Raises VideoError.
    """
    _check_wanted(wanted)
    if wanted[-1] >= len(packets):
        raise ValueError(f"frame {wanted[-1]} is wanted of {len(packets)} packets")
    decoder = cast(av.VideoCodecContext, av.CodecContext.create(codec, "r"))
    decoder.thread_count = 1
    limit = (size[0] + _DECODER_MARGIN) * (size[1] + _DECODER_MARGIN) if size else MAX_PIXELS
    decoder.options = {"max_pixels": str(limit), "err_detect": "explode"}  # report damage instead of hiding it
    decoder.extradata = extradata
    number = found = 0
    try:
        for position in range(wanted[-1] + 2):
            packet = None  # after the last one: what the decoder still holds
            if position <= wanted[-1]:
                packet = av.Packet(cast(bytes, packets[position]))  # its type stub knows no other buffers
                packet.pts = position
            for picture in decoder.decode(packet):
                if picture.is_corrupt or picture.pts != number:
                    raise VideoError("decode_error", f"the decoder calls frame {number} damaged")
                if on_frame is not None:
                    on_frame()
                number += 1
                if picture.pts == wanted[found]:
                    yield picture
                    found += 1
                    if found == len(wanted):
                        return
    except av.error.FFmpegError as error:
        raise VideoError("decode_error", f"after {number} frames: {error.strerror or error}") from error
    raise VideoError("decode_error", f"{number} frames came out of {wanted[-1] + 1} packets")


def stored_planes(picture: av.VideoFrame) -> Yuv420 | None:
    """The planes of a decoded picture, without a copy; None where it is not as our profiles store it."""
    name = picture.format.name
    full_range = name == "yuvj420p" or (name == "yuv420p" and picture.color_range == ColorRange.JPEG)
    even = picture.width % 2 == picture.height % 2 == 0
    if not (full_range and even and picture.colorspace in _BT601):
        return None
    return Yuv420(*map(plane_view, picture.planes))


def to_rgb(picture: av.VideoFrame, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Any picture as uint8 [H, W, 3], RGB, not turned; scaled to `size` (width, height) if it has another one."""
    width, height = size or (picture.width, picture.height)
    rgb = picture.reformat(width=width, height=height, format="rgb24", interpolation=_TO_RGB, threads=1)
    return cast(NDArray[np.uint8], rgb.to_ndarray())


def plane_view(plane: Any, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
    """One plane of a picture as [H, W], without a copy."""
    values = np.frombuffer(plane, dtype)
    return values.reshape(plane.height, -1)[:, : plane.width]


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
    stream.codec_context.options = {"max_pixels": str(_DECODED_PIXELS)}
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
    if len(entries) > MAX_FRAMES:  # 100 bytes of an mp4 can state any number; looking at all would take minutes
        raise VideoError("too_large", f"its index lists {len(entries)} frames; allowed are {MAX_FRAMES}")
    outside = sum(entry.pos + entry.size > num_bytes for entry in entries)
    if outside:
        text = f"{outside} of the {len(entries)} frames in its index lie beyond its end at byte {num_bytes}"
        raise VideoError("truncated", text)


def _check_wanted(wanted: Sequence[int]) -> None:
    if not len(wanted) or wanted[0] < 0 or any(b <= a for a, b in pairwise(wanted)):
        raise ValueError(f"wanted frames must be sorted, each once, from 0 on, at least one; got {list(wanted)[:20]}")
