"""From a set of videos to a set of frame features: every stored frame goes once through a frozen image model.

    set of videos ─ worker processes: decode, centre crop, resize ─▶ uint8 [M, S, S, 3] ─ image model ─▶ float [M, D]
      ─▶ float16 [n, D] a video ─▶ shards, of which each holds the samples of one source shard

The image model comes from outside (`FrameEncoder`). Frames are cut as in evaluation, never augmented. A video that does
not decode is left out and listed in rejects.tsv. As in packing, the new folder is there whole or not at all, and a run
that ended early goes on after its last finished shard; batches of frames do not cross shards, so that the bytes are
those of a run that was left alone on the same machine (another one rounds otherwise).

Cost: that of decoding every stored frame once (0.4 ms of a core, 340 × 256 JPEG), or of the image model.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.encode import FrameChoice
from pipelines.features import store_features
from pipelines.journal import FinishedShard, Journal, Packed, Reject
from pipelines.pack import slug, versions, writing_set
from pipelines.plan import EVAL_EPOCH, ClipOptions, ClipPlan, eval_box
from pipelines.pool import WorkerPool
from pipelines.read import ClipRequest, request_clip
from pipelines.shards import (
    CHANNELS,
    FEATURES,
    SAFE_KEY,
    EncodedVideo,
    FeatureSource,
    Sample,
    ShardInfo,
    ShardSet,
    ShardWriter,
    read_manifest,
    write_manifest,
    write_rejects,
)

FRAMES_A_PIECE = 64
"""That a worker decodes at a time: 10 MB at 224 × 224. Of the copy profile a piece costs all frames before it too."""
_LOST_IN_A_ROW = 20  # videos that cannot be read one after another: that is a broken disk, not broken videos


class FrameEncoder(Protocol):
    """A frozen image model."""

    @property
    def source(self) -> Mapping[str, Any]:
        """What the manifest says of it: model, weights_xxh3, width, size, mean and std of `FeatureSource`."""

    def embed_frames(self, frames: Tensor) -> Tensor:
        """uint8 RGB frames [M, S, S, 3] on the CPU → their features [M, D], not normalised, on any device."""


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """How features are made. Raises ValueError, saying what is allowed, when a value makes no sense."""

    every: int = 1
    """Stored frames from one that is taken to the next; the first one is taken."""
    channels: str = "rgb"
    """`bgr` swaps red and blue, as the published extraction of Efficient-Prompt did."""
    crop: float = 0.875
    """Side of the centre crop, as a share of the short side (`data.eval_crop`)."""
    batch: int = 256
    """Frames that the image model takes at a time."""

    def __post_init__(self) -> None:
        if not 1 <= self.every <= 10_000:
            raise ValueError(f"every {self.every}-th stored frame: allowed is 1 to 10000")
        if self.channels not in CHANNELS:
            raise ValueError(f"channels {self.channels!r}: allowed are {' and '.join(CHANNELS)}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop {self.crop}: allowed is a share of the short side, 0 < crop <= 1")
        if not 1 <= self.batch <= 65536:
            raise ValueError(f"batch {self.batch}: allowed is 1 to 65536 frames")


@dataclass(slots=True)
class ExtractReport:
    """What extraction did; filled while it runs."""

    total: int = 0
    """Videos of the source."""
    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    frames: int = 0
    rejects: list[tuple[str, Reject]] = field(default_factory=list)
    """With the keys of their samples."""
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: defaultdict(list))

    @property
    def videos(self) -> int:
        """Done so far."""
        return self.samples.total() + len(self.rejects)


def extract_features(
    folder: Path,
    out: Path,
    encoder: FrameEncoder,
    settings: ExtractSettings,
    *,
    workers: int = 1,
    restart: bool = False,
    on_video: Callable[[ExtractReport], None] | None = None,
) -> ExtractReport:
    """Writes the features of the stored frames of the set in `folder` into the new folder `out`; calls `on_video` after
    every video. Goes on where an earlier call with the same arguments ended; `restart` begins again.

    Raises FileExistsError when `out` exists or is being written, ValueError when the set holds no videos, an unfinished
    run differs, every video of a split is unusable or what the model answers are no numbers, OSError when the disk is
    full or many videos in a row cannot be read.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers: allowed is 1 or more")
    sets = [ShardSet.open(folder, split) for split in read_manifest(folder)["splits"]]
    if not sets or sets[0].features is not None:
        raise ValueError(f"{folder} holds no videos: give a set that tools/make_shards.py or index_shards.py made")
    source = FeatureSource.from_manifest(
        {**encoder.source, "channels": settings.channels, "crop": settings.crop, "source": sets[0].fingerprint}
    )
    with writing_set(out, _describe(source, settings), restart=restart) as journal:
        extraction = _Extraction(sets, encoder, source, settings, journal, on_video)
        done = extraction.replay()
        with contextlib.closing(_Decoder(source.size, workers)) as decoder:
            extraction.run(decoder, done)
        report = extraction.report
        entries = [(key, reject.reason, reject.detail) for key, reject in report.rejects]
        write_rejects(journal.shards, ("key", "reason", "detail"), entries)
        write_manifest(journal.shards, _manifest(sets, source, settings, report))
    return report


