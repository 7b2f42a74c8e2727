"""Bad samples over ranks, splits and resumes: each written down once, and all ranks stop alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.loader import BadSample
from pipelines.shards import ShardSet
from tests.sets import make_set
from tests.train.runs import launch, metrics, run_here, trace
from train.bad_samples import BadSamples
from train.engine import World

SHORT = ("schedule.epochs=3", "train.keep=9", "train.log_every=2")


@dataclass
class Table:
    """Where ranks that are threads of this process meet."""

    size: int
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=10)
        self.said = [""] * self.size


class Seat(World):
    """A rank at a table."""

    def __init__(self, table: Table, rank: int) -> None:
        super().__init__(rank, table.size, table.size, torch.device("cpu"))
        object.__setattr__(self, "table", table)

    def gather(self, text: str) -> list[str]:
        table: Table = self.table  # type: ignore[attr-defined]
        table.said[self.rank] = text
        table.barrier.wait()
        said = list(table.said)
        table.barrier.wait()
        return said

    def on_first(self, action: Callable[[], object]) -> None:
        if self.rank == 0:
            action()
        self.gather("")


class Loader:
    """What `BadSamples` knows of a loader. Its batches are numbers, up to `end`, where it cannot go on."""

    def __init__(self, planned: int = 0, end: int = 99) -> None:
        self.bad: dict[int, BadSample] = {}
        self.planned, self._next, self._end = planned, 0, end

    def __next__(self) -> int:
        self._next += 1
        if self._next > self._end:
            raise OSError("no worker\nstarts")
        return self._next

    def find(self, *sample_ids: int) -> None:
        self.bad |= {i: BadSample(f"key{i}", "train-000000.tar", "bad\tbytes") for i in sample_ids}


def together(size: int, act: Callable[[World], Any]) -> list[Any]:
    """What each of `size` ranks answers, or the exception it raised."""

    def answer(seat: World) -> Any:
        try:
            return act(seat)
        except (ValueError, OSError) as error:
            return error

    table = Table(size)
    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(answer, [Seat(table, rank) for rank in range(size)]))


@pytest.fixture(scope="module")
def shards(packed: Path) -> ShardSet:
    return ShardSet.open(packed, "train")


def lines(out: Path) -> list[list[str]]:
    """The cells of bad_samples.tsv, header included."""
    return [line.split("\t") for line in (out / "bad_samples.tsv").read_text().splitlines()]


def test_each_is_written_once_over_ranks_and_resumes(tmp_path: Path, shards: ShardSet) -> None:
    def run(world: World) -> set[int]:
        bad, loader = BadSamples(world, tmp_path, 1.0), Loader()
        loader.find(7, world.rank)
        bad.meet(loader, shards, 0)
        bad.meet(loader, shards, 0)
        loader.find(20 + world.rank)
        bad.meet(loader, shards, 0)
        bad.meet_evaluated({7: BadSample("", "val-000000.tar", "gone")}, shards.__class__.open(shards.folder, "val"))
        return bad.met

    assert together(2, run) == [{0, 1, 7, 20, 21}] * 2
    assert lines(tmp_path)[0] == ["sample_id", "key", "split", "shard", "reason"]
    written = [["0", "1", "7"], ["20", "21"]]
    assert [line[0] for line in lines(tmp_path)[1:6]] == written[0] + written[1]
    assert lines(tmp_path)[3] == ["7", "key7", "train", "train-000000.tar", "bad bytes"]
    assert lines(tmp_path)[6:] == [["7", "", "val", "val-000000.tar", "gone"]]
    before = lines(tmp_path)
    assert together(2, run) == [{0, 1, 7, 20, 21}] * 2, "another process of the same run finds them again"
    assert lines(tmp_path) == before


def test_ranks_are_judged_together(tmp_path: Path, shards: ShardSet) -> None:
    """Neither has planned 200 samples or found more than its share would allow; with the others' they have."""

    def run(bad_of_rank: list[int], planned: int, before: int, met: list[int]) -> Callable[[World], Any]:
        def act(world: World) -> str:
            bad, loader = BadSamples(world, tmp_path, 0.02, met), Loader(planned)
            loader.find(*range(10 * world.rank, 10 * world.rank + bad_of_rank[world.rank]))
            bad.meet(loader, shards, before)
            return "goes on"

        return act

    for stops, case in [
        (False, ([2, 2], 100, 0, [])),  # 4 of 200
        (True, ([3, 2], 100, 0, [])),
        (False, ([3, 2], 99, 0, [])),  # not judged yet
        (True, ([0, 1], 100, 0, [90, 91, 92, 93])),  # met before a resume
        (False, ([0, 1], 100, 100, [90, 91, 92, 93])),  # in as many more samples
        (False, ([1, 1], 100, 0, [0, 10, 90])),  # met again
    ]:
        answers = together(2, run(*case))
        if not stops:
            assert answers == ["goes on"] * 2, case
            continue
        assert {type(answer) for answer in answers} == {ValueError} and len({str(answer) for answer in answers}) == 1
        assert "5 of 200 samples" in str(answers[0]) and "data.max_bad_fraction = 0.02" in str(answers[0])


