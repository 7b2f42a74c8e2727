"""The plan: the published frame rules, the order of samples, and that nothing depends on anything but the seed."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines import plan as plans
from pipelines.plan import (
    RAND_AUGMENT,
    ClipOptions,
    ClipPlan,
    FrameOp,
    MixPlan,
    Order,
    Turn,
    draw_masks,
    eval_turns,
    plan_clip,
    plan_features,
    plan_mix,
    train_turns,
)
from pipelines.shards import FrameTable, Sample

UNIFORM = ClipOptions(num_frames=8, sampling="uniform")
DENSE = ClipOptions(num_frames=8, interval=16)
FROZEN_PLAN = (82, (110, 73, 205, 178), False)
FROZEN_ORDER = [0, 2, 1, 9, 8, 3, 6, 7, 4, 5]
FROZEN_OPS = [
    ("hue", -0.08794),
    ("brightness", 0.77833),
    ("saturation", 0.910863),
    ("contrast", 0.841567),
    ("autocontrast", 0.0),
]
FROZEN_REGIONS = [0.024854, 0.367013, 0.569667, 0.659449, 0.371537, 0.168397, 0.031063, 0.961153, 0.823819]
AUGMENTED = ClipOptions(color_jitter=(0.4, 0.3, 0.2, 0.1), rand_augment=(2, 9), random_erasing=1.0, cutmix_alpha=1.0)


def make_sample(
    source_frames: int = 300, every: int = 1, size: tuple[int, int] = (340, 256), sample_id: int = 5
) -> Sample:
    stored = np.arange(0, source_frames, every, dtype=np.int32)
    zeros = np.zeros(len(stored), np.int64)
    table = FrameTable(zeros, zeros.astype(np.int32), zeros.astype(np.uint64), stored, zeros.astype(np.uint8))
    return Sample(
        sample_id=sample_id,
        key="key",
        labels=(0,),
        shard=Path(),
        video_offset=0,
        video_bytes=0,
        checksum=0,
        width=size[0],
        height=size[1],
        source_frames=source_frames,
        fps=30.0,
        frames=table,
        extradata=b"",
    )


@pytest.mark.parametrize(
    ("num", "expected"),
    [(45, [3, 8, 13, 19, 25, 30, 35, 41]), (6, [0, 1, 1, 2, 2, 3, 4, 4]), (16, [1, 3, 5, 7, 8, 10, 12, 14])],
)
def test_uniform_evaluation_frames_are_the_published_ones(num: int, expected: list[int]) -> None:
    assert plans.eval_frames(num, UNIFORM).tolist() == expected


def test_dense_evaluation_clip_is_the_middle_one() -> None:
    assert plans.eval_frames(300, DENSE)[0] == (300 - 128 + 1) // 2
    assert plans.eval_frames(100, DENSE).tolist() == [16 * k % 100 for k in range(8)]


@pytest.mark.parametrize(("num", "clips"), [(300, 3), (300, 1), (128, 4), (131, 10), (1000, 7), (127, 3)])
def test_dense_test_clips_start_where_the_official_code_starts_them(num: int, clips: int) -> None:
    """Against the arithmetic of MMAction 0.x's `SampleFrames._get_test_clips`, written as it is there."""
    average = (num - 128 + 1) / float(clips)
    offsets = (np.arange(clips) * average + average / 2.0).astype(np.int32) if num > 127 else np.zeros(clips, int)
    options = replace(DENSE, test_clips=clips)
    for clip, offset in enumerate(offsets):
        expected = (offset + 16 * np.arange(8)) % num
        assert plans.eval_frames(num, options, clip).tolist() == expected.tolist()


def test_dense_test_clips_of_a_kinetics_video() -> None:
    options = replace(DENSE, test_clips=3)
    assert [int(plans.eval_frames(300, options, clip)[0]) for clip in range(3)] == [28, 86, 144]