def _describe(source: FeatureSource, settings: ExtractSettings) -> dict[str, Any]:
    """Everything that the bytes depend on, but for the machine."""
    libraries = {**versions(), "torch": torch.__version__}
    described = {**asdict(source), **asdict(settings), **{f"version of {n}": v for n, v in libraries.items()}}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in described.items()}


def _manifest(
    sets: Sequence[ShardSet], source: FeatureSource, settings: ExtractSettings, report: ExtractReport
) -> dict[str, Any]:
    first = sets[0]
    splits = {
        shards.split: {
            "samples": report.samples[shards.split],
            "shards": [asdict(shard) for shard in report.shards[shards.split]],
        }
        for shards in sets
    }
    return {
        "classes": list(first.classes),
        "multi_label": first.multi_label,
        "verified": True,
        "profile": {"name": FEATURES, "fps": thinned(first.stored_frames, settings.every)},
        FEATURES: asdict(source),
        "splits": splits,
        "rejected": dict(sorted(Counter(reject.reason for _, reject in report.rejects).items())),
        "versions": {**versions(), "torch": torch.__version__},
    }


def thinned(stored: str, every: int) -> str:
    """Which source frames are left (see `FrameChoice.parse`) of those stored when one of `every` is taken."""
    choice = FrameChoice.parse(stored)
    if choice.rate is not None:
        return f"{choice.rate / every:g}"
    return "source" if choice.every * every == 1 else f"source/{choice.every * every}"


@dataclass(slots=True)
class _Video:
    """One on its way."""

    sample_id: int
    sample: Sample | None
    features: NDArray[np.float16]
    """[n, D], filled from the front."""
    filled: int = 0
    reject: Reject | None = None

    @property
    def is_settled(self) -> bool:
        return self.reject is not None or self.filled == len(self.features)


