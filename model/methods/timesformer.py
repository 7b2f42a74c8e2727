"""Divided space-time attention with temporal weights of its own, all of it trained: what AIM is compared with.

Two published forms, which differ in where the class token is:

`TimeSformer`: one class token a clip (Bertasius et al., "Is Space-Time Attention All You Need for Video
    Understanding?", ICML 2021; official file `timesformer/models/vit.py` of facebookresearch/TimeSformer). Patches
    alone attend over time; over space every frame sees a copy of the class token, and the outputs of the copies are
    averaged.
`TimeSformerCLIP`: a class token a frame, which attends over time as patches do (official file
    `mmaction/models/backbones/timesformer.py` of AIM's repository).

Both take any ViT. A block attends over time (`t_norm`, `t_attn`, then the linear layer `T_Adapter`), over space, and
has an MLP. `t_norm` and `t_attn` start as copies of the image model's `ln_1` and `attn`. Parameters bear CLIP's names.

DropPath drops one of a clip's three branches; the official code drops single rows of whatever layout a branch has. As
in it the temporal branch is dropped before `T_Adapter`, whose bias stays.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), P patches a frame, D width, L layers; 1 for
an axis of length one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.layers import LayerNorm, Linear
from model.method import Method
from model.methods.aim import AIM, stands_on
from model.official import (
    CLIP_MARK,
    PROJECTION,
    TIMM_MARK,
    TIMM_NAMES,
    Format,
    Reading,
    Shapes,
    read_clip_vit,
    read_timm_vit,
    reading,
    shape_of,
)
from model.speed import call_block
from model.timm_models import LEADING_ONES
from model.video import Head, VideoModel, drop_path_rates, load_tower_weights
from model.vit import MLP, Attention, ViT, initialise


@dataclass(frozen=True)
class TimeSformerOptions:
    """What can be set of TimeSformer; the defaults are as published."""

    drop_path: float = 0.1
    """Drop rate of the last block's three branches; block i of L has drop_path · i / (L - 1)."""
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}; allowed is 0 <= rate < 1")


@dataclass(frozen=True)
class TimeSformerCLIPOptions(TimeSformerOptions):
    """The same for the form of AIM's repository, which has the head of AIM."""

    head_dropout: float = 0.5


class Block(nn.Module):
    """The parts of a block, and its attention over time."""

    def __init__(self, geometry: ViTGeometry) -> None:
        super().__init__()
        width = geometry.width
        self.t_norm = LayerNorm(width, geometry.eps)
        self.t_attn = Attention(width, geometry.heads)
        self.T_Adapter = Linear(width, width)
        self.ln_1 = LayerNorm(width, geometry.eps)
        self.attn = Attention(width, geometry.heads)
        self.ln_2 = LayerNorm(width, geometry.eps)
        self.mlp = MLP(width, geometry.quick_gelu, geometry.mlp_width)

    def over_time(self, x_BTND: Tensor, masks: Tensor | None) -> Tensor:
        """The temporal branch, to be added: every token with the same one of the other frames."""
        return self.T_Adapter(_masked(self.t_attn.over_time(self.t_norm(x_BTND)), masks, 0))

    def add_mlp(self, x: Tensor, masks: Tensor | None) -> Tensor:
        """The block's last step, token by token."""
        return x + _masked(self.mlp(self.ln_2(x)), masks, 2)


class FrameBlock(Block):
    """With a class token in every frame, which is a token like the others."""

    def forward(self, x_BTND: Tensor, masks: Tensor | None) -> Tensor:
        """`masks`: scaled keep masks [B, 3] of the temporal, the spatial and the MLP's branch, or None."""
        x = x_BTND + self.over_time(x_BTND, masks)
        x = x + _masked(self.attn.over_space(self.ln_1(x)), masks, 1)
        return self.add_mlp(x, masks)


