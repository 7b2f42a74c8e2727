"""Storing videos: the three profiles. With `video.py` the only files that import PyAV.

`jpeg` is Motion-JPEG in full-range BT.601, every frame a JPEG of its own; `h264` closed groups of 8 frames, no
B-frames, limited-range BT.601; `copy` the source's own bytes, verified. Colour is BT.601 whatever the source: JPEG
decoders assume it always, hardware video decoders mostly. A source without a colour tag counts as BT.601, limited
range, which is what swscale assumes at every size.

Cost on one core, after decoding: 1080p 4 ms a frame to scale; a 456 × 256 frame 1.5 ms to store as JPEG, 4 ms as
H.264. One thread everywhere: stored bytes depend on the thread count, and parallelism is over videos.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray

from pipelines.annotations import VIDEO_SUFFIXES
from pipelines.shards import EncodedVideo, FrameTable, checksum
from pipelines.video import Orientation, Reader, ShownFrame, VideoError, open_video

MAX_STORED_BYTES = 2**31 - 1  # frame sizes are 32-bit in the index, and a video is held in memory while it is packed

_TICKS = 90_000  # of the stored time stamps, per second
_GOP = 8  # frames from keyframe to keyframe in the h264 profile
_SCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND  # widens its filter when it shrinks: nothing aliases
_LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # of red and blue
_MATRIX_OF_TAG = {1: "bt709", 9: "bt2020", 10: "bt2020"}  # AVColorSpace; others, and no tag, count as BT.601

# quality: (mjpeg qscale, x264 crf), linear in between; the two columns give the same PSNR. Measured on 14 natural clips
# (phones, television, animation; 8 and 10 bit, BT.601, 709 and 2020) at a short side of 256, in RGB against the source
# frames scaled alike: 100 → 43.9 dB and 31 kB a frame as JPEG, 43.8 dB and 16 kB as H.264 at every 4th frame;
# 90 → 41.8 dB, 20 kB and 42.0 dB, 10 kB (worst natural clip 39.3 and 38.7; the one animation 37.8 and 38.7);
# 80 → 40.2 dB, 15 kB; 60 → 38.1 dB, 11 kB; 40 → 35.8 dB, 8 kB; 20 → 32.8 dB, 5 kB; 1 → 30.2 dB, 3.5 kB.
# 90 is the default: the cheapest step at which every natural clip stays above 38 dB in both profiles.
_QUALITY = {
    1: (31.0, 40.0),
    20: (16.0, 35.0),
    40: (8.0, 29.5),
    60: (5.0, 25.5),
    70: (4.0, 23.5),
    80: (3.0, 21.0),
    90: (2.0, 18.0),
    100: (1.0, 14.0),
}
DEFAULT_QUALITY = 90


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
    quality: int = DEFAULT_QUALITY,
) -> EncodedVideo:
    """Reads, verifies and stores one video in the given profile.

    `short_side` in pixels (None: as the source) never enlarges; `quality` is 1 to 100. Both, and `choice`, are for
    jpeg and h264 only. Raises VideoError with a reason, or OSError where the file cannot be opened.
    """
    if profile == "copy":
        return copy_video(path)
    encode = {"jpeg": encode_jpeg, "h264": encode_h264}[profile]
    return encode(path, choice=choice, short_side=short_side, quality=quality)


def encode_jpeg(
    source: Path | bytes,
    *,
    choice: FrameChoice,
    short_side: int | None = None,
    quality: int = DEFAULT_QUALITY,
) -> EncodedVideo:
    """Motion-JPEG in mp4, 4:2:0, full-range BT.601, even sizes; every frame's byte range is one complete JPEG."""
    qscale = round(_interpolate(quality)[0])
    settings = _EncoderSettings(
        codec="mjpeg",
        pix_fmt="yuvj420p",
        full_range=True,
        multiple=2,
        options={"qmin": str(qscale), "qmax": str(qscale), "huffman": "optimal"},
    )
    return _encode(source, settings, choice, short_side)


def encode_h264(
    source: Path | bytes,
    *,
    choice: FrameChoice,
    short_side: int | None = None,
    quality: int = DEFAULT_QUALITY,
) -> EncodedVideo:
    """H.264 in mp4, 8-bit 4:2:0, closed groups of 8 frames, no B-frames, sizes a multiple of 16."""
    options = {
        "crf": f"{_interpolate(quality)[1]:.1f}",
        "preset": "medium",
        "bf": "0",
        "g": str(_GOP),
        "keyint_min": str(_GOP),
        "sc_threshold": "0",
        "x264-params": "open-gop=0:chromaloc=1",  # chroma centred, as `_to_stored` makes it
    }
    settings = _EncoderSettings(codec="libx264", pix_fmt="yuv420p", full_range=False, multiple=16, options=options)
    return _encode(source, settings, choice, short_side)


