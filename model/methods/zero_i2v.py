"""ZeroI2V: a frozen image transformer that sees time at no cost once it is trained (Li et al., "ZeroI2V: Zero-Cost
Adaptation of Pre-trained Transformers from Image to Video", ECCV 2024; official files `vit_zero_clip.py` and `stdha.py`
of leexinhao/ZeroI2V, `vit_zero_clip_long.py` of MCG-NJU/ZeroI2V).

    y = T_Adapter_in(ln_1(x));  k, v: groups of channels from other frames;  x = x + S_Adapter(attention(q, k, v))
    x = x + MLP_Adapter_out(mlp(MLP_Adapter(ln_2(x))))

Attention is over space alone, but some heads look at keys and values of the frame before, some at those of the frame
after: the first D / 12 channels (one head of ViT-B/16) and the next D / 12. At a clip's ends a frame keeps its own.
Adapters are linear, x + s · fc2(fc1(x)), and start as the identity, so each is one matrix and folds into the frozen one
beside it:

    A = I + s · W2 W1, a = s · (W2 b1 + b2);  after an adapter: W ← W A, b ← b + W a;  before one: W ← A W, b ← A b + a

`ZeroI2V.merged` does that (tools/export.py writes it): the same logits, and a model of the image model's own size and
cost, the option `folded`. The temporal embedding, the last norm and the head train as in AIM; none of those is decayed.

On purpose not as published: adapters drop a hidden feature of a clip, for all its tokens at once, where the official
code drops every token's by itself. A mask is drawn on the CPU, and 8 × 197 tokens would ask for 14 million numbers a
clip. The published models for Something-Something V2 drop nothing there.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), D width, L layers, A adapters a block, C
bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.layers import Linear
from model.method import Method
from model.methods.aim import AIM, stands_on
from model.official import (
    BLOCKS,
    CLIP_MARK,
    PROJECTION,
    Format,
    Reading,
    Shapes,
    has,
    ratio_of,
    read_clip_vit,
    reading,
    shape_of,
)
from model.video import BACKBONE, VideoModel, check_rates, load_tower_weights
from model.vit import Attention, Block, ViT, initialise

FOLDS = {
    "T_Adapter_in": ("attn.in_proj_weight", "attn.in_proj_bias", True),
    "S_Adapter": ("attn.out_proj.weight", "attn.out_proj.bias", False),
    "MLP_Adapter": ("mlp.c_fc.weight", "mlp.c_fc.bias", True),
    "MLP_Adapter_out": ("mlp.c_proj.weight", "mlp.c_proj.bias", False),
}
"""Adapters in the order in which a token meets them → the weight and the bias that each folds into, and whether it
stands before them."""
LARGE_WIDTH = 1024
"""Of ViT-L, whose published models shift two heads of 16, D / 8 channels, each way."""


@dataclass(frozen=True)
class ZeroI2VOptions:
    """What can be set of ZeroI2V; the defaults are as published for Kinetics-400 on ViT-B."""

    shift_back: tuple[int, ...] = (12,)
    """Of the keys and values, D / 12 channels come from the frame before; a second number n: further D / n channels
    from two frames before, and so on. (12, 12) on Something-Something V2 with ViT-B, (8, 16, 16) with ViT-L."""
    shift_ahead: tuple[int, ...] = (12,)
    """The same of frames after. Channels stand in the order one back, one ahead, two back, two ahead, …"""
    mlp_adapters: int = 2
    """2: an adapter before the MLP and one after it; 1: only the one before."""
    adapter_ratio: float = 0.25
    adapter_scale: float = 0.5
    """s; the published models for Something-Something V2 have 1."""
    adapter_dropout: float = 0.1
    """Of the features within adapters; 0 on Something-Something V2."""
    head_dropout: float = 0.5
    folded: bool = False
    """Without adapters: what folding makes of a trained model."""

    def __post_init__(self) -> None:
        for name in ("shift_back", "shift_ahead"):
            if not all(1 <= part <= 16384 for part in getattr(self, name)):
                raise ValueError(f"model.{name} = {list(getattr(self, name))}; allowed are numbers from 1 to 16384")
        if self.mlp_adapters not in (1, 2):
            raise ValueError(f"model.mlp_adapters = {self.mlp_adapters}; allowed are 1 and 2")
        if not 0 < self.adapter_ratio <= 4:
            raise ValueError(f"model.adapter_ratio = {self.adapter_ratio}; allowed is 0 < ratio <= 4")
        if not 0 <= self.adapter_scale < float("inf"):
            raise ValueError(f"model.adapter_scale = {self.adapter_scale}; allowed is 0 or more")
        check_rates(self, "adapter_dropout", "head_dropout")


class ZeroI2V(VideoModel):
    """ZeroI2V on a ViT with a class token; arguments as `model.methods.create` says."""

    trained_names = AIM.trained_names
    undecayed_names = (*AIM.undecayed_names, "temporal_embedding")

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: ZeroI2VOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.backbone = DroppingViT(geometry, lambda _: ShiftingBlock(geometry, options), num_frames)
        initialise(self.backbone)
        load_tower_weights(self.backbone, tower.state_dict, ("temporal_embedding", "Adapter"))
        for module in self.backbone.modules():
            if isinstance(module, LinearAdapter):
                nn.init.zeros_(module.D_fc2.weight)
                nn.init.zeros_(module.D_fc2.bias)
        self.finish()

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`adapter_dropout` [L, A, C], where there is any; `head_dropout` [D]."""
        if self.options.folded or not self.options.adapter_dropout:
            return super().random_masks
        assert isinstance(self.geometry, ViTGeometry)
        hidden = int(self.geometry.width * self.options.adapter_ratio)
        shape = (self.geometry.layers, 2 + self.options.mlp_adapters, hidden)
        rates = torch.full(shape, self.options.adapter_dropout, dtype=torch.float64)
        return {"adapter_dropout": rates, **super().random_masks}

    def merged(self) -> VideoModel:
        if self.options.folded:
            return self
        weights = {name: tensor for name, tensor in self.state_dict().items() if "Adapter" not in name}
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, ShiftingBlock)
            weights |= {f"{BACKBONE}.{BLOCKS}.{layer}.{name}": tensor for name, tensor in block.folded().items()}
        options = replace(self.options, folded=True)
        with torch.random.fork_rng(devices=[]):  # the initialisation, soon overwritten, draws from it
            merged = ZeroI2V(ImageTower(self.geometry, {}), self.num_classes, self.num_frames, options)
        merged.load_state_dict(weights)
        return merged.train(self.training)


