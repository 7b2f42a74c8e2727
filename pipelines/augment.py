"""Augmentation after decoding: does to a micro-batch what the plan says, on the device that trains; draws nothing.

Clips are uint8 RGB [B, T, S, S, 3] and stay so: every operation ends in whole levels 0..255, as if the video had been
stored that way. An operation is one call for all T frames of a clip, so it is the same on each of them; what it takes
from the picture itself (the mean of `contrast`, the histogram of `equalize`) it takes from each frame, as PIL would. A
clip without operations costs nothing. The same code runs on CPU and CUDA. Training only: evaluation never comes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipelines.plan import ClipPlan, MixPlan, Region

CLIP_MEAN = (123, 117, 104)
"""The mean colour of CLIP's normalisation in whole levels: normalised, within 0.004 of zero."""
_WHOLE = 2**16  # weights of a mix are multiples of 1 / _WHOLE, so that integers do it, alike on every device

Operation = Callable[[Tensor, float, Tensor], Tensor]
"""uint8 frames [T, 3, S, S], amount, colour [3] of what comes from outside the frame → uint8 frames [T, 3, S, S]."""


def augment_clips(frames: Tensor, plans: Sequence[ClipPlan], fill: Tensor) -> None:
    """Changes clips in place as planned: operations in their order, then the erased box.

    Args:
        frames: uint8 RGB [B, T, S, S, 3].
        plans: B plans.
        fill: uint8 [3] on the same device: the mean colour of the model's normalisation. It fills erased boxes, where
            the official code writes zeros into normalised frames, and what an operation moves in from outside.
    """
    for clip, plan in zip(frames, plans, strict=True):
        if plan.ops:
            moved = clip.permute(0, 3, 1, 2)
            with PinnedNumbers() if frames.is_cuda else nullcontext():
                for name, amount in plan.ops:
                    moved = operations()[name](moved, amount, fill)
            clip.copy_(moved.permute(0, 2, 3, 1))
        if plan.erase is not None:
            rows, columns = _pixels(plan.erase, clip.shape[1])
            clip[:, rows, columns] = fill


def mix_clips(frames: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
    """Mixes each clip 2k with clip 2k + 1, in place, and returns their mixed targets.

    Args:
        frames: uint8 [B, T, S, S, 3], B even.
        targets: float [B, C]: one-hot or multi-hot.
        plan: mixup rounds once, to the nearest level; cutmix moves pixels as they are.
    """
    assert len(frames) % 2 == 0, f"{len(frames)} clips do not make pairs"
    if plan.region is None:
        weight = round(plan.weight * _WHOLE)
        own_share = weight / _WHOLE
        for pair in frames.view(-1, 2, *frames.shape[1:]):  # one at a time: four times the bytes of a pair, not of all
            own = pair.int()
            pair.copy_((own * weight + own.flip(0) * (_WHOLE - weight) + _WHOLE // 2) >> 16)
    else:
        size = frames.shape[2]
        rows, columns = _pixels(plan.region, size)
        box = frames.view(-1, 2, *frames.shape[1:])[..., rows, columns, :]
        box.copy_(box.flip(1))
        own_share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / size**2
    others = targets.view(-1, 2, targets.shape[1]).flip(1).view_as(targets)
    return own_share * targets + (1 - own_share) * others


@cache
def operations() -> Mapping[str, Operation]:
    """Every operation that a plan may name; torchvision is imported by the first call."""
    from torchvision.transforms.v2 import functional as F

    return {
        "brightness": lambda frames, amount, _: F.adjust_brightness(frames, amount),
        "contrast": lambda frames, amount, _: F.adjust_contrast(frames, amount),
        "saturation": lambda frames, amount, _: F.adjust_saturation(frames, amount),
        "hue": lambda frames, amount, _: F.adjust_hue(frames, amount),
        "red": lambda frames, levels, _: _raise_channel(frames, 0, levels),
        "green": lambda frames, levels, _: _raise_channel(frames, 1, levels),
        "blue": lambda frames, levels, _: _raise_channel(frames, 2, levels),
        "sharpness": lambda frames, amount, _: F.adjust_sharpness(frames, amount),
        "grayscale": lambda frames, _, __: F.rgb_to_grayscale(frames, num_output_channels=3),
        "autocontrast": lambda frames, _, __: F.autocontrast(frames),
        "equalize": lambda frames, _, __: F.equalize(frames),
        "invert": lambda frames, _, __: F.invert(frames),
        "posterize": lambda frames, bits, _: F.posterize(frames, int(bits)),
        "solarize": lambda frames, level, _: F.solarize(frames, level) if level < 256 else frames,
        "rotate": lambda frames, degrees, fill: _move(frames, fill, degrees=degrees),
        "shear_x": lambda frames, slope, fill: _move(frames, fill, shear=(slope, 0.0)),
        "shear_y": lambda frames, slope, fill: _move(frames, fill, shear=(0.0, slope)),
        "translate_x": lambda frames, share, fill: _move(frames, fill, translate=(share, 0.0)),
        "translate_y": lambda frames, share, fill: _move(frames, fill, translate=(0.0, share)),
    }


class PinnedNumbers(TorchFunctionMode):
    """Inside, tensors made of numbers reach the device without the host waiting for it: torchvision makes small ones
    for moves and sharpening."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is not torch.tensor or given.get("device") is None:
            return func(*args, **given)
        device = given.pop("device")
        return func(*args, **given).pin_memory().to(device, non_blocking=True)


def _raise_channel(frames: Tensor, channel: int, levels: float) -> Tensor:
    """Adds to one colour of all frames, to the nearest level."""
    raised = frames.clone()
    raised[:, channel] = (frames[:, channel].float() + levels).round_().clamp_(0, 255).to(torch.uint8)
    return raised


def _move(
    frames: Tensor,
    fill: Tensor,
    *,
    degrees: float = 0.0,
    shear: tuple[float, float] = (0.0, 0.0),
    translate: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Turns (clockwise) or shears about the centre, or shifts all frames alike; bilinear, `fill` beyond the border.

    shear: how far a pixel goes right a pixel that it lies below the centre, and down a pixel that it lies right of it.
    translate: right and down, as shares of the side.

    The fill colour is zero while torchvision moves the frames: its own blending of a fill colour leaves a dark seam.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    colour = fill.float()[:, None, None]
    moved = F.affine(
        frames.float() - colour,
        angle=degrees,
        translate=[share * frames.shape[-1] for share in translate],
        scale=1.0,
        shear=[-math.degrees(math.atan(slope)) for slope in shear],
        interpolation=InterpolationMode.BILINEAR,
    )
    return (moved + colour).round_().clamp_(0, 255).to(torch.uint8)


def _pixels(region: Region, size: int) -> tuple[slice, slice]:
    """Rows and columns of a region in frames of `size` × `size` pixels: its edges go to the nearest pixel border."""
    left, top, right, bottom = (round(edge * size) for edge in region)
    return slice(top, bottom), slice(left, right)
