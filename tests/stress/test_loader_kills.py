"""Killing loaders and their workers at any moment: what follows is as if nothing had happened.

A few kills in every test run; with STRESS=1 the promised 200.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.loader import ClipBatch, ClipLoader
from pipelines.plan import ClipOptions, Order, train_turns
from pipelines.pool import Settled, WorkerPool
from pipelines.shards import ShardSet
from tests.sets import make_set

FULL = os.environ.get("STRESS") == "1"
KILLS = 200 if FULL else 6
STEPS = (KILLS // 2 + 1) * 30
PROFILES = ("jpeg", "h264")
OPTIONS = ClipOptions(num_frames=4, sampling="uniform")
SPAN = 20  # batches that a victim delivers at most
PHASES = ("starting", "constructing", "planning", "waiting", "answers", "handing out", "training")


def open_loader(folder: Path, start: int, steps: int, kind: type[ClipLoader] = ClipLoader) -> ClipLoader:
    shards = ShardSet.open(folder, "train")
    order = Order([shard.samples for shard in shards.shards], 5)
    turns = train_turns(order, global_batch=6, micro_batch=6, rank=0, world=1, start_step=start, num_steps=steps)
    return kind(shards, turns, micro_batch=6, size=32, options=OPTIONS, seed=5, workers=2)


def record(step: int, batch: ClipBatch) -> list[Any]:
    """Everything that a batch is, to the last bit."""
    ids = [(turn.sample_id, turn.epoch) for turn in batch.turns]
    plans = [(plan.frames, plan.stored, plan.box, plan.flip) for plan in batch.plans]
    pixels = hashlib.sha256(batch.frames.numpy().tobytes()).hexdigest()
    entry = [step, ids, plans, batch.labels.tolist(), batch.valid.tolist(), batch.keys, pixels]
    return json.loads(json.dumps(entry))  # type: ignore[no-any-return]


class Talking(ClipLoader):
    """Notes what it is at."""

    phase: memoryview

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        with self._in("constructing"):
            super().__init__(*arguments, **settings)
        pool, collect = self._decoder, self._decoder.collect

        def noted(*, wait: bool) -> list[Settled]:
            with self._in("waiting" if wait else "answers"):
                return collect(wait=wait)

        pool.collect = noted  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _in(self, name: str) -> Iterator[None]:
        before, self.phase[0] = self.phase[0], PHASES.index(name)
        yield
        self.phase[0] = before

    def _fill(self) -> None:
        with self._in("planning"):
            super()._fill()

    def _batch(self, batch: Any) -> ClipBatch:
        with self._in("handing out"):
            return super()._batch(batch)


def victim(folder: Path, start: int, steps: int, journal: Path, phase: Any) -> None:
    """Delivers batches from `start` on, a line of the journal each, until it is killed."""
    Talking.phase = memoryview(phase).cast("B")
    with journal.open("a", buffering=1) as file, open_loader(folder, start, steps, Talking) as loader:
        for step, batch in enumerate(loader, start):
            Talking.phase[0] = PHASES.index("training")
            file.write(json.dumps(record(step, batch)) + "\n")
            time.sleep(0.002)


def lines(journal: Path) -> list[str]:
    """Whole ones."""
    return [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]


def await_batches(journal: Path, count: int, process: BaseProcess) -> float:
    """Seconds until a victim has delivered so many."""
    start = time.monotonic()
    while len(lines(journal)) < count:
        assert process.exitcode is None, "it ended by itself"
        time.sleep(0.0005)
    return time.monotonic() - start


def workers_of(pid: int) -> list[int]:
    """The decode workers that a process has started: its id is their first argument."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if (
                b"pipelines.worker" in arguments[:4]
                and arguments[arguments.index(b"pipelines.worker") + 1] == b"%d" % pid
            ):
                found.append(int(folder.name))
    return found


def kill(process: BaseProcess) -> None:
    """With SIGKILL; nothing of it may be left a second later."""
    assert process.pid is not None
    started = workers_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in started) or workers_of(process.pid):
        assert time.monotonic() < deadline, "its workers live on"
        time.sleep(0.01)


@pytest.mark.parametrize("profile", PROFILES)
def test_killed_loaders_are_continued_to_the_last_bit(tmp_path: Path, profile: str) -> None:
    """Victims are forked from a process that has imported everything. The moments are drawn: a third before the first
    batch, spread over the time that takes, the others a little after any of the first batches."""
    folder = make_set(tmp_path / "set", [9, 14, 22, 31, 40] * 4, profile=profile)
    with open_loader(folder, 0, STEPS) as loader:
        expected = [record(step, batch) for step, batch in enumerate(loader)]
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["pipelines.loader"])
    before = sorted(os.listdir("/dev/shm"))
    random, hit, position, seconds = np.random.default_rng(7), Counter[str](), 0, 1.0
    kills = KILLS // len(PROFILES)
    for moment in (-1, *random.permutation(kills)):  # the first one warms the parent up
        journal, phase = tmp_path / "journal", forks.RawArray("B", 1)
        journal.write_text("")
        process = forks.Process(target=victim, args=(folder, position, STEPS, journal, phase))
        process.start()
        if 0 <= moment < kills // 3:
            time.sleep((moment + random.random()) / (kills // 3) * seconds)
        else:
            seconds = await_batches(journal, 1, process)
            await_batches(journal, int(random.integers(1, SPAN)), process)
            time.sleep(random.random() * 0.01)
        kill(process)
        assert process.exitcode == -signal.SIGKILL, "it ended by itself"
        hit[PHASES[phase[0]]] += 1
        seen = [json.loads(line) for line in lines(journal)]
        assert seen == expected[position : position + len(seen)]
        position += len(seen)
    print(f"\n{profile}: {kills} kills, {position} batches bit-equal; killed while {dict(hit)}")
    if "PYTEST_XDIST_WORKER" not in os.environ:  # with it, other tests write there at the same time
        assert sorted(os.listdir("/dev/shm")) == before
    assert position > kills // 2 and len(hit) > (5 if FULL else 1)


def test_killed_workers_change_nothing(tmp_path: Path) -> None:
    """While batches are on their way; SIGKILL, and now and then SIGSTOP, which looks like a decoder that hangs."""
    folder = make_set(tmp_path / "set", [9, 14, 22, 31, 40] * 4)
    random, kills, stops = np.random.default_rng(8), KILLS, 0
    with open_loader(folder, 0, 20 * KILLS) as loader:
        expected = [record(step, batch) for step, batch in enumerate(loader)]
    with open_loader(folder, 0, 20 * KILLS) as loader:
        pool = loader._decoder
        assert isinstance(pool, WorkerPool)
        victims = sorted(random.choice(np.arange(1, 20 * KILLS), kills, replace=False).tolist())
        for step, batch in enumerate(loader):
            assert record(step, batch) == expected[step]
            if step in victims:
                stop = stops < kills // 20 and random.random() < 0.1
                stops += stop
                time.sleep(random.random() * 0.004)  # at the start, in the middle, or at the end of a task
                os.kill(int(random.choice(pool.process_ids)), signal.SIGSTOP if stop else signal.SIGKILL)
        assert step == 20 * KILLS - 1 and not loader.bad, loader.bad
    print(f"\n{kills} workers killed, {stops} of them stopped; {20 * KILLS} batches bit-equal")
