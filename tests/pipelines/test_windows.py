"""Windows of a long video: where they lie, which frames they hold, and that each frame is decoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.plan import ClipOptions
from pipelines.stream import StreamError
from pipelines.windows import Window, WindowedVideo, check_windows, cut_windows, frames_of
from tests.videos import read_number, write_video


def test_windows_reach_the_end_and_are_of_one_length() -> None:
    times = np.arange(100) / 10
    windows = cut_windows(times, 10.0, 3.0, 2.0)
    assert [(w.start_seconds, w.end_seconds) for w in windows] == [(0, 3), (2, 5), (4, 7), (6, 9), (7, 10)]
    assert [(w.first_frame, w.num_frames) for w in windows] == [(0, 30), (20, 30), (40, 30), (60, 30), (70, 30)]
    assert cut_windows(times, 10.0, 5.0, 5.0) == [Window(0, 5, 0, 50), Window(5, 10, 50, 50)]
    assert cut_windows(times[:7], 0.7, 5.0, 5.0) == [Window(0, 0.7, 0, 7)], "shorter than a window"
    assert cut_windows(times, 8.1, 2.0, 2.0) == cut_windows(times, 8.0, 2.0, 2.0), "the last 0.1 s alone is no window"
    assert [w.start_seconds for w in cut_windows(times, 8.3, 4.0, 2.0)] == pytest.approx([0, 2, 4, 4.3])
    with pytest.raises(ValueError, match=r"windows in 10 s; allowed are .*: choose a longer stride"):
        cut_windows(times, 10.0, 2e-3, 1e-5)


def test_a_picture_that_stays_is_in_every_window_that_shows_it() -> None:
    times = np.asarray([0.0, 0.1, 0.2, 7.0, 7.1])
    windows = cut_windows(times, 8.0, 2.0, 2.0)
    assert [(w.first_frame, w.num_frames) for w in windows] == [(0, 3), (2, 1), (2, 1), (2, 3)]
    options = ClipOptions(num_frames=4, sampling="uniform")
    assert [frames_of(window, options).ravel().tolist() for window in windows[1:3]] == [[2] * 4] * 2


def test_too_much_overlap_is_refused() -> None:
    check_windows(2.0, 2.0 / 32)
    with pytest.raises(ValueError, match=r"--stride 0\.06s: allowed is 1/32 of --window 2s or more"):
        check_windows(2.0, 0.06)


@pytest.mark.parametrize(("sampling", "stride"), [("uniform", 0.25), ("dense", 3.0)])
def test_clips_show_the_frames_of_their_window(tmp_path: Path, sampling: str, stride: float) -> None:
    """Variable rate: 8 frames in the first second, then 40, then one that stays for two."""
    times = [*np.linspace(0, 1, 8, endpoint=False), *np.linspace(1, 2, 40, endpoint=False), 4.0]
    path = write_video(tmp_path / "a.mp4", len(times), (64, 64), times=times)
    video = WindowedVideo.open(path, 1.0, stride)
    options = ClipOptions(num_frames=4, sampling=sampling, interval=3, test_clips=2, test_crops=3)
    seen = []
    for window, clips in video.clips(options, 64):
        numbers = np.asarray([[read_number(frame) for frame in clip] for clip in clips])
        np.testing.assert_array_equal(numbers, np.tile(frames_of(window, options), (3, 1)))
        assert window.first_frame <= numbers.min() and numbers.max() < window.first_frame + window.num_frames
        seen.append(window)
    assert seen == video.windows and {window.num_frames for window in seen} >= {8, 1}


def test_a_video_that_breaks_off_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 90, (64, 64))
    video = WindowedVideo.open(path, 1.0, 1.0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    path.write_bytes(data)
    with pytest.raises(StreamError):
        list(video.clips(ClipOptions(num_frames=4, sampling="uniform"), 64))
    (tmp_path / "b.mp4").write_text("#EXTM3U\n")
    with pytest.raises(StreamError, match="unreadable"):
        WindowedVideo.open(tmp_path / "b.mp4", 1.0, 1.0)