def test_evaluations_are_judged_by_themselves(tmp_path: Path) -> None:
    val = ShardSet.open(make_set(tmp_path / "set", [4] * 250, splits=("val",), samples_a_shard=250), "val")
    found = {i: BadSample("", "val-000000.tar", "gone") for i in range(3)}
    together(1, lambda world: BadSamples(world, tmp_path, 0.012, range(200)).meet_evaluated(found, val))
    (error,) = together(1, lambda world: BadSamples(world, tmp_path, 0.011).meet_evaluated(found, val))
    assert "3 of 250 samples" in str(error)


def test_rank_that_cannot_go_on_keeps_step_until_all_stop(tmp_path: Path, shards: ShardSet) -> None:
    def run(world: World) -> Any:
        bad, loader = BadSamples(world, tmp_path, 1.0), Loader(end=3 if world.rank else 99)
        seen.setdefault(world.rank, []).extend(bad.next_batch(loader) for _ in range(5))  # type: ignore[arg-type]
        bad.meet(loader, shards, 0)

    seen: dict[int, list[Any]] = {}
    answers = together(2, run)
    assert seen == {0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 3, 3]}
    assert [type(answer) for answer in answers] == [ValueError, OSError]
    assert {str(answer) for answer in answers} == {"no worker\nstarts"}


def test_rank_without_a_first_batch_stops_all_at_once(tmp_path: Path) -> None:
    def run(world: World) -> Any:
        return BadSamples(world, tmp_path, 1.0).next_batch(Loader(end=0 if world.rank else 99))  # type: ignore[arg-type]

    assert [str(answer) for answer in together(2, run)] == ["no worker\nstarts"] * 2


def test_alone_it_stops_at_once(tmp_path: Path) -> None:
    def run(world: World) -> Any:
        bad, loader = BadSamples(world, tmp_path, 1.0), Loader(end=3)
        return [bad.next_batch(loader) for _ in range(4)]  # type: ignore[arg-type]

    assert [str(answer) for answer in together(1, run)] == ["no worker\nstarts"]


def spoil(folder: Path, split: str, sample_id: int) -> None:
    sample = ShardSet.open(folder, split)[sample_id]
    with sample.shard.open("r+b") as file:
        file.seek(sample.video_offset)
        file.write(bytes(sample.video_bytes))


def test_run_lists_them_also_when_it_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make_set(tmp_path / "set", [12, 9] * 13, classes=3, splits=("train", "val")), tmp_path / "run"
    for split, sample_id in (("train", 4), ("train", 17), ("val", 9)):
        spoil(folder, split, sample_id)
    run_here(folder, out, *SHORT, "data.max_bad_fraction=0.5")
    first = lines(out)
    assert sorted(line[:3] for line in first[1:]) == sorted(
        [["4", "000004_numbers", "train"], ["17", "000017_numbers", "train"], ["9", "000009_numbers", "val"]]
    )
    assert all("checksum differs" in line[4] for line in first[1:])
    assert f"2 of 26 samples could not be decoded and were replaced by others: {out}" in capsys.readouterr().out
    assert metrics(out, "train")[-1]["bad_samples"] == 2 and metrics(out, "eval")[-1]["undecodable"] == 1
    seen = [i for line in trace(out) for i in line["samples"]]
    assert not {4, 17} & set(seen) and set(seen) == set(range(26)) - {4, 17}
    state = json.loads((out / "checkpoint-000004" / "state.json").read_text())
    assert state["bad_samples"] == [4, 17]
    for later in ("checkpoint-000006", "checkpoint-000008", "checkpoint-000010"):
        (out / later / "state.json").unlink()
        (out / later / "state.safetensors").unlink()
        (out / later).rmdir()
    run_here(folder, out, *SHORT, "data.max_bad_fraction=0.5", resume=True)
    assert lines(out) == first
    assert metrics(out, "train")[-1]["bad_samples"] == 2


def test_two_processes_stop_together_with_one_line(tmp_path: Path) -> None:
    """The bad sample is one of 100: of the first 200 planned, by both ranks, more than 0.4 %."""
    folder = make_set(tmp_path / "set", [9] * 100, classes=3, splits=("train",), samples_a_shard=100)
    spoil(folder, "train", 40)
    settings = ("data.max_bad_fraction=0.004", 'data.val_split=""', "train.log_every=1", "data.prefetch=1")
    process = launch(2, folder, tmp_path / "run", *settings, "ds.train_batch_size=24")
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0 and "Traceback" not in errors, errors
    assert errors.count("error: ") == 1, errors
    assert "cannot be decoded (first: 000040_numbers), more than data.max_bad_fraction = 0.004" in errors
    assert [line[0] for line in lines(tmp_path / "run")[1:]] == ["40"]
    assert 200 - 2 * 24 <= 24 * max(line["step"] for line in trace(tmp_path / "run")) < 200 + 2 * 24
