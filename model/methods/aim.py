"""AIM: a frozen image transformer that understands video through adapters (Yang et al., "AIM: Adapting Image Models
for Efficient Video Action Recognition", ICLR 2023; official files `vit_clip.py` and `vit_imagenet.py` in
`mmaction/models/backbones`).

Every block attends twice with the same frozen weights: over time, then over space. Small bottleneck adapters stand
after each attention (temporal, spatial) and beside the MLP (joint); they, a temporal embedding, the last layer norm
and the head are all that trains. With zero-initialised adapters the network starts as the image model applied frame by
frame. AIM on Swin is in `model.methods.swin`.

Parameters bear the names of the official CLIP checkpoints, whatever image model stands behind them.
Official DropPath drops along the first axis of whatever layout its tensor has: on CLIP a token position for the whole
batch, on ImageNet's ViT a frame. Here a clip's branch is dropped, unless `drop_path_axis` asks for the official way.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), D width, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.adapters import ADAPTERS, Adapter, AIMOptions, adapted_layers
from model.geometry import Geometry, ImageTower, SwinGeometry, ViTGeometry
from model.layers import LayerNorm
from model.method import Method
from model.methods.swin import COMPUTED, SWIN_MARK, AIMSwin, is_flat, read_swin, unshifted
from model.official import (
    CLIP_MARK,
    IMAGE_HEAD,
    PROJECTION,
    TIMM_MARK,
    TIMM_NAMES,
    Format,
    Reading,
    Shapes,
    blocks_of,
    official_name,
    ratio_of,
    read_clip_vit,
    read_timm_vit,
    reading,
    shape_of,
)
from model.timm_models import LEADING_ONES
from model.video import BACKBONE, VideoModel, drop_path_rates, load_tower_weights
from model.vit import MLP, Attention, ViT, initialise

PUBLISHED_FRAMES = 8
"""Of the first published models for Kinetics-400, where no tensor depends on it."""


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


def published(description: Mapping[str, Any]) -> bool:
    """Whether the options that no published format knows are as published."""
    experiments = {"temporal_weights": "reuse", "temporal_embedding": "input"}
    return all(description["options"].get(name, value) == value for name, value in experiments.items())


def stands_on(description: Mapping[str, Any], *, ln_pre: bool) -> bool:
    """Whether the image model is CLIP's ViT (`ln_pre`), or else ImageNet's."""
    geometry = description["geometry"]
    of_vit = description["backbone"] != SwinGeometry.kind
    return of_vit and geometry["ln_pre"] == ln_pre and geometry["patch_bias"] != ln_pre


def _holds(description: Mapping[str, Any]) -> bool:
    """Whether it is of AIM, or one of the baselines, which its files hold as AIM without adapters."""
    return description["method"] in ("aim", "frozen", "finetuned") and published(description)


def _read_clip(entry: Format, shapes: Shapes) -> Reading:
    return _read_on_vit(entry, shapes, read_clip_vit(entry, shapes))


def _read_timm(entry: Format, shapes: Shapes) -> Reading:
    return _read_on_vit(entry, shapes, read_timm_vit(entry, shapes))


def _read_on_vit(entry: Format, shapes: Shapes, geometry: ViTGeometry) -> Reading:
    assumed: dict[str, Any] = {"heads": geometry.heads, "quick_gelu": geometry.quick_gelu}
    options = _read_adapters(entry, shapes, geometry)
    if "joint" in options["adapters"]:
        assumed["adapter_scale"] = options["adapter_scale"]
    name = "backbone.temporal_embedding"
    if name in shapes:
        return reading(entry, shapes, geometry, shape_of(entry, shapes, name, 3)[1], options, assumed)
    return reading(entry, shapes, geometry, PUBLISHED_FRAMES, options, assumed | {"num_frames": PUBLISHED_FRAMES})


def _read_on_swin(entry: Format, shapes: Shapes) -> Reading:
    geometry, frames, assumed = read_swin(entry, shapes)
    return reading(entry, shapes, geometry, frames, _read_adapters(entry, shapes, geometry), assumed)


def _read_adapters(entry: Format, shapes: Shapes, geometry: Geometry) -> dict[str, Any]:
    """Which adapters stand in which blocks, how wide they are, and the scale that was published with them."""
    of_swin = isinstance(geometry, SwinGeometry)
    names = ("S_Adapter2", "T_Adapter", "S_Adapter") if of_swin else ("S_Adapter", "T_Adapter", "MLP_Adapter")
    parts = dict(zip(names, ADAPTERS, strict=True))
    standing: dict[str, set[int]] = {name: set() for name in (*names, "T_Adapter_in")}
    ratios = set()
    for number, name in blocks_of(shapes, geometry):
        adapter, _, rest = re.sub(r".*?blocks\.\d+\.", "", name, count=1).partition(".")
        if adapter in standing:
            standing[adapter].add(number)
            if rest == "D_fc1.weight":
                ratios.add(ratio_of(*shape_of(entry, shapes, name, 2)))
    present = [name for name in parts if standing[name]]
    adapted = set().union(*(standing[name] for name in present)) if present else set()
    for name in present:
        wanted = adapted
        if isinstance(geometry, SwinGeometry) and name == "T_Adapter":
            wanted = adapted & unshifted(geometry)
        if lacking := sorted(wanted - standing[name]):
            raise ValueError(f"block {lacking[0]} has no {name} and other blocks have one; adapted blocks are alike")
    if len(ratios) > 1:
        raise ValueError(
            f"the adapters have different ratios of bottleneck to width ({sorted(ratios)}); one is allowed"
        )
    embedding = f"{BACKBONE}.temporal_embedding"
    if embedding in shapes and "T_Adapter" not in present:
        raise ValueError(
            f"{official_name(entry, embedding)} is there and no T_Adapter: a model without temporal adapters has no "
            "temporal embedding; remove it, or give the file that has them"
        )
    two = bool(standing["T_Adapter_in"])
    return {
        "adapters": tuple(parts[name] for name in present),
        "positions": "all" if not adapted or len(adapted) == geometry.layers else tuple(sorted(adapted)),
        "temporal_adapters": 2 if two else 1,
        "adapter_scale": 1.0 if two else 0.5,
        **({"adapter_ratio": ratios.pop()} if ratios else {}),
    }


METHODS = (
    Method(
        "aim",
        "frozen image model with adapters",
        AIMOptions,
        {ViTGeometry: AIM, SwinGeometry: AIMSwin},
        (
            Format(
                name="aim_clip",
                summary="AIM on CLIP's ViT",
                family="aim",
                method="aim",
                marks=(CLIP_MARK,),
                read=_read_clip,
                holds=lambda description: _holds(description) and stands_on(description, ln_pre=True),
                dropped=(PROJECTION,),
            ),
            Format(
                name="aim_in21k",
                summary="AIM on ImageNet-21k's ViT",
                family="aim",
                method="aim",
                marks=(TIMM_MARK,),
                read=_read_timm,
                holds=lambda description: _holds(description) and stands_on(description, ln_pre=False),
                names=TIMM_NAMES,
                blocks="blocks",
                dropped=(IMAGE_HEAD,),
                leading_ones=LEADING_ONES,
            ),
            Format(
                name="aim_swin",
                summary="AIM on Swin",
                family="aim",
                method="aim",
                marks=(SWIN_MARK, is_flat),
                read=_read_on_swin,
                holds=lambda description: _holds(description) and description["backbone"] == SwinGeometry.kind,
                dropped=(COMPUTED, IMAGE_HEAD),
            ),
        ),
        shown_options=("adapters", "positions", "temporal_adapters", "temporal_weights", "adapter_ratio"),
        reads_texts=lambda options: options.temporal_weights == "text",
        paper='Yang et al., "AIM: Adapting Image Models for Efficient Video Action Recognition", ICLR 2023',
    ),
    Method("frozen", "frozen image model, frame by frame, new head", SpaceOnlyOptions, {ViTGeometry: Frozen}),
    Method("finetuned", "the same with all of it trained", SpaceOnlyOptions, {ViTGeometry: Finetuned}),
)
