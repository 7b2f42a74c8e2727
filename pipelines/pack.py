"""Packs a list of videos into shards: one process a video at a time, one writer, the same bytes for any worker count.

Samples are shuffled by the seed within each split and written in that order, whichever worker finishes first. A worker
that dies or hangs costs the one video it was at, which is rejected with the reason; packing goes on with a new worker.
At most a few encoded videos per worker are held in memory. Everything is written into `.NAME.packing` beside the
output folder and renamed at the end, so the output folder is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.annotations import SPLITS, Listing, Video
from pipelines.encode import DEFAULT_QUALITY, FrameChoice, check_quality, encode_video, library_versions
from pipelines.shards import PROFILES, EncodedVideo, ShardInfo, ShardWriter, write_durably, write_manifest
from pipelines.video import VideoError

_SPAWN = multiprocessing.get_context("spawn")  # fork would copy the parent's threads and locks in unknown states
_VIDEOS_AHEAD = 3  # per worker: how far workers may run ahead of the writer


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How videos are stored. Raises ValueError, saying what is allowed, when a value makes no sense."""

    profile: str = "jpeg"
    fps: str = "source"
    """See `FrameChoice.parse`."""
    short_side: int | None = None
    """Pixels of the shorter side; None keeps the source's."""
    quality: int | None = None
    """1 to 100; None is `DEFAULT_QUALITY` (and nothing in the copy profile)."""
    max_shard_bytes: int = 1_000_000_000
    seed: int = 0
    timeout_seconds: float = 300.0
    """A video that takes longer is rejected."""

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile {self.profile!r}: allowed are {', '.join(PROFILES)}")
        choice = FrameChoice.parse(self.fps)
        if self.profile == "copy":
            if choice != FrameChoice() or self.short_side is not None or self.quality is not None:
                raise ValueError(
                    "profile copy stores the source's own bytes: leave out fps, short side and quality, or use "
                    "profile jpeg or h264"
                )
        else:
            quality = DEFAULT_QUALITY if self.quality is None else self.quality
            check_quality(quality)
            object.__setattr__(self, "quality", quality)
        if self.short_side is not None and not 16 <= self.short_side <= 4096:
            raise ValueError(f"short side {self.short_side}: allowed are 16 to 4096 pixels")
        if self.max_shard_bytes < 1_000_000:
            raise ValueError(f"shards of at most {self.max_shard_bytes} bytes: allowed is 1 MB or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: allowed are 0 to 2^63 - 1")


@dataclass(frozen=True, slots=True)
class Reject:
    """A video that was not packed."""

    reason: str
    """One of `VideoError.REASONS`, or missing, decoder_crash, timeout, out_of_memory, internal_error."""
    detail: str


@dataclass(slots=True)
class PackReport:
    """What packing did; filled while it runs."""

    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Seconds of video by split."""
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: defaultdict(list))
    rejects: list[tuple[Path, Reject]] = field(default_factory=list)
    bytes_in: int = 0
    """Of the packed videos' source files."""
    packed_of_class: Counter[str] = field(default_factory=Counter)
    stored_frames: list[int] = field(default_factory=list)
    """Of every packed video."""

    @property
    def bytes_out(self) -> int:
        return sum(shard.bytes for shards in self.shards.values() for shard in shards)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reject.reason for _, reject in self.rejects)


