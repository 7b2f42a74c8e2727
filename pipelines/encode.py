"""Storing videos: the four profiles. What becomes of colours and sizes on the way is in `colour.py`.

`jpeg` is Motion-JPEG, every frame a JPEG of its own; `h264` and `hevc` are closed groups of 8 frames without B-frames;
`copy` is the source's own bytes, verified. What is encoded is full-range BT.601 whatever the source: JPEG decoders
assume it always, hardware video decoders mostly. A source without a colour tag counts as BT.601, limited range, which
is what swscale assumes at every size.

Cost on one core, after decoding: 1080p 1.6 ms a frame to scale, 340 × 256 0.1 ms to convert and 0.5 ms to store as
JPEG, 3.5 ms as H.264. One thread everywhere: stored bytes depend on the thread count, and parallelism is over videos.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from pipelines.annotations import VIDEO_SUFFIXES
from pipelines.shards import EncodedVideo, FrameTable, checksum
from pipelines.video import Orientation, Reader, ShownFrame, VideoError, open_video

MAX_STORED_BYTES = 2**31 - 1  # frame sizes are 32-bit in the index, and a video is held in memory while it is packed

_TICKS = 90_000  # of the stored time stamps, per second
_TIME_BASE = Fraction(1, _TICKS)
_GOP = 8  # frames from keyframe to keyframe in the h264 and hevc profiles

SIDE_MULTIPLE = {"jpeg": 2, "h264": 16, "hevc": 16}  # both sides are made a multiple of this


class _Quantisers(NamedTuple):
    """What a quality means to each encoder; one row gives the same PSNR with all three."""

    qscale: float
    x264_crf: float
    x265_crf: float


# Linear in between. Measured on the 20 sources of tools/bench_pipeline.py (natural video, 340 × 256, 432 kb/s) at every
# 4th frame, in RGB against the source frames scaled alike; bytes as a part of the source's as JPEG, H.264 and HEVC:
# 100 → 45.6 dB, 3.39, 2.16, 1.82; 90 → 41.3 dB, 1.70, 1.00, 0.88; 80 → 39.5 dB, 1.35, 0.75, 0.64; 75 → 38.9 dB, 1.24,
# 0.68, 0.58; 50 → 36.6 dB, 0.91, 0.46, 0.37; 15 → 32.4 dB, 0.52, 0.22, 0.16; 1 → 30.6 dB, 0.42, 0.15, 0.11. At every
# frame H.264 is 0.6 dB lower, at every 8th 1.2 dB higher: x264 spends more on frames that stay longer.
_QUALITY = {
    1: _Quantisers(31.0, 39.0, 35.5),
    15: _Quantisers(20.0, 35.8, 32.3),
    30: _Quantisers(12.0, 31.9, 28.2),
    50: _Quantisers(8.0, 29.0, 25.1),
    65: _Quantisers(6.0, 26.6, 22.7),
    75: _Quantisers(5.0, 25.3, 21.2),
    83: _Quantisers(4.0, 23.8, 19.7),
    90: _Quantisers(3.0, 21.5, 17.4),
    95: _Quantisers(2.0, 18.3, 14.4),
    100: _Quantisers(1.0, 13.3, 10.0),
}
DEFAULT_QUALITY = 80
"""For pictures stored at about their own size: above 38 dB, JPEG below 1.6 of the source's bytes, H.264 below 1."""
SHRUNK_QUALITY = 90
"""For pictures stored at half their width and height or less, whose detail is finer: 1080p phone clips at a short side
of 256 reach 36 dB at quality 75, 38 dB at 90, at a seventh of the source's bytes."""


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which source frames are stored: every `every`-th one, or by time at `rate` frames per second."""

    every: int = 1
    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> FrameChoice:
        """`source` → all frames, `source/4` → 0, 4, 8 …, `7.5` → the frames shown at k / 7.5 s."""
        match = re.fullmatch(r"source(?:/([1-9]\d{0,5}))?", text)
        if match:
            return cls(every=int(match[1] or 1))
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not 0.001 <= rate <= 1000:
            raise ValueError(
                f"fps {text!r}: allowed are 'source' (every frame), 'source/K' (every K-th, such as source/4) and a "
                "number of frames per second from 0.001 to 1000"
            )
        return cls(rate=rate)


def encode_video(
    path: Path,
    profile: str,
    *,
    choice: FrameChoice,
    short_side: int | None = None,
    quality: int | None = None,
    verify: bool = True,
) -> EncodedVideo:
    """Reads, verifies and stores one video in the given profile.

    What is encoded becomes 8-bit 4:2:0, full-range BT.601, upright, in mp4: jpeg of even sizes, h264 and hevc of
    multiples of 16 in closed groups of 8 frames without B-frames. `short_side` in pixels (None: as the source) never
    enlarges; `quality` is 1 to 100, None: `DEFAULT_QUALITY` or `SHRUNK_QUALITY`. Both, and `choice`, are for the
    profiles that encode; `verify=False`, for copy only, decodes the first frame alone. Raises VideoError with a reason,
    or OSError where the file cannot be read.
    """
    if profile == "copy":
        return copy_video(path, verify=verify)
    return _encode(path, profile, choice, short_side, quality)


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What a profile asks of FFmpeg, at one quality."""

    codec: str
    options: dict[str, str]
    qscale: float | None = None
    """Of Motion-JPEG, 1 (best) to 31; a fraction is reached by taking turns between its neighbours."""


