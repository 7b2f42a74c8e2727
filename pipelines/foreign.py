"""Tars that others wrote become a set of ours, as they lie: scanned, inspected, indexed; not one byte is rewritten.

    train-0000.tar of webdataset.ShardWriter …        KEY.mp4 (webm, avi, mov, mkv …) + KEY.cls or KEY.json or KEY.txt
      │  scan_tar                                     where every file lies
      ▼
    ForeignSample: key, video, labels                 the files of one key belong together wherever they stand
      │  survey: classes from all labels              labels that are no class end it here, before hours of work
      │  inspect: frames, size, rotation, rate        in other processes; FFmpeg demuxes, with `verify` decodes all
      ▼
    train-0000.index.safetensors, manifest.json       profile copy; checksums of what was there when it was indexed
    rejects.tsv                                       every key that is left out, and why

Nothing is unpickled, extracted, or opened but the tars. A set is unverified unless every video was decoded: then only
worker processes decode it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

from pipelines.annotations import SPLITS, VIDEO_SUFFIXES
from pipelines.encode import MAX_STORED_BYTES, library_versions
from pipelines.processes import Lost, map_isolated
from pipelines.shards import EncodedVideo, FrameTable, IndexBuilder, ShardInfo, checksum, write_manifest, write_rejects
from pipelines.tar import Fault, Member, scan_tar
from pipelines.video import VideoError, open_video

MAX_LABEL_BYTES = 2**20  # of the file that a label stands in
MAX_LABEL_CHARACTERS = 200  # a longer one is a caption
MAX_CLASSES = 100_000
MAX_KEY_BYTES = 1000
_LABELS = ("cls", "json:label", "txt")  # tried in this order
_KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # the key ends at the first dot of the name
_NO_SAMPLES = re.compile(r"__[^/]*__($|/)")  # webdataset keeps facts about the tar there


@dataclass(frozen=True, slots=True)
class ForeignOptions:
    """How tars are read. ValueError when a value makes no sense."""

    label: str = ""
    """Where labels stand: a suffix, such as cls or txt, or json:FIELD (of an object in it: json:OBJECT.FIELD); empty:
    the first of cls, json:label and txt that a sample has."""
    video: str = ""
    """Suffix of the videos, such as mp4 or rgb.mp4; empty: whatever is one."""
    verify: bool = False
    """Decode every frame, instead of counting them."""
    timeout_seconds: float = 300.0
    """For a video; one that takes longer is left out."""

    def __post_init__(self) -> None:
        if self.label and not re.fullmatch(r"[a-z0-9_.]+|json:[^:]+", self.label):
            raise ValueError(f"label {self.label!r}: allowed are a suffix, such as cls or txt, and json:FIELD")


class Skipped(NamedTuple):
    """A line of rejects.tsv."""

    tar: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ForeignSample:
    """A video with its labels."""

    key: str
    """ASCII; other characters as %XX."""
    video: Member
    labels: tuple[int | str, ...]
    """Class numbers, or names."""


@dataclass(slots=True)
class Survey:
    """What the labels of all tars say."""

    samples: int = 0
    several: bool = False
    """Whether a sample has several labels, or none."""
    largest: tuple[int, str] = (-1, "")
    """The largest class number and who has it."""
    names: dict[str, str] = field(default_factory=dict)
    """Class name → who has it first."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why samples were left out: reason and detail → how often."""

    def add(self, other: Survey) -> None:
        self.skipped += other.skipped
        self.samples += other.samples
        self.several |= other.several
        self.largest = max(self.largest, other.largest)
        self.names = other.names | self.names

    def classes(self, listed: Sequence[str] | None) -> tuple[str, ...]:
        """The classes: those `listed`, else class0…, else the names, sorted. ValueError where the labels do not fit."""
        number, whose = self.largest
        if not self.samples:
            reasons = "; ".join(f"{count} times {reason}" for reason, count in self.skipped.most_common(3))
            raise ValueError(f"no sample can be used: {reasons or 'the tars hold none'}; see --video and --label")
        if listed is not None:
            unknown = next((name for name in sorted(self.names) if name not in set(listed)), None)
            if unknown is not None:
                raise ValueError(
                    f"{self.names[unknown]}: label {unknown!r} is none of the {len(listed)} classes listed"
                )
            if number >= len(listed):
                raise ValueError(f"{whose}: label {number}; allowed are 0 to {len(listed) - 1}, the classes listed")
            return tuple(listed)
        if self.names and number >= 0:
            name = next(iter(self.names))
            raise ValueError(
                f"labels are numbers ({number} in {whose}) and names ({name!r} in {self.names[name]}): list the classes"
            )
        if len(self.names) > MAX_CLASSES:
            raise ValueError(f"{len(self.names)} class names, such as {next(iter(self.names))!r}: captions?")
        classes = tuple(sorted(self.names)) or tuple(f"class{i}" for i in range(number + 1))
        if len(classes) < 2:
            raise ValueError(f"{len(classes)} class in {self.samples} samples; two or more are needed")
        return classes


