"""Mutated samples over four codecs: the trainer lives, the neighbours are delivered, and with checksums no wrong frame.

A few samples in every test run; with STRESS=1 the promised 10,000 of each kind. Mutants that nothing can tell from
undamaged ones (a set made by others, mutated before it was indexed) are counted, and the counts printed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.encode import FrameChoice, encode_video
from pipelines.loader import ClipBatch, ClipLoader
from pipelines.plan import ClipOptions, eval_turns
from pipelines.shards import EncodedVideo, FrameTable, ShardSet, ShardWriter, checksum, write_manifest
from tests.videos import read_number, write_video

FULL = os.environ.get("STRESS") == "1"
CODECS = ("jpeg", "h264", "hevc", "vp9")  # the last in the copy profile
MUTANTS = 10_000 // len(CODECS) if FULL else 60  # of each codec and kind, beside as many untouched neighbours
LENGTHS = (9, 14, 17, 22, 30, 41)
A_SHARD = 100
OPTIONS = ClipOptions(num_frames=4, sampling="uniform", eval_crop=1.0)
Random = np.random.Generator


def flip_bits(data: bytearray, random: Random) -> None:
    for at in random.integers(len(data), size=random.integers(1, 9)):
        data[at] ^= 1 << int(random.integers(8))


def overwrite(data: bytearray, random: Random) -> None:
    """A stretch of noise, zeros or ones."""
    start, length = int(random.integers(len(data))), int(random.integers(1, 400))
    filling = [random.bytes(length), bytes(length), b"\xff" * length][int(random.integers(3))]
    data[start : start + length] = filling[: len(data) - start]


def shift(data: bytearray, random: Random) -> None:
    """A few bytes are lost, what follows moves up; or the other way round."""
    start, length = int(random.integers(len(data))), int(random.integers(1, 20))
    tail = bytes(data[start:])
    moved = tail[length:] + tail[:length] if random.random() < 0.5 else tail[-length:] + tail[:-length]
    data[start:] = moved


def cut(data: bytearray, random: Random) -> None:
    """Zeros from somewhere on, as after a crash of the machine."""
    start = int(random.integers(len(data)))
    data[start:] = bytes(len(data) - start)


def swap(data: bytearray, random: Random) -> None:
    """Two stretches change places."""
    length = int(random.integers(1, max(2, len(data) // 8)))
    first = int(random.integers(len(data) - 2 * length)) if len(data) > 2 * length else 0
    second = int(random.integers(first + length, len(data) - length + 1))
    a, b = bytes(data[first : first + length]), bytes(data[second : second + length])
    data[first : first + length], data[second : second + length] = b, a


MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (flip_bits, overwrite, shift, cut, swap)


def mutate(video: bytes, frames: FrameTable, random: Random) -> bytes:
    """The same number of bytes, not the same bytes; where the table says where frames lie, among those."""
    first, last = 0, len(video)
    if frames.num_bytes.any():
        first, last = int(frames.offset.min()), int((frames.offset + frames.num_bytes).max())
    while True:
        part = bytearray(video[first:last])
        MUTATIONS[int(random.integers(len(MUTATIONS)))](part, random)
        assert len(part) == last - first
        if part != video[first:last]:
            return video[:first] + part + video[last:]


def encode(folder: Path, codec: str) -> list[EncodedVideo]:
    """A numbered video of each length."""
    videos = []
    for length in LENGTHS:
        if codec == "vp9":
            path = write_video(folder / f"{length}.webm", length, (64, 64), codec="libvpx-vp9", g="12")
            videos.append(encode_video(path, "copy", choice=FrameChoice()))
        else:
            path = write_video(folder / f"{length}.mp4", length, (64, 64))
            videos.append(encode_video(path, codec, choice=FrameChoice()))
    return videos


def reindex(video: EncodedVideo, data: bytes) -> EncodedVideo:
    """As whoever indexes a set made by others does: the checksums are those of the bytes that are there."""
    table = video.frames
    sums = [
        checksum(data[o : o + n]) if n else 0
        for o, n in zip(table.offset.tolist(), table.num_bytes.tolist(), strict=True)
    ]
    return replace(video, data=data, frames=replace(table, checksum=np.asarray(sums, np.uint64)))


def write_set(folder: Path, profile: str, videos: Iterator[EncodedVideo], *, verified: bool) -> ShardSet:
    folder.mkdir()
    shards, writer = [], ShardWriter(folder, "train-000000.tar")
    for i, video in enumerate(videos):
        if len(writer) == A_SHARD:
            shards.append(asdict(writer.close()))
            writer = ShardWriter(folder, f"train-{len(shards):06d}.tar")
        writer.add(f"{i:06d}", [0], video, {})
    shards.append(asdict(writer.close()))
    facts = {"classes": ["a"], "multi_label": False, "verified": verified, "profile": {"name": profile}}
    write_manifest(folder, {**facts, "splits": {"train": {"shards": shards}}})
    return ShardSet.open(folder, "train")


def mutate_in_place(shards: ShardSet, random: Random) -> None:
    """Every second sample's video, where it lies in its tar."""
    for i in range(1, len(shards), 2):
        sample = shards[i]
        with sample.shard.open("r+b") as file:
            file.seek(sample.video_offset)
            data = mutate(file.read(sample.video_bytes), sample.frames, random)
            file.seek(sample.video_offset)
            file.write(data)


