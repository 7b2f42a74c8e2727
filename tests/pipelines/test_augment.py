"""Augmentation: every operation against PIL or NumPy frame by frame, the same on all frames, decided by the plan."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from pipelines.augment import CLIP_MEAN, PinnedNumbers, augment_clips, mix_clips, operations
from pipelines.plan import (
    CHANNELS,
    COLOUR_JITTER,
    RAND_AUGMENT,
    ClipOptions,
    ClipPlan,
    FrameOp,
    MixPlan,
    Turn,
    plan_clip,
    plan_mix,
)
from tests.pipelines.test_plan import make_sample

SIZE = 40
FILL = torch.tensor(CLIP_MEAN, dtype=torch.uint8)
Frame = NDArray[np.uint8]


def make_clips(count: int, num_frames: int = 3, seed: int = 0) -> torch.Tensor:
    """Clips of moving waves and some noise, uint8 [count, T, 40, 40, 3]; every frame has levels of its own."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    frames = []
    for i in range(count * num_frames):
        phase = random.uniform(0, 6, 3)
        waves = [np.sin(5 * x + 7 * y * (c + 1) / 2 + phase[c]) for c in range(3)]
        level, depth = random.uniform(80, 160), random.uniform(20, 70)
        frames.append(level + depth * np.stack(waves, -1) + random.uniform(-9, 9, (SIZE, SIZE, 3)) + i % 3)
    pixels = np.clip(np.stack(frames), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels.reshape(count, num_frames, SIZE, SIZE, 3))


def make_plan(*ops: tuple[str, float], erase: tuple[float, float, float, float] | None = None) -> ClipPlan:
    return ClipPlan(0, 0, (0,), (0,), (0, 0, 1, 1), False, tuple(FrameOp(*op) for op in ops), erase)


def enhanced(kind: type) -> Callable[[Frame, float], Frame]:
    return lambda frame, amount: np.asarray(kind(Image.fromarray(frame)).enhance(amount))


def changed(function: Callable[..., Image.Image], number: type | None = None) -> Callable[[Frame, float], Frame]:
    return lambda frame, amount: np.asarray(function(Image.fromarray(frame), *([number(amount)] if number else [])))


def turned_hue(frame: Frame, amount: float) -> Frame:
    """By the standard library, pixel by pixel: PIL's own hue has 256 steps."""
    pixels = []
    for pixel in frame.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        pixels.append(colorsys.hsv_to_rgb((hue + amount) % 1, saturation, value))
    return np.round(255 * np.asarray(pixels)).astype(np.uint8).reshape(frame.shape)


def moved(inverse: Callable[[float], NDArray[np.float64]]) -> Callable[[Frame, float], Frame]:
    """Bilinear: the pixel at (x, y) from the centre comes from `inverse(amount) @ (x, y, 1)`, the mean colour from
    outside the frame."""

    def move(frame: Frame, amount: float) -> Frame:
        padded = np.full((SIZE + 2, SIZE + 2, 3), CLIP_MEAN, np.float64)
        padded[1:-1, 1:-1] = frame
        centre = (SIZE - 1) / 2
        y, x = np.mgrid[0:SIZE, 0:SIZE] - centre
        places = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        column, row = np.clip(inverse(amount) @ places + centre + 1, 0, SIZE + 1)
        left, top = np.minimum(column.astype(int), SIZE), np.minimum(row.astype(int), SIZE)
        right, down = (column - left)[:, None], (row - top)[:, None]
        upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
        lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
        return np.round(upper * (1 - down) + lower * down).astype(np.uint8).reshape(frame.shape)

    return move