@dataclass(slots=True)
class IndexReport:
    """What indexing did."""

    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(entry.reason for entry in self.skipped)


def list_samples(tar: Path, options: ForeignOptions) -> tuple[list[ForeignSample], list[Skipped]]:
    """The usable samples of a tar, in the order of their videos, and what is left out. OSError if it cannot be read."""
    skipped: list[Skipped] = []
    files: dict[str, dict[str, Member]] = defaultdict(dict)

    def skip(key: str, reason: str, detail: str) -> None:
        skipped.append(Skipped(tar.name, _printable(key), reason, detail))

    with tar.open("rb") as file:
        for entry in scan_tar(file):
            match = _KEY_AND_SUFFIX.fullmatch(entry.name.removeprefix("./"))
            if isinstance(entry, Fault):
                skip(entry.name, entry.reason, entry.detail)
            elif _NO_SAMPLES.match(entry.name):
                continue
            elif match is None:
                skip(entry.name, "no_key", "a name is KEY.SUFFIX")
            elif (suffix := match[2].lower()) in files[match[1]]:
                skip(match[1], "duplicate", f"another {suffix} at byte {entry.offset}; the first one counts")
            else:
                files[match[1]][suffix] = entry
        samples = []
        for key, parts in files.items():
            try:
                samples.append(_make_sample(file.fileno(), key, parts, options))
            except _NoSample as error:
                skip(key, *error.args)
    return sorted(samples, key=lambda sample: sample.video.offset), skipped


def survey_tars(tars: Sequence[Path], options: ForeignOptions, *, workers: int) -> Iterator[Survey]:
    """What the labels of each tar say. Raises ValueError, naming the sample, for labels that are no class."""
    for tar, found in zip(tars, map_isolated(partial(_survey, options), tars, workers=workers), strict=True):
        if isinstance(found, Lost):
            raise ValueError(f"{tar}: {found.detail} while it was scanned")
        yield found


def index_tars(
    tars: Mapping[str, Sequence[Path]],
    folder: Path,
    options: ForeignOptions,
    classes: Sequence[str],
    *,
    several: bool = False,
    workers: int = 1,
    on_sample: Callable[[IndexReport], None] | None = None,
) -> IndexReport:
    """Writes indexes, manifest.json and rejects.tsv of the tars (by split), all in `folder`, into it.

    `several` makes a multi-label set. Calls `on_sample` for every sample. Raises ValueError when a split has none left.
    """
    report, numbers = IndexReport(), {name: number for number, name in enumerate(classes)}
    order = [(split, tar) for split in SPLITS for tar in tars.get(split, ())]
    shards: dict[str, list[ShardInfo]] = defaultdict(list)
    with ThreadPoolExecutor(max(1, min(workers, 4))) as threads:
        contents = (
            _Contents(split, tar, *list_samples(tar, options), threads.submit(_sha256, tar)) for split, tar in order
        )
        ahead, behind = itertools.tee(contents)  # what is inspected, and what is written
        tasks = ((c.tar, sample.video.offset, sample.video.num_bytes) for c in ahead for sample in c.samples)
        inspect = partial(_inspect, options.verify)
        results = map_isolated(inspect, tasks, workers=workers, timeout_seconds=options.timeout_seconds)
        for content in behind:
            report.skipped += content.skipped
            shard = _write_index(content, results, numbers, report, on_sample)
            if shard is not None:
                shards[content.split].append(shard)
    _check_splits(tars, report)
    write_rejects(folder, ("tar", "key", "reason", "detail"), report.skipped)
    facts = {"classes": list(classes), "multi_label": several, "verified": options.verify, "profile": _PROFILE}
    splits = {
        split: {"samples": report.samples[split], "shards": [asdict(shard) for shard in shards[split]]}
        for split in SPLITS
        if shards[split]
    }
    counts = dict(sorted(report.reasons.items()))
    write_manifest(folder, {**facts, "splits": splits, "rejected": counts, "versions": library_versions()})
    return report


def _write_index(
    content: _Contents,
    results: Iterator[_Video | Lost],
    numbers: Mapping[str, int],
    report: IndexReport,
    on_sample: Callable[[IndexReport], None] | None,
) -> ShardInfo | None:
    """The index of a tar from the results for its samples, which are the next ones; None if none can be used."""
    builder = IndexBuilder()
    for sample in content.samples:
        found = next(results)
        if isinstance(found, Lost):
            report.skipped.append(Skipped(content.tar.name, sample.key, found.reason, found.detail))
        else:
            labels = sorted({numbers[label] if isinstance(label, str) else label for label in sample.labels})
            video = sample.video
            builder.add(sample.key, labels, found.encoded(), video.offset, video.num_bytes, found.checksum)
            report.samples[content.split] += 1
        if on_sample is not None:
            on_sample(report)
    num_bytes, sha256 = content.sha256.result()
    return builder.write(content.tar, num_bytes, sha256) if len(builder) else None


_PROFILE = {"name": "copy", "fps": "source", "short_side": None, "quality": None}


class _NoSample(Exception):
    """Arguments: reason and detail."""


