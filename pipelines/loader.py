"""Turns to batches: plans each clip, has it decoded ahead of time, hands the trainer `ClipBatch`es.

On the CPU, long-lived worker processes (`pool.py`) write decoded clips into shared memory which the trainer only maps.
On CUDA (jpeg profile, sets that were verified when they were made), DALI decodes on the GPU in a thread of the
trainer's process; that path has not been run on a GPU. Sets of frame features (`features.py`) are read by the worker
processes on any machine.

A sample whose index entry, bytes or content is not what it should be is reported once and replaced by a rule that needs
no communication (`plan.substitute`), or in evaluation struck out; when too many are bad, the run stops.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipelines.features import DTYPE, check_options, describe
from pipelines.plan import EVAL_EPOCH, ClipOptions, ClipPlan, Turn, plan_clip, plan_features, substitute
from pipelines.pool import Settled, WorkerPool
from pipelines.read import ClipRequest, request_clip
from pipelines.shards import ShardSet
from pipelines.worker import Shape

logger = logging.getLogger(__name__)

MAX_PREFETCH = 4
MAX_SUBSTITUTES = 20  # in a row for one clip: by then the set is not worth training on
MAX_WARNINGS = 20  # of bad samples, each a line; all of them are in `ClipLoader.bad`
JUDGED_FROM = 200  # samples planned before the share of bad ones is judged
NO_TURN = Turn(-1, EVAL_EPOCH)
NO_PLAN = ClipPlan(sample_id=-1, epoch=EVAL_EPOCH, frames=(), stored=(), box=(0, 0, 0, 0), flip=False)


@dataclass(frozen=True)
class ClipBatch:
    """One micro-batch of B clips of T frames, as the model takes it."""

    frames: Tensor
    """uint8 RGB [B, T, S, S, 3], or of a set of frame features float16 [B, T, D]; valid until the next batch is
    fetched."""
    labels: Tensor
    """int64 [B]; of a multi-label set multi-hot, float32 [B, C]. 0 in rows that are not valid."""
    valid: Tensor
    """bool [B]: False where evaluation was padded or the sample could not be decoded; the row then holds anything."""
    turns: tuple[Turn, ...]
    """B (sample id, epoch): what really stands in each row, substitutes included; `NO_TURN` where it is not valid."""
    plans: tuple[ClipPlan, ...]
    """`NO_PLAN` where the row is not valid."""
    keys: tuple[str, ...]
    """Empty where the row is not valid."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be decoded."""

    key: str
    """Empty where its index cannot be read."""
    shard: str
    reason: str
    """One line."""


