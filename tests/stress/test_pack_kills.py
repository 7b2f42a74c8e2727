"""SIGKILL for the packer at moments drawn from a seed: never a torn shard, and the run that is continued ends with the
bytes of one that was left alone.

Each victim is forked from this process, which has everything imported, and packs into the folder that the victim before
it left, so that continued runs are killed too. A kill is aimed at one of `PHASES`, right before, right after or at some
moment during it; where it struck is noted in memory shared with the victim and printed as a histogram.

    STRESS_KILLS=500 pytest -s tests/stress/test_pack_kills.py      (12 by default, 500 with STRESS=1)
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipelines import colour, encode, journal, pack, processes, shards
from pipelines.annotations import Listing, list_videos
from pipelines.pack import PackSettings, pack_videos, unfinished_folder

KILLS = int(os.environ.get("STRESS_KILLS", "500" if os.environ.get("STRESS") == "1" else "12"))
SEED = int(os.environ.get("STRESS_SEED", "0"))
WORKERS = 2
SETTINGS = PackSettings(quality=100, max_shard_bytes=1_000_000)
FORK = multiprocessing.get_context("fork")
WORK = processes._work

PHASES: dict[str, tuple[Any, str]] = {  # what the function at this place does
    "check the journal": (journal.FinishedShard, "is_whole"),
    "begin the journal": (journal.Journal, "_begin"),
    "start workers": (processes, "_start"),
    "wait for a video": (processes, "_collect"),
    "write to the tar": (shards.ShardWriter, "add"),
    "make the tar durable": (shards, "_sync_and_close"),
    "name the tar": (Path, "replace"),
    "write the index": (shards.IndexBuilder, "write"),
    "write the journal": (journal.Journal, "_write"),
    "list the rejects": (pack, "write_rejects"),
    "write the manifest": (pack, "write_manifest"),
    "name the set": (Path, "rename"),
    "clean up": (journal.Journal, "remove"),
}
IN_A_WORKER: dict[str, tuple[Any, str]] = {
    "worker: open and decode": (pack, "encode_video"),
    "worker: scale": (colour.Converter, "convert"),
    "worker: read back": (encode, "_read_back"),
}
ONCE = ("begin the journal", "start workers", "list the rejects", "write the manifest", "name the set", "clean up")
ALL = ["before the first", *PHASES, *IN_A_WORKER]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen videos of noise, two or three to a shard, in two splits and two classes, and two bad files."""
    root = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 256, (8, 192, 192, 3), np.uint8)
    for i, place in enumerate(["train/a"] * 5 + ["train/b"] * 5 + ["val/a", "val/b"] * 2):
        (root / place).mkdir(parents=True, exist_ok=True)
        with av.open(str(root / place / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
            stream.width = stream.height = 192
            for picture in np.roll(noise, i, axis=2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
            container.mux(stream.encode())
    for place in ("train/b", "val/a"):
        (root / place / "page.mp4").write_text("<html>")
    return root


class Marks:
    """Memory shared with victims and their workers: the phase that each is in."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, 2)

    def enter(self, phase: str, *, worker: bool) -> str:
        """Notes a phase; returns the one before."""
        before = self._bytes[worker]
        self._bytes[worker] = ALL.index(phase)
        return ALL[before]

    def where(self) -> str:
        """The phase; while the packer waits, what a worker is doing."""
        packer, worker = (ALL[b] for b in self._bytes[:])
        return worker if packer == "wait for a video" and worker != ALL[0] else packer

    def clear(self) -> None:
        self._bytes[:] = bytes(2)


class Aim:
    """Where a victim is to die: the n-th time that a phase begins; `side` is before, after or during it."""

    def __init__(self, phase: str, times: int, side: str) -> None:
        self.phase, self.times, self.side = phase, times, side


def victim(source: Path, listing: Listing, out: Path, marks: Marks, aim: Aim, connection: Connection) -> None:
    """Packs, and tells when the moment has come."""
    os.dup2(os.open(out.with_name("errors.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    counter = FORK.Value("i", 0)

    def strike(side: str) -> None:
        if side == aim.side or (side == "before" and aim.side == "during"):
            connection.send_bytes(b"now")
            while side == aim.side:
                time.sleep(1)

    def watch(name: str, owner: Any, attribute: str) -> None:
        original: Callable[..., Any] = getattr(owner, attribute)
        worker = name in IN_A_WORKER

        def watched(*args: Any, **kwargs: Any) -> Any:
            outer = marks.enter(name, worker=worker)
            aimed = False
            if name == aim.phase:
                with counter.get_lock():
                    counter.value += 1
                    aimed = counter.value == aim.times
            try:
                if aimed:
                    strike("before")
                result = original(*args, **kwargs)
                if aimed:
                    strike("after")
                return result
            finally:
                marks.enter(outer, worker=worker)

        setattr(owner, attribute, watched)

    for name, place in (PHASES | IN_A_WORKER).items():
        watch(name, *place)
    use_forked_workers(setattr, connection.fileno())
    pack_videos(source, listing, out, SETTINGS, workers=WORKERS)
    connection.send_bytes(b"end")


def use_forked_workers(patch: Callable[[Any, str, Any], None], *kept: int) -> None:
    """Workers that start as quickly as a fork and, like fresh processes, inherit no open file but those `kept`."""

    def alone(connection: Connection, function: Any) -> None:
        parent: Any = multiprocessing.parent_process()
        keep = {0, 1, 2, connection.fileno(), parent.sentinel, *kept}
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor not in keep:
                with suppress(OSError):
                    os.close(descriptor)
        WORK(connection, function)

    patch(processes, "_SPAWN", FORK)
    patch(processes, "_work", alone)


def wait_for_workers(connection: Connection) -> None:
    """Until nobody is left who could write to the other end: workers end with their packer, however it ends."""
    with suppress(EOFError):
        while True:
            assert connection.poll(20), "workers outlive their packer"
            connection.recv_bytes()
    connection.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_leftovers(out: Path, expected: dict[str, bytes]) -> None:
    """What stands under a final name is whole, and the journal lists nothing else."""
    part = unfinished_folder(out)
    if out.exists():
        assert contents(out) == expected
    if not (part / "shards").exists():
        return
    found = {name: data for name, data in contents(part / "shards").items() if not name.startswith(".")}
    assert found == {name: data for name, data in expected.items() if name in found}
    for line in (part / "journal.jsonl").read_bytes().splitlines(keepends=True)[1:]:
        if line.endswith(b"\n"):
            name = json.loads(line)["info"]["name"]
            assert name in found and name.replace(".tar", ".index.safetensors") in found


def test_killed_packers_leave_nothing_torn_and_are_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_forked_workers(monkeypatch.setattr)
    listing = list_videos(source)
    pack_videos(source, listing, tmp_path / "expected", SETTINGS, workers=WORKERS)
    expected = contents(tmp_path / "expected")
    assert sum(name.endswith(".tar") for name in expected) >= 5

    random = np.random.default_rng(SEED)
    out, marks = tmp_path / "out", Marks()
    struck: Counter[str] = Counter()
    completed = 0
    while struck.total() < KILLS:
        phase = ALL[1 + struck.total() % (len(ALL) - 1)] if random.random() < 0.8 else str(random.choice(ALL[1:]))
        times = 1 if phase in ONCE else int(random.integers(1, 4))
        aim = Aim(phase, times, str(random.choice(["before", "after", "during"])))
        marks.clear()
        here, there = FORK.Pipe()
        process = FORK.Process(target=victim, args=(source, listing, out, marks, aim, there))
        process.start()
        there.close()
        with suppress(EOFError):  # it may have ended on its own
            told = here.recv_bytes()
            if told == b"now":
                if aim.side == "during":
                    time.sleep(float(random.exponential(0.002)))
                os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        wait_for_workers(here)
        if process.exitcode == -signal.SIGKILL:
            struck[marks.where()] += 1
            check_leftovers(out, expected)
        else:
            assert process.exitcode == 0, f"aimed at {vars(aim)}: {out.with_name('errors.txt').read_text()}"
        if out.exists() or random.random() < 0.15:
            if not out.exists():
                pack_videos(source, listing, out, SETTINGS, workers=WORKERS)
            assert contents(out) == expected, (out / "rejects.tsv").read_text()
            completed += 1
            shutil.rmtree(out)
            shutil.rmtree(unfinished_folder(out), ignore_errors=True)
    if not out.exists():
        pack_videos(source, listing, out, SETTINGS, workers=WORKERS)
    assert contents(out) == expected
    print(f"\n{struck.total()} kills, {completed + 1} runs completed byte-identical; where they struck:")
    for name, count in struck.most_common():
        print(f"  {count:4d}  {name}")
    assert len(struck) >= min(KILLS // 2, 10)