def copy_video(path: Path) -> EncodedVideo:
    """The source's own bytes, after every frame of them decoded."""
    _check_bytes(path.stat().st_size)
    data = path.read_bytes()
    suffix = path.suffix.lower()
    with open_video(data) as reader:
        width = height = 0
        for frame in reader.frames():
            if frame.number == 0:
                width, height = reader.orientation.upright_size(frame.picture.width, frame.picture.height)
        zeros = np.zeros(reader.num_frames, np.int64)
        return EncodedVideo(
            data=data,
            suffix=suffix.lstrip(".") if suffix in VIDEO_SUFFIXES else "mp4",
            frames=FrameTable(
                offset=zeros,
                num_bytes=zeros.astype(np.int32),
                checksum=zeros.astype(np.uint64),
                source_frame=np.arange(reader.num_frames, dtype=np.int32),
                keyframe=zeros.astype(np.uint8),
            ),
            width=width,
            height=height,
            source_frames=reader.num_frames,
            fps=reader.fps,
            facts={"seconds": round(reader.seconds, 6), "source_codec": reader.codec},
        )


def check_quality(quality: int) -> None:
    """ValueError unless `quality` is on the scale."""
    if not 1 <= quality <= 100:
        raise ValueError(f"quality {quality}: allowed are 1 (smallest files) to 100 (best), default {DEFAULT_QUALITY}")


def library_versions() -> dict[str, str]:
    """Versions of everything that stored bytes depend on."""
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info, **libraries}


@dataclass(frozen=True, slots=True)
class _EncoderSettings:
    codec: str
    pix_fmt: str
    full_range: bool
    multiple: int
    """Both sides are made a multiple of this."""
    options: dict[str, str]


def _encode(
    source: Path | bytes, settings: _EncoderSettings, choice: FrameChoice, short_side: int | None
) -> EncodedVideo:
    sink = io.BytesIO()
    source_frames: list[int] = []
    with open_video(source) as reader, av.open(sink, "w", format="mp4") as container:
        stream = None
        for seconds, frame in _chosen(reader, choice):
            if stream is None:
                size = _stored_size(frame.picture, reader.orientation, short_side, settings.multiple)
                stream = _add_stream(container, settings, size, reader)
            picture = _to_stored(frame.picture, size, settings, reader.orientation)
            picture.pts, picture.time_base = round(seconds * _TICKS), Fraction(1, _TICKS)
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
        extradata=extradata if settings.codec == "libx264" else b"",
        facts={"seconds": round(reader.seconds, 6), "source_codec": reader.codec},
    )


def _add_stream(container: Any, settings: _EncoderSettings, size: tuple[int, int], reader: Reader) -> Any:
    fps = Fraction(min(max(reader.fps, 1.0), 1000.0)).limit_denominator(1001)  # nominal: every frame has a time stamp
    stream = container.add_stream(settings.codec, rate=fps)
    context = stream.codec_context
    context.width, context.height = size
    context.pix_fmt = settings.pix_fmt
    context.time_base = Fraction(1, _TICKS)
    context.thread_count = 1
    context.options = settings.options
    context.color_range = ColorRange.JPEG if settings.full_range else ColorRange.MPEG
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