class ClipLoader:
    """Iterates over the batches of `turns`; use as a context manager, or call `close`.

    Its workers start at once, planning begins with the first batch. Where several ranks share the turns equally, each
    judges the samples it found to be bad against what all `ranks` of them have planned, after `planned_before` in
    earlier runs: as all have the same share, that never stops a run too early. Raises ValueError when too many are bad,
    OSError when decoding cannot go on.
    """

    def __init__(
        self,
        shards: ShardSet,
        turns: Iterable[Sequence[Turn | None]],
        *,
        micro_batch: int,
        size: int,
        options: ClipOptions,
        seed: int = 0,
        workers: int = 1,
        prefetch: int = 3,
        max_bad_fraction: float = 0.01,
        planned_before: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        known: Callable[[ClipPlan], bool] | None = None,
    ) -> None:
        """`size`: of the clips' frames in pixels; without meaning for features. `known`: clips whose pixels nobody
        needs; they are not decoded, and their frames hold anything."""
        if not 1 <= prefetch <= MAX_PREFETCH:
            raise ValueError(f"data.prefetch = {prefetch}; allowed is 1 to {MAX_PREFETCH} batches")
        if workers < 1:
            raise ValueError(f"data.workers = {workers}; at least one process must decode")
        self._shards, self._options, self._seed = shards, options, seed
        self._known = known
        self._turns = shards.follow(iter(turns))
        self._max_bad_fraction, self._planned_before, self._ranks = max_bad_fraction, planned_before, ranks
        self._plan_clip = plan_clip if shards.features is None else plan_features
        clips = (prefetch + 1, micro_batch, options.num_frames)
        device = torch.device(device)
        self._decoder: _Decoder
        if shards.features is not None:
            check_options(options, shards.features)
            self._decoder = pool = WorkerPool((*clips, 1, 1, DTYPE.itemsize * shards.features.width), workers)
            self._clips = torch.from_numpy(pool.clips.view(DTYPE)[:, :, :, 0, 0])
        elif decodes_on_gpu(shards, device):
            self._decoder = gpu = _GpuThread((*clips, size, size, 3), device)
            self._clips = gpu.clips
        else:
            self._decoder = pool = WorkerPool((*clips, size, size, 3), workers)
            self._clips = torch.from_numpy(pool.clips)
        self._free = deque(range(prefetch + 1))
        self._pending: deque[_Pending] = deque()
        self._in_use: int | None = None
        self.planned = 0
        """Samples planned so far, by this loader."""
        self.bad: dict[int, BadSample] = {}
        """Every sample id that could not be decoded, in the order in which they were found."""
        self.largest_shift = 0
        """Most source frames between a frame that was planned and the stored one that was used."""
        self.wait_seconds = 0.0
        """Spent blocked in fetching batches."""

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        if self._in_use is not None:
            self._free.append(self._in_use)
            self._in_use = None
        self._settle(self._decoder.collect(wait=False))
        self._fill()
        if not self._pending:
            raise StopIteration
        batch = self._pending[0]
        start = time.perf_counter()
        while batch.open_rows:
            self._settle(self._decoder.collect(wait=True))
        self.wait_seconds += time.perf_counter() - start
        self._pending.popleft()
        self._in_use = batch.slot
        return self._batch(batch)

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._decoder.close()

    def _fill(self) -> None:
        """Plans and hands out batches until every slot is taken."""
        while self._free and (turns := next(self._turns, None)) is not None:
            batch = _Pending(self._free.popleft(), [_Row(turn, turn) for turn in turns])
            self._pending.append(batch)
            self.planned += sum(turn is not None and turn.view == 0 for turn in turns)
            requests = {i: request for i, row in enumerate(batch.rows) if (request := self._request(row)) is not None}
            batch.open_rows = set(requests)
            if requests:
                self._decoder.submit(batch.slot, list(requests), list(requests.values()))

    def _request(self, row: _Row) -> ClipRequest | None:
        """What to decode for a row: its sample or, unless that can be planned, a stand-in; None if nothing need be."""
        while (turn := row.turn) is not None:
            if turn.sample_id in self.bad:
                self._give_up(row, self.bad[turn.sample_id].reason)
                continue
            try:
                sample = self._shards[turn.sample_id]
            except (ValueError, OSError) as error:
                self._give_up(row, str(error))
                continue
            row.plan, row.key, row.labels = (
                self._plan_clip(sample, turn, self._seed, self._options),
                sample.key,
                sample.labels,
            )
            self.largest_shift = max(self.largest_shift, row.plan.largest_shift(sample))
            if self._known is not None and self._known(row.plan):
                return None
            return request_clip(sample, row.plan, self._shards.profile)
        return None

    def _settle(self, settled: Sequence[Settled]) -> None:
        """Clips came back: done, or to be replaced."""
        for slot, i, reason in settled:
            batch = next(pending for pending in self._pending if pending.slot == slot)
            request = None
            if reason is not None:
                self._give_up(batch.rows[i], reason)
                request = self._request(batch.rows[i])
            if request is None:
                batch.open_rows.discard(i)
            else:
                self._decoder.submit(slot, [i], [request])

    def _give_up(self, row: _Row, reason: str) -> None:
        """Reports the sample of a row and puts a stand-in (training) or nothing (evaluation) in its place."""
        assert row.planned is not None and row.turn is not None
        self._report(row.turn.sample_id, row.key, reason)
        row.plan, row.key, row.labels = NO_PLAN, "", ()
        if row.turn.epoch == EVAL_EPOCH:
            row.turn = None
            return
        row.attempts += 1
        if row.attempts > MAX_SUBSTITUTES:
            raise ValueError(
                f"{self._shards.folder}: {row.attempts} samples in a row cannot be decoded; last: {reason}"
            )
        row.turn = substitute(len(self._shards), row.planned, self._seed, row.attempts, kept=self._shards.kept)

    def _report(self, sample_id: int, key: str, reason: str) -> None:
        if sample_id not in self.bad:
            shard = self._shards.shards[self._shards.shard_of(sample_id)].name
            self.bad[sample_id] = BadSample(key, shard, " ".join(reason.split()))
            if len(self.bad) <= MAX_WARNINGS:
                logger.warning("bad sample %s: %s", key or f"{sample_id} of {shard}", reason)
            if len(self.bad) == MAX_WARNINGS:
                logger.warning("further bad samples are not listed here")
        planned = self._planned_before + self._ranks * self.planned
        check_bad_share(len(self.bad), planned, self._max_bad_fraction, self._shards, self.bad)

    def _batch(self, batch: _Pending) -> ClipBatch:
        rows = batch.rows
        return ClipBatch(
            frames=self._clips[batch.slot],
            labels=self._labels([row.labels for row in rows]),
            valid=torch.tensor([row.turn is not None for row in rows]),
            turns=tuple([row.turn or NO_TURN for row in rows]),
            plans=tuple([row.plan for row in rows]),
            keys=tuple([row.key for row in rows]),
        )

    def _labels(self, labels: Sequence[Sequence[int]]) -> Tensor:
        if not self._shards.multi_label:
            return torch.tensor([sum(of_sample) for of_sample in labels])  # one each, or none
        hot = torch.zeros(len(labels), len(self._shards.classes))
        for row, of_sample in zip(hot, labels, strict=True):
            row[list(of_sample)] = 1.0
        return hot


