"""Two video models on a Swin transformer: AIM, which adapts a frozen one, and Video Swin, the baseline that trains all.

`AIMSwin`: Yang et al., "AIM: Adapting Image Models for Efficient Video Action Recognition", ICLR 2023, official file
`mmaction/models/backbones/swin2d_adapter.py`. A stem joins two frames to one time step; after that every block of the
image model runs on each time step, and every second one, whose windows are not shifted, attends over time first, with
the same weights and a bias table of its own. The published names mislead: `S_Adapter` is the joint adapter and
`S_Adapter2` the spatial one. Official DropPath drops the temporal branch of a location; here a clip's.

`VideoSwin`: Liu et al., "Video Swin Transformer", CVPR 2022, official file
`mmaction/models/backbones/swin_transformer.py`. Windows and bias tables extend over time.

Parameters bear the names of the official checkpoints. `ImageTower.state_dict` holds the official names of the image
model (`layers.0.downsample` after stage 0; a patch convolution over one frame), without its constant buffers.

Legend of shapes: B clips, T time steps (half the frames), H, W tokens in space, C width, L blocks; of attention
M independent entries, N tokens that attend to each other, P windows side by side, h heads, K head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import isqrt, prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import Adapter, AIMOptions, adapted_layers
from model.attention import attention
from model.backbone import NORMALISATIONS
from model.geometry import ImageTower, SwinGeometry
from model.layers import LayerNorm, Linear
from model.method import Method
from model.official import IMAGE_HEAD, Format, Reading, Shapes, has, reading, shape_of
from model.speed import call_block
from model.video import VideoModel, drop_path_rates, load_tower_weights
from model.vit import initialise

Size = tuple[int, ...]
"""Time, height, width, in tokens."""

TUBELET = 2
"""Frames that the stem joins to one time step."""
SWIN_MARK = r"^layers\.\d+\.blocks\.\d+\."
COMPUTED = (
    r".*\.(relative_position_index|attn_mask|t_relative_coords)",
    "computed from the geometry when the model is built",
)
_PUBLISHED_WINDOW = 7  # of every published Video Swin; its tables show no more than the product of the window's sides
_PUBLISHED_FRAMES = 32
_MOST_BLOCKS = 512
MASKED = -100.0
"""Logit of a pair of tokens in one shifted window that are no neighbours in the picture."""


@dataclass(frozen=True)
class VideoSwinOptions:
    """What of Video Swin can be set; the defaults are the published Kinetics-400 settings."""

    drop_path: float = 0.2
    """Drop rate of the last block's two branches; block i of L has drop_path · i / (L - 1)."""
    head_dropout: float = 0.5
    temporal_window: int = 8
    """Time steps of a window: 8 on Kinetics, 16 on Something-Something V2."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}; allowed is 0 <= rate < 1")
        if self.temporal_window < 1:
            raise ValueError(f"model.temporal_window = {self.temporal_window}; allowed is 1 or more")


class AIMSwin(VideoModel):
    """AIM on Swin; arguments as `model.methods.create` says, `num_frames` those of the input, an even number.

    Without a head it returns [B, D, T, H, W] of the last stage. Raises ValueError for options that AIM on Swin has not.
    """

    biased_attention = True
    time_axes: ClassVar[Mapping[str, int]] = {"temporal_embedding": 1, "temporal_position_bias_table": 0}
    trained_names = ("temporal_embedding", "ln_post", "cls_head", "Adapter")  # official tools/train.py
    undecayed_names = ("absolute_pos_embed", "relative_position_bias_table", "norm")

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: AIMOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, SwinGeometry)
        _refuse_options(options)
        super().__init__(geometry, geometry.features, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.adapted = adapted_layers(options.positions, geometry.layers) if options.adapters else frozenset()
        self.backbone = Swin(
            geometry, time_steps(num_frames), lambda place: AdaptedBlock(place, options, place.layer in self.adapted)
        )
        initialise(self.backbone)
        load_tower_weights(self.backbone, inflate(tower.state_dict), ("Adapter", "temporal_position_bias_table"))
        for module in self.backbone.modules():
            if isinstance(module, Adapter):
                nn.init.zeros_(module.D_fc2.weight)
                nn.init.zeros_(module.D_fc2.bias)
        self.finish()

    def trains(self, name: str) -> bool:
        """By the official rule; unless `shipped_freezing`, also what that rule misses by its names: the temporal bias
        tables, which would stay random, and the last norm."""
        missed = "temporal_position_bias_table" in name or name.startswith("backbone.norm.")
        return super().trains(name) or (missed and not self.options.shipped_freezing)

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`drop_path` [L, 2] (temporal, joint) and `head_dropout` [D]."""
        return {"drop_path": _two_branches(self.geometry, self.options.drop_path), **super().random_masks}