def encoder_settings(profile: str, quality: int) -> EncoderSettings:
    """Of the profiles that encode. Raises ValueError where this PyAV has no encoder for it."""
    quantisers = _interpolate(quality)
    if profile == "jpeg":  # every frame's byte range is one complete JPEG
        first = str(math.floor(quantisers.qscale))
        options = {"huffman": "optimal", "qmin": first, "qmax": first}
        return EncoderSettings("mjpeg", options, quantisers.qscale)
    group = {"bf": "0", "g": str(_GOP), "keyint_min": str(_GOP), "sc_threshold": "0"}
    if profile == "h264":
        options = {
            "crf": f"{quantisers.x264_crf:.1f}",
            "preset": "medium",
            "tune": "fastdecode",  # no CABAC, no deblocking: half the decoding time for a seventh more bytes
            # chromaloc: chroma centred, as `colour.Converter` makes it. The others: at the same bytes 1.2 dB more in
            # RGB than the preset, whose adaptive quantisation and psychovisual decisions favour what people see. mbtree
            # costs 0.1 dB to leave out, but its assembly reads past its tables where the number of macroblocks is no
            # multiple of 16, and the bytes then depend on what lay there.
            "x264-params": "open-gop=0:chromaloc=1:mbtree=0:aq-mode=0:psy=0:chroma-qp-offset=-3:ref=1:me=dia",
        }
        return EncoderSettings("libx264", group | options)
    if "libx265" not in av.codecs_available:
        raise ValueError("profile hevc needs an FFmpeg with libx265, which this PyAV lacks; use profile h264")
    parameters = (
        f"keyint={_GOP}:min-keyint={_GOP}:open-gop=0:scenecut=0:bframes=0:ref=1:repeat-headers=0:chromaloc=1:"
        "aq-mode=0:psy-rd=0:cbqpoffs=-3:crqpoffs=-3:pools=none:frame-threads=1:wpp=0:log-level=none"
    )
    options = {"crf": f"{quantisers.x265_crf:.1f}", "preset": "veryfast", "x265-params": parameters}
    return EncoderSettings("libx265", options)


def copy_video(path: Path, *, verify: bool = True) -> EncodedVideo:
    """The source's own bytes, after every frame of them decoded; without `verify` only the first."""
    _check_bytes(path.stat().st_size)
    data = path.read_bytes()
    suffix = path.suffix.lower()
    with open_video(data) as reader:
        width, height = reader.decode_all() if verify else reader.skim()
        return EncodedVideo(
            data=data,
            suffix=suffix.lstrip(".") if suffix in VIDEO_SUFFIXES else "mp4",
            frames=FrameTable.of_copy(reader.num_frames),
            width=width,
            height=height,
            source_frames=reader.num_frames,
            fps=reader.fps,
            facts={"seconds": round(reader.seconds, 6), "source_codec": reader.codec},
        )


