"""The packer's journal: what it lists is whole and durable, one process holds it, a torn end costs the last shard."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.journal import FinishedShard, Journal, Packed, Reject, remove_leftover
from pipelines.shards import EncodedVideo, FrameTable, ShardInfo, ShardWriter

RUN = {"profile": "jpeg", "seed": 0}
OUTCOMES = [Packed(1.5, 30, 1000), Reject("truncated", "half \udcff of\tit"), Packed(0.1 + 0.2, 1, 7)]


def write_shard(folder: Path, number: int) -> ShardInfo:
    writer = ShardWriter(folder, f"train-{number:06d}.tar")
    table = FrameTable.of_copy(3)
    writer.add("key", [0], EncodedVideo(os.urandom(500), "mp4", table, 96, 64, 3, 30.0), {})
    return writer.close()


def begin(folder: Path, shards: int) -> list[FinishedShard]:
    """A journal of some shards, closed as by a kill."""
    journal = Journal(folder, RUN)
    assert list(journal.replay()) == []
    finished = [FinishedShard("train", write_shard(journal.shards, i), OUTCOMES) for i in range(shards)]
    for shard in finished:
        journal.append(shard)
    journal.close()
    return finished


def test_what_was_noted_comes_back(tmp_path: Path) -> None:
    finished = begin(tmp_path / "part", 3)
    journal = Journal(tmp_path / "part", RUN)
    assert list(journal.replay()) == finished
    assert "3 finished shards are kept in" in journal.what_is_kept()
    journal.append(FinishedShard("train", write_shard(journal.shards, 3), []))
    journal.close()
    assert len(list(Journal(tmp_path / "part", RUN).replay())) == 4


@pytest.mark.parametrize("cut", range(1, 400, 37))
def test_a_torn_end_costs_only_what_was_torn(tmp_path: Path, cut: int) -> None:
    finished = begin(tmp_path / "part", 3)
    path = tmp_path / "part/journal.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    lines = data[:-cut].count(b"\n") - 1
    journal = Journal(tmp_path / "part", RUN)
    assert list(journal.replay()) == finished[:lines]
    assert sorted(p.name for p in journal.shards.glob("*.tar")) == [f"train-{i:06d}.tar" for i in range(lines)]
    journal.append(FinishedShard("train", write_shard(journal.shards, lines), OUTCOMES))
    journal.close()
    assert len(list(Journal(tmp_path / "part", RUN).replay())) == lines + 1


def test_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "part", RUN)
    for restart in (False, True):
        with pytest.raises(FileExistsError, match="another program is packing in"):
            Journal(tmp_path / "part", RUN, restart=restart)
    remove_leftover(tmp_path / "part")
    assert first.shards.exists()
    first.close()
    Journal(tmp_path / "part", RUN).close()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not from packing"):
        Journal(tmp_path / "part", RUN, restart=True)
    remove_leftover(tmp_path / "part")
    assert (tmp_path / "part/thesis.txt").read_text() == "mine"


def test_another_run_is_named_and_loses_nothing(tmp_path: Path) -> None:
    finished = begin(tmp_path / "part", 1)
    with pytest.raises(ValueError, match=r"seed is 0 there and 1 now; .* or add --restart"):
        Journal(tmp_path / "part", {**RUN, "seed": 1})
    assert list(Journal(tmp_path / "part", RUN).replay()) == finished
    assert list(Journal(tmp_path / "part", {**RUN, "seed": 1}, restart=True).replay()) == []


def test_every_step_is_durable_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file has its final name only if its bytes are on the disk, and the journal comes last."""
    steps: list[tuple[str, str]] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        steps.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def named(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Path, target: Path) -> Any:
            steps.append(("name", Path(target).name))
            return original(path, target)

        return wrapped

    journal = Journal(tmp_path / "part", RUN)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named(Path.replace))
    journal.append(FinishedShard("train", write_shard(journal.shards, 0), OUTCOMES))
    order = [
        ("sync", ".train-000000.tar.part"),
        ("name", "train-000000.tar"),
        ("sync", ".train-000000.index.safetensors.part"),
        ("name", "train-000000.index.safetensors"),
        ("sync", "shards"),
        ("sync", "journal.jsonl"),
    ]
    positions = [len(steps) - 1 - steps[::-1].index(step) for step in order]
    assert positions == sorted(positions)


def test_leftovers_of_a_run_that_was_done(tmp_path: Path) -> None:
    begin(tmp_path / "part", 1)
    remove_leftover(tmp_path / "part")  # not done: its shards are still there
    assert (tmp_path / "part/shards").exists()
    (tmp_path / "part/shards").rename(tmp_path / "out")
    remove_leftover(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    remove_leftover(tmp_path / "part")


def test_without_locks_it_works_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    finished = begin(tmp_path / "part", 2)
    assert list(Journal(tmp_path / "part", RUN).replay()) == finished
    assert np.sum([shard.info.samples for shard in finished]) == 2