class VideoSwin(VideoModel):
    """Video Swin; arguments as for `AIMSwin`."""

    biased_attention = True
    undecayed_names = AIMSwin.undecayed_names

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: VideoSwinOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, SwinGeometry)
        super().__init__(geometry, geometry.features, num_classes, num_frames, options.head_dropout)
        self.options = options
        steps, window = time_steps(num_frames), options.temporal_window
        if steps > window and steps % window:
            raise ValueError(
                f"num_frames = {num_frames} gives {steps} time steps, and model.temporal_window = {window} does not "
                "divide them; choose numbers that fit"
            )
        self.backbone = Swin(geometry, steps, lambda place: VideoBlock(place, window))
        initialise(self.backbone)
        load_tower_weights(self.backbone, inflate(tower.state_dict, window), ())
        self.finish()

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`drop_path` [L, 2] (attention, MLP) and `head_dropout` [D]."""
        return {"drop_path": _two_branches(self.geometry, self.options.drop_path), **super().random_masks}


def time_steps(num_frames: int) -> int:
    """Time steps after the stem; ValueError for frames that cannot be paired."""
    if num_frames < TUBELET or num_frames % TUBELET:
        raise ValueError(f"num_frames = {num_frames}: Swin's stem takes frames in pairs; choose an even number")
    return num_frames // TUBELET


def inflate(image_state: Mapping[str, Tensor], temporal_window: int = 1) -> dict[str, Tensor]:
    """An image Swin's weights made a video model's: the patch convolution (C, 3, p, p) → (C, 3, 2, p, p), so that two
    equal frames give what one gave; bias tables are repeated for every distance in time, 2 · `temporal_window` - 1."""

    def inflated(name: str, tensor: Tensor) -> Tensor:
        if name == "patch_embed.proj.weight":
            return tensor.unsqueeze(2).repeat(1, 1, TUBELET, 1, 1) / TUBELET
        if name.endswith("relative_position_bias_table"):
            return tensor.repeat(2 * temporal_window - 1, 1)
        return tensor

    return {name: inflated(name, tensor) for name, tensor in image_state.items()}


@dataclass(frozen=True)
class Place:
    """Where a block stands, and so what shape it has."""

    layer: int
    """Among all blocks."""
    shifted: bool
    """Every second block of a stage."""
    width: int
    heads: int
    window: int
    size: Size
    """Of the tokens it sees."""


class Swin(nn.Module):
    """Normalised clips [B, frames, 3, pixels, pixels] → [B, D, T, H, W], through stages of blocks."""

    def __init__(self, geometry: SwinGeometry, steps: int, make_block: Callable[[Place], nn.Module]) -> None:
        """`make_block`: its place → a block that takes x_BTHWC and its masks, and returns x_BTHWC."""
        super().__init__()
        self.depths = geometry.depths
        self.patch_embed = Stem(geometry.width, geometry.patch_size)
        self.layers = nn.ModuleList()
        layer = 0
        for stage, depth in enumerate(geometry.depths):
            side, width = _side(geometry, stage), geometry.width * 2**stage
            size, heads = (steps, side, side), geometry.heads[stage]
            places = [Place(layer + i, i % 2 == 1, width, heads, geometry.window, size) for i in range(depth)]
            self.layers.append(Stage(map(make_block, places), width, stage + 1 == len(geometry.depths)))
            layer += depth
        self.norm = LayerNorm(geometry.features)

    @property
    def blocks(self) -> list[nn.Module]:
        """From the input on."""
        return [block for stage in self.layers if isinstance(stage, Stage) for block in stage.blocks]

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks["drop_path"]`: scaled keep masks [B, L, 2], absent for no drop."""
        x_BTHWC = self.patch_embed(clips)
        drop_path = masks.get("drop_path")
        of_stages = None if drop_path is None else drop_path.to(x_BTHWC.dtype).split(self.depths, dim=1)
        for number, stage in enumerate(self.layers):
            x_BTHWC = stage(x_BTHWC, None if of_stages is None else of_stages[number])
        return self.norm(x_BTHWC).permute(0, 4, 1, 2, 3)


