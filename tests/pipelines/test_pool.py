"""The worker pool: what hangs or dies is replaced and what is only slow is not, whatever the decoder does.

The workers are real processes; in them a stand-in for `pipelines.decode` does what a request's profile says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines import pool as pool_module
from pipelines.pool import Settled, Watch, WorkerPool
from pipelines.read import ClipRequest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (2, 8, 4, 2, 2, 3)
DECODER = '''
import ctypes, os, signal, sys, time, types

class ClipDecoder:
    """Paints a clip in its width, after doing what the profile says; `once` what only the first to come does."""

    def __init__(self, size, num_frames, *, on_progress):
        self.on_progress = on_progress

    def decode_into(self, requests, rows):
        failures = []
        for i, request in enumerate(requests):
            words = request.profile.split()
            if words[0] == "once":
                try:
                    os.close(os.open(request.shard, os.O_CREAT | os.O_EXCL))
                    getattr(self, words[1])()
                except FileExistsError:
                    pass
            elif words[0] != "paint":
                getattr(self, words[0])()
            rows[i][...] = request.width
            if request.width == 13:
                failures.append((i, "unlucky"))
        return failures

    def die(self):
        os._exit(9)

    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def spin(self):
        while True:
            pass

    def sleep(self):
        time.sleep(1000)

    def sleep_deep(self):  # holding Python's lock
        ctypes.PyDLL(None).sleep(1000)

    def walk(self):
        for _ in range(4):
            time.sleep(0.5)
            self.on_progress()

    def think(self):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

if "pipelines.worker" in sys.orig_argv:
    sys.modules["pipelines.decode"] = types.ModuleType("pipelines.decode")
    sys.modules["pipelines.decode"].ClipDecoder = ClipDecoder
'''


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python that is started imports sitecustomize first."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DECODER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")


def request(act: str, paint: int, mark: Path = Path("none")) -> ClipRequest:
    return ClipRequest(act, mark, ((0, 1, 2),), (0,), (0,), paint, 1, (0, 0, 1, 1), False, b"")


def finish(pool: WorkerPool, clips: int, *, seconds: float = 20) -> Iterator[Settled]:
    """What is settled until so many are."""
    deadline = time.monotonic() + seconds
    while clips:
        for settled in pool.collect(wait=True):
            clips -= 1
            yield settled
        assert time.monotonic() < deadline, f"{clips} clips are not settled"


def painted(pool: WorkerPool, slot: int, rows: int) -> list[int]:
    """The colour of each row, which must be of one."""
    clips = pool.clips[slot, :rows].reshape(rows, -1)
    assert (clips == clips[:, :1]).all()
    return clips[:, 0].tolist()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(SHAPE, 2)
    yield pool
    pool.close()


def test_workers_hear_no_signal_for_the_trainer_even_while_they_start(pool: WorkerPool) -> None:
    started = pool.process_ids
    for number in range(30):
        for pid in started:
            os.kill(pid, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3])
        time.sleep(0.01)
    pool.submit(0, [0, 1], [request("paint", 1), request("paint", 2)])
    assert sorted(finish(pool, 2)) == [(0, 0, None), (0, 1, None)] and pool.process_ids == started


def test_clips_land_in_their_rows_and_failures_are_told(pool: WorkerPool) -> None:
    rows = [0, 1, 2, 5, 6, 7]  # row 3 and 4 belong to somebody else
    pool.clips[:] = 99
    pool.submit(1, rows, [request("paint", 10 + row) for row in rows])
    settled = list(finish(pool, 6))
    assert sorted(settled) == [(1, row, None) for row in rows] and painted(pool, 1, 8) == [
        10,
        11,
        12,
        99,
        99,
        15,
        16,
        17,
    ]
    pool.submit(0, [2, 3], [request("paint", 13), request("paint", 14)])
    assert sorted(finish(pool, 2)) == [(0, 2, "unlucky"), (0, 3, None)]
    assert set(painted(pool, 1, 8)) == set(range(10, 13)) | {99, 15, 16, 17}, "the other slot is as it was"


def test_what_hangs_or_dies_is_replaced_within_5_seconds(tmp_path: Path) -> None:
    """Stopped, spinning, asleep, asleep with Python's lock, dead: each once, beside a worker that goes on."""
    acts = ["stop", "spin", "sleep", "sleep_deep", "die"]
    pool = WorkerPool(SHAPE, len(acts) + 1)
    try:
        pool.submit(0, [0], [request("paint", 1)])
        list(finish(pool, 1))
        while not all(worker.steps for worker in pool._workers):  # all have started: what follows is not about that
            time.sleep(0.01)
        before = pool.process_ids
        start = time.monotonic()
        for row, act in enumerate(acts):
            pool.submit(0, [row], [request(f"once {act}", 50 + row, tmp_path / act)])
        seconds = {row: time.monotonic() - start for _, row, reason in finish(pool, len(acts)) if reason is None}
        assert painted(pool, 0, len(acts)) == [50, 51, 52, 53, 54]
        assert max(seconds.values()) < 5 and seconds[4] < 2 < min(seconds[row] for row in range(4)), seconds
        assert sum(a != b for a, b in zip(before, pool.process_ids, strict=True)) == len(acts)
    finally:
        pool.close()


