"""AIM: a frozen image transformer that understands video through adapters (Yang et al., "AIM: Adapting Image Models
for Efficient Video Action Recognition", ICLR 2023; official files `vit_clip.py` and `vit_imagenet.py` in
`mmaction/models/backbones`).

Every block attends twice with the same frozen weights: over time, then over space. Small bottleneck adapters stand
after each attention (temporal, spatial) and beside the MLP (joint); they, a temporal embedding, the last layer norm
and the head are all that trains. With zero-initialised adapters the network starts as the image model applied frame by
frame. AIM on Swin is in `model.swin`.

Parameters bear the names of the official CLIP checkpoints, whatever image model stands behind them.
Official DropPath drops along the first axis of whatever layout its tensor has: on CLIP a token position for the whole
batch, on ImageNet's ViT a frame. Here a clip's branch is dropped, unless `drop_path_axis` asks for the official way.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), D width, L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.layers import LayerNorm, Linear
from model.video import VideoModel, drop_path_rates, load_tower_weights
from model.vit import MLP, Attention, ViT, initialise

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
        adapted_layers(self.positions, _ANY_DEPTH)  # its form alone: the depth is not known yet


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


class AIM(VideoModel):
    """AIM on a ViT with a class token; arguments as `model.methods.create` says."""

    trained_names = ("temporal_embedding", "ln_post", "cls_head", "Adapter")  # official tools/train.py
    undecayed_names = ("class_embedding", "positional_embedding", "ln_1", "ln_2", "ln_pre", "ln_post")

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: AIMOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.adapted = adapted_layers(options.positions, geometry.layers) if options.adapters else frozenset()
        self.backbone = ViT(
            geometry,
            lambda layer: Block(geometry, options, layer in self.adapted),
            num_frames if "temporal" in options.adapters else None,
            time_enters=min(self.adapted, default=None) if options.temporal_embedding == "adapters" else None,
        )
        initialise(self.backbone)
        load_tower_weights(self.backbone, tower.state_dict, ("temporal_embedding", "Adapter", "text_"))
        if options.temporal_weights == "text" and tower.state_dict:
            self._load_text_tower(tower)
        for module in self.backbone.modules():
            if isinstance(module, Adapter):
                nn.init.zeros_(module.D_fc2.weight)
                nn.init.zeros_(module.D_fc2.bias)
        self.finish()

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`drop_path` [L, 2] (temporal, joint), with the official axis [L, 2, N] or [L, 2, T]; `head_dropout` [D]."""
        assert isinstance(self.geometry, ViTGeometry)
        layers = self.geometry.layers
        rates = drop_path_rates(self.options.drop_path, layers)[:, None].expand(layers, 2)
        if self.options.drop_path_axis == "official":
            size = self.geometry.num_tokens if self.geometry.ln_pre else self.num_frames
            rates = rates[..., None].expand(layers, 2, size)
        return {"drop_path": rates, **super().random_masks}

    def _load_text_tower(self, tower: ImageTower) -> None:
        """Fills every block's `text_ln` and `text_attn` from the text tower's block of the same number."""
        wanted = {
            f"{ours}.{part}": f"transformer.resblocks.{layer}.{theirs}.{part}"
            for layer in self.adapted
            for ours, theirs, parts in (
                (f"transformer.resblocks.{layer}.text_ln", "ln_1", ("weight", "bias")),
                (
                    f"transformer.resblocks.{layer}.text_attn",
                    "attn",
                    ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
                ),
            )
            for part in parts
        }
        text, own = tower.text_state or {}, self.backbone.state_dict()
        for ours, theirs in wanted.items():
            if theirs not in text or text[theirs].shape != own[ours].shape:
                there = f"{list(text[theirs].shape)}" if theirs in text else "nothing"
                raise ValueError(
                    f'model.temporal_weights = "text": the image tower needs {theirs} of shape {list(own[ours].shape)} '
                    f"and the text tower has {there}; choose a model whose towers are equally wide and deep, or "
                    '"reuse"'
                )
        self.backbone.load_state_dict({ours: text[theirs] for ours, theirs in wanted.items()}, strict=False)