class Stage(nn.Module):
    """Blocks of one width, and the step to the next."""

    def __init__(self, blocks: Iterable[nn.Module], width: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x_BTHWC: Tensor, masks: Tensor | None) -> Tensor:
        """`masks`: scaled keep masks [B, blocks, 2], or None."""
        for number, block in enumerate(self.blocks):
            x_BTHWC = call_block(block, x_BTHWC, None if masks is None else masks[:, number])
        return x_BTHWC if self.downsample is None else self.downsample(x_BTHWC)


class Stem(nn.Module):
    """Clips [B, frames, 3, pixels, pixels] → x_BTHWC: a linear map of each tubelet (2, p, p), and a norm."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        kernel = (TUBELET, patch_size, patch_size)
        self.proj = nn.Conv3d(3, width, kernel_size=kernel, stride=kernel)
        self.norm = LayerNorm(width)

    def forward(self, clips: Tensor) -> Tensor:
        # As one product: it leaves the channels last, where a convolution would want them permuted before and after.
        t, p, _ = self.proj.kernel_size
        B, frames, channels, height, width = clips.shape
        cells = clips.reshape(B, frames // t, t, channels, height // p, p, width // p, p)
        tubelets = cells.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4)
        assert self.proj.bias is not None
        weight, bias = self.proj.weight.flatten(1).to(clips.dtype), self.proj.bias.to(clips.dtype)
        return self.norm(F.linear(tubelets, weight, bias))


class PatchMerging(nn.Module):
    """Half as many tokens in height and width, of twice the width: [B, T, H, W, C] → [B, T, H/2, W/2, 2C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * width, 2 * width, bias=False)
        self.norm = LayerNorm(4 * width)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        B, T, H, W, C = x_BTHWC.shape
        quads = x_BTHWC.view(B, T, H // 2, 2, W // 2, 2, C)
        return self.reduction(self.norm(quads.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)))


class MLP(nn.Module):
    """The feed-forward layer, four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class AdaptedBlock(nn.Module):
    """A block of the image model with AIM's adapters; which it has decides what it does."""

    def __init__(self, place: Place, options: AIMOptions, adapted: bool) -> None:
        super().__init__()
        width, steps = place.width, place.size[0]
        hidden = int(width * options.adapter_ratio)
        present = options.adapters if adapted else ()
        over_time = "temporal" in present and not place.shifted
        self.windows = Windows((1, *place.size[1:]), (1, place.window, place.window), place.shifted)
        self.T_Adapter = Adapter(width, hidden) if over_time else None
        self.norm1 = LayerNorm(width)
        self.attn = WindowAttention(width, place.heads, self.windows, steps if over_time else None)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width)
        self.S_Adapter = Adapter(width, hidden) if "joint" in present else None
        self.S_Adapter2 = Adapter(width, hidden) if "spatial" in present else None
        self.scale = options.adapter_scale

    def forward(self, x_BTHWC: Tensor, masks: Tensor | None) -> Tensor:
        """`masks`: scaled keep masks [B, 2] of the temporal and the joint branch, or None."""
        x = x_BTHWC
        if self.T_Adapter is not None:
            x = x + _masked(self.T_Adapter(self.attn.over_time(self.norm1(x))), masks, 0)
        # A time step is a picture: time joins the batch.
        pictures = self.norm1(x).flatten(0, 1).unsqueeze(1)
        y = self.attn.over_windows(pictures).view_as(x)
        x = x + (y if self.S_Adapter2 is None else y + self.S_Adapter2(y))
        y = self.norm2(x)
        if self.S_Adapter is None:
            return x + self.mlp(y)
        return x + self.mlp(y) + _masked(self.S_Adapter(y, self.scale), masks, 1)


