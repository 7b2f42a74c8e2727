"""What tools/doctor.py says of data: a packed set (manifest, files, indexes, bytes, decoding), a folder of videos.

A set is looked at as the loader would: what the manifest promises against what lies there, then, shard by shard in
turns until the time is over, the digest of an index and the checksums of a few samples. That is a sample; training
checks every byte that it reads.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines.annotations import VIDEO_SUFFIXES
from pipelines.features import describe
from pipelines.loader import decodes_on_gpu, default_workers, describe_decoding
from pipelines.read import CorruptSample, ShardReader
from pipelines.shards import ShardInfo, ShardSet, index_path_of, read_manifest
from pipelines.video import VideoError, open_video
from tools.parts.doctor_machine import FALLBACK, OK, PROBLEM, Row, decode_rates

SECONDS = 4.0  # for checksums; and for looking at videos
SAMPLES_A_SHARD = 3
ALLOWED = 0.01  # data.max_bad_fraction, unless the recipe says otherwise
TOLD = 3


def set_rows(folder: Path, on_gpu: bool) -> list[Row]:
    """The rows of a packed set; after one that keeps it from being opened there are no more."""
    try:
        manifest = read_manifest(folder)
        splits = [ShardSet(folder, split, manifest) for split in manifest["splits"]]
        total = sum(len(split) for split in splits)
        if not total:
            raise ValueError(f"{folder} holds no sample; {folder / 'rejects.tsv'} has the reasons; pack again")
    except (ValueError, OSError) as error:
        return [Row(PROBLEM, "set", _line(error), remedy="pack again with tools/make_shards.py, or copy the set again")]
    rows = [_contents(folder, splits), _files(splits, total)]
    return [*rows, _bytes(splits), _rejects(folder, total), _decoding(splits[0], on_gpu)]


def video_rows(folder: Path) -> list[Row]:
    """The row of a folder of videos that are to be packed: a few are opened, and their first frame decoded."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not paths:
        text = f"{folder}: no video among its files (they end in {' '.join(VIDEO_SUFFIXES)})"
        return [Row(PROBLEM, "videos", text, remedy="give the folder above the classes' folders")]
    deadline = time.monotonic() + SECONDS
    looked, bad = 0, []
    step = max(1, len(paths) // 100)
    for path in paths[::step]:
        looked += 1
        try:
            with open_video(path) as reader:
                reader.skim()
        except (VideoError, OSError) as error:
            bad.append(f"{path.name} ({_line(error)})")
        if time.monotonic() > deadline:
            break
    size = sum(path.stat().st_size for path in paths) / 1e9
    found = f"{len(paths):,} videos, {size:,.2f} GB; {looked} looked at, {looked - len(bad)} open and show a frame"
    if not bad:
        return [Row(OK, "videos", found)]
    cost = "packing leaves such videos out and lists them in rejects.tsv"
    status = PROBLEM if len(bad) == looked else FALLBACK
    return [Row(status, "videos", f"{found}; not {'; '.join(bad[:TOLD])}", cost, "copy or convert them again")]


def _contents(folder: Path, splits: list[ShardSet]) -> Row:
    """What the manifest says there is."""
    first = splits[0]
    size = sum(shard.bytes for split in splits for shard in split.shards) / 1e9
    counts = ", ".join(f"{split.split} {len(split):,}" for split in splits)
    verified = "" if first.verified else ", not verified when packed"
    found = f"{folder}: {first.profile}, {len(first.classes)} classes, {counts}, {size:,.2f} GB{verified}"
    lacking = [name for name in ("train", "val") if name not in [split.split for split in splits if len(split)]]
    if not lacking:
        return Row(OK, "set", found)
    cost = f"no samples in split {' and '.join(lacking)}, which recipes name"
    remedy = '--set data.train_split=NAME --set data.val_split=NAME (or "" for no evaluation)'
    return Row(FALLBACK, "set", found, cost, remedy)


def _files(splits: list[ShardSet], total: int) -> Row:
    """Whether every shard and index is there, the shards of the right length."""
    problems = [problem for split in splits for problem in split.check_files()]
    if not problems:
        return Row(OK, "set: files", f"all {sum(len(split.shards) for split in splits)} shards and their indexes")
    return _lost("set: files", sum(shard.samples for shard, _ in problems), total, [text for _, text in problems])


def _bytes(splits: list[ShardSet]) -> Row:
    """Digests of indexes and checksums of samples, as many as there is time for."""
    deadline, reader = time.monotonic() + SECONDS, ShardReader()
    looked, lost = 0, 0
    texts: list[str] = []
    turns = [_looks(split, number, reader) for split in splits for number in range(len(split.shards))]
    shards = len(turns)
    while turns and time.monotonic() < deadline:
        turn = turns.pop(0)
        if (look := next(turn, None)) is None:
            continue
        turns.append(turn)  # after the other shards
        count, text = look
        looked += count
        if text:
            lost, texts = lost + count, [*texts, text]
    reader.close()
    name = "set: bytes"
    if texts:
        return _lost(name, lost, max(1, looked), texts)
    return Row(OK, name, f"checksums hold: {looked} samples of {shards} shards looked at, and their indexes")


def _looks(split: ShardSet, number: int, reader: ShardReader) -> Iterator[tuple[int, str]]:
    """A shard's index, then some of its samples: how many samples that was, and what is wrong with it."""
    shard = split.shards[number]
    first = sum(other.samples for other in split.shards[:number])
    if (text := _index_problem(split, shard)) is not None:
        yield shard.samples, text
        return
    for k in range(min(SAMPLES_A_SHARD, shard.samples)):
        try:
            sample = split[first + k * shard.samples // min(SAMPLES_A_SHARD, shard.samples)]
            reader.packets(sample.shard, [(sample.video_offset, sample.video_bytes, sample.checksum)])
            yield 1, ""
        except (ValueError, OSError, CorruptSample) as error:
            yield 1, _line(error)


def _index_problem(split: ShardSet, shard: ShardInfo) -> str | None:
    path = index_path_of(split.folder / shard.name)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if digest == shard.index_sha256 else f"{path.name} is not the index that the manifest names"


def _lost(name: str, lost: int, of: int, texts: list[str]) -> Row:
    """A row of samples that cannot be read, judged as training judges them."""
    more = f"; and {len(texts) - TOLD} more" if len(texts) > TOLD else ""
    found = f"{lost:,} of {of:,} samples cannot be read: {'; '.join(texts[:TOLD])}{more}"
    remedy = "copy these files again, or pack again (tools/make_shards.py, tools/index_shards.py)"
    if lost > ALLOWED * of:
        return Row(PROBLEM, name, f"{found} (data.max_bad_fraction is {ALLOWED:g})", remedy=remedy)
    return Row(FALLBACK, name, found, "others are learned from in their place, and the run lists them", remedy)


def _rejects(folder: Path, total: int) -> Row:
    """What packing left out."""
    path = folder / "rejects.tsv"
    if not path.is_file():
        return Row(OK, "set: rejects", "no rejects.tsv: nothing is known to be left out")
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reasons = Counter(row.get("reason") or "unknown" for row in csv.DictReader(file, delimiter="\t"))
    if not reasons:
        return Row(OK, "set: rejects", "none: every source was packed")
    found = f"{reasons.total():,} sources were left out beside {total:,} packed samples: "
    found += ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))
    if reasons.total() <= ALLOWED * total:
        return Row(OK, "set: rejects", found)
    return Row(FALLBACK, "set: rejects", found, "they are not learned from", f"{path} lists them; mend and pack again")


def _decoding(split: ShardSet, on_gpu: bool) -> Row:
    """Who will decode the set here, and what that costs."""
    device = torch.device("cuda" if on_gpu else "cpu")
    name, found = "set: decoding", describe_decoding(split, device, default_workers(1, device.type))
    if split.features is not None:
        return Row(OK, name, f"{found} ({describe(split.features)})" if "(" not in found else found)
    if decodes_on_gpu(split, device):
        return Row(OK, name, f"{found}; its speed is unmeasured")
    if split.profile == "jpeg":
        return Row(OK, name, f"{found}: {decode_rates('jpeg')}")
    if split.profile == "copy":
        cost = "a source is decoded from its first frame to the last wanted: 13 clips/s a core by PyAV (measured)"
        return Row(FALLBACK, name, found, cost, f"pack with --profile jpeg: {decode_rates('jpeg')}")
    rates = decode_rates(split.profile)
    return Row(FALLBACK, name, found, rates, f"pack with --profile jpeg: {decode_rates('jpeg')}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:250]
