"""Small videos made on the spot whose frames carry their own number, for tests of everything that decodes.

The frame is a 4 × 4 grid of blocks. Twelve hold the number in binary, bright for 1; of the corners only the top left
one is bright, so a frame that was turned or mirrored does not read. Numbers survive scaling and JPEG and H.264 loss.
This is the only test helper that writes media; 30 frames of 96 × 64 take about 10 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

_GRID = 4
_CORNERS = (0, 3, 12, 15)  # cells in reading order; 0 is bright, the others are dark
_CELLS = tuple(cell for cell in range(_GRID * _GRID) if cell not in _CORNERS)  # bit k of the number is _CELLS[k]
MAX_NUMBER = 2 ** len(_CELLS) - 1
_COLORSPACES = {"bt601": (5, 6), "bt709": (1, 1), "bt2020": (9, 9)}  # swscale's number, the stream's tag


def draw_number(
    number: int,
    size: tuple[int, int] = (96, 64),
    dark: Sequence[int] = (16, 16, 16),
    bright: Sequence[int] = (235, 235, 235),
) -> NDArray[np.uint8]:
    """The frame [H, W, 3] in RGB that shows `number` (0 to `MAX_NUMBER`); `size` is width, height in pixels."""
    width, height = size
    bits = np.zeros(_GRID * _GRID, bool)
    bits[0] = True
    bits[list(_CELLS)] = [(number >> bit) & 1 for bit in range(len(_CELLS))]
    rows = np.arange(height) * _GRID // height
    columns = np.arange(width) * _GRID // width
    return np.where(bits.reshape(_GRID, _GRID)[rows][:, columns, None], bright, dark).astype(np.uint8)


def read_number(frame: NDArray[Any]) -> int:
    """The number that a frame [H, W, 3] shows; ValueError where it is unreadable, turned or mirrored."""
    height, width = frame.shape[:2]
    gray = np.asarray(frame, np.float64).mean(axis=2)
    cells = []
    for row in range(_GRID):
        for column in range(_GRID):
            y, x = (2 * row + 1) * height // (2 * _GRID), (2 * column + 1) * width // (2 * _GRID)
            cells.append(gray[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean())
    contrast = max(cells) - min(cells)
    bits = [value > (max(cells) + min(cells)) / 2 for value in cells]
    if contrast < 30 or [bits[corner] for corner in _CORNERS] != [True, False, False, False]:
        raise ValueError(f"no upright number in this frame; blocks: {np.round(cells).astype(int).tolist()}")
    return sum(int(bits[cell]) << bit for bit, cell in enumerate(_CELLS))


def write_video(
    path: Path,
    num_frames: int,
    size: tuple[int, int] = (96, 64),
    fps: int | Fraction = 30,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    colorspace: str | None = None,
    full_range: bool = False,
    rotation: int = 0,
    times: Sequence[float] | None = None,
    skipped: int = 0,
    dark: Sequence[int] = (16, 16, 16),
    bright: Sequence[int] = (235, 235, 235),
    **options: str,
) -> Path:
    """Writes `num_frames` numbered frames to `path`; the container follows from the suffix. Returns the path.

    `colorspace` (bt601, bt709 or bt2020; None: BT.601 without a tag) is both used and written to the file.
    `rotation` in degrees is a display matrix: a player shows the numbers upright, the stored frames are turned.
    `times` in seconds, one a frame, makes the frame rate variable. The first `skipped` frames lie before the start of
    an edit list: players show `num_frames - skipped` frames, from number `skipped` on (mp4 and mov only).
    Further options go to the encoder; libx264 uses B-frames unless `bf="0"`.
    """
    sws, tag = _COLORSPACES[colorspace or "bt601"]
    time_base = Fraction(1, 60_000)  # MPEG-4 takes no finer one
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        turned = rotation % 180 != 0
        stream.width, stream.height = size[::-1] if turned else size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        if colorspace is not None:
            stream.codec_context.colorspace = tag
            stream.codec_context.color_range = 2 if full_range else 1
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            pixels = np.rot90(draw_number(number, size, dark, bright), -rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24").reformat(
                format=pix_fmt, dst_colorspace=sws, dst_color_range=2 if full_range else 1, threads=1
            )
            seconds = times[number] if times is not None else Fraction(number - skipped) / fps
            frame.pts, frame.time_base = round(seconds / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_noise(tmp_path: Path, suffix: str, **options: str) -> bytes:
    """A file of noise, 64 × 64 and 30 frames: large enough to be cut and damaged."""
    path = tmp_path / f"noise.{suffix}"
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4" if suffix == "avi" else "libx264", rate=30)
        stream.width, stream.height = 64, 64
        for _ in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(generator.integers(0, 256, (64, 64, 3), np.uint8))))
        container.mux(stream.encode())
    return path.read_bytes()
