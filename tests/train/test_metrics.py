"""What a run writes down: a line at a time, nothing of steps that are done again, and lines that people can read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from train import metrics
from train.clock import Pace
from train.metrics import MetricsLog, counted, eval_line, metrics_text, train_line


class Board:
    """In place of TensorBoard's writer, whose files are not ours to read."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Board]]:
    """Those that were opened."""
    opened: list[Board] = []

    def open_board(folder: str, purge_step: int) -> Board:
        opened.append(Board(folder, purge_step))
        return opened[-1]

    monkeypatch.setattr(metrics, "SummaryWriter", open_board)
    yield opened


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_there_at_once_and_numbers_go_to_tensorboard(tmp_path: Path, boards: list[Board]) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write("train", 4, loss=0.5, clips_per_s=None)
    assert entries(tmp_path) == [{"kind": "train", "step": 4, "loss": 0.5, "clips_per_s": None}]
    log.write("eval", 4, top1=1.0)
    assert entries(tmp_path)[1:] == [{"kind": "eval", "step": 4, "top1": 1.0}]
    log.close()
    (board,) = boards
    assert board.scalars == [("train/loss", 0.5, 4), ("eval/top1", 1.0, 4)]
    assert board.folder == str(tmp_path / "tensorboard") and board.closed


def test_a_resumed_run_appends_to_what_was_written_up_to_its_step(tmp_path: Path, boards: list[Board]) -> None:
    first = MetricsLog(tmp_path, 0)
    for step in (2, 4, 6):
        first.write("train", step, loss=step / 10)
        first.write("eval", step, top1=0.5)
    first.close()
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    resumed = MetricsLog(tmp_path, 4)
    assert resumed.evaluated
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:4])
    resumed.write("train", 6, loss=0.25)
    resumed.close()
    assert [entry["step"] for entry in entries(tmp_path)] == [2, 2, 4, 4, 6]
    assert entries(tmp_path)[-1]["loss"] == 0.25
    assert not MetricsLog(tmp_path, 6).evaluated
    assert [board.purge_step for board in boards] == [1, 5, 7]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"kind": "train", "st',
        b'{"kind": "train", "step": 3}',  # whole, but without its end: what comes next would stand on the same line
        b'{"kind": "train", \xe2\x82',
        bytes(4096),  # what some file systems leave after a power cut
        b"\n\n",
    ],
)
def test_half_a_line_is_cut(tmp_path: Path, boards: list[Board], tail: bytes) -> None:
    whole = b'{"kind": "train", "step": 3, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + tail)
    log = MetricsLog(tmp_path, 3)
    log.write("train", 4, loss=0.5)
    log.close()
    assert [entry["step"] for entry in entries(tmp_path)] == [3, 4]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(whole)


def test_lines_of_training(boards: list[Board]) -> None:
    facts: dict[str, Any] = {"step": 40, "num_steps": 100, "epoch": 1.256, "loss": 2.71828, "lr": 3e-4}
    start = "step 40/100  epoch 1.26  loss 2.7183  lr 3.00e-04"
    none = Pace(0, 0.0, 0.0, 0)
    assert train_line(**facts, pace=none, whole=none) == start
    pace, whole = Pace(20, 5.0, 0.1, 320), Pace(35, 70.0, 1.0, 560)
    assert train_line(**facts, pace=pace, whole=whole) == (
        f"{start}  64.0 clips/s  250 ms a step, waiting 5.0 ms (2.0 %)  left 0:02:00"
    )
    done = facts | {"step": 100}
    assert train_line(**done, pace=pace, whole=whole).endswith("left 0:00:00")


def test_lines_of_evaluation() -> None:
    one = {"top1": 0.5, "top5": 1.0, "mean_class_accuracy": 0.25, "loss": 1.0, "samples": 8.0, "undecodable": 0.0}
    assert metrics_text(one) == "top-1 50.00 %  top-5 100.00 %  mean class 25.00 %  loss 1.0000  (8 samples)"
    several = {"mean_average_precision": 1 / 3, "top1": 0.5, "loss": 0.25, "samples": 7.0, "undecodable": 2.0}
    assert metrics_text(several) == "mAP 33.33 %  top-1 50.00 %  loss 0.2500  (7 samples, 2 could not be decoded)"
    assert eval_line(30, one, 6) == f"evaluation after step 30: {metrics_text(one)}"
    assert metrics_text(one, 5) == "top-1 50.00 %  mean class 25.00 %  loss 1.0000  (8 samples)"
    assert (counted(1, "process", "es"), counted(2, "process", "es")) == ("1 process", "2 processes")
