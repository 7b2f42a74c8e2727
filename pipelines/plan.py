"""The plan: what every training step sees, as a pure function of (seed, epoch, sample id), before any byte is read.

Which sample stands at a position of the endless training sequence, which frames of it are used, which box is cropped,
whether it is flipped, and the random masks of the model (DropPath, dropout): each is drawn from a counter-based
generator (Philox) keyed by the seed and counted by epoch and sample. Nothing is drawn from a running state, so the
same clips come out in any process, at any world size, after any restart, and a plan can be compared without decoding.

Frames are chosen in source frames by the published rules (official AIM `configs/recognition/vit/*.py`, MMAction's
`SampleFrames` and `UniformSample`), then mapped to the nearest stored frame.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.shards import Sample

SAMPLINGS = ("dense", "uniform")


@dataclass(frozen=True)
class ClipOptions:
    """How clips are cut from videos."""

    num_frames: int = 8
    """T, frames a clip."""
    sampling: str = "dense"
    """`dense`: num_frames source frames, `interval` apart, from a random start (Kinetics). `uniform`: one frame from
    each of num_frames equal segments of the whole video (Something-Something V2, Diving-48)."""
    interval: int = 16
    """Source frames between two frames of a dense clip."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the frame's area that a random training crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width : height of a random training crop."""
    flip: float = 0.5
    """Probability of mirroring a training clip; 0 where left and right matter."""
    eval_crop: float = 0.875
    """Side of the square centre crop in evaluation, as a share of the short side (224 of 256)."""

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"data.sampling = {self.sampling!r}; allowed are {', '.join(SAMPLINGS)}")
        for name in ("num_frames", "interval"):
            if not 1 <= getattr(self, name) <= 1024:
                raise ValueError(f"data.{name} = {getattr(self, name)}; allowed is 1 to 1024")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale = {list(self.crop_scale)}; allowed is 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio = {list(self.crop_ratio)}; allowed is 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip = {self.flip}; allowed is a probability, 0 to 1")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"data.eval_crop = {self.eval_crop}; allowed is 0 < share <= 1")


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """Everything that decides the pixels of one clip."""

    sample_id: int
    epoch: int
    frames: tuple[int, ...]
    """T source frame numbers, 0-based."""
    stored: tuple[int, ...]
    """The stored frame that stands for each, as a row of the sample's frame table."""
    box: tuple[int, int, int, int]
    """left, top, width, height in pixels of the stored frame."""
    flip: bool

    def largest_shift(self, sample: Sample) -> int:
        """Most source frames between a wanted frame and the stored one that is used."""
        return int(np.abs(sample.frames.source_frame[list(self.stored)] - np.asarray(self.frames)).max())


@dataclass(frozen=True, slots=True)
class Turn:
    """One row of a batch: which sample, and in which epoch (-1: evaluation, nothing random)."""

    sample_id: int
    epoch: int


EVAL_EPOCH = -1


