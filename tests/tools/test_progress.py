"""What a program says in a log of how far it is."""

from __future__ import annotations

import pytest

from tools.parts import progress
from tools.parts.progress import Progress


def test_without_a_terminal_a_line_at_the_start_and_one_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(2_000, "video") as bar:
        for _ in range(50):
            now += 0.5
            bar.advance(note="3 rejected")
        now += 60
        bar.advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "0 of 2,000 videos",
        "20 of 2,000 videos, 2.0 videos a second, 16:30 left, 3 rejected",
        "40 of 2,000 videos, 2.0 videos a second, 16:20 left, 3 rejected",
        "52 of 2,000 videos, 5.4 s a video, 2:55:51 left",
    ]