@pytest.mark.parametrize("num", [6, 8, 45, 117, 300])
def test_uniform_test_clips_are_spread_over_the_segments(num: int) -> None:
    """Against MMAction2 1.x's `UniformSample._get_sample_clips` for three clips, written as it is there."""
    options = replace(UNIFORM, test_clips=3)
    segment = (num - 1) / 8
    for clip in range(3):
        expected = [int(np.round(segment * i)) + int(segment / 4 * (clip + 1)) for i in range(8)]
        assert plans.eval_frames(num, options, clip).tolist() == expected and max(expected) < num


def test_dense_training_frames_cover_every_start() -> None:
    random = np.random.default_rng(0)
    starts = Counter(int(plans.train_frames(random, 131, DENSE)[0]) for _ in range(400))
    assert set(starts) == {0, 1, 2, 3}
    short = plans.train_frames(random, 100, DENSE)
    assert short.tolist() == [16 * k % 100 for k in range(8)]


def test_a_training_clip_draws_its_interval_from_the_list() -> None:
    """A stream of its own: the start is drawn as ever, and other clips of the epoch are as they were."""
    options = replace(DENSE, interval=2, intervals=(1, 2, 3, 3, 3, 4))
    drawn = []
    for epoch in range(600):
        frames = np.asarray(plan_clip(make_sample(), Turn(5, epoch), 7, options).frames)
        (step,) = set(np.diff(frames).tolist())
        drawn.append(step)
        if step == 2:
            assert plan_clip(make_sample(), Turn(5, epoch), 7, replace(options, intervals=())).frames == tuple(frames)
    shares = {step: count / 600 for step, count in Counter(drawn).items()}
    expected = {1: 1 / 6, 2: 1 / 6, 3: 1 / 2, 4: 1 / 6}
    assert all(abs(shares[step] - share) < 0.06 for step, share in expected.items()) and len(shares) == 4
    assert drawn[:20] == [np.diff(plan_clip(make_sample(), Turn(5, e), 7, options).frames)[0] for e in range(20)]
    middle = plan_clip(make_sample(), Turn(5, plans.EVAL_EPOCH), 7, options)
    assert set(np.diff(middle.frames)) == {2}


def test_short_videos_wrap_around_or_hold_their_last_frame() -> None:
    """`hold`: the clip reaches the video's very last frame, where `wrap` leaves interval - 1 frames behind it."""
    hold = replace(DENSE, short="hold")
    assert plans.eval_frames(100, DENSE).tolist() == [0, 16, 32, 48, 64, 80, 96, 12]
    assert plans.eval_frames(100, hold).tolist() == [0, 16, 32, 48, 64, 80, 96, 99]
    assert plans.eval_frames(1, hold).tolist() == [0] * 8
    assert plans.eval_frames(113, hold).tolist() == [16 * k for k in range(8)]
    random = np.random.default_rng(0)
    starts = Counter(int(plans.train_frames(random, 115, hold)[0]) for _ in range(400))
    assert set(starts) == {0, 1, 2}
    assert plans.train_frames(random, 40, hold).tolist() == [0, 16, 32, 39, 39, 39, 39, 39]


@pytest.mark.parametrize("options", [UNIFORM, DENSE, replace(DENSE, fixed_views=True), replace(DENSE, test_clips=3)])
@pytest.mark.parametrize("turn", [Turn(5, 4), Turn(5, plans.EVAL_EPOCH)])
def test_features_have_the_frames_of_their_videos_and_no_crop(options: ClipOptions, turn: Turn) -> None:
    for num in (300, 40):
        video, features = make_sample(num, every=4), make_sample(num, every=4, size=(512, 1))
        clip, rows = plan_clip(video, turn, 7, options), plan_features(features, turn, 7, options)
        assert (clip.frames, clip.stored) == (rows.frames, rows.stored)
        assert (rows.box, rows.flip, rows.ops, rows.erase) == ((0, 0, 512, 1), False, (), None)


