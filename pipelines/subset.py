"""A part of a set: for learning with less data, from a few samples of each class, or of some classes only.

Training takes the same share of every class (`data.fraction`, as in the data-efficiency experiment of the AIM paper) or
as many samples of each (`data.shots`). Samples of a class are put in an order by a hash of the seed and their keys, and
the first of them are kept: the part depends on neither the order of the samples nor how they lie in shards, and with
one seed a smaller part lies within every larger one.

`data.classes` leaves the samples of other classes out, in training and evaluation alike, and numbers those it names
anew, as if there had never been others. An episode of few-shot learning is five such classes and five shots; one that
somebody published names its samples, in a file:

    {"episodes": [{"classes": ["dive", …], "train": [KEY, …], "test": [KEY, …]}, …]}

A KEY is a sample's, with or without the number that the packer puts before a video's name; without "test", all samples
of these classes are. It costs a look at every sample's entry in the index; of a remote set,
every shard is fetched for it. A whole set costs nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipelines.plan import Turn
from pipelines.shards import Sample, ShardInfo, ShardSet

MAX_EPISODE_BYTES = 100_000_000
_PACKED_NUMBER = re.compile(r"^\d{6,}_")


@dataclass(frozen=True)
class Part:
    """Which samples of a set are learned from and tested on; by default all. At most one of `fraction`, `shots` and the
    keys is given, and keys with classes."""

    fraction: float = 1.0
    shots: int = 0
    seed: int = 0
    classes: tuple[str, ...] = ()
    """Names, in the order of their new numbers; empty: all as they are."""
    train_keys: tuple[str, ...] = ()
    test_keys: tuple[str, ...] = ()

    def of_training(self, shards: ShardSet) -> ShardSet:
        """The training split with nothing but these classes or keys, and `kept` set to what is learned from.

        Raises ValueError or OSError: no such class or sample, a class with too few, an entry of the index damaged.
        """
        chosen = select(shards, self.classes, self.train_keys)
        chosen.kept = (
            choose_shots(chosen, self.shots, self.seed)
            if self.shots
            else choose_fraction(chosen, self.fraction, self.seed)
        )
        return chosen

    def of_testing(self, shards: ShardSet) -> ShardSet:
        """The same for a split that is evaluated: all samples of these classes, or those of these keys."""
        return select(shards, self.classes, self.test_keys)


def choose_fraction(shards: ShardSet, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """Ascending ids of `fraction` · n of every class's n samples, rounded half up and at least one; None for 1: all.

    In a set with several labels a sample counts with its lowest one, and those without any are a class of their own.
    Raises ValueError or OSError where an entry of the index cannot be read: its class is not known then.
    """
    if fraction == 1:
        return None
    classes = _hashed(shards, seed, f"data.fraction = {fraction:g}")
    return _ids(of_class[: max(1, math.floor(fraction * len(of_class) + 0.5))] for of_class in classes.values())


def choose_shots(shards: ShardSet, shots: int, seed: int) -> NDArray[np.int64]:
    """Ascending ids of `shots` samples of every class.

    Raises ValueError for a class with fewer and for a set with several labels a sample, ValueError or OSError where an
    entry of the index cannot be read.
    """
    what = f"data.shots = {shots}"
    _require_one_label(shards, what)
    classes = _hashed(shards, seed, what)
    for label, name in enumerate(shards.classes):
        if len(classes[label]) < shots:
            raise ValueError(
                f"{what}: class {name!r} has {len(classes[label])} samples in split {shards.split!r} of "
                f"{shards.folder}; take fewer shots, or name other classes in data.classes"
            )
    return _ids(of_class[:shots] for of_class in classes.values())


def draw_classes(names: Sequence[str], ways: int, seed: int) -> tuple[str, ...]:
    """`ways` of the names, which differ, by a hash of the seed and the name: whatever their order, and with one seed
    fewer are among more. ValueError where there are not so many."""
    if not 1 <= ways <= len(names):
        raise ValueError(f"{ways} classes were asked for; allowed is 1 to {len(names)}, as many as there are")
    return tuple(sorted(names, key=lambda name: (_place(name, seed), name))[:ways])


def select(shards: ShardSet, classes: Sequence[str], keys: Sequence[str] = ()) -> ShardSet:
    """The samples of these classes, or if there are keys, those alone; numbered anew, with labels renumbered in the
    order of `classes`. Without classes, the set itself.

    Raises ValueError: no such class or sample, one named twice, a class without samples, a sample of another class, a
    set with several labels a sample. ValueError or OSError where an entry of the index cannot be read.
    """
    if not classes:
        return shards
    what = "data.episodes" if keys else "data.classes"
    _require_one_label(shards, what)
    numbers = _new_numbers(shards, classes)
    entries = [(sample.key, sample.label) for sample in _samples(shards, what)]
    if keys:
        chosen = _ids_of_keys(shards, keys, [key for key, _ in entries])
    else:
        chosen = [i for i, (_, label) in enumerate(entries) if label in numbers]
    for i in chosen:
        key, label = entries[i]
        if label not in numbers:
            raise ValueError(
                f"sample {key!r} is of class {shards.classes[label]!r}, which is not one of the {len(classes)} of its "
                f"episode: {', '.join(classes)}"
            )
    present = {entries[i][1] for i in chosen}
    for label in numbers:
        if label not in present:
            where = "its episode" if keys else f"split {shards.split!r} of {shards.folder}"
            raise ValueError(f"class {shards.classes[label]!r} has no sample in {where}")
    return _Selection(shards, np.asarray(sorted(chosen), np.int64), tuple(classes), numbers)


def own_name(key: str) -> str:
    """The name of a video in the key that the packer made of it: `000012_dive` → `dive`; other keys as they are."""
    return _PACKED_NUMBER.sub("", key, count=1)


@dataclass(frozen=True)
class Episode:
    """A few classes, what is learned of them, and what is asked."""

    classes: tuple[str, ...]
    train: tuple[str, ...]
    """Keys of the training split."""
    test: tuple[str, ...]
    """Keys of the split that is evaluated; empty: all samples of the classes."""


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a file (see the head of this module), each with two classes or more and something to learn.

    Raises ValueError or OSError naming the episode and what is wrong with it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; name a JSON file of episodes")
    if path.stat().st_size > MAX_EPISODE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; allowed are {MAX_EPISODE_BYTES}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({type(error).__name__}: {error})") from error
    entries = document.get("episodes") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: the form is {{"episodes": [{{"classes": […], "train": […], "test": […]}}, …]}}')
    return [_read_episode(entry, f"{path}: episode {number}") for number, entry in enumerate(entries)]


def read_episode(path: Path, number: int) -> Episode:
    """One of them, counted from 0. ValueError or OSError as `read_episodes`, and where there is no such."""
    episodes = read_episodes(path)
    if not 0 <= number < len(episodes):
        raise ValueError(f"data.episode = {number}; allowed is 0 to {len(episodes) - 1}: {path} has {len(episodes)}")
    return episodes[number]


def _read_episode(entry: Any, where: str) -> Episode:
    if not isinstance(entry, dict):
        raise ValueError(f'{where} is no object with "classes", "train" and "test"')
    lists = []
    for name, least in (("classes", 2), ("train", 1), ("test", 0)):
        values = entry.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            raise ValueError(f"{where}: {name} is no list of texts")
        if len(values) < least:
            raise ValueError(f"{where}: {name} has {len(values)} entries; needed are {least} or more")
        if len(set(values)) < len(values):
            raise ValueError(f"{where}: {_twice(values)!r} stands twice in {name}")
        lists.append(tuple(values))
    return Episode(*lists)


class _Selection(ShardSet):
    """Some samples of a split as if there were no others: numbered from 0, with the classes that are named, in as many
    shards, of which some may hold nothing. Its fingerprint is its own."""

    def __init__(
        self, whole: ShardSet, ids: NDArray[np.int64], classes: tuple[str, ...], numbers: Mapping[int, int]
    ) -> None:
        """`ids` ascending, in `whole`; `numbers`: old label → new."""
        ends = np.cumsum([shard.samples for shard in whole.shards])
        left = np.diff(np.searchsorted(ids, ends), prepend=0).tolist()
        shards = [asdict(replace(shard, samples=n)) for shard, n in zip(whole.shards, left, strict=True)]
        facts = json.dumps([whole.fingerprint, classes, ids.tolist()], ensure_ascii=False)
        manifest = {
            **whole.manifest,
            "classes": list(classes),
            "fingerprint": hashlib.sha256(facts.encode()).hexdigest(),
            "splits": {whole.split: {"samples": len(ids), "shards": shards}},
        }
        super().__init__(whole.folder, whole.split, manifest)
        self._whole, self._sample_ids, self._numbers = whole, ids, numbers

    def __getitem__(self, sample_id: int) -> Sample:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        sample = self._whole[int(self._sample_ids[sample_id])]
        return replace(sample, sample_id=sample_id, labels=(self._numbers[sample.label],))

    def follow(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, after the whole set has seen them with its own numbers."""
        ahead: deque[Any] = deque()

        def translated() -> Iterator[list[Turn | None]]:
            for batch in batches:
                ahead.append(batch)
                yield [t and replace(t, sample_id=int(self._sample_ids[t.sample_id])) for t in batch]

        for _ in self._whole.follow(translated()):
            yield ahead.popleft()

    def check_files(self) -> list[tuple[ShardInfo, str]]:
        return self._whole.check_files()