def _to_stored(
    picture: av.VideoFrame, size: tuple[int, int], settings: _EncoderSettings, orientation: Orientation
) -> av.VideoFrame:
    """Scaled and upright, 8-bit 4:2:0 in BT.601, chroma centred between its four pixels.

    swscale scales, to 16-bit 4:4:4; matrix, range and chroma averaging are done here in float32 because swscale rounds
    chroma down (means off by up to 1.5) and places it left, where JPEG decoders expect it centred (1 dB).
    """
    planes, matrix_name, full = _scaled_planes(picture, orientation.upright_size(*size))
    y, u, v = (orientation.apply(plane) for plane in planes)
    matrix, offset = _matrix_to_bt601(matrix_name, full, settings.full_range)
    offset = offset + np.float32(0.5)  # what is cut to integers below is rounded
    width, height = size
    stored = np.empty((height * 3 // 2, width), np.uint8)  # three planes one after another
    luma = y * matrix[0, 0] + offset[0]
    if matrix[0, 1] or matrix[0, 2]:
        luma += u * matrix[0, 1]
        luma += v * matrix[0, 2]
    np.clip(luma, 0, 255, out=stored[:height], casting="unsafe")
    u, v = _average_fours(u), _average_fours(v)
    for row, plane in zip((1, 2), stored[height:].reshape(2, height // 2, width // 2), strict=True):
        chroma = u * matrix[row, 1] + v * matrix[row, 2] + offset[row]
        np.clip(chroma, 0, 255, out=plane, casting="unsafe")
    return av.VideoFrame.from_ndarray(stored, settings.pix_fmt)


def _scaled_planes(picture: av.VideoFrame, size: tuple[int, int]) -> tuple[list[NDArray[np.uint16]], str, bool]:
    """Y, Cb, Cr [H, W] in 16 bits, whose matrix they are in, and whether they use the full range."""
    is_rgb = picture.format.is_rgb
    scaled = picture.reformat(
        width=size[0],
        height=size[1],
        format="yuv444p16le",
        interpolation=_SCALE,
        threads=1,
        dst_colorspace=Colorspace.ITU601 if is_rgb else None,
        dst_color_range=ColorRange.MPEG if is_rgb else None,
    )
    planes = [np.frombuffer(memoryview(plane), np.uint16).reshape(size[1], -1)[:, : size[0]] for plane in scaled.planes]
    if is_rgb:
        return planes, "bt601", False
    full = picture.color_range == ColorRange.JPEG or picture.format.name.startswith(("yuvj", "gray", "ya"))
    return planes, _MATRIX_OF_TAG.get(int(picture.colorspace), "bt601"), full


def _average_fours(plane: NDArray[np.uint16]) -> NDArray[np.float32]:
    """[H, W] → [H / 2, W / 2]."""
    rows = plane[0::2].astype(np.float32) + plane[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)


@lru_cache
def _matrix_to_bt601(
    source: str, source_full: bool, stored_full: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[3, 3] and [3] that take 16-bit Y, Cb, Cr of `source` to 8-bit ones of BT.601."""

    def to_rgb(name: str) -> NDArray[np.float64]:
        red, blue = _LUMA_WEIGHTS[name]
        green = 1 - red - blue
        of_cb, of_cr = 2 * (1 - blue), 2 * (1 - red)
        return np.array([[1, 0, of_cr], [1, -blue * of_cb / green, -red * of_cr / green], [1, of_cb, 0]])

    def span(full: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # 8-bit steps per unit, and zero
        return (np.array([255, 255, 255]), np.array([0, 128, 128])) if full else (
            np.array([219, 224, 224]), np.array([16, 128, 128])
        )  # fmt: skip

    source_span, source_zero = span(source_full)
    stored_span, stored_zero = span(stored_full)
    matrix = np.linalg.solve(to_rgb("bt601"), to_rgb(source)) * stored_span[:, None] / source_span
    matrix[np.abs(matrix) < 1e-9] = 0
    offset = stored_zero - matrix @ source_zero
    return (matrix / 256).astype(np.float32), offset.astype(np.float32)


def _read_back(data: bytes, source_frames: Sequence[int]) -> tuple[FrameTable, bytes]:
    """The byte ranges and the parameter sets (avcC) from the finished file, where they are final."""
    with av.open(io.BytesIO(data), "r", format="mp4") as container:
        stream = container.streams.video[0]
        extradata = bytes(stream.codec_context.extradata or b"")
        packets = [(p.pos or 0, p.size, p.is_keyframe) for p in container.demux(stream) if p.size]
    assert len(packets) == len(source_frames), (len(packets), len(source_frames))
    table = FrameTable(
        offset=np.array([pos for pos, _, _ in packets], np.int64),
        num_bytes=np.array([size for _, size, _ in packets], np.int32),
        checksum=np.array([checksum(data[pos : pos + size]) for pos, size, _ in packets], np.uint64),
        source_frame=np.asarray(source_frames, np.int32),
        keyframe=np.array([key for _, _, key in packets], np.uint8),
    )
    return table, extradata


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_STORED_BYTES:
        raise VideoError("too_large", f"more than {MAX_STORED_BYTES} bytes to store; cut it into clips")


def _interpolate(quality: int) -> tuple[float, float]:
    check_quality(quality)
    points = list(_QUALITY)
    qscale, crf = zip(*_QUALITY.values(), strict=True)
    return float(np.interp(quality, points, qscale)), float(np.interp(quality, points, crf))
