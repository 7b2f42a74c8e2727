"""The loop: the same batches and losses however a run is shared out, the clock, the logs, and a loss that runs away."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.shards import EncodedVideo, FrameTable, ShardWriter, checksum, write_manifest
from tests.train.runs import FP32, launch, metrics, run_here, trace
from train.clock import WARMUP_STEPS, Clock
from train.config import ScheduleConfig
from train.schedule import crosses, learning_rate

STEPS = 20
LONG = (FP32, "schedule.epochs=6", "train.log_every=1", "optimizer.lr=1e-3")


def global_batches(out: Path, world: int) -> list[dict[str, Any]]:
    """Step by step, what all ranks saw together, in order, and their mean loss."""
    steps = []
    for step in range(1, STEPS + 1):
        lines = [line for rank in range(world) for line in trace(out, rank) if line["step"] == step]
        keys = ("samples", "epochs", "frames", "boxes", "flips")
        seen = {key: list(itertools.chain.from_iterable(line[key] for line in lines)) for key in keys}
        steps.append(seen | {"loss": sum(line["loss"] for line in lines) / len(lines)})
    return steps


def test_batches_and_losses_do_not_depend_on_how_a_run_is_shared(packed: Path, tmp_path: Path) -> None:
    """One process, two, and two with accumulation; DropPath and head dropout on. The steps straddle epochs."""
    two, four = tmp_path / "two", tmp_path / "four"
    runs = [launch(2, packed, two, *LONG), launch(2, packed, four, *LONG, "ds.train_micro_batch_size_per_gpu=2")]
    run_here(packed, tmp_path / "one", *LONG)
    for run in runs:
        output, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
        assert output.count("top-1") == 1, "rank 0 alone speaks"
        assert "Traceback" not in errors and "Warning" not in errors, errors
    one = global_batches(tmp_path / "one", 1)
    assert {epoch for step in one for epoch in step["epochs"]} == set(range(7))
    for other in (two, four):
        for step, theirs in zip(one, global_batches(other, 2), strict=True):
            assert {k: v for k, v in step.items() if k != "loss"} == {k: v for k, v in theirs.items() if k != "loss"}
            assert theirs["loss"] == pytest.approx(step["loss"], rel=1e-5)
        logged = [line["loss"] for line in metrics(other, "train")]
        assert logged == pytest.approx([step["loss"] for step in one], rel=1e-5)
        evaluated = [metrics(out, "eval")[-1] for out in (tmp_path / "one", other)]
        assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], rel=1e-4)
        assert evaluated[0]["samples"] == evaluated[1]["samples"] == 26
    assert len(trace(four, 0)) == 2 * len(trace(two, 0)) == 2 * STEPS


def colour_set(folder: Path) -> Path:
    """12 still videos, red or blue: what a model with random frozen weights can learn."""
    folder.mkdir()
    writer = ShardWriter(folder, "train-000000.tar")
    for i in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48), [(200, 40 + i, 40), (40, 40 + i, 200)][i % 2]).save(buffer, "JPEG")
        jpeg = buffer.getvalue()
        offsets = np.arange(6, dtype=np.int64) * len(jpeg)
        sizes, sums = np.full(6, len(jpeg), np.int32), np.full(6, checksum(jpeg), np.uint64)
        table = FrameTable(offsets, sizes, sums, np.arange(6, dtype=np.int32), np.ones(6, np.uint8))
        writer.add(f"{i:06d}", i % 2, EncodedVideo(jpeg * 6, "mp4", table, 64, 48, 6, 30.0), {})
    entry = {"samples": 12, "shards": [asdict(writer.close())]}
    splits = {"train": entry, "val": entry}
    write_manifest(folder, {"classes": ["red", "blue"], "profile": {"name": "jpeg"}, "splits": splits})
    return folder


def test_run_learns_and_logs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("train.log_every=4", "train.eval_every=4", "train.checkpoint_every=8", "train.keep=2")
    run_here(colour_set(tmp_path / "set"), out, *settings, "schedule.epochs=13")
    lines = metrics(out, "train")
    assert [line["step"] for line in lines] == [4, 6, 8, 12, 16, 18, 20]
    assert lines[0]["clips_per_s"] is None and lines[2]["clips_per_s"] > 0 and 0 <= lines[2]["wait_share"] <= 1
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert [line["step"] for line in metrics(out, "eval")] == [6, 12, 18, 20]
    assert metrics(out, "eval")[-1]["top1"] == 1.0
    assert metrics(out, "end")[0]["measured_steps"] == 20 - WARMUP_STEPS
    written = {"checkpoint-000016", "checkpoint-000020", "metrics.jsonl", "predictions.npz", "run.json", "tensorboard"}
    assert {path.name for path in out.iterdir()} == written | {"trace-0.jsonl"}


def test_loss_that_is_not_finite_stops_the_run_before_it_is_saved(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+ .*: lower optimizer.lr"):
        run_here(packed, tmp_path / "run", "optimizer.lr=1e30", "schedule.warmup_epochs=0")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    schedule = ScheduleConfig(epochs=10, warmup_epochs=1, warmup_start=0.1)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[100] == pytest.approx(0.0)
    assert rates[5] == pytest.approx(0.55 * (1 + math.cos(math.pi * 0.05)))
    assert max(rates) == rates[10] == pytest.approx(1 + math.cos(math.pi / 10))
    assert learning_rate(0, 100, 2.0, ScheduleConfig(epochs=10, warmup_epochs=0)) == 2.0


def test_evaluation_steps_are_those_that_complete_epochs() -> None:
    assert [step for step in range(1, 14) if crosses(step * 8, (step - 1) * 8, 2 * 26)] == [7, 13]
    assert not any(crosses(step, step - 1, 0) for step in range(1, 9))


def test_clock_leaves_out_warmup_and_pauses() -> None:
    time, waited = 0.0, 0.0
    clock = Clock(8, lambda: waited, now=lambda: time)
    for _ in range(WARMUP_STEPS):
        time, waited = time + 100, waited + 50
        with clock.paused():
            time += 7
        assert clock.read().clips_per_s is None
        if clock.step_done():
            clock.start_measuring()
    for _ in range(4):
        time, waited = time + 2, waited + 0.5
        with clock.paused():
            time += 1000
        assert not clock.step_done()
    pace = clock.read()
    assert (pace.clips_per_s, pace.step_ms, pace.wait_ms, pace.wait_share) == (4.0, 2000.0, 500.0, 0.25)
    assert clock.paused_seconds == 4 * 1000 + WARMUP_STEPS * 7
    time, waited = time + 1, waited + 1
    clock.step_done()
    assert clock.read().since(pace).wait_share == 1.0