class Order:
    """The endless training sequence: one permutation of all samples after another, no drop, no padding."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self._permutation = lru_cache(maxsize=2)(lambda epoch: _stream(seed, "order", epoch).permutation(num_samples))

    def turn(self, position: int) -> Turn:
        """Who stands at `position`, 0-based; O(1) but for one permutation an epoch."""
        epoch, place = divmod(position, self.num_samples)
        return Turn(int(self._permutation(epoch)[place]), epoch)


def train_turns(
    order: Order,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int,
    num_steps: int,
) -> Iterator[list[Turn]]:
    """The micro-batches of one rank, for optimizer steps start_step..num_steps-1.

    Step s covers positions s·G .. (s+1)·G of the sequence; ranks take equal consecutive slices, micro-batches equal
    consecutive parts of a slice. So the global batch does not depend on world size or accumulation.
    """
    share = global_batch // world
    assert share * world == global_batch and share % micro_batch == 0, (
        global_batch,
        world,
        micro_batch,
    )
    for step in range(start_step, num_steps):
        first = step * global_batch + rank * share
        for start in range(first, first + share, micro_batch):
            yield [order.turn(position) for position in range(start, start + micro_batch)]


def eval_turns(num_samples: int, *, micro_batch: int, rank: int, world: int) -> Iterator[list[Turn | None]]:
    """All samples once, in file order, dealt to ranks in consecutive slices; None pads so that all ranks have equally
    many batches of equal size."""
    batches = math.ceil(num_samples / (micro_batch * world))
    first = rank * batches * micro_batch
    for start in range(first, first + batches * micro_batch, micro_batch):
        yield [Turn(i, EVAL_EPOCH) if i < num_samples else None for i in range(start, start + micro_batch)]


def num_steps(epochs: float, num_samples: int, global_batch: int) -> int:
    """Optimizer steps that cover `epochs` passes over the samples."""
    return math.ceil(epochs * num_samples / global_batch)


def plan_clip(sample: Sample, turn: Turn, seed: int, options: ClipOptions) -> ClipPlan:
    """The plan of one clip: random in training, the fixed centre view in evaluation."""
    if turn.epoch == EVAL_EPOCH:
        frames = eval_frames(sample.source_frames, options)
        box, flip = _centre_box(sample.width, sample.height, options.eval_crop), False
    else:
        random = _stream(seed, "clip", turn.epoch, sample.sample_id)
        frames = train_frames(random, sample.source_frames, options)
        box = _random_box(random, sample.width, sample.height, options)
        flip = bool(random.random() < options.flip)
    stored = _nearest(sample.frames.source_frame, frames)
    return ClipPlan(sample.sample_id, turn.epoch, tuple(frames.tolist()), tuple(stored.tolist()), box, flip)


def substitute(num_samples: int, turn: Turn, seed: int, attempt: int) -> Turn:
    """The turn that replaces one whose sample cannot be decoded: the same for all ranks, chosen without looking."""
    random = _stream(seed, "substitute", turn.epoch, turn.sample_id, attempt)
    return Turn(int(random.integers(num_samples)), turn.epoch)


def draw_masks(
    seed: int, turns: Sequence[Turn], drop_probabilities: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float32]]:
    """The model's random masks for one training batch.

    For each name with probabilities p of shape S: float32 [B, *S], 0 with probability p, else 1 / (1 - p).
    """
    masks = {}
    for name, probability in drop_probabilities.items():
        drawn = [_stream(seed, name, t.epoch, t.sample_id).random(probability.shape) for t in turns]
        keep = np.stack(drawn) >= probability
        masks[name] = (keep / (1 - probability)).astype(np.float32)
    return masks


def train_frames(random: np.random.Generator, num: int, options: ClipOptions) -> NDArray[np.int64]:
    """T source frame numbers of a training clip of a video with `num` frames.

    dense: the start is uniform over 0..num-span (inclusive), span = T·interval; shorter videos start at 0 and wrap
    around. uniform: a random frame of each segment, both its ends included.
    """
    if options.sampling == "uniform":
        bounds = _segment_bounds(num, options.num_frames)
        return random.integers(bounds[:-1], bounds[1:] + 1)
    span = options.num_frames * options.interval
    start = int(random.integers(0, num - span + 1)) if num >= span else 0
    return (start + options.interval * np.arange(options.num_frames)) % num


def eval_frames(num: int, options: ClipOptions) -> NDArray[np.int64]:
    """T source frame numbers of the one evaluation clip: the middle of the video, or of each segment."""
    if options.sampling == "uniform":
        bounds = _segment_bounds(num, options.num_frames)
        return (bounds[:-1] + bounds[1:]) // 2
    span = options.num_frames * options.interval
    start = (num - span + 1) // 2 if num >= span else 0
    return (start + options.interval * np.arange(options.num_frames)) % num


def _segment_bounds(num: int, num_segments: int) -> NDArray[np.int64]:
    """Ends of equal segments of frames 0..num-1, rounded half to even as the official code does."""
    return np.round((num - 1) / num_segments * np.arange(num_segments + 1)).astype(np.int64)


def _random_box(
    random: np.random.Generator, width: int, height: int, options: ClipOptions
) -> tuple[int, int, int, int]:
    """Random resized crop: area share uniform, aspect log-uniform, ten tries, else the centre square."""
    area = random.uniform(*options.crop_scale, size=10) * width * height
    aspect = np.exp(random.uniform(math.log(options.crop_ratio[0]), math.log(options.crop_ratio[1]), size=10))
    places = random.random(2)
    widths = np.round(np.sqrt(area * aspect)).astype(int)
    heights = np.round(np.sqrt(area / aspect)).astype(int)
    for w, h in zip(widths.tolist(), heights.tolist(), strict=True):
        if 0 < w <= width and 0 < h <= height:
            return int(places[0] * (width - w + 1)), int(places[1] * (height - h + 1)), w, h
    return _centre_box(width, height, 1.0)


def _centre_box(width: int, height: int, share: float) -> tuple[int, int, int, int]:
    side = max(1, round(min(width, height) * share))
    return (width - side) // 2, (height - side) // 2, side, side


def _nearest(stored: NDArray[np.int32], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row of the stored frame nearest to each wanted source frame; the earlier one of two equally near."""
    after = np.minimum(np.searchsorted(stored, wanted), len(stored) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - stored[before] <= np.abs(stored[after] - wanted), before, after)


def _stream(seed: int, name: str, *counts: int) -> np.random.Generator:
    """An independent generator for (seed, name, counts): Philox with the first two as key, the counts as counter.

    The counter's lowest word is left to the generator itself, which counts it up as numbers are drawn.
    """
    counter = [0, *(count & (2**64 - 1) for count in counts)]
    key = np.array([seed & (2**64 - 1), zlib.crc32(name.encode())], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter + [0] * (4 - len(counter))))
