"""A part of a training set with the same share of every class: for learning with less data, as in the data-efficiency
experiment of the AIM paper.

Samples of a class are put in an order by a hash of the seed and their keys, and the first of them are kept. So the part
depends on neither the order of the samples nor how they lie in shards, and with one seed a smaller part lies within
every larger one. It costs a look at every sample's entry in the index, seconds for the 240,000 samples of Kinetics-400;
of a remote set, every shard is fetched for it. A whole set costs nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipelines.shards import ShardSet


def choose_fraction(shards: ShardSet, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """Ascending ids of `fraction` · n of every class's n samples, rounded half up and at least one; None for 1: all.

    In a set with several labels a sample counts with its lowest one, and those without any are a class of their own.
    Raises ValueError or OSError where an entry of the index cannot be read: its class is not known then.
    """
    if fraction == 1:
        return None
    classes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sample_id in range(len(shards)):
        try:
            sample = shards[sample_id]
        except ValueError as error:
            raise ValueError(f"data.fraction = {fraction:g} needs the class of every sample: {error}") from error
        place = xxhash.xxh3_64_intdigest(sample.key.encode(), seed)
        classes[min(sample.labels, default=-1)].append((place, sample_id))
    kept = [sample_id for of_class in classes.values() for _, sample_id in _first(sorted(of_class), fraction)]
    return np.sort(np.asarray(kept, np.int64))


def _first(ordered: list[tuple[int, int]], fraction: float) -> list[tuple[int, int]]:
    return ordered[: max(1, math.floor(fraction * len(ordered) + 0.5))]
