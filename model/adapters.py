"""AIM's adapters: the bottleneck itself, which of them stand where, and how strongly they count.

What AIM on a ViT (`model.methods.aim`) and AIM on Swin (`model.methods.swin`) share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Linear

ADAPTERS = ("spatial", "temporal", "joint")
_ANY_DEPTH = 1024  # more than any model has


@dataclass(frozen=True)
class AIMOptions:
    """What of AIM is built; the defaults are the published Kinetics-400 settings."""

    adapters: tuple[str, ...] = ADAPTERS
    """Which adapters stand in each block: the paper's ladder is (), spatial, spatial + temporal, all three. Without
    the temporal one no temporal attention runs and there is no temporal embedding: the model is space-only."""
    positions: str | tuple[int, ...] = "all"
    """Which blocks have adapters; the others run as plain blocks of the image model. "all", "bottom 6" (nearest the
    input), "top 6", "every 2" (the second, the fourth, …), or a list of block numbers from 0."""
    temporal_adapters: int = 1
    """2 adds one before the temporal attention (Something-Something V2)."""
    temporal_weights: str = "reuse"
    """Whose weights attend over time: "reuse" those that attend over space (AIM), or "text": an experiment, those of
    the frozen text tower that belongs to a CLIP model, where it is as wide. (There they see only what came before; here
    every frame sees all.)"""
    adapter_ratio: float = 0.25
    adapter_scale: float = 0.5
    """s, the weight of the joint adapter's branch (Swin: always 0.5, as published)."""
    temporal_embedding: str = "input"
    """Where the temporal embedding is added, which trains: to the "input" (AIM), so that gradients go all the way down;
    or before the lowest block with "adapters", so that nothing below needs any. No difference but the place of a norm
    where all blocks are adapted."""
    drop_path: float = 0.2
    """Drop rate of the last block's temporal and joint branches; block i of L has drop_path · i / (L - 1)."""
    drop_path_axis: str = "clip"
    """What is dropped: "clip", a clip's branch; "official", what the official code drops (on CLIP a token position for
    all clips of a micro-batch, on ImageNet's ViT a frame; not for Swin)."""
    head_dropout: float = 0.5
    shipped_freezing: bool = False
    """Of Swin: freeze the temporal bias tables and the last norm, as the shipped code does by their names."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.adapters if name not in ADAPTERS]
        if unknown:
            raise ValueError(f"model.adapters: {unknown[0]!r} is none of {', '.join(ADAPTERS)}")
        if len(set(self.adapters)) < len(self.adapters):
            raise ValueError(f"model.adapters = {list(self.adapters)}; each may be named once")
        if self.temporal_adapters not in (1, 2):
            raise ValueError(f"model.temporal_adapters = {self.temporal_adapters}; allowed are 1 and 2")
        if not 0 < self.adapter_ratio <= 4:
            raise ValueError(f"model.adapter_ratio = {self.adapter_ratio}; allowed is 0 < ratio <= 4")
        if not 0 <= self.adapter_scale < float("inf"):
            raise ValueError(f"model.adapter_scale = {self.adapter_scale}; allowed is 0 or more")
        for name in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}; allowed is 0 <= rate < 1")
        for name, allowed in (
            ("temporal_weights", ("reuse", "text")),
            ("temporal_embedding", ("input", "adapters")),
            ("drop_path_axis", ("clip", "official")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name} = {getattr(self, name)!r}; allowed is {' or '.join(allowed)}")
        check_positions(self.positions)


def check_positions(positions: str | tuple[int, ...]) -> None:
    """ValueError where `AIMOptions.positions` has none of its forms; how deep the model is, is not known yet."""
    adapted_layers(positions, _ANY_DEPTH)


def adapted_layers(positions: str | tuple[int, ...], layers: int) -> frozenset[int]:
    """The blocks, of `layers`, that `AIMOptions.positions` names; ValueError for a form or a number that is none."""
    if isinstance(positions, str):
        if positions == "all":
            return frozenset(range(layers))
        match = re.fullmatch(r"(bottom|top|every) ([1-9][0-9]{0,5})", positions)
        if match and int(match[2]) <= layers:
            count = int(match[2])
            return frozenset(
                {
                    "bottom": range(count),
                    "top": range(layers - count, layers),
                    "every": range(count - 1, layers, count),
                }[match[1]]
            )
    elif positions and all(
        type(layer) is int and 0 <= layer < layers and positions.count(layer) == 1 for layer in positions
    ):
        return frozenset(positions)
    shown = f'"{positions}"' if isinstance(positions, str) else list(positions)
    raise ValueError(
        f'model.positions = {shown}; allowed is "all", "bottom K", "top K", "every K", or a list of different block '
        f"numbers from 0{'' if layers == _ANY_DEPTH else f'; the model has {layers} blocks'}"
    )


class Adapter(nn.Module):
    """Bottleneck D → hidden → D with GELU between, times a factor; the caller adds the skip connection where the paper
    has one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1 = Linear(width, hidden)
        self.D_fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.D_fc2(F.gelu(self.D_fc1(x)), output_factor=factor)