def back_turn(degrees: float) -> NDArray[np.float64]:
    """Undoes a turn clockwise as seen on a screen, where y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.asarray([[cos, sin, 0], [-sin, cos, 0]])


def raised(channel: int) -> Callable[[Frame, float], Frame]:
    def add(frame: Frame, levels: float) -> Frame:
        added = frame.astype(float)
        added[..., channel] += levels
        return np.clip(np.round(added), 0, 255).astype(np.uint8)

    return add


# name: amounts, what it must be (one frame, amount), greatest difference in levels
REFERENCES: dict[str, tuple[tuple[float, ...], Callable[[Frame, float], Frame], int]] = {
    "brightness": ((0.3, 1.0, 1.7), enhanced(ImageEnhance.Brightness), 1),
    "contrast": ((0.3, 1.7), enhanced(ImageEnhance.Contrast), 2),  # PIL rounds the mean first
    "saturation": ((0.0, 0.4, 1.9), enhanced(ImageEnhance.Color), 2),
    "red": ((-70.0, 3.4), raised(0), 0),
    "green": ((-3.4, 90.0), raised(1), 0),
    "blue": ((-0.6, 300.0), raised(2), 0),
    "sharpness": ((0.1, 1.9), enhanced(ImageEnhance.Sharpness), 2),
    "hue": ((-0.3, 0.05, 0.5), turned_hue, 1),
    "grayscale": ((0.0,), changed(lambda image: image.convert("L").convert("RGB")), 1),
    "autocontrast": ((0.0,), changed(ImageOps.autocontrast), 1),
    "equalize": ((0.0,), changed(ImageOps.equalize), 0),
    "invert": ((0.0,), changed(ImageOps.invert), 0),
    "posterize": ((2.0, 5.0, 8.0), changed(ImageOps.posterize, int), 0),
    "solarize": ((0.0, 100.0, 150.0, 256.0), changed(ImageOps.solarize, int), 0),
    "rotate": ((-30.0, 7.0), moved(back_turn), 1),
    "shear_x": ((-0.3, 0.07), moved(lambda slope: np.asarray([[1, -slope, 0], [0, 1, 0]])), 1),
    "shear_y": ((-0.3, 0.07), moved(lambda slope: np.asarray([[1, 0, 0], [-slope, 1, 0]])), 1),
    "translate_x": ((-0.33, 0.11), moved(lambda share: np.asarray([[1, 0, -share * SIZE], [0, 1, 0]])), 1),
    "translate_y": ((-0.33, 0.11), moved(lambda share: np.asarray([[1, 0, 0], [0, 1, -share * SIZE]])), 1),
}


def test_every_operation_of_the_plan_is_there_and_has_a_reference() -> None:
    planned = {*RAND_AUGMENT, *COLOUR_JITTER, "grayscale", *CHANNELS} - {"identity"}
    assert set(operations()) == set(REFERENCES) == planned


@pytest.mark.parametrize("name", REFERENCES)
def test_operation_does_to_each_frame_what_the_reference_does(name: str) -> None:
    amounts, reference, tolerance = REFERENCES[name]
    for amount in amounts:
        frames = make_clips(1)
        before = frames[0].numpy().copy()
        augment_clips(frames, [make_plan((name, amount))], FILL)
        for frame, source in zip(frames[0].numpy(), before, strict=True):
            expected = reference(source, amount).astype(int)
            assert np.abs(frame - expected).max() <= tolerance, (amount, np.abs(frame - expected).max())
        assert (amount in (1.0, 8.0, 256.0)) == np.array_equal(frames[0].numpy(), before), "it changes something"


@pytest.mark.parametrize("name", REFERENCES)
def test_frames_that_are_alike_stay_alike(name: str) -> None:
    frames = make_clips(1, num_frames=1).expand(1, 4, SIZE, SIZE, 3).contiguous()
    augment_clips(frames, [make_plan((name, REFERENCES[name][0][0]))], FILL)
    assert all(torch.equal(frame, frames[0, 0]) for frame in frames[0])


def test_operations_come_in_their_order_and_leave_other_clips_alone() -> None:
    frames = make_clips(3)
    before = frames.clone()
    augment_clips(frames, [make_plan(), make_plan(("invert", 0.0), ("posterize", 2.0)), make_plan()], FILL)
    assert torch.equal(frames[0], before[0]) and torch.equal(frames[2], before[2])
    assert torch.equal(frames[1], (255 - before[1]) & 0xC0)
    augment_clips(before, [make_plan(), make_plan(("posterize", 2.0), ("invert", 0.0)), make_plan()], FILL)
    assert not torch.equal(frames, before)


def test_erased_box_is_painted_in_the_given_colour_on_every_frame_after_the_operations() -> None:
    frames = make_clips(2)
    expected = 255 - frames[1].numpy()
    expected[:, 10:30, 4:20] = (9, 8, 7)
    untouched = frames[0].clone()
    plans = [make_plan(), make_plan(("invert", 0.0), erase=(0.1, 0.2501, 0.501, 0.7499))]
    augment_clips(frames, plans, torch.tensor([9, 8, 7], dtype=torch.uint8))
    assert np.array_equal(frames[1].numpy(), expected) and torch.equal(frames[0], untouched)


def test_mixup_blends_neighbours_with_one_rounding() -> None:
    frames, weight = make_clips(4), 0.3
    before = frames.numpy().astype(np.float64)
    targets = mix_clips(frames, torch.eye(4), MixPlan(weight, None))
    partner = before[[1, 0, 3, 2]]
    exact = weight * before + (1 - weight) * partner
    assert np.abs(frames.numpy() - exact).max() <= 0.5 + 255 / 2**17
    np.testing.assert_allclose(targets, weight * np.eye(4) + (1 - weight) * np.eye(4)[[1, 0, 3, 2]], atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_mixup_at_its_ends_is_one_clip(weight: float) -> None:
    frames = make_clips(2)
    before = frames.clone()
    targets = mix_clips(frames, torch.eye(2), MixPlan(weight, None))
    assert torch.equal(frames, before if weight else before.flip(0))
    assert torch.equal(targets, torch.eye(2) if weight else torch.eye(2).flip(0))


def test_cutmix_swaps_a_box_and_weighs_labels_by_its_pixels() -> None:
    frames = make_clips(4)
    before = frames.numpy().copy()
    several = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    targets = mix_clips(frames, several, MixPlan(0.5, (0.0, 0.26, 0.49, 1.0)))
    expected = before.copy()
    expected[:, :, 10:40, 0:20] = before[[1, 0, 3, 2], :, 10:40, 0:20]
    assert np.array_equal(frames.numpy(), expected)
    own = 1 - 30 * 20 / SIZE**2
    np.testing.assert_allclose(targets, own * several + (1 - own) * several[[1, 0, 3, 2]], atol=1e-6)


EVERYTHING = ClipOptions(
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    grayscale=0.3,
    rand_augment=(3, 12, 2),
    random_erasing=0.5,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
)


@pytest.mark.parametrize("step", range(4))
def test_pixels_do_not_depend_on_how_a_global_batch_is_shared(step: int) -> None:
    """Each part of the batch is augmented and mixed by itself, as ranks and micro-batches do it."""
    turns = [Turn(sample_id, step) for sample_id in range(8)]
    plans = [plan_clip(make_sample(sample_id=turn.sample_id), turn, 7, EVERYTHING) for turn in turns]
    mix = plan_mix(7, step, EVERYTHING)
    assert mix is not None and sum(bool(plan.ops) for plan in plans) > 4
    whole, targets = make_clips(8), torch.eye(8)
    results = []
    for size in (8, 8, 4, 2):
        parts = [(whole[i : i + size].clone(), targets[i : i + size], plans[i : i + size]) for i in range(0, 8, size)]
        mixed = []
        for clips, labels, part in parts:
            augment_clips(clips, part, FILL)
            mixed.append(mix_clips(clips, labels, mix))
        results.append((torch.cat([clips for clips, _, _ in parts]), torch.cat(mixed)))
    assert not torch.equal(results[0][0], whole)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_both_kinds_of_mixing_come_up() -> None:
    assert {plan_mix(7, step, EVERYTHING).region is None for step in range(4)} == {True, False}  # type: ignore[union-attr]


def test_plans_without_augmentation_leave_pixels_alone() -> None:
    frames = make_clips(2)
    before = frames.clone()
    augment_clips(frames, [plan_clip(make_sample(), Turn(5, epoch), 0, ClipOptions()) for epoch in range(2)], FILL)
    assert torch.equal(frames, before) and plan_mix(0, 0, ClipOptions()) is None


def test_numbers_go_to_a_device_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision makes of numbers inside is copied without waiting, and is the same."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    clips = make_clips(1)
    for name in ("rotate", "sharpness"):
        expected = operations()[name](clips[0].permute(0, 3, 1, 2), 0.5, FILL)
        with PinnedNumbers():
            torch.testing.assert_close(operations()[name](clips[0].permute(0, 3, 1, 2), 0.5, FILL), expected)
        assert pinned and all(tensor.numel() <= 9 for tensor in pinned)
        pinned.clear()


@pytest.mark.gpu
def test_a_gpu_does_the_same() -> None:
    """Mixing to the last bit, operations within a level or two of the CPU's rounding."""
    options = replace(EVERYTHING, random_erasing=1.0)
    plans = [plan_clip(make_sample(sample_id=i), Turn(i, 0), 7, options) for i in range(64)]
    clips = make_clips(64)
    on_gpu = clips.cuda()
    augment_clips(clips, plans, FILL)
    augment_clips(on_gpu, plans, FILL.cuda())
    difference = (on_gpu.cpu().int() - clips.int()).abs()
    assert difference.float().mean() < 0.1 and (difference > 2).float().mean() < 1e-3
    for mix in (MixPlan(0.3, None), MixPlan(0.5, (0.1, 0.2, 0.8, 0.7))):
        one, other = clips.clone(), clips.cuda()
        targets = mix_clips(one, torch.eye(64), mix)
        torch.testing.assert_close(mix_clips(other, torch.eye(64).cuda(), mix).cpu(), targets)
        assert torch.equal(other.cpu(), one)