def check_bad_share(num_bad: int, planned: int, allowed: float, shards: ShardSet, bad: Mapping[int, BadSample]) -> None:
    """ValueError when of `planned` samples more than the allowed share are bad; `bad` are examples."""
    if planned < JUDGED_FROM or num_bad <= allowed * planned:
        return
    keys = ", ".join(sample.key or f"number {i} of {sample.shard}" for i, sample in list(bad.items())[:5])
    reason = next((f"; the first because {sample.reason}" for sample in bad.values()), "")
    raise ValueError(
        f"{num_bad} of {planned} samples of {shards.folder} cannot be decoded{f' (first: {keys})' if keys else ''}, "
        f"more than data.max_bad_fraction = {allowed}{reason}; mend that, pack the set again, or raise the limit"
    )


@dataclass
class _Row:
    """A clip on its way."""

    planned: Turn | None
    """None: padding."""
    turn: Turn | None
    """Who stands there now; None: nobody."""
    attempts: int = 0
    """Stand-ins so far."""
    plan: ClipPlan = NO_PLAN
    key: str = ""
    labels: tuple[int, ...] = ()


@dataclass
class _Pending:
    """A batch on its way."""

    slot: int
    rows: list[_Row]
    open_rows: set[int] = field(default_factory=set)


class _Decoder(Protocol):
    """Decodes clips into slots."""

    def submit(self, slot: int, rows: Sequence[int], requests: Sequence[ClipRequest]) -> None:
        """Has requests[i] decoded into rows[i] of a slot; rows are ascending."""

    def collect(self, *, wait: bool) -> list[Settled]:
        """What has been settled since the last call, if need be after waiting for a short time."""

    def close(self) -> None: ...


class _GpuThread:
    """DALI on the GPU in a thread of this process, on a stream of its own: decoded clips never leave the device."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        from pipelines.decode import ClipDecoder

        number = torch.cuda.current_device() if device.index is None else device.index
        self.clips = torch.empty(shape, dtype=torch.uint8, device=device)
        self._decoder = ClipDecoder(size=shape[3], num_frames=shape[2], gpu=number)
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._futures: deque[Future[list[Settled]]] = deque()

    def submit(self, slot: int, rows: Sequence[int], requests: Sequence[ClipRequest]) -> None:
        # The trainer may have queued work that still reads this slot; what is decoded into it must come after.
        slot_is_free = torch.cuda.current_stream(self.clips.device).record_event()
        self._futures.append(self._thread.submit(self._decode, slot, rows, requests, slot_is_free))

    def collect(self, *, wait: bool) -> list[Settled]:
        settled: list[Settled] = []
        while self._futures and (self._futures[0].done() or (wait and not settled)):
            settled += self._futures.popleft().result()
        return settled

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _decode(
        self, slot: int, rows: Sequence[int], requests: Sequence[ClipRequest], slot_is_free: torch.cuda.Event
    ) -> list[Settled]:
        with torch.cuda.stream(self._stream):
            decoded = torch.empty((len(rows), *self.clips.shape[2:]), dtype=torch.uint8, device=self.clips.device)
            failures = dict(self._decoder.decode_into(requests, decoded))
            self._stream.wait_event(slot_is_free)
            self.clips[slot, list(rows)] = decoded
        self._stream.synchronize()  # the trainer reads on another stream, and only what is settled
        return [(slot, row, failures.get(i)) for i, row in enumerate(rows)]


def decodes_on_gpu(shards: ShardSet, device: torch.device) -> bool:
    """Whether DALI decodes on the device; else worker processes do, on the CPU."""
    return device.type == "cuda" and shards.profile == "jpeg" and shards.verified


def describe_decoding(shards: ShardSet, device: torch.device, workers: int) -> str:
    """What decodes this set for training on `device`: for the log."""
    where = f"in {workers} worker process{'es' if workers > 1 else ''} a rank"
    if shards.features is not None:
        return f"reading, {where}, {describe(shards.features)}"
    if decodes_on_gpu(shards, device):
        return "decoding by DALI on the GPU"
    who = "DALI and OpenCV" if shards.profile == "jpeg" else "FFmpeg and OpenCV"
    return f"decoding by {who} on the CPU {where}"


def default_workers(local_world: int, device: str) -> int:
    """Decode processes a rank starts when the recipe does not say: its share of the cores, less what trains."""
    cores = len(os.sched_getaffinity(0)) // local_world
    return max(1, cores - 1 if device == "cuda" else cores // 2)
