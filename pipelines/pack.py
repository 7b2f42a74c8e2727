"""Packs a list of videos into shards: one process a video at a time, one writer, the same bytes for any worker count.

Samples are shuffled by the seed within each split and written in that order, whichever worker finishes first. A worker
that dies or hangs costs the one video it was at, which is rejected with the reason; packing goes on with a new worker.
At most a few encoded videos per worker are held in memory, also while the writer waits for a slow one.

Everything is written into `.NAME.packing` beside the output folder and given its name at the end, so the output folder
is there whole or not at all. A run that ends early, killed, interrupted or for want of space, leaves its finished
shards there (`journal.py`); the same call then goes on from them and ends with the same bytes as one that was left
alone. Without a finished shard nothing is left.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipelines.annotations import SPLITS, Listing, Video
from pipelines.encode import FrameChoice, check_quality, encode_video, library_versions
from pipelines.journal import FinishedShard, Journal, Packed, Reject, remove_leftover, sync_folder
from pipelines.shards import PROFILES, EncodedVideo, ShardInfo, ShardWriter, write_durably, write_manifest
from pipelines.video import VideoError

_Result = tuple[EncodedVideo, int] | Reject  # what a worker makes of a video; the number is its source's bytes

_PROCESSES = multiprocessing.get_context("spawn")  # fork would copy the parent's threads and locks in unknown states
_VIDEOS_AHEAD = 3  # per worker: how far workers may run ahead of the writer
_WORKER_BYTES = 16 * 2**30  # address space; a hostile index of a few bytes makes FFmpeg take as much as there is
_LOST_IN_A_ROW = 20  # videos that cannot be read one after another: that is a broken disk or share, not broken videos


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How videos are stored. Raises ValueError, saying what is allowed, when a value makes no sense."""

    profile: str = "jpeg"
    fps: str = "source"
    """See `FrameChoice.parse`."""
    short_side: int | None = None
    """Pixels of the shorter side; None keeps the source's."""
    quality: int | None = None
    """1 to 100; None: what suits each video, see `encode_video` (and nothing in the copy profile)."""
    verify: bool = True
    """Decode every frame; False, for the copy profile only, decodes the first and counts the others."""
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
            if not self.verify:
                raise ValueError(f"profile {self.profile} decodes every frame anyway: only copy can leave that out")
            if self.quality is not None:
                check_quality(self.quality)
        if self.short_side is not None and not 16 <= self.short_side <= 4096:
            raise ValueError(f"short side {self.short_side}: allowed are 16 to 4096 pixels")
        if self.max_shard_bytes < 1_000_000:
            raise ValueError(f"shards of at most {self.max_shard_bytes} bytes: allowed is 1 MB or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: allowed are 0 to 2^63 - 1")


@dataclass(slots=True)
class PackReport:
    """What packing did; filled while it runs."""

    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
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

    def note(self, video: Video, outcome: Packed | Reject) -> None:
        """Takes account of one video."""
        if isinstance(outcome, Reject):
            self.rejects.append((video.path, outcome))
            return
        self.samples[video.split] += 1
        self.seconds[video.split] += outcome.seconds
        self.bytes_in += outcome.source_bytes
        self.packed_of_class.update(video.labels)
        self.stored_frames.append(outcome.frames)