def test_uniform_training_frames_stay_in_their_segments_with_both_ends() -> None:
    random = np.random.default_rng(0)
    drawn = np.stack([plans.train_frames(random, 45, UNIFORM) for _ in range(500)])
    bounds = np.round(44 / 8 * np.arange(9))
    assert (drawn.min(0) == bounds[:-1]).all() and (drawn.max(0) == bounds[1:]).all()


def test_frames_map_to_the_nearest_stored_one() -> None:
    thinned = make_sample(every=4)
    plan = plan_clip(thinned, Turn(5, 0), 0, DENSE)
    stored = thinned.frames.source_frame[list(plan.stored)]
    assert np.abs(stored - np.asarray(plan.frames)).max() <= 2
    assert plan.largest_shift(thinned) == np.abs(stored - np.asarray(plan.frames)).max()
    wanted = np.array([0, 1, 2, 3, 4, 5, 6, 298, 299])
    assert plans._nearest(thinned.frames.source_frame, wanted).tolist() == [0, 0, 0, 1, 1, 1, 1, 74, 74]
    # Every fourth frame stored, interval a multiple of four: clips are exact once their start is.
    shifts = set(np.asarray(plan.frames) - stored)
    assert len(shifts) == 1


def test_boxes_lie_in_the_frame_and_cover_the_asked_share() -> None:
    options = ClipOptions(crop_scale=(0.25, 0.5))
    shares = []
    for epoch in range(200):
        left, top, width, height = plan_clip(make_sample(), Turn(5, epoch), 0, options).box
        assert left >= 0 and top >= 0 and left + width <= 340 and top + height <= 256
        assert 3 / 4 * 0.97 < width / height < 4 / 3 * 1.03
        shares.append(width * height / (340 * 256))
    assert min(shares) > 0.24 and max(shares) < 0.51 and max(shares) - min(shares) > 0.2


def test_narrow_videos_get_the_centre_square() -> None:
    options = ClipOptions(crop_scale=(1.0, 1.0))
    assert plan_clip(make_sample(size=(400, 100)), Turn(5, 0), 0, options).box == (150, 0, 100, 100)


def test_evaluation_takes_the_centre_crop_and_never_flips() -> None:
    plan = plan_clip(make_sample(), Turn(5, plans.EVAL_EPOCH), 0, DENSE)
    assert plan.box == (58, 16, 224, 224) and not plan.flip


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((340, 256), [(0, 0, 256, 256), (84, 0, 256, 256), (42, 0, 256, 256)]),
        ((256, 341), [(0, 0, 256, 256), (0, 84, 256, 256), (0, 42, 256, 256)]),
        ((90, 90), [(0, 0, 90, 90)] * 3),
    ],
)
def test_three_crops_stand_at_the_ends_and_in_the_middle(
    size: tuple[int, int], boxes: list[tuple[int, int, int, int]]
) -> None:
    """Left, right, middle, as MMAction's `ThreeCrop`: of 85 spare pixels it uses 84. Clips change fastest."""
    options = replace(DENSE, test_clips=2, test_crops=3)
    views = [plan_clip(make_sample(size=size), Turn(5, plans.EVAL_EPOCH, view), 0, options) for view in range(6)]
    assert [view.box for view in views] == [box for box in boxes for _ in range(2)]
    assert [view.frames[0] for view in views] == [43, 129] * 3
    assert not any(view.flip or view.ops or view.erase for view in views)


def test_plans_depend_on_seed_epoch_and_sample_alone() -> None:
    base = plan_clip(make_sample(), Turn(5, 3), 7, DENSE)
    assert base == plan_clip(make_sample(), Turn(5, 3), 7, DENSE)
    others = [
        plan_clip(make_sample(), Turn(5, 3), 8, DENSE),
        plan_clip(make_sample(), Turn(5, 4), 7, DENSE),
        plan_clip(make_sample(sample_id=6), Turn(6, 3), 7, DENSE),
    ]
    assert all((base.frames, base.box) != (other.frames, other.box) for other in others)
    flips = [plan_clip(make_sample(), Turn(5, epoch), 7, DENSE).flip for epoch in range(400)]
    assert 150 < sum(flips) < 250
    never = ClipOptions(flip=0.0)
    assert not any(plan_clip(make_sample(), Turn(5, epoch), 7, never).flip for epoch in range(50))


