"""From a run's configuration to a model, for the trainer and for every tool that loads a run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from model import methods
from model.parameters import backbone_checksum
from model.video import VideoModel
from train.config import ModelConfig

__all__ = ["backbone_checksum", "build_model"]


def build_model(
    config: ModelConfig,
    *,
    num_classes: int | None,
    num_frames: int,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> VideoModel:
    """The model at its initialisation, in float32 on the CPU; the same for the same arguments.

    `class_names`: which some models read.

    Raises ValueError for an unknown name, weights that cannot be had or do not fit, or a method that cannot adapt it.
    """
    return methods.build(
        config.method,
        config.name,
        config.pretrained,
        num_classes=num_classes,
        num_frames=num_frames,
        seed=seed,
        normalisation=config.normalisation,
        options=config.options,
        class_names=class_names,
    )
