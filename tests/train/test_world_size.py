"""One run at 1, 2, 4 and 3 processes in turn, resumed in mid-epoch each time: always the global batches of one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.shards import ShardSet
from tests.sets import make_set
from tests.shell import LAUNCHER
from tests.train.runs import FP32, arguments, run_here, trace

SEEN = ("samples", "epochs", "frames", "boxes", "flips")
SETTINGS = (
    *(FP32, "ds.train_batch_size=24", "ds.train_micro_batch_size_per_gpu=4", "schedule.epochs=5"),
    *("train.checkpoint_every=1", "train.keep=99", "train.log_every=1", "data.max_bad_fraction=0.5"),
    *('data.val_split=""', "data.shuffle_shards=3"),
)
SAMPLES, STEPS = 40, 9  # ceil(5 · 40 / 24)


def rank_main(rank: int, world: int, port: int, argv: list[str]) -> None:
    """A process of a run, in a fork of a process that has imported everything."""
    from train.main import main

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    raise SystemExit(main(argv))


def run_together(world: int, argv: list[str]) -> None:
    """A run of so many processes."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["train.start", "deepspeed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [forks.Process(target=rank_main, args=(rank, world, port, argv)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0] * world


def global_batches(out: Path, world: int) -> dict[int, dict[str, Any]]:
    """Step → what all ranks saw together, in order, and their mean loss; the last time that the step was taken."""
    batches = {}
    for step in range(1, STEPS + 1):
        micro = 24 // world // (3 if world == 4 else 4)  # micro-batches; of 6 clips a rank, they are of 3
        lines = [[line for line in trace(out, rank) if line["step"] == step][-micro:] for rank in range(world)]
        flat = list(itertools.chain.from_iterable(lines))
        if flat:
            seen = {key: list(itertools.chain.from_iterable(line[key] for line in flat)) for key in SEEN}
            batches[step] = seen | {"loss": sum(line["loss"] for line in flat) / len(flat)}
    return batches


def keep_up_to(out: Path, step: int) -> None:
    """As if the run had been killed when it had saved this step."""
    for checkpoint in out.glob("checkpoint-*"):
        if int(checkpoint.name[-6:]) > step:
            shutil.rmtree(checkpoint)
    for path in out.glob("trace-*"):
        path.unlink()


def test_world_size_may_change_in_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where shards are read three at a time, and where a sample is bad and replaced by another."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    folder = make_set(tmp_path / "set", [9, 12, 20, 7] * 10, classes=3)
    sample = ShardSet.open(folder, "train")[11]
    with sample.shard.open("r+b") as file:
        file.seek(sample.video_offset)
        file.write(bytes(sample.video_bytes))
    out = tmp_path / "run"
    run_here(folder, tmp_path / "one", *SETTINGS)
    expected = global_batches(tmp_path / "one", 1)
    assert len(expected) == STEPS
    shutil.copytree(tmp_path / "one", out)
    for world, start in ((2, 2), (4, 4), (3, 6)):
        keep_up_to(out, start)
        run_together(world, [*arguments(folder, out, *SETTINGS), "--resume"])
        seen = global_batches(out, world)
        assert sorted(seen) == list(range(start + 1, STEPS + 1))
        for step in range(start + 1, STEPS + 1):
            assert {k: seen[step][k] for k in SEEN} == {k: expected[step][k] for k in SEEN}, (world, step)
            assert seen[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
    shown = [turn for step in expected.values() for turn in zip(step["epochs"], step["samples"], strict=True)]
    for epoch in range(5):
        counts = Counter(sample for e, sample in shown if e == epoch)
        assert sorted(counts) == [i for i in range(SAMPLES) if i != 11]
        assert sorted(counts.values()) == [1] * (SAMPLES - 2) + [2], "one stands in for the bad one"
    assert [line.split("\t")[0] for line in (out / "bad_samples.tsv").read_text().splitlines()[1:]] == ["11"]