class VideoBlock(nn.Module):
    """A block of Video Swin: attention in windows of time and space, then the MLP."""

    def __init__(self, place: Place, temporal_window: int) -> None:
        super().__init__()
        window = (temporal_window, place.window, place.window)
        self.norm1 = LayerNorm(place.width)
        self.attn = WindowAttention(place.width, place.heads, Windows(place.size, window, place.shifted))
        self.norm2 = LayerNorm(place.width)
        self.mlp = MLP(place.width)

    def forward(self, x_BTHWC: Tensor, masks: Tensor | None) -> Tensor:
        """`masks`: scaled keep masks [B, 2] of the attention's and the MLP's branch, or None."""
        x = x_BTHWC + _masked(self.attn.over_windows(self.norm1(x_BTHWC)), masks, 0)
        return x + _masked(self.mlp(self.norm2(x)), masks, 1)


class Windows:
    """How tokens [M, T, H, W, C] are cut into windows of N tokens, and put together again.

    Windows that are not shifted are alike and join the batch: [M·P, N, 1, C]. Shifted ones lie side by side,
    [M, N, P, C], because each has a mask of its own; the heads take them up there without a copy of the mask.
    """

    def __init__(self, size: Size, window: Size, shifted: bool) -> None:
        """`window`: the nominal one, for which bias tables are made; an axis no longer than it is one window."""
        self.nominal = window
        self.size = size
        self.window = tuple(map(min, size, window))
        self.shift = tuple(w // 2 if shifted and n > w else 0 for n, w in zip(size, window, strict=True))
        self.count = tuple(n // w for n, w in zip(size, self.window, strict=True))

    @property
    def shifted(self) -> bool:
        return any(self.shift)

    def cut(self, x_MTHWC: Tensor) -> Tensor:
        """[M, T, H, W, C] → [M·P, N, 1, C], or [M, N, P, C] where shifted."""
        if self.shifted:
            x_MTHWC = x_MTHWC.roll([-s for s in self.shift], (1, 2, 3))
        (a, b, c), (t, h, w) = self.count, self.window
        cells = x_MTHWC.view(-1, a, t, b, h, c, w, x_MTHWC.shape[-1])
        if self.shifted:
            return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 6).flatten(1, 3)
        return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3).unsqueeze(2)

    def join(self, x_MNPC: Tensor) -> Tensor:
        """The way back from `cut`."""
        (a, b, c), (t, h, w) = self.count, self.window
        if not self.shifted:
            cells = x_MNPC.view(-1, a, b, c, t, h, w, x_MNPC.shape[-1])
            return cells.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *self.size, x_MNPC.shape[-1])
        cells = x_MNPC.view(-1, t, h, w, a, b, c, x_MNPC.shape[-1])
        joined = cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(-1, *self.size, x_MNPC.shape[-1])
        return joined.roll(self.shift, (1, 2, 3))

    def regions(self) -> Tensor:
        """Of each token of each window [P, N], which of the regions that the shift brought together it comes from."""
        axes = []
        for n, s in zip(self.size, self.shift, strict=True):
            axes.append((torch.arange(n) >= n - s).long() if s else torch.zeros(n, dtype=torch.long))
        label = (axes[0][:, None, None] * 2 + axes[1][:, None]) * 2 + axes[2]
        unrolled = label.roll(self.shift, (0, 1, 2))
        return self.cut(unrolled[None, ..., None])[0, :, :, 0].t().contiguous()


