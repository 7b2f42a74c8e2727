"""The plan: what every training step sees, as a pure function of (seed, epoch, sample id), before any byte is read.

Which sample stands at a position of the endless training sequence, which frames of it are used, which box is cropped,
whether it is flipped, how its colours change, what is erased, how clips are mixed, and the random masks of the model
(DropPath, dropout): each is drawn from a counter-based generator (Philox) keyed by the seed and counted by epoch and
sample, or by step. Nothing is drawn from a running state, so the same clips come out in any process, at any world size,
after any restart, and a plan can be compared without decoding. Each kind of draw has a stream of its own: switching one
on changes none of the others. What is planned for pixels after decoding, `augment.py` does.

Frames are chosen in source frames by the published rules (official AIM `configs/recognition/vit/*.py`, MMAction's
`SampleFrames` and `UniformSample`), then mapped to the nearest stored frame.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from pipelines.shards import Sample

SAMPLINGS = ("dense", "uniform")
SHORT = ("wrap", "hold")
CROPS = (1, 3)
COLOUR_JITTER = ("brightness", "contrast", "saturation", "hue")
CHANNELS = ("red", "green", "blue")
LIGHTING = (
    (-0.5675 * 55.46, 0.7192 * 4.794, 0.4009 * 1.148),
    (-0.5808 * 55.46, -0.0045 * 4.794, -0.8140 * 1.148),
    (-0.5836 * 55.46, -0.6948 * 4.794, 0.4203 * 1.148),
)
"""Levels by which red, green and blue rise with each principal component of ImageNet's colours: the eigenvectors times
the eigenvalues of MMAction's `ColorJitter`."""
RAND_AUGMENT_SCALE = 30.0
"""The magnitude m at which an operation of RandAugment is at its strongest."""
RAND_AUGMENT: dict[str, Callable[[float, int], float] | None] = {
    "identity": None,
    "autocontrast": None,
    "equalize": None,
    "invert": None,
    "rotate": lambda strength, sign: 30 * strength * sign,  # degrees
    "posterize": lambda strength, sign: 8 - int(6 * strength),  # bits kept
    "solarize": lambda strength, sign: 256 - int(256 * strength),  # inverted from this brightness on
    "saturation": lambda strength, sign: 1 + 0.9 * strength * sign,
    "contrast": lambda strength, sign: 1 + 0.9 * strength * sign,
    "brightness": lambda strength, sign: 1 + 0.9 * strength * sign,
    "sharpness": lambda strength, sign: 1 + 0.9 * strength * sign,
    "shear_x": lambda strength, sign: 0.3 * strength * sign,  # sideways by this much per pixel of height
    "shear_y": lambda strength, sign: 0.3 * strength * sign,
    "translate_x": lambda strength, sign: 0.33 * strength * sign,  # share of the side
    "translate_y": lambda strength, sign: 0.33 * strength * sign,
}
"""Operation → its amount at a strength (0 to 1, = m / 30) and a sign drawn evenly; None: it has none. Operations and
ranges are those of imgaug 0.4's `RandAugment`, which the official code uses, without its cutout, blur and smooth (they
are not in the paper's list) and without the flip and crop it starts with (ours are drawn once, by other options)."""
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
PIXEL_CHANGES = (
    *("color_jitter", "grayscale", "lighting", "rand_augment"),
    *("random_erasing", "mixup_alpha", "cutmix_alpha"),
)
"""Options that change pixels when they are set."""


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
    intervals: tuple[int, ...] = ()
    """Intervals of dense training clips, of which one is drawn for each clip ([1, 2, 3, 3, 3, 4] is published for
    Efficient-Prompt); evaluation takes `interval`. Empty: `interval` always."""
    short: str = "wrap"
    """Dense clips of videos that are too short for one: `wrap` begins again at the first frame, and a clip spans
    num_frames · interval frames (AIM, MMAction); `hold` repeats the last frame, and a clip ends with its own last frame
    (ST-Adapter, Efficient-Prompt)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the frame's area that a random training crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width : height of a random training crop."""
    flip: float = 0.5
    """Probability of mirroring a training clip; 0 where left and right matter (directions of motion, as in
    Something-Something V2). No other augmentation mirrors."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths s of brightness, contrast, saturation and hue: factors are uniform in 1 - s..1 + s, the hue turns by a
    share of the circle uniform in -s..s; in random order (torchvision's ColorJitter)."""
    grayscale: float = 0.0
    """Probability that a training clip loses its colours."""
    lighting: float = 0.0
    """Deviation of the noise along the principal components of ImageNet's colours that a training clip is lit with, the
    same on all its frames (AlexNet's; 0.1 is what the official ColorJitter of the L/14 recipes does by default)."""
    rand_augment: tuple[float, ...] = ()
    """[n, m] or [n, m, mstd]: n operations a training clip, drawn with replacement from `RAND_AUGMENT`, at magnitude m
    of 30, or drawn about m with deviation mstd; [4, 7] is published for Something-Something V2. Empty: none. The scale
    is the official one (imgaug's and torchvision's); timm's m counts to 10: its m = 7 is 21 here. Never mirrors, unlike
    the official code, whose imgaug flips half of the clips."""
    random_erasing: float = 0.0
    """Probability that a box of a training clip, the same on all its frames, is painted in the mean colour: area 0.02
    to 1/3, aspect log-uniform in 0.3..1/0.3 (timm's 'const' mode; 0.25 is published for Something-Something V2)."""
    mixup_alpha: float = 0.0
    """Blends the clips of a training batch in pairs with a weight from Beta(alpha, alpha); 0: not."""
    cutmix_alpha: float = 0.0
    """Puts a box of the one clip of a pair into the other, of a relative area from Beta(alpha, alpha); 0: not."""
    mix_prob: float = 1.0
    """Probability that a step mixes, where one of the two alphas is above 0."""
    switch_prob: float = 0.5
    """Probability that a step that mixes takes cutmix, where both alphas are above 0."""
    fixed_views: bool = False
    """Training clips are cut as in evaluations during training, in the middle and the same in every epoch, neither
    mirrored nor changed: for caches of frozen features (speed.cache_gb), and to measure what augmentation brings."""
    eval_crop: float = 0.875
    """Side of the square centre crop in evaluation, as a share of the short side (224 of 256)."""
    test_clips: int = 1
    """Clips over time that the final test averages, see `eval_frames`."""
    test_crops: int = 1
    """Crops a clip that the final test averages. 1: the centre, of `eval_crop`. 3: squares of the whole short side at
    the ends and in the middle of the long side."""

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"data.sampling = {self.sampling!r}; allowed are {', '.join(SAMPLINGS)}")
        if self.short not in SHORT:
            raise ValueError(f"data.short = {self.short!r}; allowed are {', '.join(SHORT)}")
        low, high = self.crop_scale
        narrow, wide = self.crop_ratio
        jitter = self.color_jitter
        magnitude = self.rand_augment
        probability = "a probability, 0 to 1"
        rules: list[tuple[str, bool, str]] = [
            ("num_frames", 1 <= self.num_frames <= 1024, "1 to 1024"),
            ("interval", 1 <= self.interval <= 1024, "1 to 1024"),
            ("intervals", all(1 <= i <= 1024 for i in self.intervals), "[] or numbers, 1 to 1024 each"),
            ("intervals", self.sampling == "dense" or not self.intervals, "[] unless data.sampling = 'dense'"),
            ("crop_scale", 0 < low <= high <= 1, "0 < low <= high <= 1"),
            ("crop_ratio", 0 < narrow <= wide < math.inf, "0 < low <= high"),
            ("flip", 0 <= self.flip <= 1, probability),
            ("color_jitter", all(0 <= s <= 1 for s in jitter) and jitter[3] <= 0.5, "0 to 1 each, of hue 0 to 0.5"),
            ("grayscale", 0 <= self.grayscale <= 1, probability),
            ("lighting", 0 <= self.lighting <= 10, "0 (off) to 10"),
            (
                "rand_augment",
                _is_rand_augment(magnitude),
                "[] or [n, m] or [n, m, mstd]: n 1 to 16, m 0 to 30, mstd >= 0",
            ),
            ("random_erasing", 0 <= self.random_erasing <= 1, probability),
            ("mixup_alpha", 0 <= self.mixup_alpha < math.inf, "0 (off) or more"),
            ("cutmix_alpha", 0 <= self.cutmix_alpha < math.inf, "0 (off) or more"),
            ("mix_prob", 0 <= self.mix_prob <= 1, probability),
            ("switch_prob", 0 <= self.switch_prob <= 1, probability),
            ("eval_crop", 0 < self.eval_crop <= 1, "0 < share <= 1"),
            ("test_clips", 1 <= self.test_clips <= 100, "1 to 100"),
            ("test_crops", self.test_crops in CROPS, "1 or 3"),
        ]
        for name, fits, allowed in rules:
            if not fits:
                value = getattr(self, name)
                given = list(value) if isinstance(value, tuple) else value
                raise ValueError(f"data.{name} = {given}; allowed is {allowed}")
        for name, given in self.set_among((*PIXEL_CHANGES, "intervals")) if self.fixed_views else ():
            raise ValueError(f"data.fixed_views = true leaves clips as they are, and data.{name} = {given}; unset one")

    def set_among(self, names: Iterable[str]) -> Iterator[tuple[str, object]]:
        """Those of these options that are not off, with their values as a recipe has them."""
        for name in names:
            value = getattr(self, name)
            if any(value) if isinstance(value, tuple) else value:
                yield name, list(value) if isinstance(value, tuple) else value

    @property
    def num_views(self) -> int:
        """Clips a video that the final test averages."""
        return self.test_clips * self.test_crops

    @property
    def mixes(self) -> bool:
        """Whether clips of a batch are mixed in pairs."""
        return self.mix_prob > 0 and max(self.mixup_alpha, self.cutmix_alpha) > 0