class _Extraction:
    """Takes account of the videos in their order and keeps shards, journal and report in step."""

    def __init__(
        self,
        sets: Sequence[ShardSet],
        encoder: FrameEncoder,
        source: FeatureSource,
        settings: ExtractSettings,
        journal: Journal,
        on_video: Callable[[ExtractReport], None] | None,
    ) -> None:
        self.report = ExtractReport(total=sum(map(len, sets)))
        self._sets, self._encoder, self._source, self._settings = sets, encoder, source, settings
        self._options = ClipOptions(eval_crop=settings.crop)
        self._journal, self._on_video = journal, on_video
        self._outcomes: list[Packed | Reject] = []
        """Since the last finished shard."""
        self._lost_in_a_row = 0

    def replay(self) -> int:
        """Takes account of the shards that an earlier run has finished; returns how many videos it did."""
        videos = ((shards, sample_id) for shards in self._sets for sample_id in range(len(shards)))
        done = 0
        for shard in self._journal.replay():
            self.report.shards[shard.split].append(shard.info)
            for outcome in shard.outcomes:
                self._note(*next(videos), outcome)
            done += len(shard.outcomes)
        return done

    def run(self, decoder: _Decoder, done: int) -> None:
        """Makes the features of all videos but the first `done`, which end with a shard."""
        for shards in self._sets:
            first = 0
            for info in shards.shards:
                if done <= 0:
                    self._extract_shard(shards, range(first, first + info.samples), decoder)
                done -= info.samples
                first += info.samples
            if not self.report.samples[shards.split]:
                key, reject = self.report.rejects[-1]
                raise ValueError(
                    f"every one of the {len(shards)} videos of split {shards.split} was rejected; the last, {key}: "
                    f"{reject.detail}{self._journal.what_is_kept()}"
                )

    def _extract_shard(self, shards: ShardSet, sample_ids: range, decoder: _Decoder) -> None:
        split, number = shards.split, len(self.report.shards[shards.split])
        writer = ShardWriter(self._journal.shards, f"{split}-{number:06d}.tar")
        try:
            for video in self._embedded(shards, sample_ids, decoder):
                self._take(shards, video, writer)
            if not len(writer):
                writer.discard()
                return
            info = writer.close()
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk takes not even what is in the buffer
                writer.discard()
            raise
        self._journal.append(FinishedShard(split, info, self._outcomes))
        self._outcomes = []
        self.report.shards[split].append(info)

    def _embedded(self, shards: ShardSet, sample_ids: range, decoder: _Decoder) -> Iterator[_Video]:
        """The videos in their order, each with all its features or the reason why it has none."""
        videos: deque[_Video] = deque()
        batch = _Batch(self._encoder, self._source, self._settings)
        for piece, frames in decoder.decode(self._pieces(shards, sample_ids)):
            if not videos or videos[-1] is not piece.video:
                videos.append(piece.video)
            if isinstance(frames, str):
                piece.video.reject = piece.video.reject or Reject("unreadable", frames)
            else:
                batch.add(piece.video, frames)
            while videos and videos[0].is_settled and (len(videos) > 1 or piece.is_last):
                yield videos.popleft()
        batch.embed()
        yield from videos

    def _pieces(self, shards: ShardSet, sample_ids: range) -> Iterator[_Piece]:
        """What the workers decode: every video in pieces of some frames."""
        for sample_id in sample_ids:
            try:
                sample = shards[sample_id]
            except (ValueError, OSError) as error:
                nothing = np.zeros((0, self._source.width), np.float16)
                video = _Video(sample_id, None, nothing, reject=Reject("bad_index", str(error)))
                yield _Piece(video, None, is_last=True)
                continue
            rows = range(0, len(sample.frames), self._settings.every)
            video = _Video(sample_id, sample, np.empty((len(rows), self._source.width), np.float16))
            box = eval_box(sample.width, sample.height, self._options, 0)
            for first in range(0, len(rows), FRAMES_A_PIECE):
                stored = tuple(rows[first : first + FRAMES_A_PIECE])
                plan = ClipPlan(sample_id, EVAL_EPOCH, frames=(), stored=stored, box=box, flip=False)
                request = request_clip(sample, plan, shards.profile)
                yield _Piece(video, request, is_last=first + FRAMES_A_PIECE >= len(rows))

    def _take(self, shards: ShardSet, video: _Video, writer: ShardWriter) -> None:
        """Writes a video, if it has features, and takes account of it."""
        outcome = video.reject or self._write(shards, video, writer)
        self._outcomes.append(outcome)
        self._note(shards, video.sample_id, outcome)
        self._lost_in_a_row = self._lost_in_a_row + 1 if isinstance(outcome, Reject) else 0
        if isinstance(outcome, Reject) and self._lost_in_a_row == _LOST_IN_A_ROW:
            raise OSError(
                f"{_LOST_IN_A_ROW} videos of {shards.folder} in a row cannot be read ({outcome.detail}): see to the "
                f"disk or share{self._journal.what_is_kept()}"
            )

    def _write(self, shards: ShardSet, video: _Video, writer: ShardWriter) -> Packed:
        sample = video.sample
        assert sample is not None
        encoded = store_features(video.features, sample, slice(None, None, self._settings.every))
        key = sample.key
        if not SAFE_KEY.fullmatch(key):  # of tars that others wrote
            key = f"{video.sample_id:06d}_{slug(key)}"
        writer.add(key, sample.labels, encoded, _facts(shards, sample, encoded))
        return Packed(sample.source_frames / sample.fps, len(encoded.frames), sample.video_bytes)

    def _note(self, shards: ShardSet, sample_id: int, outcome: Packed | Reject) -> None:
        if isinstance(outcome, Reject):
            self.report.rejects.append((_key(shards, sample_id), outcome))
        else:
            self.report.samples[shards.split] += 1
            self.report.frames += outcome.frames
        if self._on_video is not None:
            self._on_video(self.report)