class ClipBlock(Block):
    """With one class token a clip, held apart from the patches so that neither has to be cut out of the other."""

    def forward(self, class_B11D: Tensor, patches_BTPD: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """`masks` as in FrameBlock; returns the class token and the patches."""
        patches = patches_BTPD + self.over_time(patches_BTPD, masks)
        copies_BT1D = class_B11D.expand(-1, patches.shape[1], -1, -1)
        y_BTND = _masked(self.attn.over_space(self.ln_1(torch.cat([copies_BT1D, patches], dim=2))), masks, 1)
        class_token = class_B11D + y_BTND[:, :, :1].mean(dim=1, keepdim=True)
        patches = patches + y_BTND[:, :, 1:]
        return self.add_mlp(class_token, masks), self.add_mlp(patches, masks)


class ClipViT(ViT):
    """A ViT of `ClipBlock`s: normalised clips [B, T, 3, H, W] → the clip's class token [B, D]."""

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks["drop_path"]`: scaled keep masks [B, L, 3], absent for no drop."""
        class_token, patches = self.tokens(clips)
        drop_path = masks.get("drop_path")
        for layer, block in enumerate(self.transformer.resblocks):
            block_masks = None if drop_path is None else drop_path[:, layer].to(patches.dtype)
            class_token, patches = call_block(block, class_token, patches, block_masks)
        return self.ln_post(class_token).flatten(1)

    def tokens(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, 3, H, W] → class token [B, 1, 1, D], without the temporal embedding, and patches [B, T, P, D]."""
        assert self.temporal_embedding is not None
        patches = self.conv1(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        where_PD, when_T1D = self.positional_embedding[1:], self.temporal_embedding[0].unsqueeze(1)
        patches = patches + (where_PD + when_T1D).to(patches.dtype)
        class_D = (self.class_embedding + self.positional_embedding[0]).to(patches.dtype)
        class_token = class_D.expand(clips.shape[0], 1, 1, -1)
        return (class_token, patches) if self.ln_pre is None else (self.ln_pre(class_token), self.ln_pre(patches))


def _masked(branch: Tensor, masks: Tensor | None, column: int) -> Tensor:
    """A branch [B, T, N, D] times its scaled keep masks (DropPath), one a clip; unchanged without masks."""
    return branch if masks is None else branch * masks[:, column, None, None, None]


class _DividedSpaceTime(VideoModel):
    """What both forms share; arguments as `model.methods.create` says."""

    vit: ClassVar[type[ViT]]
    block: ClassVar[type[Block]]

    def __init__(
        self, tower: ImageTower, num_classes: int | None, num_frames: int, options: TimeSformerOptions
    ) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.backbone = self.vit(geometry, lambda _: self.block(geometry), num_frames)
        initialise(self.backbone)
        load_tower_weights(self.backbone, _for_both(tower.state_dict), ("temporal_embedding", "T_Adapter"))
        self.finish()

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`drop_path` [L, 3] (temporal, spatial, MLP); `head_dropout` [D]."""
        assert isinstance(self.geometry, ViTGeometry)
        rates = drop_path_rates(self.options.drop_path, self.geometry.layers)
        return {"drop_path": rates[:, None].expand(-1, 3), **super().random_masks}


def _for_both(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An image model's weights, with those of its attention and the norm before it also for the attention over time."""
    copies = {
        name.replace(f".{ours}.", f".{temporal}."): weight
        for name, weight in weights.items()
        for ours, temporal in (("attn", "t_attn"), ("ln_1", "t_norm"))
        if f".{ours}." in name
    }
    return {**weights, **copies}


class TimeSformerCLIP(_DividedSpaceTime):
    """A class token a frame; `T_Adapter` starts at random, so that the model starts away from the image model."""

    undecayed_names = AIM.undecayed_names  # neither t_norm nor the temporal embedding
    vit = ViT
    block = FrameBlock


class TimeSformer(_DividedSpaceTime):
    """One class token a clip; `T_Adapter` starts at zero, so that a still clip's features are at first the image
    model's. Everything is decayed, as published."""

    vit = ClipViT
    block = ClipBlock

    def __init__(
        self, tower: ImageTower, num_classes: int | None, num_frames: int, options: TimeSformerOptions
    ) -> None:
        super().__init__(tower, num_classes, num_frames, options)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.T_Adapter.weight)
        if isinstance(self.cls_head, Head):
            nn.init.trunc_normal_(self.cls_head.fc_cls.weight, std=0.02)


def _read_facebook(entry: Format, shapes: Shapes) -> Reading:
    return _read_frames(entry, shapes, read_timm_vit(entry, shapes, "timesformer"))


def _read_clip(entry: Format, shapes: Shapes) -> Reading:
    return _read_frames(entry, shapes, read_clip_vit(entry, shapes))


def _read_frames(entry: Format, shapes: Shapes, geometry: ViTGeometry) -> Reading:
    _, frames, _ = shape_of(entry, shapes, "backbone.temporal_embedding", 3)
    assumed = {"heads": geometry.heads, "quick_gelu": geometry.quick_gelu}
    return reading(entry, shapes, geometry, frames, {}, assumed)


METHODS = (
    Method(
        "timesformer",
        "divided space-time attention, as published",
        TimeSformerOptions,
        {ViTGeometry: TimeSformer},
        (
            Format(
                name="timesformer",
                summary="TimeSformer, divided space-time attention",
                family="timesformer",
                method="timesformer",
                marks=(TIMM_MARK, r"^time_embed$|\.temporal_(attn|norm1|fc)\."),
                read=_read_facebook,
                holds=lambda description: (
                    description["method"] == "timesformer" and stands_on(description, ln_pre=False)
                ),
                names={
                    **TIMM_NAMES,
                    "time_embed": "temporal_embedding",
                    "norm": "ln_post",
                    "temporal_norm1": "t_norm",
                    "temporal_attn.qkv.weight": "t_attn.in_proj_weight",
                    "temporal_attn.qkv.bias": "t_attn.in_proj_bias",
                    "temporal_attn.proj": "t_attn.out_proj",
                    "temporal_fc": "T_Adapter",
                },
                blocks="blocks",
                outside={"head": "cls_head.fc_cls"},
                prefix="",
                leading_ones=LEADING_ONES,
            ),
        ),
        paper='Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021',
    ),
    Method(
        "timesformer_clip",
        "divided space-time attention, as the AIM paper compares",
        TimeSformerCLIPOptions,
        {ViTGeometry: TimeSformerCLIP},
        (
            Format(
                name="timesformer_clip",
                summary="TimeSformer on CLIP, of AIM's repository",
                family="timesformer_clip",
                method="timesformer_clip",
                marks=(CLIP_MARK, r"\.t_(attn|norm)\."),
                read=_read_clip,
                holds=lambda description: (
                    description["method"] == "timesformer_clip" and stands_on(description, ln_pre=True)
                ),
                dropped=(PROJECTION,),
            ),
        ),
        paper='Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021',
    ),
)
