"""From a run's configuration to a model, for the trainer and for every tool that loads a run's checkpoint."""

from __future__ import annotations

from dataclasses import fields

import torch
import xxhash
from torch import nn

from model.aim import AIM, AIMOptions
from model.backbone import load_image_tower
from train.config import ModelConfig


def build_model(config: ModelConfig, *, num_classes: int, num_frames: int, seed: int) -> AIM:
    """The model at its initialisation, in float32 on the CPU; the same for the same arguments.

    Raises ValueError for an unknown name, or weights that cannot be had or do not fit.
    """
    torch.manual_seed(seed)
    tower = load_image_tower(config.name, config.pretrained)
    options = AIMOptions(**{f.name: getattr(config, f.name) for f in fields(AIMOptions)})
    return AIM(tower, num_classes, num_frames, options)


def backbone_checksum(model: nn.Module) -> str:
    """Checksum of the frozen weights as they were loaded: call it before their precision is changed."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