def pack_videos(
    source: Path,
    listing: Listing,
    out: Path,
    settings: PackSettings,
    *,
    workers: int = 1,
    on_video: Callable[[PackReport], None] | None = None,
) -> PackReport:
    """Packs `listing`, found in `source`, into the new folder `out`; calls `on_video` after every video.

    Raises ValueError when every video of a split was rejected, FileExistsError when `out` exists, OSError when it
    cannot be written. Whatever is raised, nothing is left behind.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers: allowed is 1 or more")
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists; packing makes a new folder: remove it or choose another name")
    part = out.with_name(f".{out.name}.packing")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"{part} exists: another program is packing there, or one was killed; if none runs, remove it"
        ) from None
    try:
        report = _pack(source, listing, part, settings, workers, on_video)
        part.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"no space left for {out}; what was written has been removed again") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report


def plan_order(videos: Sequence[Video], seed: int) -> list[Video]:
    """The order in the shards: split by split, shuffled by the seed within each."""
    order: list[Video] = []
    for number, split in enumerate(SPLITS):
        members = [video for video in videos if video.split == split]
        generator = np.random.Generator(np.random.Philox(key=[seed, number]))
        order += [members[i] for i in generator.permutation(len(members))]
    return order


def _pack(
    source: Path,
    listing: Listing,
    folder: Path,
    settings: PackSettings,
    workers: int,
    on_video: Callable[[PackReport], None] | None,
) -> PackReport:
    plan = plan_order(listing.videos, settings.seed)
    report = PackReport(rejects=[(path, Reject("missing", "listed, but not there")) for path in listing.missing])
    labels = {name: number for number, name in enumerate(listing.classes)}
    writers = _SplitWriter(folder, settings.max_shard_bytes, report)
    paths = [source / video.path for video in plan]
    try:
        with _Pool(min(workers, len(plan)), settings) as pool:
            for number, result in enumerate(pool.encode(paths)):
                video = plan[number]
                if isinstance(result, Reject):
                    report.rejects.append((video.path, result))
                else:
                    key = f"{number:06d}_{_slug(video.path.stem)}"
                    writers.add(key, labels[video.label], video, result, settings.profile)
                    report.bytes_in += paths[number].stat().st_size
                if on_video is not None:
                    on_video(report)
        writers.close()
    except BaseException:
        writers.discard()
        raise
    _check_splits(plan, report)
    _write_rejects(folder, report)
    write_manifest(folder, _manifest(listing, settings, report))
    return report


class _SplitWriter:
    """Appends samples, opening a new shard for a new split and whenever one is full."""

    def __init__(self, folder: Path, max_shard_bytes: int, report: PackReport) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._report = report
        self._split = ""
        self._writer: ShardWriter | None = None

    def add(self, key: str, label: int, video: Video, encoded: EncodedVideo, profile: str) -> None:
        full = self._writer is not None and self._writer.num_bytes + len(encoded.data) > self._max_shard_bytes
        if video.split != self._split or full:
            self.close()
            self._split = video.split
        if self._writer is None:
            number = len(self._report.shards[self._split])
            self._writer = ShardWriter(self._folder, f"{self._split}-{number:06d}.tar")
        facts = {
            "label": label,
            "label_name": video.label,
            "source": os.fsencode(video.path).decode("utf-8", "replace"),
            "split": video.split,
            "profile": profile,
            "frames": len(encoded.frames),
            "source_frames": encoded.source_frames,
            "fps": round(len(encoded.frames) / encoded.facts["seconds"], 3),
            "source_fps": round(encoded.fps, 3),
            "width": encoded.width,
            "height": encoded.height,
        }
        self._writer.add(key, label, encoded, facts)
        self._report.samples[video.split] += 1
        self._report.seconds[video.split] += encoded.facts["seconds"]
        self._report.packed_of_class[video.label] += 1
        self._report.stored_frames.append(len(encoded.frames))

    def close(self) -> None:
        if self._writer is not None:
            self._report.shards[self._split].append(self._writer.close())
            self._writer = None

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection
    task: int | None = None
    deadline: float = math.inf


class _Pool:
    """Long-lived processes that encode one video at a time and are replaced when they die or hang."""

    def __init__(self, workers: int, settings: PackSettings) -> None:
        self._settings = settings
        self._workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def encode(self, paths: Sequence[Path]) -> Iterator[EncodedVideo | Reject]:
        """The results in the order of `paths`."""
        done: dict[int, EncodedVideo | Reject] = {}
        started = 0
        for wanted in range(len(paths)):
            while wanted not in done:
                ahead = wanted + _VIDEOS_AHEAD * len(self._workers)
                for slot, worker in enumerate(self._workers):
                    if worker.task is None and started < min(len(paths), ahead):
                        self._give(slot, started, paths[started])
                        started += 1
                self._collect(done)
            yield done.pop(wanted)

    def _start(self) -> _Worker:
        here, there = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_work, args=(there, self._settings), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _give(self, slot: int, task: int, path: Path) -> None:
        worker = self._workers[slot]
        worker.task, worker.deadline = task, time.monotonic() + self._settings.timeout_seconds
        with contextlib.suppress(BrokenPipeError):  # it died while idle: `_collect` sees the end of its connection
            worker.connection.send(path)

    def _collect(self, done: dict[int, EncodedVideo | Reject]) -> None:
        """Waits for the next result, death or timeout."""
        busy = [worker for worker in self._workers if worker.task is not None]
        first_deadline = min(worker.deadline for worker in busy)
        ready = wait([worker.connection for worker in busy], max(0.0, first_deadline - time.monotonic()))
        for slot, worker in enumerate(self._workers):
            task = worker.task
            if task is None:
                continue
            if worker.connection in ready:
                try:
                    done[task] = worker.connection.recv()
                    worker.task = None
                except (EOFError, OSError):
                    worker.process.join()
                    done[task] = Reject("decoder_crash", f"the decoder died ({_cause(worker.process.exitcode)})")
                    self._replace(slot)
            elif time.monotonic() >= worker.deadline:
                done[task] = Reject("timeout", f"took longer than {self._settings.timeout_seconds:g} s")
                self._replace(slot)

    def _replace(self, slot: int) -> None:
        worker = self._workers[slot]
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers[slot] = self._start()


def _work(connection: Connection, settings: PackSettings) -> None:
    """The life of a worker: encodes what it is given until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    while True:
        try:
            path = connection.recv()
            connection.send(_encode(path, settings))
        except (EOFError, ConnectionError):
            return