def evaluate(shards: ShardSet) -> Iterator[tuple[ClipLoader, ClipBatch]]:
    """All samples in order, the one centre view of each."""
    turns = eval_turns(len(shards), micro_batch=20, rank=0, world=1)
    settings = {"micro_batch": 20, "size": 64, "options": OPTIONS, "workers": 2, "max_bad_fraction": 1.0}
    with ClipLoader(shards, turns, **settings) as loader:  # type: ignore[arg-type]
        for batch in loader:
            yield loader, batch


def judge(shards: ShardSet, originals: list[EncodedVideo], expected: dict[int, NDArray[np.uint8]]) -> Counter[str]:
    """Loads all. Every neighbour must come out to the bit; counts what became of the mutants."""
    counts: Counter[str] = Counter()
    for loader, batch in evaluate(shards):
        for row, turn in enumerate(batch.turns):
            if not batch.valid[row]:
                continue
            frames = batch.frames[row].numpy()
            right = np.array_equal(frames, expected[turn.sample_id % len(LENGTHS)])
            if turn.sample_id % 2 == 0:
                assert right, f"neighbour {turn.sample_id} was altered"
                counts["neighbours"] += 1
            else:
                counts["right" if right else damage(frames, batch.plans[row].frames)] += 1
        bad = loader.bad
    assert counts["neighbours"] == (len(shards) + 1) // 2 and all(sample_id % 2 for sample_id in bad)
    counts["found"] = len(bad)
    assert sum(counts.values()) == len(shards)
    return counts


def damage(frames: NDArray[np.uint8], numbers: tuple[int, ...]) -> str:
    """What is wrong with a clip that was delivered."""
    try:
        shown = [read_number(frame) for frame in frames]
    except ValueError:
        return "undetected, unreadable"
    return "undetected, other pixels" if shown == list(numbers) else "undetected, other frames"


@pytest.mark.parametrize("codec", CODECS)
def test_mutants(tmp_path: Path, codec: str) -> None:
    originals = encode(tmp_path, codec)
    profile = "copy" if codec == "vp9" else codec
    clean = write_set(tmp_path / "clean", profile, iter(originals), verified=True)
    expected = {}
    for _, batch in evaluate(clean):
        for row, turn in enumerate(batch.turns):
            if batch.valid[row]:
                expected[turn.sample_id] = batch.frames[row].numpy().copy()
                assert damage(expected[turn.sample_id], batch.plans[row].frames) == "undetected, other pixels"
    assert len(expected) == len(LENGTHS)

    count, random = 2 * MUTANTS, np.random.default_rng(11)
    packed = (originals[i % len(LENGTHS)] for i in range(count))
    shards = write_set(tmp_path / "packed", profile, packed, verified=True)
    mutate_in_place(shards, random)
    after = judge(shards, originals, expected)
    assert set(after) <= {"neighbours", "found", "right"}, "a wrong frame was served"

    def foreign() -> Iterator[EncodedVideo]:
        for i in range(count):
            video = originals[i % len(LENGTHS)]
            yield reindex(video, mutate(video.data, video.frames, random)) if i % 2 else video

    before = judge(write_set(tmp_path / "foreign", profile, foreign(), verified=False), originals, expected)
    for when, counts in (("after packing", after), ("before indexing", before)):
        print(f"\n{codec}, {MUTANTS} mutated {when}: {dict(sorted(counts.items()))}", end="")
