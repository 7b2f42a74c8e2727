"""The plan: the published frame rules, the order of samples, and that nothing depends on anything but the seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipelines import plan as plans
from pipelines.plan import ClipOptions, Order, Turn, draw_masks, eval_turns, plan_clip, train_turns
from pipelines.shards import FrameTable, Sample

UNIFORM = ClipOptions(num_frames=8, sampling="uniform")
DENSE = ClipOptions(num_frames=8, interval=16)
FROZEN_PLAN = (82, (110, 73, 205, 178), False)
FROZEN_ORDER = [0, 2, 1, 9, 8, 3, 6, 7, 4, 5]


def make_sample(
    source_frames: int = 300, every: int = 1, size: tuple[int, int] = (340, 256), sample_id: int = 5
) -> Sample:
    stored = np.arange(0, source_frames, every, dtype=np.int32)
    zeros = np.zeros(len(stored), np.int64)
    table = FrameTable(zeros, zeros.astype(np.int32), zeros.astype(np.uint64), stored, zeros.astype(np.uint8))
    return Sample(sample_id, "key", 0, None, 0, 0, 0, *size, source_frames, 30.0, table, b"")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num", "expected"),
    [(45, [3, 8, 13, 19, 25, 30, 35, 41]), (6, [0, 1, 1, 2, 2, 3, 4, 4]), (16, [1, 3, 5, 7, 8, 10, 12, 14])],
)
def test_uniform_evaluation_frames_are_the_published_ones(num: int, expected: list[int]) -> None:
    assert plans.eval_frames(num, UNIFORM).tolist() == expected


def test_dense_evaluation_clip_is_the_middle_one() -> None:
    assert plans.eval_frames(300, DENSE)[0] == (300 - 128 + 1) // 2
    assert plans.eval_frames(100, DENSE).tolist() == [16 * k % 100 for k in range(8)]


def test_dense_training_frames_cover_every_start() -> None:
    random = np.random.default_rng(0)
    starts = Counter(int(plans.train_frames(random, 131, DENSE)[0]) for _ in range(400))
    assert set(starts) == {0, 1, 2, 3}
    short = plans.train_frames(random, 100, DENSE)
    assert short.tolist() == [16 * k % 100 for k in range(8)]


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
    assert [Order(10, seed=7).turn(p).sample_id for p in range(10)] == FROZEN_ORDER


def test_order_shows_every_sample_once_an_epoch() -> None:
    order = Order(10, seed=1)
    turns = [order.turn(p) for p in range(35)]
    for epoch in range(3):
        part = turns[10 * epoch : 10 * epoch + 10]
        assert sorted(t.sample_id for t in part) == list(range(10)) and {t.epoch for t in part} == {epoch}
    first, second = ([t.sample_id for t in turns[e * 10 : e * 10 + 10]] for e in (0, 1))
    assert first != second
    assert order.turn(33) == turns[33]


@pytest.mark.parametrize(("world", "micro"), [(1, 6), (1, 2), (2, 3), (2, 1), (3, 2), (6, 1)])
def test_global_batches_do_not_depend_on_the_world(world: int, micro: int) -> None:
    order = Order(10, seed=1)
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
        ({"num_frames": 0}, "data.num_frames = 0; allowed is 1 to 1024"),
        ({"crop_scale": (0.5, 0.1)}, "data.crop_scale"),
        ({"flip": 1.5}, "data.flip = 1.5"),
        ({"eval_crop": 0.0}, "data.eval_crop"),
    ],
)
def test_options_out_of_range_are_named(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace(".", r"\.").replace("[", r"\[")):
        ClipOptions(**change)  # type: ignore[arg-type]
