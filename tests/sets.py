"""Small packed sets made on the spot, of videos whose frames carry their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.encode import FrameChoice, encode_video
from pipelines.shards import EncodedVideo, ShardSet, ShardWriter, write_manifest
from pipelines.video import decode_file, packet_frames, to_rgb
from tests.videos import read_number, write_video


def make_set(
    folder: Path,
    lengths: list[int],
    *,
    profile: str = "jpeg",
    fps: str = "source",
    classes: int = 2,
    size: tuple[int, int] = (96, 64),
    samples_a_shard: int = 4,
    splits: tuple[str, ...] = ("train",),
    rotation: int = 0,
    multi_label: bool = False,
) -> Path:
    """Packs one numbered video of each length into every split; sample i is of class i mod `classes`, and if
    `multi_label`, also of class i // 2 mod `classes`."""
    folder.mkdir(parents=True)
    source = folder / "source.mp4"
    encoded = {}
    for length in set(lengths):
        write_video(source, length, size, rotation=rotation)
        encoded[length] = encode_video(source, profile, choice=FrameChoice.parse(fps))
    source.unlink()
    entries = {}
    for split in splits:
        shards = []
        for start in range(0, len(lengths), samples_a_shard):
            writer = ShardWriter(folder, f"{split}-{len(shards):06d}.tar")
            for i in range(start, min(start + samples_a_shard, len(lengths))):
                labels = sorted({i % classes, (i // 2 if multi_label else i) % classes})
                writer.add(f"{i:06d}_numbers", labels, encoded[lengths[i]], {"labels": labels})
            shards.append(asdict(writer.close()))
        entries[split] = {"samples": len(lengths), "shards": shards}
    names = [f"class{i}" for i in range(classes)]
    facts: dict[str, object] = {"classes": names, "multi_label": multi_label, "verified": True}
    facts["profile"] = {"name": profile, "fps": fps}
    write_manifest(folder, {**facts, "splits": entries})
    return folder


def open_set(folder: Path, lengths: list[int], split: str = "train", **options: object) -> ShardSet:
    """`make_set` and open it."""
    return ShardSet.open(make_set(folder, lengths, **options), split)  # type: ignore[arg-type]


def whole(video: EncodedVideo) -> list[NDArray[np.uint8]]:
    """All stored frames, decoded from the whole file."""
    return list(decode_file(video.data, range(len(video.frames))))


def packets(video: EncodedVideo) -> list[bytes]:
    """The stored bytes of every frame."""
    return [video.data[o : o + n] for o, n in zip(video.frames.offset, video.frames.num_bytes, strict=True)]


def numbers(images: list[NDArray[np.uint8]]) -> list[int]:
    """What the frames show."""
    return [read_number(image) for image in images]


def decode_packets(packets: Sequence[bytes | memoryview], extradata: bytes, wanted: Sequence[int]) -> NDArray[np.uint8]:
    """`packet_frames` of H.264 as one array, uint8 [n, H, W, 3], RGB: the same bits as `decode_file` gives."""
    return np.stack([to_rgb(picture) for picture in packet_frames(packets, extradata, wanted)])
