"""The methods by name: how each is built from a recipe, and built again from what a checkpoint says of it.

A new method is a subclass of `VideoModel` with a dataclass of options, and an entry here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.aim import AIM, AIMOptions, Finetuned, Frozen, SpaceOnlyOptions
from model.backbone import load_image_tower
from model.geometry import Geometry, ImageTower, SwinGeometry, ViTGeometry
from model.swin import AIMSwin, VideoSwin, VideoSwinOptions
from model.timesformer import TimeSformer, TimeSformerCLIP, TimeSformerOptions
from model.video import VideoModel

Create = Callable[[ImageTower, int | None, int, Any], VideoModel]


@dataclass(frozen=True)
class Method:
    """A method: what it is in one line, the dataclass of its options, and its model for each kind of image model."""

    summary: str
    options: type
    models: Mapping[type[Geometry], Create]


METHODS: dict[str, Method] = {
    "aim": Method("frozen image model with adapters", AIMOptions, {ViTGeometry: AIM, SwinGeometry: AIMSwin}),
    "frozen": Method("frozen image model, frame by frame, new head", SpaceOnlyOptions, {ViTGeometry: Frozen}),
    "finetuned": Method("the same with all of it trained", SpaceOnlyOptions, {ViTGeometry: Finetuned}),
    "timesformer": Method(
        "divided space-time attention, as published", TimeSformerOptions, {ViTGeometry: TimeSformer}
    ),
    "timesformer_clip": Method(
        "divided space-time attention, as the AIM paper compares", TimeSformerOptions, {ViTGeometry: TimeSformerCLIP}
    ),
    "video_swin": Method("3-D shifted windows, all trained", VideoSwinOptions, {SwinGeometry: VideoSwin}),
}


def create(
    method: str, tower: ImageTower, *, num_classes: int | None, num_frames: int, options: Any | None = None
) -> VideoModel:
    """The model of a method on an image tower, at its initialisation, in float32; without classes it has no head.

    `options` is an instance of the method's dataclass; None: its defaults. Raises ValueError for an unknown method, or
    an image model that it cannot adapt.
    """
    entry = METHODS.get(method)
    if entry is None:
        raise ValueError(f"unknown method {method!r}; allowed is {', '.join(METHODS)}")
    model = entry.models.get(type(tower.geometry))
    if model is None:
        kinds = {ViTGeometry: "an image transformer with a class token", SwinGeometry: "a Swin transformer"}
        needed = " or ".join(kinds[kind] for kind in entry.models)
        raise ValueError(f"method {method} needs {needed}, and model.name is {kinds[type(tower.geometry)]}")
    return model(tower, num_classes, num_frames, entry.options() if options is None else options)


def build(
    method: str,
    name: str,
    pretrained: str,
    *,
    num_classes: int,
    num_frames: int,
    seed: int = 0,
    normalisation: str = "",
    options: Any | None = None,
) -> VideoModel:
    """As `create`, on an image model by name (see `model.backbone.load_image_tower`); the same for the same arguments."""
    torch.manual_seed(seed)
    text_tower = getattr(options, "temporal_weights", "") == "text"
    tower = load_image_tower(name, pretrained, normalisation=normalisation, text_tower=text_tower)
    return create(method, tower, num_classes=num_classes, num_frames=num_frames, options=options)


def describe(model: VideoModel) -> dict[str, Any]:
    """What `from_description` needs to build an equal model: plain values, for JSON."""
    method = next(name for name, entry in METHODS.items() if type(model) in entry.models.values())
    return {
        "method": method,
        "backbone": "vit" if isinstance(model.geometry, ViTGeometry) else "swin",
        "geometry": dataclasses.asdict(model.geometry),
        "num_classes": model.num_classes,
        "num_frames": model.num_frames,
        "options": dataclasses.asdict(model.options),  # type: ignore[call-overload]
    }


def from_description(description: Mapping[str, Any]) -> VideoModel:
    """The model that `describe` described, with random weights; ValueError names what is not as it should be."""
    raise NotImplementedError