def test_the_drawn_numbers_never_change() -> None:
    """Resume and comparison with old runs rest on these; if this test fails, NumPy's streams or our keys changed."""
    plan = plan_clip(make_sample(), Turn(5, 3), 7, DENSE)
    assert (plan.frames[0], plan.box, plan.flip) == FROZEN_PLAN
    assert [Order([10], seed=7).turn(p).sample_id for p in range(10)] == FROZEN_ORDER
    augmented = plan_clip(make_sample(), Turn(5, 3), 7, AUGMENTED)
    assert (augmented.frames, augmented.box, augmented.flip) == (plan.frames, plan.box, plan.flip)
    assert augmented.erase is not None and rounded(augmented) == FROZEN_OPS
    mix = plan_mix(7, 3, AUGMENTED)
    assert mix is not None and mix.region is not None
    assert [round(n, 6) for n in (*augmented.erase, mix.weight, *mix.region)] == FROZEN_REGIONS


def rounded(plan: ClipPlan) -> list[tuple[str, float]]:
    return [(name, round(amount, 6)) for name, amount in plan.ops]


def test_streams_are_plain_philox() -> None:
    """Anyone can draw them again: the key is (seed, CRC-32 of the name), the counter (0, counts)."""
    key = np.array([7, zlib.crc32(b"clip")], np.uint64)
    counter = np.array([0, 3, 2**64 - 1, 0], np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter))
    ours = plans._stream(7, "clip", 3, -1)
    assert ours.integers(1000) == expected.integers(1000) and (ours.random(50) == expected.random(50)).all()


def plans_of(options: ClipOptions, count: int = 600) -> list[ClipPlan]:
    return [plan_clip(make_sample(), Turn(5, epoch), 1, options) for epoch in range(count)]


def test_one_augmentation_does_not_change_another() -> None:
    everything = replace(AUGMENTED, grayscale=0.5, mixup_alpha=0.3)
    for whole, clean in zip(plans_of(everything, 50), plans_of(ClipOptions(), 50), strict=True):
        assert replace(whole, ops=(), erase=None) == clean
    for name in ("color_jitter", "rand_augment", "random_erasing"):
        alone = ClipOptions(**{name: getattr(AUGMENTED, name)})  # type: ignore[arg-type]
        for one, both in zip(plans_of(alone, 20), plans_of(AUGMENTED, 20), strict=True):
            assert set(one.ops) <= set(both.ops) and one.erase in (None, both.erase)


def test_colours_change_as_much_as_asked_in_any_order() -> None:
    drawn = [plan.ops for plan in plans_of(ClipOptions(color_jitter=(0.4, 0.0, 1.0, 0.1), grayscale=0.25))]
    assert len({tuple(op.name for op in ops[:3]) for ops in drawn}) == 6
    for name, low, high in (("brightness", 0.6, 1.4), ("saturation", 0.0, 2.0), ("hue", -0.1, 0.1)):
        factors = [op.amount for ops in drawn for op in ops if op.name == name]
        assert len(factors) == len(drawn) and low <= min(factors) and max(factors) <= high
        assert min(factors) < low + 0.02 * (high - low) and max(factors) > high - 0.02 * (high - low)
    assert 100 < sum(ops[-1] == FrameOp("grayscale", 0.0) for ops in drawn) < 200
    assert {op.name for ops in drawn for op in ops} == {"brightness", "saturation", "hue", "grayscale"}


