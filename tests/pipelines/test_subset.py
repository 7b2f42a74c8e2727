"""Parts of a training set: the same share of every class, the same samples wherever they lie, and nothing else learned
from."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, Order, Turn, substitute, train_turns
from pipelines.shards import ShardSet
from pipelines.subset import choose_fraction
from tests.sets import open_set

CLASSES = (1, 4, 5, 10, 25, 100)
"""Samples of each class."""


def samples(classes: tuple[int, ...] = CLASSES) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(key=f"{label}_{i:03d}", labels=(label,))
        for label, count in enumerate(classes)
        for i in range(count)
    ]


def choose(of: list[SimpleNamespace], fraction: float, seed: int = 0) -> list[SimpleNamespace]:
    kept = choose_fraction(cast("ShardSet", of), fraction, seed)
    return of if kept is None else [of[i] for i in kept]


def keys(of: list[SimpleNamespace]) -> set[str]:
    return {sample.key for sample in of}


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.001, [1, 1, 1, 1, 1, 1]),
        (0.1, [1, 1, 1, 1, 3, 10]),  # 0.1, 0.4, 0.5, 1, 2.5 and 10, rounded half up, at least 1
        (0.5, [1, 2, 3, 5, 13, 50]),
        (0.999, [1, 4, 5, 10, 25, 100]),
        (1.0, [1, 4, 5, 10, 25, 100]),
    ],
)
def test_every_class_keeps_its_share(fraction: float, expected: list[int]) -> None:
    counts = Counter(sample.labels[0] for sample in choose(samples(), fraction))
    assert [counts[label] for label in range(len(CLASSES))] == expected


def test_the_samples_kept_depend_on_their_keys_alone() -> None:
    there = samples()
    shuffled = [there[i] for i in np.random.default_rng(0).permutation(len(there))]
    assert keys(choose(there, 0.3)) == keys(choose(shuffled, 0.3))
    first = [sample.key for sample in choose(samples((9,)), 0.4)]
    assert first == ["0_004", "0_005", "0_007", "0_008"], "now and in ten years"


def test_a_smaller_part_lies_in_a_larger_one_and_another_seed_gives_another() -> None:
    parts = [keys(choose(samples(), fraction, seed=3)) for fraction in (0.05, 0.1, 0.25, 0.5, 1)]
    assert all(small < large for small, large in pairwise(parts))
    assert keys(choose(samples(), 0.5, seed=4)) != parts[3]


def test_a_part_is_a_fair_draw() -> None:
    """Over many seeds every sample of a class comes up equally often: 4 of 10, in 500 draws, within 5 deviations."""
    counts = Counter(key for seed in range(500) for key in keys(choose(samples((10,)), 0.4, seed)))
    assert all(abs(counts[f"0_{i:03d}"] - 200) < 5 * (500 * 0.4 * 0.6) ** 0.5 for i in range(10)), counts


def test_samples_of_several_labels_count_with_the_lowest_and_those_of_none_together() -> None:
    there = [SimpleNamespace(key=f"{i}", labels=((), (2, 5), (2,), (5,))[i % 4]) for i in range(40)]
    counts = Counter(sample.labels[:1] for sample in choose(there, 0.5))
    assert counts == {(): 5, (2,): 10, (5,): 5}


@pytest.mark.parametrize("window", [0, 1, 2])
def test_an_epoch_is_of_the_kept_samples_alone(window: int) -> None:
    kept = np.asarray([1, 2, 3, 9, 11])  # of shards with 4, 0, 4, 4 samples, none of the third
    order = Order([4, 0, 4, 4], seed=0, window=window, kept=kept)
    assert order.num_samples == 5
    for epoch in range(20):
        turns = [order.turn(5 * epoch + place) for place in range(5)]
        assert sorted(turn.sample_id for turn in turns) == kept.tolist() and {turn.epoch for turn in turns} == {epoch}
        if window == 1:
            shards = [turn.sample_id // 4 for turn in turns]
            assert sum(a != b for a, b in pairwise(shards)) == 1, "one shard after the other"
    assert len({tuple(order.turn(5 * epoch + place).sample_id for place in range(5)) for epoch in range(20)}) > 1


def test_to_keep_all_is_the_whole_set() -> None:
    whole, all_kept = Order([4, 6], seed=1), Order([4, 6], seed=1, kept=np.arange(10))
    assert [whole.turn(p) for p in range(30)] == [all_kept.turn(p) for p in range(30)]


def test_stand_ins_are_kept_samples() -> None:
    kept = np.asarray([1, 5, 8])
    chosen = Counter(substitute(10, Turn(5, epoch), 0, 1, kept=kept).sample_id for epoch in range(300))
    assert set(chosen) == {1, 5, 8} and min(chosen.values()) > 50


def test_the_loader_replaces_a_bad_sample_by_a_kept_one(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [9] * 12, classes=2)
    shards.kept = choose_fraction(shards, 0.5, 0)
    assert shards.kept is not None and (len(shards), shards.num_kept) == (12, 6)
    bad = int(shards.kept[2])
    video, tar = shards[bad], bytearray(shards[bad].shard.read_bytes())
    tar[video.video_offset : video.video_offset + video.video_bytes] = bytes(video.video_bytes)
    video.shard.write_bytes(tar)
    order = Order([shard.samples for shard in shards.shards], 0, kept=shards.kept)
    turns = train_turns(order, global_batch=6, micro_batch=6, rank=0, world=1, start_step=0, num_steps=4)
    options = ClipOptions(num_frames=2, sampling="uniform")
    with ClipLoader(shards, turns, micro_batch=6, size=32, options=options, workers=1, max_bad_fraction=1.0) as loader:
        seen = [turn.sample_id for batch in loader for turn in batch.turns]
        assert set(loader.bad) == {bad}
    assert len(seen) == 24 and set(seen) == set(shards.kept.tolist()) - {bad}


def test_a_class_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [9] * 8)
    (tmp_path / "set" / "train-000001.index.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"data\.fraction = 0\.1 needs the class of every sample: .*is missing"
    ) as failure:
        choose_fraction(shards, 0.1, 0)
    assert "\n" not in str(failure.value)
    assert choose_fraction(shards, 1.0, 0) is None, "a whole set is not read"
