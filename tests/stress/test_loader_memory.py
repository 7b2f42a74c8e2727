"""Memory of the trainer and its workers over many batches of tiny clips: with STRESS=1 the promised 20,000."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, Order, train_turns
from pipelines.pool import WorkerPool
from pipelines.shards import ShardSet
from tests.sets import make_set

FULL = os.environ.get("STRESS") == "1"
WARM_UP, BATCHES = (1000, 20_000) if FULL else (300, 1200)
LOOKS = 21  # from the end of the warm-up to the end


def resident_bytes(pids: list[int]) -> int:
    """VmRSS of all processes: what each has mapped and touched.

    What they share (libraries, the clips) counts once for each; that adds a constant. Proportional set sizes would move
    with any other process that maps the same libraries.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)


def run(folder: Path, report: Connection) -> None:
    """A process that does nothing else; tells how much memory it and its workers hold after each stretch."""
    shards = ShardSet.open(folder, "train")
    order = Order([shard.samples for shard in shards.shards], 0)
    span = {"start_step": 0, "num_steps": WARM_UP + BATCHES}
    turns = train_turns(order, global_batch=4, micro_batch=4, rank=0, world=1, **span)
    looks = set(np.linspace(WARM_UP, WARM_UP + BATCHES - 1, LOOKS).astype(int).tolist())
    options = ClipOptions(num_frames=2, sampling="uniform")
    settings = {"micro_batch": 4, "size": 16, "options": options, "workers": 2, "max_bad_fraction": 1.0}
    with ClipLoader(shards, turns, **settings) as loader:  # type: ignore[arg-type]
        assert isinstance(loader._decoder, WorkerPool)
        pids = [os.getpid(), *loader._decoder.process_ids]
        for number, _ in enumerate(loader):
            if number in looks:
                report.send(resident_bytes(pids))
        assert loader._decoder.process_ids == pids[1:], "a worker was replaced, and with it what it had leaked"
        assert len(loader.bad) == 1
    report.send(0)


@pytest.mark.parametrize("profile", ["jpeg", "h264", "copy"] if FULL else ["jpeg"])
def test_memory_does_not_grow(tmp_path: Path, profile: str) -> None:
    """By no more than 1 % after the warm-up; one sample is bad, so that failures are among what is repeated."""
    folder = make_set(tmp_path / "set", [5, 7, 9, 12, 20] * 20, profile=profile, size=(32, 32), samples_a_shard=20)
    sample = ShardSet.open(folder, "train")[42]
    with sample.shard.open("r+b") as file:
        file.seek(sample.video_offset)
        file.write(bytes(sample.video_bytes))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run, args=(folder, theirs))
    process.start()
    theirs.close()
    *sizes, end = [ours.recv() for _ in range(LOOKS + 1)]
    process.join()
    assert (end, process.exitcode) == (0, 0)
    growth = max(sizes) / sizes[0] - 1
    start = f"{sizes[0] / 2**20:.1f} MB after {WARM_UP} batches"
    print(f"\n{profile}: {start}, at most {100 * growth:.2f} % more in {BATCHES} more")
    assert growth <= 0.01, [size / 2**20 for size in sizes]