class DroppingViT(ViT):
    """A ViT whose blocks take the masks of their adapters."""

    block_masks = "adapter_dropout"


class ShiftingAttention(Attention):
    """Attention over space in which groups of the keys' and values' channels come from other frames."""

    shifts: tuple[tuple[int, int], ...] = ()
    """Channels of each group, and how many frames before its own it comes from; below 0: after."""

    def _project(self, x_BTND: Tensor, view: tuple[int, int, int, int]) -> list[Tensor]:
        B, T, N, D = x_BTND.shape
        q, k, v = super()._project(x_BTND, (B, T, N, D))
        return [part.view(view) for part in (q, self._shifted(k), self._shifted(v))]

    def _shifted(self, x_BTND: Tensor) -> Tensor:
        channels = [channels for channels, _ in self.shifts]
        *groups, rest = x_BTND.split([*channels, x_BTND.shape[-1] - sum(channels)], dim=-1)
        moved = [_from_frames_before(group, back) for group, (_, back) in zip(groups, self.shifts, strict=True)]
        return torch.cat([*moved, rest], dim=-1)


class ShiftingBlock(Block):
    """A block of the image model with shifted heads, and adapters unless it is folded."""

    def __init__(self, geometry: ViTGeometry, options: ZeroI2VOptions) -> None:
        super().__init__(geometry, ShiftingAttention)
        assert isinstance(self.attn, ShiftingAttention)
        self.attn.shifts = channel_shifts(options, geometry.width)
        present = () if options.folded else tuple(FOLDS)[: 2 + options.mlp_adapters]
        adapters = {name: LinearAdapter(geometry.width, options) for name in present}
        self.T_Adapter_in = adapters.get("T_Adapter_in")
        self.S_Adapter = adapters.get("S_Adapter")
        self.MLP_Adapter = adapters.get("MLP_Adapter")
        self.MLP_Adapter_out = adapters.get("MLP_Adapter_out")

    def forward(self, x_BTND: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks`: scaled keep masks [B, A, C] of the adapters' hidden features, or None."""
        y = _through(self.T_Adapter_in, self.ln_1(x_BTND), masks, 0)
        x = x_BTND + _through(self.S_Adapter, self.attn.over_space(y), masks, 1)
        y = _through(self.MLP_Adapter, self.ln_2(x), masks, 2)
        return x + _through(self.MLP_Adapter_out, self.mlp(y), masks, 3)

    def folded(self) -> dict[str, Tensor]:
        """Name → weight or bias into which an adapter is folded: computed in float64, in float32."""
        own, folded = dict(self.named_parameters()), {}
        for name, (weight_name, bias_name, is_before) in FOLDS.items():
            adapter = getattr(self, name)
            if adapter is not None:
                weight, bias = (own[part].detach().double() for part in (weight_name, bias_name))
                matrix, added = adapter.as_matrix()
                folded[weight_name] = (weight @ matrix if is_before else matrix @ weight).float()
                folded[bias_name] = (bias + weight @ added if is_before else matrix @ bias + added).float()
        return folded


class LinearAdapter(nn.Module):
    """x + s · fc2(fc1(x)), a bottleneck without activation."""

    def __init__(self, width: int, options: ZeroI2VOptions) -> None:
        super().__init__()
        hidden = int(width * options.adapter_ratio)
        self.scale = options.adapter_scale
        self.D_fc1 = Linear(width, hidden)
        self.D_fc2 = Linear(hidden, width)

    def forward(self, x_BTND: Tensor, mask_BC: Tensor | None) -> Tensor:
        h_BTNC = self.D_fc1(x_BTND)
        if mask_BC is not None:
            h_BTNC = h_BTNC * mask_BC[:, None, None]
        return x_BTND + self.D_fc2(h_BTNC, output_factor=self.scale)

    def as_matrix(self) -> tuple[Tensor, Tensor]:
        """A [D, D] and a [D], float64, of the same function x → A x + a."""
        down, b1, up, b2 = (part.detach().double() for part in self.parameters())
        identity = torch.eye(len(b2), dtype=torch.float64, device=b2.device)
        return identity + self.scale * (up @ down), self.scale * (up @ b1 + b2)


def channel_shifts(options: ZeroI2VOptions, width: int) -> tuple[tuple[int, int], ...]:
    """`ShiftingAttention.shifts` of keys and values of that width; ValueError if there are too few channels."""
    groups = []
    for number, parts in enumerate(zip_longest(options.shift_back, options.shift_ahead), start=1):
        groups += [(width // part, back) for part, back in zip(parts, (number, -number), strict=True) if part]
    counts = [channels for channels, _ in groups]
    if sum(counts) > width or not all(counts):
        raise ValueError(
            f"model.shift_back = {list(options.shift_back)} and shift_ahead = {list(options.shift_ahead)} are groups "
            f"of {counts} channels; allowed is at least 1 in each and {width}, the model's width, in all"
        )
    return tuple(groups)


def _from_frames_before(x_BTNC: Tensor, back: int) -> Tensor:
    """Every frame's tokens from `back` frames before, below 0 after; where there is no such frame, its own."""
    frames = abs(back)
    if frames >= x_BTNC.shape[1]:
        return x_BTNC
    if back > 0:
        return torch.cat([x_BTNC[:, :frames], x_BTNC[:, :-frames]], dim=1)
    return torch.cat([x_BTNC[:, frames:], x_BTNC[:, -frames:]], dim=1)


def _through(adapter: LinearAdapter | None, x_BTND: Tensor, masks: Tensor | None, column: int) -> Tensor:
    """Through an adapter with its column of the masks [B, A, C]; unchanged without one."""
    return x_BTND if adapter is None else adapter(x_BTND, None if masks is None else masks[:, column])


def _has_no_temporal_attention(shapes: Shapes) -> bool:
    return not has(r"\.T_Adapter\.", shapes)


def _read(entry: Format, shapes: Shapes) -> Reading:
    """How many adapters and how wide; which channels are shifted, and s, no tensor shows."""
    geometry = read_clip_vit(entry, shapes)
    hidden, width = shape_of(entry, shapes, f"backbone.{BLOCKS}.0.T_Adapter_in.D_fc1.weight", 2)
    _, frames, _ = shape_of(entry, shapes, "backbone.temporal_embedding", 3)
    shifts = (8,) if geometry.width == LARGE_WIDTH else (12,)
    assumed = {
        "heads": geometry.heads,
        "quick_gelu": geometry.quick_gelu,
        "adapter_scale": 0.5,
        "shift_back": shifts,
        "shift_ahead": shifts,
    }
    options = {
        "mlp_adapters": 2 if has(r"\.MLP_Adapter_out\.", shapes) else 1,
        "adapter_ratio": ratio_of(hidden, width),
        "shift_back": shifts,
        "shift_ahead": shifts,
    }
    return reading(entry, shapes, geometry, frames, options, assumed)


def _holds(description: Mapping[str, Any]) -> bool:
    is_ours = description["method"] == "zero_i2v" and stands_on(description, ln_pre=True)
    return is_ours and not description["options"].get("folded", False)


METHODS = (
    Method(
        "zero_i2v",
        "linear adapters, shifted heads; no cost when folded",
        ZeroI2VOptions,
        {ViTGeometry: ZeroI2V},
        (
            Format(
                name="zero_i2v",
                summary="ZeroI2V on CLIP's ViT",
                family="zero_i2v",
                method="zero_i2v",
                marks=(CLIP_MARK, r"\.T_Adapter_in\.", _has_no_temporal_attention),
                read=_read,
                holds=_holds,
                dropped=(PROJECTION,),
            ),
        ),
        shown_options=("mlp_adapters", "adapter_ratio", "folded"),
        paper=('Li et al., "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video", ECCV 2024'),
    ),
)