class FrameOp(NamedTuple):
    """One change of a clip's pixels, alike on all its frames; `augment.OPERATIONS` says what each name does."""

    name: str
    amount: float
    """0 where the operation has none."""


Region = tuple[float, float, float, float]
"""left, top, right, bottom of a box in a clip's frames, as shares of their side."""


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
    ops: tuple[FrameOp, ...] = ()
    """Changes of the decoded clip, in order."""
    erase: Region | None = None
    """What is painted over after them."""

    def largest_shift(self, sample: Sample) -> int:
        """Most source frames between a wanted frame and the stored one that is used."""
        used = sample.frames.source_frame[list(self.stored)].tolist()
        return max(abs(is_ - wanted) for is_, wanted in zip(used, self.frames, strict=True))


@dataclass(frozen=True, slots=True)
class MixPlan:
    """How the clips of one training step are mixed: each with its neighbour in the global batch, 2k with 2k + 1.

    The order of samples is a random permutation, so these are random pairs; as a pair never parts, what comes out does
    not depend on how the global batch is shared. Else it is timm's 'batch' mode: one draw for the whole batch.
    """

    weight: float
    """mixup (`region` is None): the share that a clip keeps of its own pixels and label."""
    region: Region | None
    """cutmix: the box that comes from the neighbour; its area in pixels is the neighbour's share of the label."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One row of a batch: which sample, in which epoch (-1: evaluation, nothing random), and which view of it."""

    sample_id: int
    epoch: int
    view: int = 0
    """In evaluation, 0 to num_views - 1: crop by crop, and clip by clip within (the official order)."""


