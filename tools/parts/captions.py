"""Draws a model's labels on every picture of a video, in a process of its own: the file may be a stranger's.

That process imports this file, so no torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.encode import VideoWriter
from pipelines.stream import ahead, stream_isolated
from pipelines.video import open_video, to_rgb

Label = tuple[str, float]
"""Name and probability."""
Span = tuple[float, Sequence[Label]]
"""Until when in seconds what is shown, the likeliest first."""

_LINES_A_HEIGHT = 18  # of text, in a picture's height
_SMALLEST_TEXT = 9  # pixels


class CaptionTask(NamedTuple):
    """What to draw where."""

    video: Path
    out: Path
    spans: Sequence[Span]


def annotate(video: Path, out: Path, spans: Sequence[Span]) -> Iterator[int]:
    """Writes the video with labels, H.264 of the same size, upright, with the same times, without sound; yields the
    number of each picture written. `out` is there whole or not at all. Raises pipelines.stream.StreamError."""
    part = out.with_name(f".{out.name}.part")
    try:
        with closing(stream_isolated(draw_video, CaptionTask(video.absolute(), part.absolute(), spans))) as numbers:
            yield from ahead(numbers, 1)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def draw_video(task: CaptionTask) -> Iterator[int]:
    """The work: one picture in memory at a time."""
    spans, panel = iter(task.spans), None
    until, labels = next(spans)
    with open_video(task.video) as reader:
        frames = reader.frames()
        first = next(frames)
        size = first.picture.width, first.picture.height
        with VideoWriter(task.out, reader.nominal_fps) as writer:
            for frame in itertools.chain([first], frames):
                picture = reader.orientation.apply(to_rgb(frame.picture, size))
                while frame.seconds >= until and (following := next(spans, None)) is not None:
                    until, labels = following
                    panel = None
                if panel is None:
                    panel = draw_panel(labels, picture.shape[1], picture.shape[0])
                picture = np.ascontiguousarray(picture)
                put(panel, picture)
                writer.add(picture, frame.seconds)
                yield frame.number


def draw_panel(labels: Sequence[Label], width: int, height: int) -> NDArray[np.uint8]:
    """The labels with bars as RGBA [h, w, 4], no larger than the picture that they go onto."""
    text = max(_SMALLEST_TEXT, height // _LINES_A_HEIGHT)
    line = text + text // 2
    rows = min(len(labels), max(1, height // line))
    font = ImageFont.load_default(size=text)
    lines = [f"{100 * share:3.0f} %  {' '.join(name.split())}" for name, share in labels[:rows]]
    wide = int(min(width, max(font.getlength(words) for words in lines) + 2 * text))
    panel = Image.new("RGBA", (wide, min(height, rows * line)), (0, 0, 0, 150))
    draw = ImageDraw.Draw(panel)
    for row, (words, (_, share)) in enumerate(zip(lines, labels, strict=False)):
        top = row * line
        draw.rectangle((0, top + 1, max(0, round(share * wide) - 1), top + line - 2), fill=(40, 110, 200, 210))
        draw.text((text // 2, top + text // 5), words, fill="white", font=font)
    return np.asarray(panel)


def put(panel: NDArray[np.uint8], picture: NDArray[np.uint8]) -> None:
    """Mixes a panel into the upper left corner of a picture [H, W, 3]."""
    height, width = panel.shape[:2]
    corner = picture[:height, :width]
    share = panel[..., 3:].astype(np.uint16)
    corner[:] = (panel[..., :3] * share + corner * (255 - share)) // 255