def _encode(path: Path, settings: PackSettings) -> EncodedVideo | Reject:
    try:
        return encode_video(
            path,
            settings.profile,
            choice=FrameChoice.parse(settings.fps),
            short_side=settings.short_side,
            quality=settings.quality if settings.quality is not None else DEFAULT_QUALITY,
        )
    except VideoError as error:
        return Reject(error.reason, error.detail)
    except MemoryError:
        return Reject("out_of_memory", "not enough memory to decode it")
    except OSError as error:
        return Reject("unreadable", error.strerror or str(error))
    except Exception as error:  # a defect of ours must not cost hours of packing; it is listed like any reject
        return Reject("internal_error", f"{type(error).__name__}: {error}")


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"


def _check_splits(plan: Sequence[Video], report: PackReport) -> None:
    for split, videos in Counter(video.split for video in plan).items():
        if not report.samples[split]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.most_common())
            path, reject = next((p, r) for p, r in report.rejects if r.reason != "missing")
            raise ValueError(
                f"every one of the {videos} videos of split {split} was rejected ({reasons}); the first: {path}: "
                f"{reject.reason}: {reject.detail}"
            )


def _write_rejects(folder: Path, report: PackReport) -> None:
    lines = ["path\treason\tdetail"]
    for path, reject in sorted(report.rejects, key=lambda entry: entry[0]):
        name = os.fsencode(path).decode("utf-8", "replace")
        lines.append("\t".join(" ".join(text.split()) for text in (name, reject.reason, reject.detail)))
    write_durably(folder / "rejects.tsv", ("\n".join(lines) + "\n").encode())


def _manifest(listing: Listing, settings: PackSettings, report: PackReport) -> dict[str, Any]:
    return {
        "classes": list(listing.classes),
        "profile": {
            "name": settings.profile,
            "fps": settings.fps,
            "short_side": settings.short_side,
            "quality": settings.quality,
        },
        "seed": settings.seed,
        "splits": {
            split: {
                "samples": report.samples[split],
                "seconds": round(report.seconds[split], 3),
                "shards": [asdict(shard) for shard in report.shards[split]],
            }
            for split in SPLITS
            if report.samples[split]
        },
        "rejected": dict(sorted(report.reasons.items())),
        "versions": {"project": _project_version(), **library_versions()},
    }


def _project_version() -> str:
    try:
        return metadata.version("image-to-video")
    except metadata.PackageNotFoundError:
        return "not installed"


def _slug(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:60] or "video"
