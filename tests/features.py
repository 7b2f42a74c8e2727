"""Small sets of frame features made on the spot, whose rows carry the numbers of their frame and their sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.features import store_features
from pipelines.shards import EncodedVideo, FeatureSource, FrameTable, Sample, ShardWriter, write_manifest

WIDTH = 6
MADE_BY = FeatureSource("stub", "0123", WIDTH, "rgb", 32, 0.875, (0.5,) * 3, (0.5,) * 3, "of nothing")  # type: ignore[arg-type]


def numbered(source_frames: int, every: int, sample_number: int, width: int = WIDTH) -> NDArray[np.float16]:
    """Row i: the number of its source frame, the sample's number, and the first again and again."""
    rows = np.repeat(np.arange(0, source_frames, every, dtype=np.float16)[:, None], width, axis=1)
    rows[:, 1] = sample_number
    return rows


def stored(features: NDArray[Any], source_frames: int, every: int = 1) -> EncodedVideo:
    """Ready to be written."""
    numbers = np.arange(0, source_frames, every, dtype=np.int32)
    nothing = np.zeros(len(numbers), np.int64)
    table = FrameTable(nothing, nothing.astype(np.int32), nothing.astype(np.uint64), numbers, nothing.astype(np.uint8))
    of = Sample(0, "", (0,), Path(), 0, 0, 0, 8, 8, source_frames, 30.0, table, b"")
    return store_features(features, of, slice(None))


def make_feature_set(
    folder: Path,
    lengths: Sequence[int],
    *,
    every: int = 1,
    classes: int = 2,
    samples_a_shard: int = 4,
    splits: Sequence[str] = ("train",),
    made_by: FeatureSource = MADE_BY,
    change: Callable[[int, EncodedVideo], EncodedVideo] = lambda _, video: video,
) -> Path:
    """A sample for each length in source frames, sample i of class i mod `classes`; `change` may spoil it."""
    folder.mkdir(parents=True)
    entries = {}
    for split in splits:
        shards = []
        for first in range(0, len(lengths), samples_a_shard):
            writer = ShardWriter(folder, f"{split}-{len(shards):06d}.tar")
            for i in range(first, min(first + samples_a_shard, len(lengths))):
                video = change(i, stored(numbered(lengths[i], every, i, made_by.width), lengths[i], every))
                writer.add(f"{i:06d}_numbers", [i % classes], video, {})
            shards.append(asdict(writer.close()))
        entries[split] = {"samples": len(lengths), "shards": shards}
    facts: dict[str, object] = {"classes": [f"class{i}" for i in range(classes)], "multi_label": False}
    facts |= {"verified": True, "profile": {"name": "features", "fps": f"source/{every}"}, "features": asdict(made_by)}
    write_manifest(folder, {**facts, "splits": entries})
    return folder