class Block(nn.Module):
    """One transformer block of section 3 of the paper; which adapters it has decides what it does."""

    def __init__(self, geometry: ViTGeometry, options: AIMOptions, adapted: bool = True) -> None:
        super().__init__()
        width = geometry.width
        hidden = int(width * options.adapter_ratio)
        self.scale = options.adapter_scale
        # The axis of [B, T, N, D] along which masks [B, 2, S] vary within a clip; on the token axis they are drawn for
        # a clip as all masks are, and those of the first serve the whole micro-batch.
        self.mask_axis = None if options.drop_path_axis == "clip" else 2 if geometry.ln_pre else 1
        self.ln_1 = LayerNorm(width, geometry.eps)
        self.attn = Attention(width, geometry.heads)
        self.ln_2 = LayerNorm(width, geometry.eps)
        self.mlp = MLP(width, geometry.quick_gelu, geometry.mlp_width)
        present = options.adapters if adapted else ()
        has = present.__contains__
        self.S_Adapter = Adapter(width, hidden) if has("spatial") else None
        self.T_Adapter = Adapter(width, hidden) if has("temporal") else None
        self.T_Adapter_in = Adapter(width, hidden) if has("temporal") and options.temporal_adapters == 2 else None
        self.MLP_Adapter = Adapter(width, hidden) if has("joint") else None
        by_text = has("temporal") and options.temporal_weights == "text"
        self.text_ln = LayerNorm(width, geometry.eps) if by_text else None
        self.text_attn = Attention(width, geometry.heads) if by_text else None

    def forward(self, x_BTND: Tensor, masks: Tensor | None) -> Tensor:
        """`masks`: scaled keep masks [B, 2, …] of the temporal and the joint branch, or None."""
        x = x_BTND
        if self.T_Adapter is not None:
            y = (self.text_ln or self.ln_1)(x)
            if self.T_Adapter_in is not None:
                y = y + self.T_Adapter_in(y)
            x = self._add(x, self.T_Adapter((self.text_attn or self.attn).over_time(y)), masks, 0)
        y = self.attn.over_space(self.ln_1(x))
        x = x + (y if self.S_Adapter is None else y + self.S_Adapter(y))
        y = self.ln_2(x)
        if self.MLP_Adapter is None:
            return x + self.mlp(y)
        return self._add(x + self.mlp(y), self.MLP_Adapter(y, self.scale), masks, 1)

    def _add(self, x_BTND: Tensor, branch_BTND: Tensor, masks: Tensor | None, column: int) -> Tensor:
        """Adds a branch times its scaled keep masks (DropPath), or as it is without masks."""
        if masks is None:
            return x_BTND + branch_BTND
        mask = masks[:, column]
        if self.mask_axis is None:
            mask = mask[:, None, None, None]
        else:
            mask = mask[:, :, None, None] if self.mask_axis == 1 else mask[:1, None, :, None]
        return torch.addcmul(x_BTND, branch_BTND, mask)


class Adapter(nn.Module):
    """Bottleneck D → hidden → D with GELU between, times a factor; the caller adds the skip connection where the paper
    has one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1 = Linear(width, hidden)
        self.D_fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.D_fc2(F.gelu(self.D_fc1(x)), output_factor=factor)


@dataclass(frozen=True)
class SpaceOnlyOptions:
    """The baselines that see no time: nothing but the head's dropout can be set."""

    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"model.head_dropout = {self.head_dropout}; allowed is 0 <= rate < 1")


class Finetuned(VideoModel):
    """Finetuned space-only (section 4.1 of the paper): each frame through the image model, all of which trains; the
    class tokens' mean goes to the head."""

    undecayed_names = AIM.undecayed_names

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: SpaceOnlyOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        plain = AIMOptions(adapters=())
        self.backbone = ViT(geometry, lambda _: Block(geometry, plain), None)
        initialise(self.backbone)
        load_tower_weights(self.backbone, tower.state_dict, ())
        self.finish()


class Frozen(Finetuned):
    """Frozen space-only, the linear probe: only the last layer norm and the head train, as in AIM without adapters."""

    trained_names = ("ln_post", "cls_head")