def _hashed(shards: ShardSet, seed: int, what: str) -> dict[int, list[tuple[int, int]]]:
    """Label → (place by hash, sample id) of its samples, ascending."""
    classes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sample_id, sample in enumerate(_samples(shards, what)):
        classes[min(sample.labels, default=-1)].append((_place(sample.key, seed), sample_id))
    for of_class in classes.values():
        of_class.sort()
    return classes


def _samples(shards: ShardSet, what: str) -> Iterator[Sample]:
    for sample_id in range(len(shards)):
        try:
            yield shards[sample_id]
        except ValueError as error:
            raise ValueError(f"{what} needs the class of every sample: {error}") from error


def _place(text: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed)


def _ids(classes: Iterator[list[tuple[int, int]]]) -> NDArray[np.int64]:
    return np.sort(np.asarray([sample_id for of_class in classes for _, sample_id in of_class], np.int64))


def _require_one_label(shards: ShardSet, what: str) -> None:
    if shards.multi_label:
        raise ValueError(f"{what}: the videos of {shards.folder} have several labels each; allowed are sets with one")


def _new_numbers(shards: ShardSet, names: Sequence[str]) -> dict[int, int]:
    """Label in the set → label among these; ValueError unless they differ and are classes of the set."""
    if len(set(names)) < len(names):
        raise ValueError(f"class {_twice(names)!r} is named twice")
    for name in names:
        if name not in shards.classes:
            close = difflib.get_close_matches(name, shards.classes, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {len(shards.classes)} others"
            raise ValueError(f"{name!r} is no class of {shards.folder}; {hint}")
    return {shards.classes.index(name): new for new, name in enumerate(names)}


def _ids_of_keys(shards: ShardSet, keys: Sequence[str], there: Sequence[str]) -> list[int]:
    """Where each key stands among those that are there, as it is or without the packer's number."""
    places = {key: i for i, key in enumerate(there)}
    by_name: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(there):
        by_name[own_name(key)].append(i)
    found = [[places[key]] if key in places else by_name.get(key, []) for key in keys]
    missing = [key for key, at in zip(keys, found, strict=True) if not at]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(keys)} samples of an episode are not in split {shards.split!r} of "
            f"{shards.folder}, first {missing[0]!r}"
        )
    for key, at in zip(keys, found, strict=True):
        if len(at) > 1:
            raise ValueError(
                f"{len(at)} samples of {shards.folder} are called {key!r}: give keys such as {there[at[0]]}"
            )
    ids = [at[0] for at in found]
    if len(set(ids)) < len(ids):
        raise ValueError(f"an episode names sample {there[_twice(ids)]!r} of {shards.folder} twice")
    return ids


def _twice(values: Sequence[Any]) -> Any:
    """The first value that stands there again."""
    return next(value for i, value in enumerate(values) if value in values[:i])
