"""Parts of a set: the same share or the same number of every class, some classes alone, episodes from files; the same
samples wherever they lie, and nothing else learned from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, Order, Turn, eval_turns, substitute, train_turns
from pipelines.shards import ShardSet
from pipelines.subset import Part, choose_fraction, choose_shots, draw_classes, read_episode, read_episodes, select
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


NAMED = [f"class{i}" for i in range(4)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """22 samples in shards of four: sample i is of class i mod 4, so the first two have 6 and the others 5."""
    return open_set(tmp_path_factory.mktemp("subset") / "set", [9] * 22, classes=4)


def test_as_many_shots_of_every_class_the_same_for_a_seed_and_fewer_within_more(four: ShardSet) -> None:
    parts = [choose_shots(four, shots, 0) for shots in (1, 3, 5)]
    for shots, part in zip((1, 3, 5), parts, strict=True):
        assert Counter(four[int(i)].label for i in part) == dict.fromkeys(range(4), shots)
        assert (np.diff(part) > 0).all()
    assert all(set(few) < set(many) for few, many in pairwise(parts))
    assert {tuple(choose_shots(four, 3, seed)) for seed in range(3)} > {tuple(parts[1])}


def test_a_class_with_too_few_samples_is_named(four: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"data\.shots = 6: class 'class2' has 5 samples in split 'train' of .*; take"):
        choose_shots(four, 6, 0)


def test_classes_are_drawn_by_seed_whatever_their_order() -> None:
    names = [f"class{i}" for i in range(20)]
    draws = [draw_classes(names, 5, seed) for seed in range(400)]
    assert draws[7] == draw_classes(names[::-1], 5, 7) and set(draw_classes(names, 3, 7)) < set(draws[7])
    assert len(set(map(frozenset, draws))) > 350
    often = Counter(name for draw in draws for name in draw)  # 100 each, within 5 deviations
    assert all(abs(often[name] - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for name in names), often
    with pytest.raises(ValueError, match="21 classes were asked for; allowed is 1 to 20"):
        draw_classes(names, 21, 0)


def test_a_selection_is_a_set_of_its_own(four: ShardSet) -> None:
    """Its labels are numbered in the order of the names, its samples as they lie, its shards as many as before."""
    chosen = select(four, ["class3", "class0"])
    before = [i for i in range(22) if i % 4 in (0, 3)]
    assert chosen.classes == ("class3", "class0") and len(chosen) == chosen.num_kept == 11
    assert [chosen[i].key for i in range(11)] == [four[i].key for i in before]
    assert [chosen[i].label for i in range(11)] == [{0: 1, 3: 0}[i % 4] for i in before]
    assert [chosen[i].sample_id for i in range(11)] == list(range(11))
    assert [chosen.shard_of(i) for i in range(11)] == [four.shard_of(i) for i in before]
    assert sum(shard.samples for shard in chosen.shards) == 11 and len(chosen.shards) == len(four.shards)
    prints = {select(four, names).fingerprint for names in (NAMED[:2], NAMED[1::-1], NAMED[:3])}
    assert len(prints | {four.fingerprint}) == 4 and select(four, NAMED[:2]).fingerprint in prints
    assert select(four, []) is four
    with pytest.raises(IndexError):
        chosen[11]


def test_the_loader_reads_a_selection_in_training_and_evaluation(four: ShardSet) -> None:
    chosen = Part(shots=2, classes=("class3", "class0")).of_training(four)
    assert chosen.kept is not None and chosen.num_kept == 4
    order = Order([shard.samples for shard in chosen.shards], 0, kept=chosen.kept)
    train = train_turns(order, global_batch=4, micro_batch=4, rank=0, world=1, start_step=0, num_steps=2)
    tests = eval_turns(len(chosen), micro_batch=4, rank=0, world=1)
    options: dict[str, Any] = {"micro_batch": 4, "size": 32, "options": ClipOptions(num_frames=2, sampling="uniform")}
    with ClipLoader(chosen, [*train, *tests], **options) as loader:
        seen = [
            (key, int(label))
            for batch in loader
            for key, label, ok in zip(batch.keys, batch.labels, batch.valid, strict=True)
            if ok
        ]
    label_of = {four[i].key: {0: 1, 3: 0}[i % 4] for i in range(22) if i % 4 in (0, 3)}
    assert all(label_of[key] == label for key, label in seen)
    assert (
        Counter(seen[:4])
        == Counter(seen[4:8])
        == Counter((chosen[int(i)].key, chosen[int(i)].label) for i in chosen.kept)
    )
    assert [key for key, _ in seen[8:]] == list(label_of)


def test_what_fetches_ahead_is_told_the_numbers_of_the_whole_set(
    four: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[Turn | None]] = []

    def follow(batches: Iterator[list[Turn | None]]) -> Iterator[list[Turn | None]]:
        told.extend(list(batches))  # all are read before the first comes back
        return iter(told)

    monkeypatch.setattr(four, "follow", follow)
    batches = [[Turn(0, 5), Turn(9, 5)], [Turn(1, 6, view=2), None]]
    assert list(select(four, NAMED[2:]).follow(iter(batches))) == batches
    assert told == [[Turn(2, 5), Turn(19, 5)], [Turn(3, 6, view=2), None]]


@pytest.mark.parametrize(
    ("classes", "keys", "message"),
    [
        (["class1", "clas2"], [], "'clas2' is no class of .*; did you mean 'class2'"),
        (["class1", "class1"], [], "class 'class1' is named twice"),
        (
            NAMED[:2],
            ["000000_numbers", "000099_numbers"],
            "1 of the 2 samples .* not in split 'train' .*'000099_numbers'",
        ),
        (
            NAMED[:2],
            ["000000_numbers", "000002_numbers"],
            "'000002_numbers' is of class 'class2', which is not one of the 2",
        ),
        (NAMED[:2], ["000000_numbers", "000004_numbers"], "class 'class1' has no sample in its episode"),
        (NAMED[:2], ["numbers"], "22 samples of .* are called 'numbers': give keys such as 000000_numbers"),
    ],
)
def test_what_cannot_be_selected_is_said(four: ShardSet, classes: list[str], keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as failure:
        select(four, classes, keys)
    assert "\n" not in str(failure.value)


def test_sets_with_several_labels_have_no_shots_and_no_episodes(tmp_path: Path) -> None:
    several = open_set(tmp_path / "set", [9] * 4, classes=2, multi_label=True)
    for attempt in (lambda: choose_shots(several, 1, 0), lambda: select(several, NAMED[:2])):
        with pytest.raises(ValueError, match="have several labels each; allowed are sets with one"):
            attempt()


def test_an_episode_from_a_file(four: ShardSet, tmp_path: Path) -> None:
    keys = [four[i].key for i in range(22)]
    entries = [
        {"classes": ["class2", "class1"], "train": [keys[2], keys[1], keys[5]], "test": [keys[9], keys[6]]},
        {"classes": ["class0", "class3"], "train": [keys[0], keys[3]]},
    ]
    path = tmp_path / "episodes.json"
    path.write_text(json.dumps({"episodes": entries}))
    first, second = read_episodes(path)
    assert read_episode(path, 1) == second and second.test == ()
    part = Part(classes=first.classes, train_keys=first.train, test_keys=first.test)
    trained, tested = part.of_training(four), part.of_testing(four)
    assert trained.kept is None and [trained[i].key for i in range(3)] == [keys[1], keys[2], keys[5]]
    assert [trained[i].label for i in range(3)] == [1, 0, 1] and [tested[i].key for i in range(2)] == [keys[6], keys[9]]
    assert [len(Part(classes=second.classes, train_keys=second.train).of_testing(four))] == [11]
    with pytest.raises(ValueError, match=r"data\.episode = 2; allowed is 0 to 1: .* has 2"):
        read_episode(path, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ('{"episodes": []}', "the form is"),
        ("[1]", "the form is"),
        ('{"episodes": [7]}', "episode 0 is no object"),
        ('{"episodes": [{"classes": ["a"], "train": ["x"]}]}', "episode 0: classes has 1 entries; needed are 2"),
        ('{"episodes": [{"classes": ["a", "a"], "train": ["x"]}]}', "episode 0: 'a' stands twice in classes"),
        ('{"episodes": [{"classes": ["a", "b"], "train": []}]}', "episode 0: train has 0 entries"),
        ('{"episodes": [{"classes": ["a", 3], "train": ["x"]}]}', "episode 0: classes is no list of texts"),
        ('{"episodes": [{"classes": ["a", "b"], "train": ["x"], "test": "y"}]}', "episode 0: test is no list of texts"),
    ],
)
def test_a_file_that_holds_no_episodes_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "episodes.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as failure:
        read_episodes(path)
    assert "\n" not in str(failure.value) and "episodes.json" in str(failure.value)