def test_lighting_follows_the_colours_of_imagenet() -> None:
    """MMAction's `ColorJitter`: noise of that deviation in every component, mixed into the channels."""
    drawn = np.asarray([[op.amount for op in plan.ops] for plan in plans_of(ClipOptions(lighting=0.1))])
    assert {tuple(op.name for op in plan.ops) for plan in plans_of(ClipOptions(lighting=0.1), 5)} == {plans.CHANNELS}
    vectors = np.asarray([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    noise = drawn @ np.linalg.inv(vectors * [55.46, 4.794, 1.148]).T
    assert np.abs(noise.mean(0)).max() < 0.015 and np.abs(noise.std(0) - 0.1).max() < 0.01
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.15
    alone = plans_of(replace(AUGMENTED, lighting=0.1), 5)
    assert [plan.ops[4:7] for plan in alone] == [plan.ops for plan in plans_of(ClipOptions(lighting=0.1), 5)]


def test_rand_augment_draws_its_operations_evenly_at_the_asked_magnitude() -> None:
    drawn = [plan.ops for plan in plans_of(ClipOptions(rand_augment=(4, 15)))]
    counts = Counter(op.name for ops in drawn for op in ops)
    assert set(counts) == set(RAND_AUGMENT) - {"identity"}
    assert all(100 < count < 230 for count in counts.values())  # 160 expected
    assert 2100 < counts.total() < 2400 and max(len(ops) for ops in drawn) == 4  # 1 of 15 is the identity
    amounts = {name: {round(op.amount, 6) for ops in drawn for op in ops if op.name == name} for name in counts}
    assert amounts["rotate"] == {-15.0, 15.0} and amounts["shear_x"] == {-0.15, 0.15}
    assert amounts["translate_y"] == {-0.165, 0.165} and amounts["contrast"] == {0.55, 1.45}
    assert amounts["posterize"] == {5.0} and amounts["solarize"] == {128.0} and amounts["invert"] == {0.0}


def test_rand_augment_at_its_published_magnitude_and_about_it() -> None:
    turns = [op.amount for plan in plans_of(ClipOptions(rand_augment=(4, 7))) for op in plan.ops if op.name == "rotate"]
    assert {round(abs(turn), 6) for turn in turns} == {7.0}
    spread = [op.amount for p in plans_of(ClipOptions(rand_augment=(4, 7, 2))) for op in p.ops if op.name == "rotate"]
    assert abs(np.mean(np.abs(spread)) - 7) < 0.6 and 1.5 < np.std(np.abs(spread)) < 2.5
    wild = [op.amount for p in plans_of(ClipOptions(rand_augment=(4, 7, 99))) for op in p.ops if op.name == "rotate"]
    assert max(map(abs, wild)) == 30.0 and min(map(abs, wild)) == 0.0


def test_erased_boxes_follow_the_published_rule() -> None:
    drawn = [plan.erase for plan in plans_of(ClipOptions(random_erasing=0.25), 2000)]
    boxes = np.asarray([box for box in drawn if box is not None])
    assert 420 < len(boxes) < 580
    assert boxes.min() >= 0 and boxes.max() <= 1
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, aspects = width * height, height / width
    assert 0.02 <= areas.min() < 0.03 and 0.31 < areas.max() <= 1 / 3
    assert 0.3 <= aspects.min() < 0.35 and 2.9 < aspects.max() <= 1 / 0.3
    assert abs(np.log(aspects).mean()) < 0.1 and abs(boxes.mean() - 0.5) < 0.02


def mix_only(step: int) -> MixPlan | None:
    return plan_mix(0, step, ClipOptions(mixup_alpha=1.0))


def cut_only(step: int) -> MixPlan | None:
    return plan_mix(0, step, ClipOptions(cutmix_alpha=1.0))


def test_mixing_is_drawn_once_a_step_with_the_asked_odds() -> None:
    both = ClipOptions(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.5, switch_prob=0.25)
    drawn = [plan_mix(3, step, both) for step in range(2000)]
    assert drawn == [plan_mix(3, step, both) for step in range(2000)] and drawn[:9] != drawn[9:18]
    mixed = [mix for mix in drawn if mix is not None]
    cut = [mix for mix in mixed if mix.region is not None]
    assert 920 < len(mixed) < 1080 and 0.2 < len(cut) / len(mixed) < 0.3
    weights = [mix.weight for mix in mixed if mix.region is None]
    assert abs(np.mean(weights) - 0.5) < 0.04 and abs(np.var(weights) - 1 / (4 * 2.6)) < 0.01  # of Beta(0.8, 0.8)
    assert {mix.region is None for mix in map(mix_only, range(50)) if mix} == {True}
    assert {mix.region is None for mix in map(cut_only, range(50)) if mix} == {False}
    assert not ClipOptions(mixup_alpha=1.0, mix_prob=0.0).mixes and not ClipOptions().mixes and both.mixes


def test_cutmix_boxes_have_the_drawn_area_unless_the_border_cuts_them() -> None:
    whole = 0
    for step in range(500):
        mix = cut_only(step)
        assert mix is not None and mix.region is not None
        left, top, right, bottom = mix.region
        assert 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1
        area = (right - left) * (bottom - top)
        assert area <= 1 - mix.weight + 1e-9
        whole += math.isclose(area, 1 - mix.weight)
    assert 50 < whole < 450


def test_order_shows_every_sample_once_an_epoch() -> None:
    order = Order([4, 6], seed=1)
    turns = [order.turn(p) for p in range(35)]
    for epoch in range(3):
        part = turns[10 * epoch : 10 * epoch + 10]
        assert sorted(t.sample_id for t in part) == list(range(10)) and {t.epoch for t in part} == {epoch}
    first, second = ([t.sample_id for t in turns[e * 10 : e * 10 + 10]] for e in (0, 1))
    assert first != second
    assert order.turn(33) == turns[33]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 99])