EVAL_EPOCH = -1


class Order:
    """The endless training sequence: one permutation of all samples after another, no drop, no padding.

    With `window` 0 an epoch is one permutation of all samples. With `window` W the shards are permuted, taken W at a
    time, and the samples of those W permuted among themselves, so that only W shards are read at once. With `kept`,
    ascending sample ids, the sequence is of these alone.
    """

    def __init__(
        self,
        samples_of_shards: Sequence[int],
        seed: int,
        *,
        window: int = 0,
        kept: NDArray[np.int64] | None = None,
    ) -> None:
        self._first = np.concatenate([[0], np.cumsum(samples_of_shards, dtype=np.int64)])
        if kept is not None:
            self._first = np.searchsorted(kept, self._first)
        self._sizes, self._kept = np.diff(self._first), kept
        self.num_samples = int(self._first[-1])
        self._seed, self._window = seed, window
        self._blocks = lru_cache(maxsize=2)(self._draw_blocks)
        self._members = lru_cache(maxsize=3)(self._draw_members)

    def turn(self, position: int) -> Turn:
        """Who stands at `position`, 0-based; O(1) in the position but for one permutation an epoch and block."""
        epoch, place = divmod(position, self.num_samples)
        ends = self._blocks(epoch)[1]
        block = int(np.searchsorted(ends, place, side="right"))
        first = int(ends[block - 1]) if block else 0
        member = int(self._members(epoch, block)[place - first])
        return Turn(member if self._kept is None else int(self._kept[member]), epoch)

    def _draw_blocks(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The shards of every block, and how many samples the blocks up to and with each hold."""
        shards = np.arange(len(self._sizes))
        if not self._window:
            return [shards], np.asarray([self.num_samples])
        shards = _stream(self._seed, "shards", epoch).permutation(shards)
        blocks = [shards[i : i + self._window] for i in range(0, len(shards), self._window)]
        return blocks, np.cumsum([self._sizes[block].sum() for block in blocks])

    def _draw_members(self, epoch: int, block: int) -> NDArray[Any]:
        """The samples of a block, in their order: their ids, or where these stand in `kept`."""
        if not self._window:
            narrow = np.int32 if self.num_samples < 2**31 else np.int64  # the same order either way
            return _stream(self._seed, "order", epoch).permutation(np.arange(self.num_samples, dtype=narrow))
        shards = self._blocks(epoch)[0][block]
        members = np.concatenate([np.arange(self._first[s], self._first[s + 1]) for s in shards])
        return _stream(self._seed, "order", epoch, block).permutation(members)


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


def eval_turns(
    num_samples: int, views: int = 1, *, micro_batch: int, rank: int, world: int
) -> Iterator[list[Turn | None]]:
    """Every view of every sample once, in file order, all views of a sample together, dealt to ranks in consecutive
    slices; None pads so that all ranks have equally many batches of equal size."""
    total = num_samples * views
    batches = math.ceil(total / (micro_batch * world))
    first = rank * batches * micro_batch
    for start in range(first, first + batches * micro_batch, micro_batch):
        yield [
            Turn(place // views, EVAL_EPOCH, place % views) if place < total else None
            for place in range(start, start + micro_batch)
        ]


def num_steps(epochs: float, num_samples: int, global_batch: int) -> int:
    """Optimizer steps that cover `epochs` passes over the samples."""
    return math.ceil(epochs * num_samples / global_batch)


def plan_clip(sample: Sample, turn: Turn, seed: int, options: ClipOptions) -> ClipPlan:
    """The plan of one clip: random in training, one of the fixed views in evaluation (the middle one with
    `fixed_views`). Costs about 30 µs of a core with augmentation off."""
    random, options = _draws(sample, turn, seed, options)
    frames, stored = _take_frames(random, sample, turn, seed, options)
    ops: tuple[FrameOp, ...] = ()
    erase = None
    if random is None:
        crop = turn.view // options.test_clips
        box, flip = eval_box(sample.width, sample.height, options, crop), False
    else:
        box = _random_box(random, sample.width, sample.height, options)
        flip = bool(random.random() < options.flip)
        colour = (*_colour_ops(seed, turn, options), *_lighting_ops(seed, turn, options))
        ops = (*colour, *_rand_augment_ops(seed, turn, options))
        erase = _erased_region(seed, turn, options)
    return ClipPlan(sample.sample_id, turn.epoch, frames, stored, box, flip, ops, erase)


def plan_features(sample: Sample, turn: Turn, seed: int, options: ClipOptions) -> ClipPlan:
    """The plan of one clip of a set of frame features: the frames that `plan_clip` takes of the videos themselves. Crop
    and flip are those that the features were made with; options that ask for more than one crop or for other pixels
    are refused before (`features.check_options`)."""
    random, options = _draws(sample, turn, seed, options)
    frames, stored = _take_frames(random, sample, turn, seed, options)
    return ClipPlan(sample.sample_id, turn.epoch, frames, stored, (0, 0, sample.width, sample.height), False)


def _draws(
    sample: Sample, turn: Turn, seed: int, options: ClipOptions
) -> tuple[np.random.Generator | None, ClipOptions]:
    """What a clip is drawn with, None for one of the fixed views, and the options to cut it by."""
    if turn.epoch == EVAL_EPOCH:
        return None, options
    if options.fixed_views:
        return None, _with_one_view(options)
    return _stream(seed, "clip", turn.epoch, sample.sample_id), options


def _take_frames(
    random: np.random.Generator | None, sample: Sample, turn: Turn, seed: int, options: ClipOptions
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The source frames of a clip, and the stored ones that stand for them."""
    if random is None:
        frames = eval_frames(sample.source_frames, options, turn.view % options.test_clips)
    else:
        interval = _draw_interval(seed, turn, options)
        frames = train_frames(random, sample.source_frames, options, interval)
    return tuple(frames.tolist()), tuple(_nearest(sample.frames.source_frame, frames).tolist())


def _draw_interval(seed: int, turn: Turn, options: ClipOptions) -> int:
    if not options.intervals:
        return options.interval
    random = _stream(seed, "interval", turn.epoch, turn.sample_id)
    return options.intervals[int(random.integers(len(options.intervals)))]


@lru_cache(maxsize=8)
def _with_one_view(options: ClipOptions) -> ClipOptions:
    return replace(options, test_clips=1, test_crops=1)


def plan_mix(seed: int, step: int, options: ClipOptions) -> MixPlan | None:
    """How the clips of an optimizer step (0-based) are mixed, if they are; draws as timm's `Mixup` does."""
    if not options.mixes:
        return None
    random = _stream(seed, "mix", step)
    mixes, switches, across, down = random.random(4).tolist()
    if mixes >= options.mix_prob:
        return None
    both = options.mixup_alpha > 0 and options.cutmix_alpha > 0
    cuts = switches < options.switch_prob if both else options.cutmix_alpha > 0
    alpha = options.cutmix_alpha if cuts else options.mixup_alpha
    weight = float(random.beta(alpha, alpha))
    if not cuts:
        return MixPlan(weight, None)
    half = math.sqrt(1 - weight) / 2
    region = (max(across - half, 0.0), max(down - half, 0.0), min(across + half, 1.0), min(down + half, 1.0))
    return MixPlan(weight, region)


def substitute(num_samples: int, turn: Turn, seed: int, attempt: int, *, kept: NDArray[np.int64] | None = None) -> Turn:
    """The turn that replaces one whose sample cannot be decoded: the same for all ranks, chosen without looking, of all
    `num_samples` or of the ids `kept`."""
    random = _stream(seed, "substitute", turn.epoch, turn.sample_id, attempt)
    return Turn(int(random.integers(num_samples) if kept is None else random.choice(kept)), turn.epoch)


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


def train_frames(
    random: np.random.Generator, num: int, options: ClipOptions, interval: int | None = None
) -> NDArray[np.int64]:
    """T source frame numbers of a training clip of a video with `num` frames.

    dense: the start is uniform over all at which the video holds the clip, frames `interval` apart (None: as the
    options say); in a video that is too short it is 0. uniform: a random frame of each segment, both its ends included.
    """
    if options.sampling == "uniform":
        bounds = _segment_bounds(num, options.num_frames)
        return random.integers(bounds[:-1], bounds[1:] + 1)
    interval = interval or options.interval
    free = num - _span(interval, options)
    start = int(random.integers(0, free + 1)) if free >= 0 else 0
    return _dense_frames(start, num, interval, options)


def eval_frames(num: int, options: ClipOptions, clip: int = 0) -> NDArray[np.int64]:
    """T source frame numbers of one of the `test_clips` evaluation clips of a video with `num` frames.

    dense: the clips start in the middles of equal parts of all possible starts; a video that is too short gives the
    same clip each time, from 0 (the official code's `SampleFrames`, MMAction 0.x, in test mode).
    uniform: the middle of each segment, the official `UniformSample`; for several clips, which that does not have, as
    many places spread over each segment (`UniformSample` of MMAction2 1.x in test mode).
    """
    clips = options.test_clips
    if options.sampling == "uniform":
        bounds = _segment_bounds(num, options.num_frames)
        if clips == 1:
            return (bounds[:-1] + bounds[1:]) // 2
        return bounds[:-1] + int((num - 1) / options.num_frames / (clips + 1) * (clip + 1))
    free = num - _span(options.interval, options)
    part = (free + 1) / clips
    start = int(clip * part + part / 2) if free >= 0 else 0
    return _dense_frames(start, num, options.interval, options)


def _span(interval: int, options: ClipOptions) -> int:
    """Source frames that a video must have for a dense clip not to leave it."""
    return options.num_frames * interval if options.short == "wrap" else (options.num_frames - 1) * interval + 1


def _dense_frames(start: int, num: int, interval: int, options: ClipOptions) -> NDArray[np.int64]:
    """T frames from a start on, as `options.short` says where the video ends before them."""
    frames = start + interval * np.arange(options.num_frames)
    return frames % num if options.short == "wrap" else np.minimum(frames, num - 1)


def _segment_bounds(num: int, num_segments: int) -> NDArray[np.int64]:
    """Ends of equal segments of frames 0..num-1, rounded half to even as the official code does."""
    return np.round((num - 1) / num_segments * np.arange(num_segments + 1)).astype(np.int64)


def _random_box(
    random: np.random.Generator, width: int, height: int, options: ClipOptions
) -> tuple[int, int, int, int]:
    """Random resized crop: area share uniform, aspect log-uniform, ten tries, else the centre square."""
    drawn = random.random(22).tolist()  # ten areas, ten aspects, two places: all, whether they are used or not
    low, high = options.crop_scale
    narrow, wide = math.log(options.crop_ratio[0]), math.log(options.crop_ratio[1])
    for i in range(10):
        area = (low + (high - low) * drawn[i]) * width * height
        aspect = math.exp(narrow + (wide - narrow) * drawn[10 + i])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(drawn[20] * (width - w + 1)), int(drawn[21] * (height - h + 1)), w, h
    return _centre_box(width, height, 1.0)


def eval_box(width: int, height: int, options: ClipOptions, crop: int) -> tuple[int, int, int, int]:
    """left, top, width, height of a crop in evaluation: the centre, or one of three squares of the whole short side,
    left, right, middle (top, bottom, middle), placed as by MMAction's `ThreeCrop`."""
    if options.test_crops == 1:
        return _centre_box(width, height, options.eval_crop)
    side = min(width, height)
    step = (max(width, height) - side) // 2
    place = (0, 2 * step, step)[crop]
    return (place, 0, side, side) if width >= height else (0, place, side, side)


def _centre_box(width: int, height: int, share: float) -> tuple[int, int, int, int]:
    side = max(1, round(min(width, height) * share))
    return (width - side) // 2, (height - side) // 2, side, side


def _colour_ops(seed: int, turn: Turn, options: ClipOptions) -> list[FrameOp]:
    """Colour jitter in random order, then loss of colour."""
    if not (any(options.color_jitter) or options.grayscale):
        return []
    random = _stream(seed, "colour", turn.epoch, turn.sample_id)
    drawn = random.random(5).tolist()
    ops = []
    for i in random.permutation(4).tolist():
        strength = options.color_jitter[i]
        if strength:
            change = strength * (2 * drawn[i] - 1)
            ops.append(FrameOp(COLOUR_JITTER[i], change if COLOUR_JITTER[i] == "hue" else 1 + change))
    if drawn[4] < options.grayscale:
        ops.append(FrameOp("grayscale", 0.0))
    return ops


def _lighting_ops(seed: int, turn: Turn, options: ClipOptions) -> list[FrameOp]:
    """Levels by which each channel rises."""
    if not options.lighting:
        return []
    noise = _stream(seed, "lighting", turn.epoch, turn.sample_id).normal(0.0, options.lighting, 3)
    return [FrameOp(name, rise) for name, rise in zip(CHANNELS, (np.asarray(LIGHTING) @ noise).tolist(), strict=True)]


def _is_rand_augment(value: tuple[float, ...]) -> bool:
    if not value:
        return True
    if not 2 <= len(value) <= 3:
        return False
    return value[0] in range(1, 17) and 0 <= value[1] <= RAND_AUGMENT_SCALE and 0 <= value[-1] < math.inf


def _rand_augment_ops(seed: int, turn: Turn, options: ClipOptions) -> list[FrameOp]:
    """n operations drawn with replacement, as the paper does (Cubuk et al. 2020)."""
    if not options.rand_augment:
        return []
    n, magnitude, *deviation = int(options.rand_augment[0]), *options.rand_augment[1:]
    random = _stream(seed, "rand_augment", turn.epoch, turn.sample_id)
    names = list(RAND_AUGMENT)
    ops = []
    for i in random.integers(len(names), size=n).tolist():
        positive, shift = random.random() < 0.5, random.standard_normal()
        strength = magnitude + (deviation[0] * shift if deviation else 0.0)
        strength = min(max(strength / RAND_AUGMENT_SCALE, 0.0), 1.0)
        amount = RAND_AUGMENT[names[i]]
        if names[i] != "identity":
            ops.append(FrameOp(names[i], float(amount(strength, 1 if positive else -1)) if amount else 0.0))
    return ops


def _erased_region(seed: int, turn: Turn, options: ClipOptions) -> Region | None:
    """timm 0.5.4's rule: a box smaller than the frame, ten tries, else none."""
    if not options.random_erasing:
        return None
    drawn = _stream(seed, "erase", turn.epoch, turn.sample_id).random(23).tolist()
    if drawn[22] >= options.random_erasing:
        return None
    flattest, steepest = math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])
    for i in range(10):
        area = ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * drawn[i]
        aspect = math.exp(flattest + (steepest - flattest) * drawn[10 + i])
        width, height = math.sqrt(area / aspect), math.sqrt(area * aspect)
        if width < 1 and height < 1:
            left, top = drawn[20] * (1 - width), drawn[21] * (1 - height)
            return left, top, left + width, top + height
    return None


def _nearest(stored: NDArray[np.int32], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row of the stored frame nearest to each wanted source frame; the earlier one of two equally near."""
    after = np.minimum(np.searchsorted(stored, wanted), len(stored) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - stored[before] <= np.abs(stored[after] - wanted), before, after)


def _stream(seed: int, name: str, *counts: int) -> np.random.Generator:
    """An independent generator for (seed, name, counts): Philox with the first two as key, the counts as counter.

    The counter's lowest word is left to the generator itself, which counts it up as numbers are drawn.
    """
    key = np.array([seed & _WORD, zlib.crc32(name.encode())], np.uint64)
    counter = np.array([0, *(count & _WORD for count in counts), *(0,) * (3 - len(counts))], np.uint64)
    philox = np.random.Philox(_Key(key), counter=counter)  # type: ignore[arg-type]  # the stub knows only SeedSequence
    return np.random.Generator(philox)


_WORD = 2**64 - 1


class _Key(ISeedSequence):
    """Hands Philox its key. The same stream as `Philox(key=key, …)`, which would first gather entropy it does not use
    and so cost three times as much."""

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[np.uint64]:
        return self._key