def pack_videos(
    source: Path,
    listing: Listing,
    out: Path,
    settings: PackSettings,
    *,
    workers: int = 1,
    restart: bool = False,
    on_video: Callable[[PackReport], None] | None = None,
) -> PackReport:
    """Packs `listing`, found in `source`, into the new folder `out`; calls `on_video` after every video.

    Goes on where an earlier call with the same arguments ended; `restart` begins again. Raises FileExistsError when
    `out` exists or is being packed, ValueError when an unfinished run differs or every video of a split was rejected,
    OSError when the shards cannot be written or the source cannot be read any more.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers: allowed is 1 or more")
    part = unfinished_folder(out)
    if out.exists() or out.is_symlink():
        remove_leftover(part)
        raise FileExistsError(f"{out} exists; packing makes a new folder: remove it or choose another name")
    plan = plan_order(listing.videos, settings.seed)
    journal = Journal(part, _describe(plan, listing, settings), restart=restart)
    try:
        packer = _Packer(source, listing, plan, settings, journal, on_video)
        packer.replay()
        packer.pack(workers)
        _write_rejects(journal.shards, packer.report)
        write_manifest(journal.shards, _manifest(listing, settings, packer.report))
        journal.shards.rename(out)
        sync_folder(out.parent)
        journal.remove()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"no space left for {out}{journal.what_is_kept()}") from error
        raise
    finally:
        if not journal.num_finished:
            journal.remove()
        journal.close()
    return packer.report


def unfinished_folder(out: Path) -> Path:
    """Where packing into `out` keeps what it has not finished."""
    return out.with_name(f".{out.name}.packing")


def plan_order(videos: Sequence[Video], seed: int) -> list[Video]:
    """The order in the shards: split by split, shuffled by the seed within each."""
    order: list[Video] = []
    for number, split in enumerate(SPLITS):
        members = [video for video in videos if video.split == split]
        generator = np.random.Generator(np.random.Philox(key=[seed, number]))
        order += [members[i] for i in generator.permutation(len(members))]
    return order


def _describe(plan: Sequence[Video], listing: Listing, settings: PackSettings) -> dict[str, Any]:
    """Everything that the bytes of a set depend on; the time limit and the number of workers are not among it."""
    lists = {
        "classes": listing.classes,
        "videos": [[os.fsencode(video.path).hex(), video.split, video.labels] for video in plan],
        "missing files": [os.fsencode(path).hex() for path in listing.missing],
    }
    digests = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for name, value in lists.items()}
    return {
        **{name: value for name, value in asdict(settings).items() if name != "timeout_seconds"},
        "multi_label": listing.multi_label,
        **{f"number of {name}": len(value) for name, value in lists.items()},
        **{f"digest of {name}": digest for name, digest in digests.items()},
        **{f"version of {name}": version for name, version in _versions().items()},
    }


class _Packer:
    """The writer's side: takes what became of the videos in plan order and keeps shards, journal and report in step."""

    def __init__(
        self,
        source: Path,
        listing: Listing,
        plan: Sequence[Video],
        settings: PackSettings,
        journal: Journal,
        on_video: Callable[[PackReport], None] | None,
    ) -> None:
        self.report = PackReport(
            rejects=[(path, Reject("missing", "listed, but not there")) for path in listing.missing]
        )
        self._source = source
        self._plan = plan
        self._settings = settings
        self._journal = journal
        self._on_video = on_video
        self._label_of = {name: number for number, name in enumerate(listing.classes)}
        self._position = 0
        """In the plan: of the next video."""
        self._split = ""
        self._writer: ShardWriter | None = None
        self._outcomes: list[Packed | Reject] = []
        """Since the last finished shard."""

    def replay(self) -> None:
        """Takes account of the shards that an earlier run has finished."""
        for shard in self._journal.replay():
            for outcome in shard.outcomes:
                video = self._plan[self._position]
                path = self._source / video.path
                if isinstance(outcome, Packed) and path.stat().st_size != outcome.source_bytes:
                    raise ValueError(f"{path} has changed since it was packed; add --restart to begin again")
                self._note(outcome)
            self.report.shards[shard.split].append(shard.info)

    def pack(self, workers: int) -> None:
        """Packs the videos that are left."""
        paths = [self._source / video.path for video in self._plan[self._position :]]
        try:
            with _Pool(min(workers, len(paths)), self._settings) as pool:
                for result in self._sure(pool.encode(paths)):
                    self._take(self._plan[self._position], result)
        except BaseException:
            if self._writer is not None:
                with contextlib.suppress(OSError):  # a full disk takes not even what is in the buffer
                    self._writer.discard()
            raise

    def _sure(self, results: Iterator[_Result]) -> Iterator[_Result]:
        """The same results. One file that cannot be read is a reject; many in a row are a broken disk or share, and
        end the run before it takes account of any of them, so that they are tried again when it is continued."""
        lost: list[Reject] = []
        for result in results:
            if isinstance(result, Reject) and result.reason in ("missing", "read_error"):
                lost.append(result)
                if len(lost) == _LOST_IN_A_ROW:
                    path = self._source / self._plan[self._position + len(lost) - 1].path
                    raise OSError(
                        f"{len(lost)} videos in a row cannot be read, the last of them {path} ({result.detail}): see "
                        f"to the disk or share{self._journal.what_is_kept()}"
                    )
                continue
            yield from lost
            lost.clear()
            yield result
        yield from lost

    def _take(self, video: Video, result: _Result) -> None:
        """Takes account of what became of the video at the present position."""
        if isinstance(result, Reject):
            outcome: Packed | Reject = result
        else:
            encoded, source_bytes = result
            self._write(video, encoded)
            outcome = Packed(encoded.facts["seconds"], len(encoded.frames), source_bytes)
        self._outcomes.append(outcome)
        self._note(outcome)
        if self._position == len(self._plan) or self._plan[self._position].split != video.split:
            self._close_shard()
            if not self.report.samples[video.split]:
                self._explain_empty(video.split)

    def _write(self, video: Video, encoded: EncodedVideo) -> None:
        limit = self._settings.max_shard_bytes
        if self._writer is not None and self._writer.num_bytes + len(encoded.data) > limit:
            self._close_shard()
        if self._writer is None:
            self._split = video.split
            number = len(self.report.shards[self._split])
            self._writer = ShardWriter(self._journal.shards, f"{self._split}-{number:06d}.tar")
        labels = sorted(self._label_of[name] for name in video.labels)
        key = f"{self._position:06d}_{_slug(video.path.stem)}"
        self._writer.add(key, labels, encoded, _facts(video, labels, encoded, self._settings.profile))

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        info = self._writer.close()
        self._writer = None
        self._journal.append(FinishedShard(self._split, info, self._outcomes))
        self._outcomes = []
        self.report.shards[self._split].append(info)

    def _note(self, outcome: Packed | Reject) -> None:
        self.report.note(self._plan[self._position], outcome)
        self._position += 1
        if self._on_video is not None:
            self._on_video(self.report)

    def _explain_empty(self, split: str) -> NoReturn:
        """Every video of a split was rejected. Its rejects are in no finished shard: they are tried again next time."""
        members = {video.path for video in self._plan if video.split == split}
        rejects = [(path, reject) for path, reject in self.report.rejects if path in members]
        counts = Counter(reject.reason for _, reject in rejects)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        path, reject = rejects[0]
        raise ValueError(
            f"every one of the {len(members)} videos of split {split} was rejected ({reasons}); the first: {path}: "
            f"{reject.reason}: {reject.detail}{self._journal.what_is_kept()}"
        )


