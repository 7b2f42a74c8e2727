"""Packs a list of videos into shards: one process a video at a time, one writer, the same bytes for any worker count.

Samples are shuffled by the seed within each split and written in that order, whichever worker finishes first. A worker
that dies or hangs costs the one video it was at, which is rejected with the reason; packing goes on with a new worker.
At most a few encoded videos per worker are held in memory, also while the writer waits for a slow one.

Everything is written into `.NAME.packing` beside the output folder and given its name at the end, so the output folder
is there whole or not at all. A run that ends early, killed, interrupted or for want of space, leaves its finished
shards there (`journal.py`); the same call then goes on from them and ends with the same bytes as one that was left
alone. Without a finished shard nothing is left, but for the list of rejects where these were all of a split.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipelines.annotations import SPLITS, Listing, Video
from pipelines.encode import FrameChoice, check_quality, encode_video, library_versions
from pipelines.journal import FinishedShard, Journal, Packed, Reject, remove_leftover
from pipelines.processes import Lost, map_isolated
from pipelines.shards import PROFILES, EncodedVideo, ShardInfo, ShardWriter, sync_folder, write_manifest, write_rejects
from pipelines.video import VideoError

_Result = tuple[EncodedVideo, int] | Reject  # what a worker makes of a video; the number is its source's bytes

_VIDEOS_AHEAD = 3  # per worker: how far workers may run ahead of the writer
_REJECT_COLUMNS = ("path", "reason", "detail")
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
    plan = plan_order(listing.videos, settings.seed)
    with writing_set(out, _describe(plan, listing, settings), restart=restart) as journal:
        packer = _Packer(source, listing, plan, settings, journal, on_video)
        packer.replay()
        packer.pack(workers)
        write_rejects(journal.shards, _REJECT_COLUMNS, _reject_entries(packer.report))
        write_manifest(journal.shards, _manifest(listing, settings, packer.report))
    return packer.report


@contextlib.contextmanager
def writing_set(out: Path, header: Mapping[str, Any], *, restart: bool) -> Iterator[Journal]:
    """The journal of the run that `header` describes; what lies in its `shards` at the end of the block, manifest and
    all, becomes the new folder `out`. Raises as `pack_videos`."""
    part = unfinished_folder(out)
    if out.exists() or out.is_symlink():
        remove_leftover(part)
        raise FileExistsError(f"{out} exists; packing makes a new folder: remove it or choose another name")
    journal = Journal(part, header, restart=restart)
    try:
        yield journal
        journal.shards.rename(out)
        sync_folder(out.parent)
        journal.remove()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"no space left for {out}{journal.what_is_kept()}") from error
        raise
    finally:
        if not journal.num_finished and not journal.rejects.exists():
            journal.remove()
        journal.close()


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
        **{f"version of {name}": version for name, version in versions().items()},
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
            encode, timeout = partial(_encode, self._settings), self._settings.timeout_seconds
            results = map_isolated(encode, paths, workers=workers, timeout_seconds=timeout, ahead=_VIDEOS_AHEAD)
            with contextlib.closing(results):
                for result in self._sure(results):
                    self._take(self._plan[self._position], result)
        except BaseException:
            if self._writer is not None:
                with contextlib.suppress(OSError):  # a full disk takes not even what is in the buffer
                    self._writer.discard()
            raise

    def _sure(self, results: Iterator[_Result | Lost]) -> Iterator[_Result]:
        """The same results. One file that cannot be read is a reject; many in a row are a broken disk or share, and
        end the run before it takes account of any of them, so that they are tried again when it is continued."""
        lost: list[Reject] = []
        for answer in results:
            result = Reject(answer.reason, answer.detail) if isinstance(answer, Lost) else answer
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
        key = f"{self._position:06d}_{slug(video.path.stem)}"
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
        self._journal.write_rejects(_REJECT_COLUMNS, _reject_entries(self.report))
        kept = self._journal.num_finished
        raise ValueError(
            f"every one of the {len(members)} videos of split {split} was rejected ({reasons}); the first: {path}: "
            f"{reject.reason}: {reject.detail}; all are listed in {self._journal.rejects}. Repair these files and give "
            "the same command again"
            + f", which goes on from {kept} finished shards" * bool(kept)
            + "; or remove them"
            + ", or take a larger --val-fraction if that made the split" * (split == "val")
            + (", and add --restart" if kept else "")
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


def _encode(settings: PackSettings, path: Path) -> _Result:
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


def _reject_entries(report: PackReport) -> list[tuple[str, str, str]]:
    """The lines of rejects.tsv."""
    rejects = sorted(report.rejects, key=lambda entry: entry[0])
    return [(os.fsencode(path).decode("utf-8", "replace"), r.reason, r.detail) for path, r in rejects]


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
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this project and the libraries that stored bytes depend on."""
    try:
        project = metadata.version("image-to-video")
    except metadata.PackageNotFoundError:
        project = "not installed"
    return {"project": project, **library_versions()}


def slug(stem: str) -> str:
    """What of a name may stand in a key."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:60] or "video"
