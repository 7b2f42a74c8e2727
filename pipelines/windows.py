"""A long video in windows of time, each cut into clips as evaluation cuts a video that holds nothing else.

The frames of a window are those on display in it, by the container's own time stamps, so a variable rate counts as a
player shows it and a window in which nothing changes still has a frame. Two passes: the first reads when each frame
appears (without decoding, where packets tell), the second decodes the file once from end to end, in a process of its
own, crops and resizes the frames that are wanted and hands on each once. Memory holds the clips of one window and the
frames that it shares with those after it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.files import PROBE_SECONDS, FileFacts, probe_times
from pipelines.plan import ClipOptions, eval_box, eval_frames
from pipelines.stream import StreamError, stream_isolated
from pipelines.video import file_frames

MAX_OVERLAP = 32
"""Windows that a moment may lie in: what they share is held in memory."""
MAX_WINDOWS = 100_000
_SLACK_SECONDS = 1e-6
_LEAST_STEP = 0.1  # of the stride, to a last window: one that begins sooner shows what the one before it did


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a video, and the frames that a player shows in it."""

    start_seconds: float
    """From the first frame on."""
    end_seconds: float
    first_frame: int
    num_frames: int
    """One or more."""


@dataclass(frozen=True)
class WindowedVideo:
    """A video file and its windows."""

    path: Path
    facts: FileFacts
    windows: list[Window]

    @classmethod
    def open(
        cls, path: Path, window_seconds: float, stride_seconds: float, timeout_seconds: float = PROBE_SECONDS
    ) -> WindowedVideo:
        """Raises StreamError where the file cannot be read, or there would be too many windows."""
        ((facts, times),) = stream_isolated(_probe_times, path, timeout_seconds=timeout_seconds)
        try:
            return cls(path, facts, cut_windows(times, facts.seconds, window_seconds, stride_seconds))
        except ValueError as error:
            raise StreamError(str(error)) from error

    def clips(self, options: ClipOptions, size: int) -> Generator[tuple[Window, NDArray[np.uint8]], None, None]:
        """Each window with its test views, uint8 RGB [V, T, size, size, 3], crop by crop, and clip by clip within.

        Raises StreamError where the file cannot be decoded to its end.
        """
        shown_size = self.facts.width, self.facts.height
        boxes = [eval_box(*shown_size, options, crop) for crop in range(options.test_crops)]
        plans = np.stack([frames_of(window, options) for window in self.windows])  # [windows, clips, T]
        earliest = np.minimum.accumulate(plans.min((1, 2))[::-1])[::-1]  # that a window or one after it takes
        task = CropTask(self.path.absolute(), np.unique(plans), shown_size, boxes, size)
        held: dict[int, NDArray[np.uint8]] = {}
        with closing(stream_isolated(crop_frames, task)) as crops:
            for window, plan, oldest in zip(self.windows, plans, earliest.tolist(), strict=True):
                held = {frame: cropped for frame, cropped in held.items() if frame >= oldest}
                while plan.max() not in held:
                    frame, cropped = next(crops)
                    held[frame] = cropped
                views = np.stack([held[frame] for frame in plan.ravel().tolist()], 1)  # [crops, clips · T, S, S, 3]
                yield window, views.reshape(-1, options.num_frames, size, size, 3)


def check_windows(window_seconds: float, stride_seconds: float) -> None:
    """ValueError where more windows would overlap than are held in memory."""
    if stride_seconds < window_seconds / MAX_OVERLAP:
        raise ValueError(
            f"--stride {stride_seconds:g}s: allowed is 1/{MAX_OVERLAP} of --window {window_seconds:g}s or more"
        )


def cut_windows(
    times: NDArray[np.float64], seconds: float, window_seconds: float, stride_seconds: float
) -> list[Window]:
    """Windows that begin at every multiple of the stride until one reaches the end; the last one ends with the video,
    which may bring its beginning forward, so that all are of one length (of a shorter video the only one is shorter).
    It is left out where that is less than a tenth of the stride after the one before it.

    `times`: when each frame appears, the first at 0; `seconds`: when the last one ends.
    """
    last_start = max(0.0, seconds - window_seconds)
    steps = max(0, math.ceil((last_start - max(_LEAST_STEP * stride_seconds, _SLACK_SECONDS)) / stride_seconds))
    if steps >= MAX_WINDOWS:
        raise ValueError(f"{steps + 1} windows in {seconds:.0f} s; allowed are {MAX_WINDOWS}: choose a longer stride")
    windows = []
    for step in range(steps + 1):
        start = min(step * stride_seconds, last_start)
        end = min(start + window_seconds, seconds)
        first = int(np.searchsorted(times, start + _SLACK_SECONDS, "right")) - 1  # on display since before
        after = int(np.searchsorted(times, end - _SLACK_SECONDS, "left"))
        windows.append(Window(start, end, first, max(after - first, 1)))
    return windows


def frames_of(window: Window, options: ClipOptions) -> NDArray[np.int64]:
    """Source frame numbers [test_clips, T] of the window's clips."""
    clips = [eval_frames(window.num_frames, options, clip) for clip in range(options.test_clips)]
    return window.first_frame + np.stack(clips)


class CropTask(NamedTuple):
    """What to decode of a file."""

    path: Path
    wanted: NDArray[np.int64]
    """Frame numbers, ascending, each once."""
    shown_size: tuple[int, int]
    """Width and height that its frames must have."""
    boxes: list[tuple[int, int, int, int]]
    """left, top, width, height of each crop."""
    size: int
    """Side that crops are resized to, in pixels."""


def crop_frames(task: CropTask) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The wanted frames in turn: number, and crops uint8 RGB [V, size, size, 3]. Raises VideoError."""
    from pipelines.decode import resize_into  # here: other processes read this file too, and need no decoder

    wanted = task.wanted.tolist()
    for number, frame in zip(wanted, file_frames(task.path, wanted), strict=True):
        if frame.shape[1::-1] != task.shown_size:
            raise ValueError(f"frames are {frame.shape[1]}x{frame.shape[0]}, the file said {task.shown_size}")
        crops = np.empty((len(task.boxes), task.size, task.size, 3), np.uint8)
        for target, (left, top, width, height) in zip(crops, task.boxes, strict=True):
            resize_into(frame[top : top + height, left : left + width], target)
        yield number, crops


def _probe_times(path: Path) -> Iterator[tuple[FileFacts, NDArray[np.float64]]]:
    yield probe_times(path)