def _key(shards: ShardSet, sample_id: int) -> str:
    try:
        return shards[sample_id].key
    except (ValueError, OSError):
        return f"number {sample_id} of split {shards.split}"


def _facts(shards: ShardSet, sample: Sample, encoded: EncodedVideo) -> dict[str, Any]:
    """What a sample's `.json` says."""
    return {
        "labels": list(sample.labels),
        "label_names": [shards.classes[label] for label in sample.labels],
        "source_key": sample.key,
        "split": shards.split,
        "profile": FEATURES,
        "frames": len(encoded.frames),
        "source_frames": sample.source_frames,
        "source_fps": round(sample.fps, 3),
        "width": encoded.width,
    }


class _Batch:
    """Frames on their way through the image model."""

    def __init__(self, encoder: FrameEncoder, source: FeatureSource, settings: ExtractSettings) -> None:
        self._encoder, self._swapped = encoder, settings.channels == "bgr"
        self._frames = torch.empty((settings.batch, source.size, source.size, 3), dtype=torch.uint8)
        self._parts: list[tuple[_Video, int]] = []
        """Whose frames they are, and how many."""
        self._used = 0

    def add(self, video: _Video, frames: NDArray[np.uint8]) -> None:
        """Takes frames [m, S, S, 3], the next of that video; embeds whenever a batch is full."""
        rest = torch.from_numpy(frames)
        while len(rest):
            taken = rest[: len(self._frames) - self._used]
            self._frames[self._used : self._used + len(taken)] = taken
            self._parts.append((video, len(taken)))
            self._used += len(taken)
            rest = rest[len(taken) :]
            if self._used == len(self._frames):
                self.embed()

    def embed(self) -> None:
        """Fills in the features of what has been taken."""
        if not self._used:
            return
        frames = self._frames[: self._used]
        embedded = self._encoder.embed_frames(frames.flip(-1) if self._swapped else frames)
        features = embedded.to(torch.float16).cpu().numpy()
        start = 0
        for video, count in self._parts:
            part = features[start : start + count]
            if not np.isfinite(part).all():
                assert video.sample is not None
                raise ValueError(
                    f"the image model makes no finite float16 numbers of {video.sample.key}: other weights?"
                )
            video.features[video.filled : video.filled + count] = part
            video.filled += count
            start += count
        self._parts, self._used = [], 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some frames of a video."""

    video: _Video
    request: ClipRequest | None
    """None: there is nothing to decode."""
    is_last: bool


class _Decoder:
    """Worker processes that decode pieces ahead of their turn."""

    def __init__(self, size: int, workers: int) -> None:
        self._free = deque(range(2 * workers + 2))
        self._pool = WorkerPool((len(self._free), 1, FRAMES_A_PIECE, size, size, 3), workers)

    def decode(self, pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, NDArray[np.uint8] | str]]:
        """The pieces in their order, each with its frames [m, S, S, 3], valid until the next one, or why there are
        none."""
        pending: deque[tuple[_Piece, int]] = deque()
        settled: dict[int, str | None] = {}
        while True:
            while self._free and (piece := next(pieces, None)) is not None:
                pending.append((piece, slot := self._free.popleft()))
                if piece.request is None:
                    settled[slot] = "nothing to decode"
                else:
                    self._pool.submit(slot, [0], [piece.request])
            if not pending:
                return
            piece, slot = pending[0]
            while slot not in settled:
                settled.update({done: reason for done, _, reason in self._pool.collect(wait=True)})
            pending.popleft()
            reason = settled.pop(slot)
            count = 0 if piece.request is None else len(piece.request.order)
            yield piece, self._pool.clips[slot, 0, :count] if reason is None else reason
            self._free.append(slot)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()