def test_what_is_slow_is_left_alone(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that shows signs of life, however long it takes, and one that gets no core: it shares one with a busy
    process of far higher priority."""
    monkeypatch.setattr(pool_module, "HANG_SECONDS", 1.0)
    pool.submit(0, [0, 1], [request("paint", 1)] * 2)
    list(finish(pool, 2))
    before = pool.process_ids
    core = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            for pid in (busy.pid, before[1]):
                os.sched_setaffinity(pid, {core})
            os.sched_setscheduler(before[1], os.SCHED_IDLE, os.sched_param(0))
            pool.submit(0, [0, 1], [request("walk", 2), request("think", 3)])  # one for each
            end = time.monotonic() + 2.4
            settled: list[Settled] = []
            while time.monotonic() < end:
                settled += pool.collect(wait=True)
            assert settled == [(0, 0, None)], "the starved one cannot be done yet"
            busy.kill()
            assert list(finish(pool, 1)) == [(0, 1, None)]
        finally:
            busy.kill()
    assert pool.process_ids == before and painted(pool, 0, 2) == [2, 3]


def test_time_in_which_nobody_looked_does_not_condemn(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the whole job is stopped for a while, or a training step takes long."""
    monkeypatch.setattr(pool_module, "HANG_SECONDS", 1.5)
    pool.submit(0, [0, 1], [request("paint", 1)] * 2)
    list(finish(pool, 2))
    before = pool.process_ids
    pool.submit(0, [0, 1], [request("walk", 2), request("walk", 3)])
    time.sleep(0.3)
    assert pool.collect(wait=False) == []  # looked once, while they are at it
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(pool_module.HANG_SECONDS + 1)
    assert pool.collect(wait=False) == []  # we are the first to go on
    for pid in before:
        os.kill(pid, signal.SIGCONT)
    assert len(list(finish(pool, 2))) == 2 and pool.process_ids == before


def test_waiting_for_the_disk_is_no_fault_for_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process as the kernel would show it: one thread waits for the disk, the other for the first."""
    for thread, state in (("1", "S"), ("2", "D")):
        (tmp_path / "task" / thread).mkdir(parents=True)
        (tmp_path / "task" / thread / "stat").write_text(f"{thread} (python) x) {state} 1 1")
    (tmp_path / "stat").write_text("1 (python) x) S " + "7 " * 40)
    seconds = 0.0
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: seconds)
    watch = Watch(1)
    watch._folder = tmp_path
    verdicts = []
    for _ in range(600):
        seconds += 0.25
        verdicts.append(watch.verdict(5))
    first = next(i for i, verdict in enumerate(verdicts) if verdict)
    assert 60 < 0.25 * first < 62 and verdicts[first] == "storage did not answer for 60 s"


def test_clip_that_ends_its_worker_is_found_out_and_the_others_are_decoded(pool: WorkerPool) -> None:
    pool.submit(0, list(range(8)), [request("die" if row == 5 else "paint", 20 + row) for row in range(8)])
    settled = sorted(finish(pool, 8))
    assert [(slot, row) for slot, row, reason in settled if reason is None] == [
        (0, row) for row in range(8) if row != 5
    ]
    assert settled[5][2] == "the decoder process died (status 9)"
    assert painted(pool, 0, 8)[:5] == [20, 21, 22, 23, 24] and painted(pool, 0, 8)[6:] == [26, 27]


def test_worker_that_is_idle_or_starting_may_die_too(pool: WorkerPool) -> None:
    for _ in range(2):
        for pid in pool.process_ids:
            os.kill(pid, signal.SIGKILL)
        pool.submit(0, list(range(8)), [request("paint", 7)] * 8)
        assert len(list(finish(pool, 8))) == 8 and painted(pool, 0, 8) == [7] * 8


def test_decoders_that_do_not_start_are_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "site" / "sitecustomize.py").open("a") as file:
        file.write("    del sys.modules['pipelines.decode'].ClipDecoder\n")
    pool = WorkerPool(SHAPE, 1)
    pool.submit(0, [0], [request("paint", 1)])
    with pytest.raises(ValueError, match=r"ended before it was ready: the decoder process died \(status 1\)"):
        list(finish(pool, 1))
    pool.close()
    assert "ImportError" in capfd.readouterr().err


def test_large_requests_never_block_us(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the worker that should read them is stopped."""
    monkeypatch.setattr(pool_module, "HANG_SECONDS", 1.0)
    pool.submit(0, [0, 1], [request("paint", 1)] * 2)
    list(finish(pool, 2))
    packets = tuple((i, 2, 3) for i in range(50_000))
    large = ClipRequest("paint", Path("none"), packets, (0,), (0,), 6, 1, (0, 0, 1, 1), False, b"")
    for pid in pool.process_ids:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    pool.submit(0, list(range(8)), [large] * 8)
    assert time.monotonic() - start < 1
    assert len(list(finish(pool, 8))) == 8 and painted(pool, 0, 8) == [6] * 8


def test_workers_die_with_whoever_started_them(tmp_path: Path) -> None:
    """However it ends, and whatever they are at."""
    code = (
        "from tests.pipelines.test_pool import SHAPE, WorkerPool, request\n"
        "import time\n"
        "pool = WorkerPool(SHAPE, 3)\n"
        "pool.submit(0, [0, 1], [request(act, 1) for act in ('spin', 'sleep_deep')])\n"
        "while not all(worker.steps for worker in pool._workers): time.sleep(0.01)\n"
        "print(*pool.process_ids, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 3
        trainer.kill()
    deadline = time.monotonic() + 2
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def test_memory_is_ours_alone(pool: WorkerPool) -> None:
    assert not [name for name in os.listdir("/dev/shm") if "clips" in name]
    assert isinstance(pool.clips, np.ndarray) and pool.clips.shape == SHAPE