def test_a_window_shows_every_sample_once_an_epoch_and_few_shards_at_once(window: int) -> None:
    sizes = [3, 0, 7, 1, 4, 5]
    shard_of = np.repeat(np.arange(6), sizes)
    order = Order(sizes, seed=2, window=window)
    epochs = [[order.turn(p) for p in range(20 * epoch, 20 * epoch + 20)] for epoch in range(3)]
    for epoch, turns in enumerate(epochs):
        assert sorted(turn.sample_id for turn in turns) == list(range(20)) and {t.epoch for t in turns} == {epoch}
        open_shards: set[int] = set()
        left = dict(enumerate(sizes))
        for turn in turns:
            shard = int(shard_of[turn.sample_id])
            open_shards.add(shard)
            left[shard] -= 1
            assert len(open_shards) <= window
            if not any(left[s] for s in open_shards):
                open_shards.clear()
    assert len({tuple(turn.sample_id for turn in turns) for turns in epochs}) == 3
    assert order.turn(33) == epochs[1][13]


@pytest.mark.parametrize(("world", "micro"), [(1, 6), (1, 2), (2, 3), (2, 1), (3, 2), (6, 1)])
def test_global_batches_do_not_depend_on_the_world(world: int, micro: int) -> None:
    order = Order([4, 6], seed=1)
    reference = [[order.turn(p) for p in range(s * 6, s * 6 + 6)] for s in range(2, 7)]
    ranks = [
        list(train_turns(order, global_batch=6, micro_batch=micro, rank=r, world=world, start_step=2, num_steps=7))
        for r in range(world)
    ]
    accumulation = 6 // (world * micro)
    for step, expected in enumerate(reference):
        seen = [t for rank in ranks for part in rank[step * accumulation : (step + 1) * accumulation] for t in part]
        assert seen == expected


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 4), (3, 5), (4, 1)])
def test_evaluation_covers_every_sample_once(world: int, micro: int) -> None:
    ranks = [list(eval_turns(10, micro_batch=micro, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    ids = [turn.sample_id for batches in ranks for batch in batches for turn in batch if turn]
    assert ids == list(range(10))


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 4), (3, 5), (4, 1), (1, 64)])
def test_evaluation_covers_every_view_of_every_sample_once(world: int, micro: int) -> None:
    ranks = [list(eval_turns(10, 3, micro_batch=micro, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    turns = [turn for batches in ranks for batch in batches for turn in batch]
    assert turns[:30] == [Turn(i, plans.EVAL_EPOCH, view) for i in range(10) for view in range(3)]
    assert set(turns[30:]) <= {None}


def test_number_of_steps_covers_the_epochs() -> None:
    assert [plans.num_steps(e, 10, 4) for e in (1, 2, 0.5)] == [3, 5, 2]


def test_masks_are_planned_and_scaled() -> None:
    wanted = {"drop_path": np.array([[0.0, 0.0], [0.4, 0.4]]), "head_dropout": np.full(500, 0.25)}
    turns = [Turn(i, 0) for i in range(300)]
    masks = draw_masks(1, turns, wanted)
    assert masks["drop_path"].shape == (300, 2, 2) and masks["head_dropout"].shape == (300, 500)
    assert (masks["drop_path"][:, 0] == 1).all()
    assert set(np.unique(masks["drop_path"][:, 1])) == {0.0, np.float32(1 / 0.6)}
    assert abs(masks["drop_path"][:, 1].mean() - 1) < 0.15 and abs(masks["head_dropout"].mean() - 1) < 0.01
    part = draw_masks(1, turns[10:12], wanted)
    assert all((part[name] == masks[name][10:12]).all() for name in wanted)
    other_epoch = draw_masks(1, [Turn(10, 1)], wanted)
    assert (other_epoch["head_dropout"] != part["head_dropout"][:1]).any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sampling": "random"}, "data.sampling = 'random'; allowed are dense, uniform"),
        ({"short": "loop"}, "data.short = 'loop'; allowed are wrap, hold"),
        ({"intervals": (4, 0)}, "data.intervals = [4, 0]; allowed is [] or numbers, 1 to 1024 each"),
        ({"intervals": (4,), "sampling": "uniform"}, "data.intervals = [4]; allowed is [] unless data.sampling"),
        ({"intervals": (4,), "fixed_views": True}, "and data.intervals = [4]; unset one"),
        ({"num_frames": 0}, "data.num_frames = 0; allowed is 1 to 1024"),
        ({"crop_scale": (0.5, 0.1)}, "data.crop_scale"),
        ({"flip": 1.5}, "data.flip = 1.5"),
        ({"eval_crop": 0.0}, "data.eval_crop"),
        (
            {"color_jitter": (0.4, 0.4, 0.4, 0.6)},
            "data.color_jitter = [0.4, 0.4, 0.4, 0.6]; allowed is 0 to 1 each, of",
        ),
        ({"grayscale": -1.0}, "data.grayscale = -1.0; allowed is a probability"),
        ({"rand_augment": (4,)}, "data.rand_augment = [4]; allowed is [] or [n, m] or [n, m, mstd]"),
        ({"rand_augment": (4.5, 7)}, "data.rand_augment = [4.5, 7]"),
        ({"rand_augment": (4, 31)}, "data.rand_augment = [4, 31]"),
        ({"rand_augment": (4, 7, math.nan)}, "data.rand_augment = [4, 7, nan]"),
        ({"random_erasing": 2.0}, "data.random_erasing = 2.0; allowed is a probability"),
        ({"mixup_alpha": -1.0}, "data.mixup_alpha = -1.0; allowed is 0 (off) or more"),
        ({"cutmix_alpha": math.inf}, "data.cutmix_alpha = inf; allowed is 0 (off) or more"),
        ({"mix_prob": 1.1}, "data.mix_prob = 1.1"),
        ({"switch_prob": 1.1}, "data.switch_prob = 1.1"),
        ({"test_clips": 0}, "data.test_clips = 0; allowed is 1 to 100"),
        ({"test_crops": 2}, "data.test_crops = 2; allowed is 1 or 3"),
    ],
)
def test_options_out_of_range_are_named(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        ClipOptions(**change)  # type: ignore[arg-type]
