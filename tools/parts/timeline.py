"""What a model says of a video over time: windows through the model, a few numbers kept of each, and the picture.

The picture has pictures of the video, the leading classes' probabilities, and a bar in the colour of the best class. Of
hours of video it shows means of neighbouring windows, no more than it has columns for.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.shards import write_durably
from pipelines.stream import ahead
from pipelines.windows import Window, WindowedVideo
from tools.parts.captions import Label, Span

_COLUMNS = 1200  # of the curves
_PICTURES = 10
_CLASSES = 6  # that get a curve and a colour
_OTHER = "#bbbbbb"

Clips = NDArray[np.uint8]


def classify_windows(
    clips: Generator[tuple[Window, Clips], None, None],
    probabilities: Callable[[torch.Tensor], NDArray[np.float64]],
    micro_batch: int,
) -> Generator[tuple[Window, Clips, NDArray[np.float64]], None, None]:
    """Each window, its middle picture [S, S, 3] and the mean [C] of what the model says of its views. Some
    `micro_batch` of these go through it at once, while the next ones are decoded; `clips` is closed."""

    def batches() -> Iterator[list[tuple[Window, Clips]]]:
        for first in clips:
            more = itertools.islice(clips, max(1, micro_batch // len(first[1])) - 1)
            yield [first, *more]

    with closing(clips), closing(ahead(batches(), 1)) as decoded:
        for batch in decoded:
            views = np.concatenate([views for _, views in batch])
            answers = probabilities(torch.from_numpy(views))
            means = answers.reshape(len(batch), -1, answers.shape[1]).mean(1)
            for (window, views), mean in zip(batch, means, strict=True):
                yield window, views[0, views.shape[1] // 2], mean


class Timeline:
    """What is kept of a video's windows."""

    def __init__(self, names: Sequence[str], video: WindowedVideo) -> None:
        self._names, self._windows, self._seconds = names, len(video.windows), video.facts.seconds
        self.spans: list[Span] = []
        """Every window's labels, up to where the next one is nearer."""
        columns = min(self._windows, _COLUMNS)
        self._sums = np.zeros((columns, len(names)))
        self._counts, self._times = np.zeros((columns, 1)), np.zeros(columns)
        self._best = np.zeros(self._windows, np.int32)
        self._edges = np.zeros(self._windows + 1)
        self._pictures: list[Clips] = []
        centres = [(window.start_seconds + window.end_seconds) / 2 for window in video.windows]
        self._until = [*((a + b) / 2 for a, b in itertools.pairwise(centres)), float("inf")]

    def add(self, window: Window, picture: Clips, probabilities: NDArray[np.float64], labels: Sequence[Label]) -> None:
        """The next window."""
        number = len(self.spans)
        column = number * len(self._sums) // self._windows
        self._sums[column] += probabilities
        self._counts[column] += 1
        self._times[column] += (window.start_seconds + window.end_seconds) / 2
        self._best[number] = probabilities.argmax()
        self._edges[number + 1] = min(self._until[number], self._seconds)
        self.spans.append((self._until[number], list(labels)))
        if number >= len(self._pictures) * self._windows / min(_PICTURES, self._windows):
            self._pictures.append(picture)

    def summary(self) -> str:
        """`12 windows: kickflip 8, ollie 4`."""
        counts = np.bincount(self._best, minlength=len(self._names))
        order = [c for c in np.argsort(-counts, kind="stable")[:_CLASSES] if counts[c]]
        said = ", ".join(f"{self._names[c]} in {counts[c]}" for c in order)
        return f"{self._windows} windows, the best class is {said}"

    def draw(self, path: Path, title: str) -> None:
        """Writes the picture (PNG)."""
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        curves, times = self._sums / self._counts, self._times / self._counts[:, 0]
        leads = np.bincount(self._best, minlength=len(self._names))
        shown = np.lexsort((-curves.max(0), -leads))[:_CLASSES].tolist()
        colours = dict(zip(shown, matplotlib.color_sequences["tab10"], strict=False))
        figure, axes = plt.subplots(
            3, 1, figsize=(14, 6), height_ratios=(1.4, 4, 0.4), layout="constrained", sharex=True
        )
        figure.suptitle(title, parse_math=False)
        width = self._seconds / len(self._pictures)
        for number, picture in enumerate(self._pictures):
            axes[0].imshow(picture, extent=(number * width, (number + 0.97) * width, 0, 1), aspect="auto")
        axes[0].set(ylim=(0, 1), yticks=[])
        style = {"drawstyle": "default", "marker": "o" if len(times) < 60 else "", "markersize": 3}
        for number in shown:
            axes[1].plot(times, curves[:, number], color=colours[number], label=_label(self._names[number]), **style)
        axes[1].set(ylim=(-0.02, 1.02), ylabel="probability")
        axes[1].grid(alpha=0.3)
        legend = axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        starts = np.flatnonzero(np.diff(self._best, prepend=-1))  # of runs of one class
        ends = [*starts[1:].tolist(), self._windows]
        for start, end in zip(starts.tolist(), ends, strict=True):
            left, right = self._edges[start], self._edges[end]
            axes[2].axvspan(left, right, color=colours.get(int(self._best[start]), _OTHER), linewidth=0)
        axes[2].set(xlim=(0, self._seconds), yticks=[], xlabel="seconds", ylabel="best")
        buffer = io.BytesIO()
        with warnings.catch_warnings():  # about names in scripts that the font does not have
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(buffer, format="png", dpi=100)
        plt.close(figure)
        write_durably(path, buffer.getvalue())


def _label(name: str) -> str:
    """A class name on one line of bearable length."""
    name = " ".join(name.split())
    return name if len(name) <= 30 else f"{name[:29]}…"
