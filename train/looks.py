"""Where a trained model looks in a clip, beside where the image model looks that it was made from: the rows of the
paper's figure."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.attention_maps import class_attention, image_model, image_model_trains
from model.video import VideoModel
from train.trained import Trained

_HEAT = 0.55  # weight of the colours over the picture


@dataclass(frozen=True)
class Looks:
    """One clip of T frames, uint8 RGB [T, S, S, 3] each."""

    frames: NDArray[np.uint8]
    image_model: NDArray[np.uint8]
    """Under the attention of the image model, without what the method added."""
    trained: NDArray[np.uint8]
    """Under that of the trained model."""
    alike: bool
    """Whether the two look at the same."""


def frozen_model(trained: Trained) -> VideoModel:
    """The image model that a trained one was made from: the frozen part of it or, where all of it was trained, what the
    run started from. ValueError where the model has no class token."""
    source = trained.before_training() if image_model_trains(trained.model) else trained.model
    if source is None:
        raise ValueError(
            f"all of {trained.folder} was trained, and a converted checkpoint does not say what it started from; give "
            "the run, or a model with adapters"
        )
    return image_model(source)


def looks_of(
    trained: Trained, clips: NDArray[np.uint8], *, block: int = -1, device: torch.device | None = None
) -> list[Looks]:
    """Of clips [B, T, S, S, 3], computed together, in one block (from 0, or -1 for the last).

    Raises ValueError for a model without class token or such a block.
    """
    device = device or torch.device("cpu")
    batch = torch.from_numpy(clips).to(device)
    frozen, adapted = (
        patch_maps(class_attention(model.to(device), batch, block)).cpu().numpy()
        for model in (frozen_model(trained), trained.model)
    )
    return [
        Looks(frames, overlay(frames, before), overlay(frames, after), alike=bool(np.allclose(before, after)))
        for frames, before, after in zip(clips, frozen, adapted, strict=True)
    ]


def patch_maps(attention_BTN: Tensor) -> Tensor:
    """The class token's shares → the patches' alone, in their grid [B, T, G, G], from 0 to 1 over each clip."""
    patches = attention_BTN[..., 1:]
    side = round(patches.shape[-1] ** 0.5)
    low, high = patches.amin((1, 2), keepdim=True), patches.amax((1, 2), keepdim=True)
    scaled = (patches - low) / (high - low).clamp_min(torch.finfo(patches.dtype).tiny)
    return scaled.unflatten(-1, (side, side))


def overlay(frames: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames [T, S, S, 3] under the colours of maps [T, G, G] of values from 0 to 1, enlarged bilinearly."""
    enlarged = F.interpolate(torch.from_numpy(heat)[:, None], frames.shape[1:3], mode="bilinear", align_corners=False)
    colours = matplotlib.colormaps["turbo"](enlarged[:, 0].numpy())[..., :3]
    mixed: NDArray[np.uint8] = np.round((1 - _HEAT) * frames + _HEAT * 255 * colours).astype(np.uint8)
    return mixed