class VideoWriter:
    """An mp4 for people to watch, H.264 without sound, picture by picture; use as a context manager.

    Odd sides grow by a row or column that repeats the last one, for the encoder knows even ones alone. BT.709, limited
    range, as players expect. 1080p takes some 20 ms a picture of one core.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """`fps`: nominal, for every picture has its own time."""
        self._container: Any = av.open(str(path), "w", format="mp4")
        self._fps = Fraction(min(max(fps, 1.0), 1000.0)).limit_denominator(1001)
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def add(self, picture: NDArray[np.uint8], seconds: float) -> None:
        """Appends a picture [H, W, 3], RGB, all of one size, that appears at a time later than the one before."""
        height, width = picture.shape[:2]
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps)
            context = self._stream.codec_context
            context.height, context.width = picture.shape[:2]
            context.pix_fmt, context.time_base = "yuv420p", _TIME_BASE
            context.thread_count = 1
            context.options = {"crf": "20", "preset": "veryfast"}
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
        )
        frame.pts, frame.time_base = round(seconds * _TICKS), _TIME_BASE
        self._container.mux(self._stream.encode(frame))


def check_quality(quality: int) -> None:
    """ValueError unless `quality` is on the scale."""
    if not 1 <= quality <= 100:
        raise ValueError(
            f"quality {quality}: allowed are 1 (smallest files) to 100 (best); the default is {DEFAULT_QUALITY}, or "
            f"{SHRUNK_QUALITY} for videos that are scaled to half or less"
        )


def library_versions() -> dict[str, str]:
    """Versions of everything that stored bytes depend on."""
    libraries = {name: ".".join(map(str, numbers)) for name, numbers in av.library_versions.items()}
    libraries["opencv"] = version("opencv-python-headless")
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info, **libraries}


def _encode(
    source: Path, profile: str, choice: FrameChoice, short_side: int | None, quality: int | None
) -> EncodedVideo:
    from pipelines.colour import STORED_FORMAT, Converter  # not for `copy`, which needs no OpenCV

    sink = io.BytesIO()
    source_frames: list[int] = []
    with open_video(source) as reader, av.open(sink, "w", format="mp4") as container:
        stream = None
        for seconds, frame in _chosen(reader, choice):
            if stream is None:
                size = _stored_size(frame.picture, reader.orientation, short_side, SIDE_MULTIPLE[profile])
                asked = _default_quality(frame.picture, size) if quality is None else quality
                settings = encoder_settings(profile, asked)
                stream = _add_stream(container, settings, size, STORED_FORMAT, reader)
                converter = Converter(frame.picture, size, reader.orientation)
            picture = converter.convert(frame.picture)
            picture.pts, picture.time_base = round(seconds * _TICKS), _TIME_BASE
            if settings.qscale is not None:
                n = len(source_frames)
                qscale = math.floor((n + 1) * settings.qscale) - math.floor(n * settings.qscale)
                stream.codec_context.qmin = stream.codec_context.qmax = qscale
            container.mux(stream.encode(picture))
            source_frames.append(frame.number)
            _check_bytes(sink.tell())
        assert stream is not None  # the first frame is always chosen
        container.mux(stream.encode())
    data = sink.getvalue()
    _check_bytes(len(data))
    frames, extradata = _read_back(data, source_frames)
    return EncodedVideo(
        data=data,
        suffix="mp4",
        frames=frames,
        width=size[0],
        height=size[1],
        source_frames=reader.num_frames,
        fps=reader.fps,
        extradata=b"" if settings.codec == "mjpeg" else extradata,
        facts={"seconds": round(reader.seconds, 6), "source_codec": reader.codec},
    )


def _default_quality(picture: av.VideoFrame, size: tuple[int, int]) -> int:
    return SHRUNK_QUALITY if 4 * size[0] * size[1] <= picture.width * picture.height else DEFAULT_QUALITY


def _add_stream(container: Any, settings: EncoderSettings, size: tuple[int, int], pix_fmt: str, reader: Reader) -> Any:
    fps = Fraction(min(max(reader.fps, 1.0), 1000.0)).limit_denominator(1001)  # nominal: every frame has a time stamp
    stream = container.add_stream(settings.codec, rate=fps)
    context = stream.codec_context
    context.width, context.height = size
    context.pix_fmt = pix_fmt
    context.time_base = _TIME_BASE
    context.thread_count = 1
    context.options = settings.options
    context.color_range = ColorRange.JPEG
    context.colorspace = 6  # AVCOL_SPC_SMPTE170M, BT.601
    return stream


def _chosen(reader: Reader, choice: FrameChoice) -> Iterator[tuple[float, ShownFrame]]:
    """The frames to store, each once, with the time stamp in seconds at which the stored video shows them."""
    if choice.rate is not None:
        yield from _chosen_by_time(reader, choice.rate)
        return
    for frame in reader.frames():
        if frame.number % choice.every == 0:
            yield frame.seconds, frame


def _chosen_by_time(reader: Reader, rate: float) -> Iterator[tuple[float, ShownFrame]]:
    """A frame is shown until the next one appears; it is stored where some k / rate falls in between.

    A source slower than `rate` is stored whole, no frame twice.
    """
    # mkv rounds time stamps to 1 ms: a frame at 67 ms is the one shown at 2/30 s.
    slack = min(reader.tick_seconds, 0.002)
    next_k = 0
    waiting: ShownFrame | None = None
    for frame in reader.frames():
        if waiting is not None:
            k = max(next_k, math.ceil((waiting.seconds - slack) * rate - 1e-9))
            if k < (frame.seconds - slack) * rate - 1e-9 or waiting.number == 0:
                yield k / rate, waiting
                next_k = k + 1
        waiting = frame
    if waiting is not None:
        k = max(next_k, math.ceil((waiting.seconds - slack) * rate - 1e-9))
        if k < (reader.seconds - slack) * rate - 1e-9 or waiting.number == 0:
            yield k / rate, waiting


def _stored_size(
    picture: av.VideoFrame, orientation: Orientation, short_side: int | None, multiple: int
) -> tuple[int, int]:
    """Upright width and height: scaled down to the short side, each to the nearest multiple that does not enlarge."""
    width, height = orientation.upright_size(picture.width, picture.height)
    scale = min(1.0, short_side / min(width, height)) if short_side else 1.0

    def side(pixels: int) -> int:
        nearest = round(pixels * scale / multiple) * multiple
        return max(multiple, nearest if nearest <= pixels else nearest - multiple)

    return side(width), side(height)


def _read_back(data: bytes, source_frames: Sequence[int]) -> tuple[FrameTable, bytes]:
    """The byte ranges and the parameter sets from the finished file, where they are final."""
    with av.open(io.BytesIO(data), "r", format="mp4") as container:
        stream = container.streams.video[0]
        extradata = bytes(stream.codec_context.extradata or b"")
        entries = [(entry.pos, entry.size, entry.is_keyframe) for entry in stream.index_entries]
    assert len(entries) == len(source_frames), (len(entries), len(source_frames))
    table = FrameTable(
        offset=np.array([pos for pos, _, _ in entries], np.int64),
        num_bytes=np.array([size for _, size, _ in entries], np.int32),
        checksum=np.array([checksum(data[pos : pos + size]) for pos, size, _ in entries], np.uint64),
        source_frame=np.asarray(source_frames, np.int32),
        keyframe=np.array([key for _, _, key in entries], np.uint8),
    )
    return table, extradata


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_STORED_BYTES:
        raise VideoError("too_large", f"more than {MAX_STORED_BYTES} bytes to store; cut it into clips")


def _interpolate(quality: int) -> _Quantisers:
    check_quality(quality)
    columns = zip(*_QUALITY.values(), strict=True)
    return _Quantisers(*(float(np.interp(quality, list(_QUALITY), column)) for column in columns))