class _Contents(NamedTuple):
    split: str
    tar: Path
    samples: list[ForeignSample]
    skipped: list[Skipped]
    sha256: Future[tuple[int, str]]


class _Video(NamedTuple):
    """What a process found out about a video."""

    width: int
    height: int
    num_frames: int
    fps: float
    checksum: int

    def encoded(self) -> EncodedVideo:
        return EncodedVideo(
            data=b"",
            suffix="",
            frames=FrameTable.of_copy(self.num_frames),
            width=self.width,
            height=self.height,
            source_frames=self.num_frames,
            fps=self.fps,
        )


def _make_sample(tar: int, key: str, parts: Mapping[str, Member], options: ForeignOptions) -> ForeignSample:
    videos = [s for s in parts if s == options.video or (not options.video and f".{s}" in VIDEO_SUFFIXES)]
    if not videos:
        wanted = options.video or "video"
        raise _NoSample("no_video", f"no {wanted} among its files: {', '.join(sorted(map(_printable, parts)))[:200]}")
    if len(videos) > 1:
        raise _NoSample("several_videos", f"{', '.join(sorted(videos))}: choose one with --video")
    video, name = parts[videos[0]], _printable(key)
    if len(name) > MAX_KEY_BYTES:
        raise _NoSample("no_key", f"longer than {MAX_KEY_BYTES} bytes")
    if not 0 < video.num_bytes <= MAX_STORED_BYTES:
        raise _NoSample("too_large" if video.num_bytes else "empty", f"{video.num_bytes} bytes")
    for rule in [options.label] if options.label else _LABELS:
        suffix, _, path = rule.partition(":")
        if suffix in parts and (values := _read_labels(tar, parts[suffix], path)) is not None:
            return ForeignSample(name, video, values)
    wanted = options.label or ", ".join(_LABELS)
    raise _NoSample("no_label", f"no {wanted} among its files: {', '.join(sorted(map(_printable, parts)))[:200]}")


def _read_labels(tar: int, member: Member, path: str) -> tuple[int | str, ...] | None:
    """The labels in a file; None if it has no such field."""
    if member.num_bytes > MAX_LABEL_BYTES:
        raise _NoSample("bad_label", f"{member.num_bytes} bytes to read a label from")
    data = os.pread(tar, member.num_bytes, member.offset)
    try:
        value: Any = data.decode("utf-8-sig")
        if path:
            value = json.loads(value)
            for name in path.split("."):
                if not isinstance(value, dict) or name not in value:
                    return None
                value = value[name]
    except (ValueError, RecursionError) as error:
        raise _NoSample("bad_label", f"{type(error).__name__} in the file it stands in") from error
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(map(_label, values)))


def _label(value: object) -> int | str:
    """A class number or name."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if not text or not text.isprintable() or len(text) > MAX_LABEL_CHARACTERS:
        raise _NoSample("bad_label", f"{_printable(str(value)[:60])}: allowed are a class number and a class name")
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def _survey(options: ForeignOptions, tar: Path) -> Survey:
    samples, skipped = list_samples(tar, options)
    survey = Survey(skipped=Counter(f"{entry.reason} ({entry.detail})" for entry in skipped))
    for sample in samples:
        survey.samples += 1
        survey.several |= len(sample.labels) != 1
        for label in sample.labels:
            whose = f"{tar}, sample {sample.key}"
            if isinstance(label, str):
                survey.names.setdefault(label, whose)
            elif 0 <= label < MAX_CLASSES:
                survey.largest = max(survey.largest, (label, whose))
            else:
                raise ValueError(f"{whose}: label {label}; allowed are 0 to {MAX_CLASSES - 1}")
    return survey


def _inspect(verify: bool, task: tuple[Path, int, int]) -> _Video | Lost:
    """What a video in a tar is; runs in a process of its own, for FFmpeg sees a stranger's bytes."""
    tar, offset, num_bytes = task
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            data = file.read(num_bytes)
        with open_video(data) as reader:
            width, height = reader.decode_all() if verify else reader.skim()
            return _Video(width, height, reader.num_frames, reader.fps, checksum(data))
    except VideoError as error:
        return Lost(error.reason, error.detail)
    except MemoryError:
        return Lost("out_of_memory", "not enough memory to read it")


def _sha256(tar: Path) -> tuple[int, str]:
    """Bytes and digest of a tar."""
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _check_splits(tars: Mapping[str, Sequence[Path]], report: IndexReport) -> None:
    for split, members in tars.items():
        if members and not report.samples[split]:
            reasons = (
                ", ".join(f"{count} {reason}" for reason, count in report.reasons.most_common()) or "they are empty"
            )
            raise ValueError(f"split {split}: no sample of {len(members)} tars can be used ({reasons})")


def _printable(text: str) -> str:
    """ASCII without control characters and spaces at will: others as %XX; a sample is told by it in logs and tables."""
    return quote_from_bytes(text.encode("utf-8", "surrogateescape"), safe=" !#$&'()*+,/:;<=>?@[]^_`{|}~-.\"")
