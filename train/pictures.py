"""Pictures of a run: curves, bars and the confusion matrix as PNG, clips as filmstrips.

Drawn without pyplot, so that nothing of a trainer's process is changed. Names may hold anything: formulas are not
typeset, what a font lacks or nobody can print becomes a box or a question mark.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Line = tuple[str, Sequence[float], Sequence[float]]
"""Its label, x, y."""
MOST_LABELLED = 400
"""Classes whose names still stand beside the confusion matrix; cells of more would make it larger than people open."""
CAPTION = 18
"""Pixels above each row of filmstrips."""
GAP = 4
_SMALLEST_FRAME = 96  # smaller frames are enlarged, so that captions and people can be read
_CURVES_DPI = 150  # on a telephone's 400 pixels the letters of a curve of 5 inches are still 9 pixels high
_LONGEST_NAME = 40  # letters
_LINES = ("-", "--", ":")


def filmstrips(clips: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> Image.Image:
    """Clips [T, H, W, 3] uint8 as rows of one picture, a caption above each."""
    factor = max(1, -(-_SMALLEST_FRAME // clips[0].shape[1]))
    clips = [clip.repeat(factor, 1).repeat(factor, 2) for clip in clips]
    num_frames, height, width = clips[0].shape[:3]
    sheet = Image.new("RGB", (num_frames * (width + GAP), len(clips) * (height + CAPTION + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        top = row * (height + CAPTION + GAP)
        draw.text((2, top + 2), printable(caption), fill="black", font=font)
        for column, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame), (column * (width + GAP), top + CAPTION))
    return sheet


def frame_grid(rows: Sequence[NDArray[np.uint8]], *, side: int) -> Image.Image:
    """Frames [columns, S, S, 3] uint8 of each row, all `side` pixels wide, without captions."""
    columns = len(rows[0])
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, len(rows) * (side + GAP) - GAP), "white")
    for row, frames in enumerate(rows):
        for column, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (column * (side + GAP), row * (side + GAP)))
    return sheet


def draw_curves(
    lines: Sequence[Line], *, title: str, x: str, y: str, marks: Sequence[float] = (), from_zero: bool = False
) -> bytes:
    """A PNG of lines over x, of few points with dots; `marks` are places on x that a red line shows."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (label, places, values) in enumerate(lines):
        dots = "o" if len(places) <= 30 else None
        style = _LINES[number % len(_LINES)]  # lines that lie on one another are all seen
        axes.plot(places, values, style, label=label, marker=dots, markersize=3, color=f"C{number}")
    for mark in marks:
        axes.axvline(mark, color="C3", linewidth=1, alpha=0.6)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if from_zero:
        axes.set_ylim(0, max(1.0, 1.1 * max(value for _, _, values in lines for value in values)))
    if len(lines) > 1:
        axes.legend()
    return _png(figure, _CURVES_DPI)


def draw_bars(groups: Sequence[Sequence[tuple[str, float]]], *, title: str, x: str) -> bytes:
    """A PNG of names with shares (0 to 1) in percent, from above, a gap between groups."""
    entries = [(number, name, share) for number, group in enumerate(groups) for name, share in group]
    places = [row + 0.8 * number for row, (number, _, _) in enumerate(entries)]
    figure = Figure(figsize=(5.2, 0.9 + 0.22 * (places[-1] + 1)), layout="constrained")
    axes = figure.subplots()
    percent = [100 * share for _, _, share in entries]
    bars = axes.barh(places, percent, color="C0")
    axes.bar_label(bars, [f"{value:.0f}" for value in percent], padding=3, fontsize=8)
    axes.set_yticks(places, [shortened(name, 26) for _, name, _ in entries], fontsize=9, parse_math=False)
    axes.set(xlabel=x, xlim=(0, 112))
    figure.suptitle(title, fontsize=12)  # over the names too, which may leave the bars little room
    axes.invert_yaxis()
    return _png(figure, _CURVES_DPI)


def draw_confusion(confusion: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """A PNG of the shares of each row, the names beside it up to `MOST_LABELLED` classes, and the counts in the cells
    of small ones."""
    count = len(names)
    cell = 0.45 if count <= 20 else 0.2 if count <= 100 else 0.1 if count <= MOST_LABELLED else 40 / count  # inches
    grid, size = max(cell * count, 2.2), min(9.0, 65 * cell)  # points: nine tenths of a cell
    shown = [shortened(name) for name in names] if count <= MOST_LABELLED else []
    margin = 0.6 + 0.65 / 72 * size * max(map(len, shown), default=0)
    width, height = margin + grid + 1.2, margin + grid + 0.2
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((margin / width, margin / height, grid / width, grid / height))
    bar = figure.add_axes(((margin + grid + 0.2) / width, margin / height, 0.2 / width, min(grid, 6) / height))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # A mesh: scaling an image of this size to the picture's takes as long again as all the names.
    image = axes.pcolormesh(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.invert_yaxis()
    figure.colorbar(image, cax=bar, label="share of the class's samples")
    axes.set(xlabel="answer", ylabel="truth")
    if shown:
        centres = np.arange(count) + 0.5
        axes.set_xticks(centres, shown, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(centres, shown, fontsize=size, parse_math=False)
    if count <= 20:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(
                column + 0.5, row + 0.5, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=8
            )
    return _png(figure, 120)


def printable(text: str) -> str:
    """On one line; what is no letter or sign (control characters, turns of the writing direction) as a replacement."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def shortened(name: str, letters: int = _LONGEST_NAME) -> str:
    """A name on one line of bearable length."""
    name = printable(name)
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _png(figure: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font does not have
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