class WindowAttention(nn.Module):
    """Multi-head self-attention with a learned bias for every relative position.

    The three projections are three products, so that q, k and v are plain views (see `model.vit.Attention`).
    """

    relative_position_index: Tensor
    t_relative_coords: Tensor
    regions: Tensor

    def __init__(self, width: int, heads: int, windows: Windows, steps: int | None = None) -> None:
        """`steps`: time steps of the temporal attention; None where there is none."""
        super().__init__()
        self.heads = heads
        self.windows = windows
        distances = prod(2 * n - 1 for n in windows.nominal)
        self.relative_position_bias_table = nn.Parameter(_small_normal(distances, heads))
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.register_buffer("relative_position_index", relative_index(windows.nominal), persistent=False)
        if windows.shifted:
            self.register_buffer("regions", windows.regions(), persistent=False)
        if steps is not None:
            self.temporal_position_bias_table = nn.Parameter(_small_normal(2 * steps - 1, heads))
            self.register_buffer("t_relative_coords", relative_index((steps,)).flatten(), persistent=False)

    def over_windows(self, x_MTHWC: Tensor) -> Tensor:
        """The tokens of each window attend to each other; returns the same shape."""
        tokens = prod(self.windows.window)
        # An axis shorter than its window uses the first of the window's positions; that axis is time, the outermost.
        index = self.relative_position_index[:tokens, :tokens]
        bias_PhNN = self._bias(self.relative_position_bias_table, index, x_MTHWC.dtype)[None]
        if self.windows.shifted:
            apart_PNN = self.regions[:, :, None] != self.regions[:, None, :]
            bias_PhNN = bias_PhNN.masked_fill(apart_PNN[:, None], MASKED)
        return self.windows.join(self._attend(self.windows.cut(x_MTHWC), bias_PhNN))

    def over_time(self, x_BTHWC: Tensor) -> Tensor:
        """Every token attends to the tokens at its place in the other time steps; returns the same shape."""
        B, T, H, W, C = x_BTHWC.shape
        index = self.t_relative_coords.view(T, T)
        bias_hTT = self._bias(self.temporal_position_bias_table, index, x_BTHWC.dtype)
        return self._attend(x_BTHWC.view(B, T, H * W, C), bias_hTT.expand(H * W, -1, -1, -1)).view_as(x_BTHWC)

    def _bias(self, table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """[h, N, N]; cast after it is gathered, so that gradients are summed in the table's precision."""
        return table[index].permute(2, 0, 1).to(dtype).contiguous()

    def _attend(self, x_MNPC: Tensor, bias_PhNN: Tensor) -> Tensor:
        M, N, P, C = x_MNPC.shape
        weights = self.qkv.weight.to(x_MNPC.dtype).chunk(3)
        biases = self.qkv.bias.to(x_MNPC.dtype).chunk(3)
        q, k, v = (
            F.linear(x_MNPC, w, b).view(M, N, P * self.heads, C // self.heads)
            for w, b in zip(weights, biases, strict=True)
        )
        return self.proj(attention(q, k, v, bias_PhNN.flatten(0, 1)).reshape(M, N, P, C))


def relative_index(window: tuple[int, ...]) -> Tensor:
    """Of each pair of a window's tokens [N, N] (time outermost), the row of the bias table: the distance along each
    axis, from -(n - 1) to n - 1, counted from 0."""
    positions = torch.tensor(list(product(*map(range, window))))
    index = torch.zeros(len(positions), len(positions), dtype=torch.long)
    for axis, n in enumerate(window):
        position = positions[:, axis]
        index = index * (2 * n - 1) + position[:, None] - position + n - 1
    return index


def _side(geometry: SwinGeometry, stage: int) -> int:
    """Tokens in height and in width at a stage; ValueError for a picture that does not divide into windows."""
    unit = geometry.patch_size * 2**stage
    side = geometry.image_size // unit
    if geometry.image_size % unit or side == 0 or side % geometry.window:
        raise ValueError(
            f"an image size of {geometry.image_size} gives {geometry.image_size / unit:g} tokens a side at stage "
            f"{stage}, which windows of {geometry.window} do not divide; choose a size that fits, as 224 does for "
            "windows of 7"
        )
    return side


def _refuse_options(options: AIMOptions) -> None:
    """ValueError for what AIM on a ViT has and AIM on Swin has not."""
    for name, published in (
        ("temporal_adapters", 1),
        ("temporal_weights", "reuse"),
        ("temporal_embedding", "input"),
        ("adapter_scale", 0.5),
        ("drop_path_axis", "clip"),
    ):
        if getattr(options, name) != published:
            raise ValueError(
                f"model.{name} = {getattr(options, name)!r} is not for Swin, where AIM has {published!r} alone; "
                "remove the line"
            )


def _two_branches(geometry: object, drop_path: float) -> Tensor:
    """Drop probabilities of the two branches of every block [L, 2]."""
    assert isinstance(geometry, SwinGeometry)
    return drop_path_rates(drop_path, geometry.layers)[:, None].expand(-1, 2)


def _masked(branch_BTHWC: Tensor, masks: Tensor | None, column: int) -> Tensor:
    """A branch times its scaled keep masks [B, 2] (DropPath); unchanged without masks."""
    return branch_BTHWC if masks is None else branch_BTHWC * masks[:, column, None, None, None, None]


def _small_normal(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)


def is_flat(shapes: Shapes) -> bool:
    """Whether windows have no extent in time: AIM's, not Video Swin's. Takes bare names and ours alike."""
    return has(r"Adapter|\.temporal_position_bias_table$", shapes) or _has_flat_windows(shapes)


def read_swin(entry: Format, shapes: Shapes) -> tuple[SwinGeometry, int, dict[str, Any]]:
    """Geometry, frames, and what of them no tensor shows; a temporal table of 2T' - 1 rows tells T = 2T' frames."""
    width, _, _, patch, _ = shape_of(entry, shapes, "backbone.patch_embed.proj.weight", 5)
    depths: dict[int, int] = {}
    for name in shapes:
        if match := re.match(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    if absent := [stage for stage in range(len(depths)) if stage not in depths]:
        raise ValueError(f"no tensor of stage {absent[0]} (layers.{absent[0]}.…) is there")
    if max(depths.values()) > _MOST_BLOCKS:
        raise ValueError(f"a stage has {max(depths.values())} blocks by its names; allowed are 1 to {_MOST_BLOCKS}")
    table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [shape_of(entry, shapes, table.format(stage), 2) for stage in range(len(depths))]
    window = _flat_window(tables[0][0]) if is_flat(shapes) else _PUBLISHED_WINDOW
    if window is None:
        raise ValueError(f"{table.format(0)} has {tables[0][0]} rows; (2 · window - 1)² is needed, such as 169")
    mean, std = NORMALISATIONS["imagenet"]
    geometry = SwinGeometry(
        width=width,
        depths=tuple(depths[stage] for stage in range(len(depths))),
        heads=tuple(heads for _, heads in tables),
        window=window,
        patch_size=patch,
        image_size=patch * window * 2 ** (len(depths) - 1),  # as of every published Swin: the last stage is one window
        mean=mean,
        std=std,
    )
    assumed = {"image_size": geometry.image_size}
    temporal = [shape for name, shape in shapes.items() if name.endswith(".temporal_position_bias_table")]
    if temporal:
        return geometry, temporal[0][0] + 1, assumed
    return geometry, _PUBLISHED_FRAMES, assumed | {"num_frames": _PUBLISHED_FRAMES}


def unshifted(geometry: SwinGeometry) -> set[int]:
    """The blocks that attend over time: every stage's first, third, …"""
    starts = [sum(geometry.depths[:stage]) for stage in range(len(geometry.depths))]
    return {start + i for start, depth in zip(starts, geometry.depths, strict=True) for i in range(0, depth, 2)}


def _temporal_window(entry: Format, shapes: Shapes) -> int:
    """Time steps W of Video Swin's windows: a table has (2W - 1) · 13 · 13 rows."""
    name = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    rows = shape_of(entry, shapes, name, 2)[0]
    quotient, rest = divmod(rows, (2 * _PUBLISHED_WINDOW - 1) ** 2)
    if rest or quotient % 2 == 0:
        raise ValueError(f"{name} has {rows} rows; (2 · time steps - 1) · 13 · 13 is needed, such as 2535")
    return (quotient + 1) // 2


def _has_flat_windows(shapes: Shapes) -> bool:
    tables = [shape for name, shape in shapes.items() if name.endswith(".relative_position_bias_table")]
    return bool(tables) and all(len(shape) == 2 and _flat_window(shape[0]) is not None for shape in tables)


def _flat_window(rows: int) -> int | None:
    """Side of a window whose bias table has (2 · side - 1)² rows."""
    side = isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def _read_video_swin(entry: Format, shapes: Shapes) -> Reading:
    geometry, frames, assumed = read_swin(entry, shapes)
    options = {"temporal_window": _temporal_window(entry, shapes)}
    return reading(entry, shapes, geometry, frames, options, assumed)


METHODS = (
    Method(
        "video_swin",
        "3-D shifted windows, all trained",
        VideoSwinOptions,
        {SwinGeometry: VideoSwin},
        (
            Format(
                name="video_swin",
                summary="Video Swin",
                family="video_swin",
                method="video_swin",
                marks=(SWIN_MARK, lambda shapes: not is_flat(shapes)),
                read=_read_video_swin,
                holds=lambda description: description["method"] == "video_swin",
                dropped=(COMPUTED, IMAGE_HEAD),
            ),
        ),
        shown_options=("temporal_window",),
        paper='Liu et al., "Video Swin Transformer", CVPR 2022',
    ),
)