def _facts(video: Video, labels: Sequence[int], encoded: EncodedVideo, profile: str) -> dict[str, Any]:
    """What a sample's `.json` says."""
    return {
        "labels": list(labels),
        "label_names": list(video.labels),
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

    def encode(self, paths: Sequence[Path]) -> Iterator[_Result]:
        """The results in the order of `paths`."""
        done: dict[int, _Result] = {}
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
        here, there = _PROCESSES.Pipe()
        process = _PROCESSES.Process(target=_work, args=(there, self._settings), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _give(self, slot: int, task: int, path: Path) -> None:
        worker = self._workers[slot]
        worker.task, worker.deadline = task, time.monotonic() + self._settings.timeout_seconds
        with contextlib.suppress(BrokenPipeError):  # it died while idle: `_collect` sees the end of its connection
            worker.connection.send(path)

    def _collect(self, done: dict[int, _Result]) -> None:
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
                    done[task] = _receive(worker.connection)
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


def _receive(connection: Connection) -> _Result:
    result: _Result = connection.recv()
    if isinstance(result, Reject):
        return result
    video, source_bytes = result
    return replace(video, data=connection.recv_bytes()), source_bytes


def _work(connection: Connection, settings: PackSettings) -> None:
    """The life of a worker: encodes what it is given until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _WORKER_BYTES if hard == resource.RLIM_INFINITY else min(_WORKER_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what was imported stays
    gc.disable()  # looking for cycles at every few hundred packets costs 4 % of a video
    while True:
        gc.collect()  # an open file of PyAV is one
        try:
            result = _encode(connection.recv(), settings)
            if isinstance(result, Reject):
                connection.send(result)
            else:  # the bytes on their own: pickling would hold them twice
                video, source_bytes = result
                connection.send((replace(video, data=b""), source_bytes))
                connection.send_bytes(video.data)
        except (EOFError, ConnectionError):
            return


def _end_with_parent() -> None:
    """A killed packer must not leave a worker behind that decodes for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(path: Path, settings: PackSettings) -> _Result:
    """The stored video, and how many bytes its source has."""
    try:
        source_bytes = path.stat().st_size
        video = encode_video(
            path,
            settings.profile,
            choice=FrameChoice.parse(settings.fps),
            short_side=settings.short_side,
            quality=settings.quality,
            verify=settings.verify,
        )
        return video, source_bytes
    except VideoError as error:
        return Reject(error.reason, error.detail)
    except MemoryError:
        return Reject("out_of_memory", "not enough memory to decode it")
    except FileNotFoundError:
        return Reject("missing", "gone since it was listed")
    except OSError as error:
        return Reject("read_error", error.strerror or str(error))
    except Exception as error:  # a defect of ours must not cost hours of packing; it is listed like any reject
        return Reject("internal_error", f"{type(error).__name__}: {error}")


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"


def _write_rejects(folder: Path, report: PackReport) -> None:
    lines = ["path\treason\tdetail"]
    for path, reject in sorted(report.rejects, key=lambda entry: entry[0]):
        name = os.fsencode(path).decode("utf-8", "replace")
        lines.append("\t".join(" ".join(text.split()) for text in (name, reject.reason, reject.detail)))
    write_durably(folder / "rejects.tsv", ("\n".join(lines) + "\n").encode())


def _manifest(listing: Listing, settings: PackSettings, report: PackReport) -> dict[str, Any]:
    return {
        "classes": list(listing.classes),
        "multi_label": listing.multi_label,
        "verified": settings.verify,
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
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    try:
        project = metadata.version("image-to-video")
    except metadata.PackageNotFoundError:
        project = "not installed"
    return {"project": project, **library_versions()}


def _slug(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:60] or "video"
