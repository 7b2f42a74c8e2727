"""EVL: a decoder that reads the last blocks of an image model which stays as it is (Lin et al., "Frozen CLIP Models are
Efficient Video Learners", ECCV 2022; official files `model.py` and `vision_transformer.py` of
OpenGVLab/efficient-video-recognition).

    frames ─ frozen ViT, no gradients ─▶ last blocks: tokens, and how the patches of neighbouring frames attend
                                                │  + temporal convolution, positions in time, offset tables
    query token ─ decoder layer ─ … ─ decoder layer ─▶ norm ─▶ head

Layer i of the decoder reads block L - n + i of the image model. One query token attends to all tokens of all frames. To
these are added their depth-wise convolution over time, a position a frame, and for each patch what its queries find in
the frame before and in the frame after: the mean over the heads of softmax(q kᵀ / √K) weights a table that has a row
for every offset between two patches, one table for each direction.

The gradient ends at the decoder, so that nothing of the image model is kept for the backward pass, and what it computes
before the first block that is read can be kept for good (`speed.cache_gb`).

What differs from the published code, in the order of operations and not in what is computed:

- One token attends, so that no token of the clip is multiplied by the matrices of keys and values: the query meets the
  key's matrix first, and the value's matrix meets the one sum that the query makes. Either projection then costs
  M · D · H multiply-adds instead of M · D², 0.015 instead of 0.93 · 10⁹ on a ViT-B/16 of 8 frames, and keeps nothing.
- Weights of pairs of patches are moved to the place of their offset along one axis, with zeros between, so that one
  product for each row of patches takes them to the tables' rows. The published code gathers a tensor of P · P · D and
  scatters its gradient.
- The image model has a bias in its patch embedding, which is zero for CLIP, as in the published code.

Files that the published code wrote while the image model stayed as it is hold the decoder alone; the image model must
be put into them first, under `backbone.`, to be converted.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), P = G · G patches a frame, D width, H heads,
K head width, M = T · N tokens a clip, R = 2G - 1 offsets along one axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import AIMOptions
from model.geometry import ImageTower, ViTGeometry
from model.layers import LayerNorm, Linear, convolve_time
from model.method import Method
from model.methods.aim import Block
from model.official import (
    HEAD_WIDTH,
    TIMM_MARK,
    TIMM_NAMES,
    Format,
    Reading,
    Shapes,
    has,
    ratio_of,
    read_vit,
    reading,
    shape_of,
)
from model.speed import call_block
from model.video import BACKBONE, Head, VideoModel, check_rates, load_tower_weights
from model.vit import MLP, Attention, ViT, add_to_patches, initialise

PUBLISHED_FRAMES = 8
"""Of the smallest published models, where no tensor depends on it."""
PLAIN = AIMOptions(adapters=())
"""Of a block of the image model."""


@dataclass(frozen=True)
class EVLOptions:
    """What can be set of EVL; the defaults are as published."""

    decoder_layers: int = 4
    """Layers of the decoder, each of which reads one of as many last blocks; of an image model with fewer blocks all
    are read."""
    decoder_width: int = 0
    """Of the decoder's queries, keys and values, in heads of 64; 0: the image model's width, and its heads."""
    decoder_mlp_ratio: float = 4.0
    """Hidden width of the decoder's feed-forward layers as a multiple of the image model's width."""
    temporal_conv: bool = True
    """Whether a convolution over time is added to what the decoder reads,"""
    temporal_positions: bool = True
    """a position for every frame,"""
    temporal_attention: bool = True
    """and what patches find in the frames before and after."""
    decoder_dropout: float = 0.5
    """Of the hidden features of the decoder's feed-forward layers."""
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.decoder_layers < 1:
            raise ValueError(f"model.decoder_layers = {self.decoder_layers}; allowed is 1 or more")
        if self.decoder_width < 0 or self.decoder_width % HEAD_WIDTH:
            raise ValueError(
                f"model.decoder_width = {self.decoder_width}; allowed is a multiple of {HEAD_WIDTH}, or 0 for the "
                "image model's"
            )
        if not 0 < self.decoder_mlp_ratio <= 16:
            raise ValueError(f"model.decoder_mlp_ratio = {self.decoder_mlp_ratio}; allowed is 0 < ratio <= 16")
        check_rates(self, "decoder_dropout", "head_dropout")


class EVL(VideoModel):
    """EVL on a ViT with a class token; arguments as `model.methods.create` says."""

    trained_names = ("decoder.", "ln_post", "cls_head")
    time_axes: ClassVar[Mapping[str, int]] = {"temporal_pos_embed": 0}

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: EVLOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.backbone = ReadViT(geometry, num_frames, options)
        # The norm after the decoder has the place of the image model's own, which is not needed, but not its weights.
        weights = {name: weight for name, weight in tower.state_dict.items() if not name.startswith("ln_post.")}
        load_tower_weights(self.backbone, weights, ("decoder.", "ln_post.", "conv1.bias"))
        self.finish()

    def make_head(self, num_classes: int) -> nn.Module:
        head = Head(self.features, num_classes)
        head.fc_cls.reset_parameters()  # published: PyTorch's own start
        return head

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`decoder_dropout` [layers of the decoder, hidden features]; `head_dropout` [D]."""
        assert isinstance(self.geometry, ViTGeometry)
        shape = (layers_read(self.geometry, self.options), hidden_width(self.geometry, self.options))
        dropped = torch.full(shape, self.options.decoder_dropout, dtype=torch.float64)
        return {"decoder_dropout": dropped, **super().random_masks}


def layers_read(geometry: ViTGeometry, options: EVLOptions) -> int:
    """Layers of the decoder, and last blocks of the image model that they read."""
    return min(options.decoder_layers, geometry.layers)


def hidden_width(geometry: ViTGeometry, options: EVLOptions) -> int:
    """Of the decoder's feed-forward layers."""
    return int(geometry.width * options.decoder_mlp_ratio)


class ReadViT(ViT):
    """Normalised clips [B, T, 3, H, W], or what `stem` made of them → features of the clip [B, D]."""

    def __init__(self, geometry: ViTGeometry, num_frames: int, options: EVLOptions) -> None:
        self.first_read = geometry.layers - layers_read(geometry, options)
        super().__init__(
            replace(geometry, patch_bias=True),
            lambda layer: (
                Block(geometry, PLAIN) if layer < self.first_read else ReadBlock(geometry, options.temporal_attention)
            ),
            None,
        )
        initialise(self)
        assert self.conv1.bias is not None
        nn.init.zeros_(self.conv1.bias)
        self.decoder = Decoder(geometry, num_frames, options)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks["decoder_dropout"]`: scaled keep masks [B, layers of the decoder, hidden features]."""
        seen = []
        with torch.no_grad():
            x_BTND = clips if clips.ndim == 4 else self.stem(clips)
            for block in self.transformer.resblocks[self.first_read :]:
                x_BTND, pairs = call_block(block, x_BTND)
                seen.append((x_BTND, pairs))
        return self.ln_post(self.decoder(seen, masks.get("decoder_dropout")))

    @property
    def blocks(self) -> list[nn.Module]:
        """Of the image model, then of the decoder."""
        return [*self.transformer.resblocks, *self.decoder.decoder_layers]

    @property
    def _stem_blocks(self) -> int:
        return self.first_read


class ReadBlock(nn.Module):
    """A block of the image model that also shows how patches attend to those of the neighbouring frames."""

    def __init__(self, geometry: ViTGeometry, shows_pairs: bool) -> None:
        super().__init__()
        self.shows_pairs = shows_pairs
        self.ln_1 = LayerNorm(geometry.width, geometry.eps)
        self.attn = Attention(geometry.width, geometry.heads)
        self.ln_2 = LayerNorm(geometry.width, geometry.eps)
        self.mlp = MLP(geometry.width, geometry.quick_gelu, geometry.mlp_width)

    def forward(self, x_BTND: Tensor) -> tuple[Tensor, Tensor | None]:
        """→ the block's output, and `pair_weights` where they are wanted."""
        y, q, k = self.attn.over_space_with_parts(self.ln_1(x_BTND))
        pairs = pair_weights(q, k, x_BTND.shape[1]) if self.shows_pairs else None
        x = x_BTND + y
        return x + self.mlp(self.ln_2(x)), pairs


def pair_weights(q_MNHK: Tensor, k_MNHK: Tensor, frames: int) -> Tensor:
    """How strongly each patch attends to those of the frame before and of the frame after, the mean over the heads, by
    the offset between the two: q, k [B·T, N, H, K] → [G, B·T·G, G·2·R].

    The first axis is the row i of the patch that attends, the second ends with its column j. The last says what it
    attends to: G - 1 - i' for row i', direction, R places of which number j - j' + G - 1 is that of column j'. There is
    nothing before the first frame and after the last.
    """
    q = q_MNHK[:, 1:].unflatten(0, (-1, frames))
    k = k_MNHK[:, 1:].flip(1).unflatten(0, (-1, frames))  # patch i', j' comes at G - 1 - i', G - 1 - j'
    side = isqrt(q.shape[2])
    before = F.pad(_mean_weights(q[:, 1:], k[:, :-1]), (0, 0, 0, 0, 1, 0))
    after = F.pad(_mean_weights(q[:, :-1], k[:, 1:]), (0, 0, 0, 0, 0, 1))
    both = torch.stack([before, after], dim=2).unflatten(3, (side, side)).unflatten(5, (side, side))
    columns = both.permute(3, 0, 1, 5, 2, 4, 6)  # [i, B, T, i', direction, j, j']
    # Each j's row of j' moves j places to the right: rows of 2G places, G of them empty, read as rows of R = 2G - 1.
    skewed = F.pad(columns, (0, side)).flatten(-2)[..., : side * (2 * side - 1)].unflatten(-1, (side, 2 * side - 1))
    return skewed.permute(0, 1, 2, 5, 3, 4, 6).flatten(4).flatten(1, 3)


def _mean_weights(q_BTPHK: Tensor, k_BTPHK: Tensor) -> Tensor:
    """softmax(q kᵀ / √K), the mean over the heads: [B, T, P, P]."""
    scores = torch.einsum("btqhk,btshk->bthqs", q_BTPHK * q_BTPHK.shape[-1] ** -0.5, k_BTPHK)
    return scores.softmax(dim=-1).mean(dim=2)


class Decoder(nn.Module):
    """What trains: the layers, and what each adds to the tokens that it reads. Names are the published ones."""

    def __init__(self, geometry: ViTGeometry, num_frames: int, options: EVLOptions) -> None:
        super().__init__()
        width, each = geometry.width, range(layers_read(geometry, options))
        offsets = (2 * isqrt(geometry.num_tokens - 1) - 1) ** 2
        self.decoder_layers = nn.ModuleList(DecoderLayer(geometry, options) for _ in each)
        self.temporal_conv = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size=3, padding=1, groups=width) for _ in each if options.temporal_conv
        )
        self.temporal_pos_embed = nn.ParameterList(
            nn.Parameter(torch.zeros(num_frames, width)) for _ in each if options.temporal_positions
        )
        self.cross_attention = nn.ModuleList(OffsetTables(offsets, width) for _ in each if options.temporal_attention)
        self.cls_token = nn.Parameter(torch.zeros(width))

    def forward(self, seen: list[tuple[Tensor, Tensor | None]], masks: Tensor | None) -> Tensor:
        """`seen`: tokens x_BTND and `pair_weights` of each block that is read → the query token [B, D]."""
        first, _ = seen[0]
        query_BD = self.cls_token.to(first.dtype).expand(first.shape[0], -1)
        for layer, (x_BTND, pairs) in enumerate(seen):
            mask = None if masks is None else masks[:, layer].to(x_BTND.dtype)
            query_BD = call_block(self.decoder_layers[layer], query_BD, x_BTND, pairs, *self._added_parts(layer), mask)
        return query_BD

    def _added_parts(self, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of what is added to a layer's tokens: kernel [D, 1, 3], constants [T, D] or [1, D], tables [2, R · R, D]."""
        kernel: Tensor | None = None
        constants: Tensor | None = None
        tables: Tensor | None = None
        if len(self.temporal_conv):
            convolution = self.temporal_conv[layer]
            assert isinstance(convolution, nn.Conv1d) and convolution.bias is not None
            kernel, constants = convolution.weight, convolution.bias.unsqueeze(0)
        if len(self.temporal_pos_embed):
            positions = self.temporal_pos_embed[layer]
            constants = positions if constants is None else constants + positions
        if len(self.cross_attention):
            both = self.cross_attention[layer]
            assert isinstance(both, OffsetTables)
            tables = torch.stack([both.w1, both.w2])
        return kernel, constants, tables


class OffsetTables(nn.Module):
    """A row for every offset between two patches [R · R, D]: of the frame before (`w1`), of the frame after (`w2`)."""

    def __init__(self, offsets: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(offsets, width))
        self.w2 = nn.Parameter(torch.zeros(offsets, width))


class DecoderLayer(nn.Module):
    """The query token attends to all tokens of a clip, and has a feed-forward layer."""

    def __init__(self, geometry: ViTGeometry, options: EVLOptions) -> None:
        super().__init__()
        width = geometry.width
        inner = options.decoder_width or width
        heads = inner // HEAD_WIDTH if options.decoder_width else geometry.heads
        self.attn = QueryAttention(width, inner, heads)
        self.mlp = QueryMLP(width, hidden_width(geometry, options))
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)

    def forward(
        self,
        query_BD: Tensor,
        x_BTND: Tensor,
        pairs: Tensor | None,
        kernel: Tensor | None,
        constants: Tensor | None,
        tables: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """`mask`: scaled keep mask [B, hidden features], or None."""
        y = x_BTND
        if kernel is not None:
            y = y + convolve_time(x_BTND, kernel, None)
        if constants is not None:
            y = y + constants.unsqueeze(1).to(y.dtype)
        if pairs is not None and tables is not None:
            y = add_to_patches(y, rows_of_pairs(pairs, tables, x_BTND.shape[1]))
        query = query_BD + self.attn(self.norm1(query_BD), self.norm3(y).flatten(1, 2))
        return query + self.mlp(self.norm2(query), mask)


def rows_of_pairs(pairs: Tensor, tables: Tensor, frames: int) -> Tensor:
    """What each patch takes from the tables [2, R · R, D] by its `pair_weights`: [B, T, P, D]."""
    side = len(pairs)
    rows = tables.to(pairs.dtype).unflatten(1, (2 * side - 1, -1)).transpose(0, 1)  # [row offset, direction, R, D]
    windows = rows.unfold(0, side, 1).movedim(-1, 1).flatten(1, 3)  # [i, G · 2 · R, D]: offsets i … i + G - 1
    found = torch.bmm(pairs, windows).unflatten(1, (-1, frames, side))
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)


class QueryAttention(nn.Module):
    """Multi-head attention of one token a clip."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, inner)
        self.k_proj = Linear(width, inner)
        self.v_proj = Linear(width, inner)
        self.out_proj = Linear(inner, width)
        for part in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, query_BD: Tensor, y_BMD: Tensor) -> Tensor:
        """→ [B, D]. `k_proj` and `v_proj` never meet y_BMD: see the top of this file."""
        q_BHK = self.q_proj(query_BD).unflatten(-1, (self.heads, -1))
        q_BHK = q_BHK * q_BHK.shape[-1] ** -0.5
        k_HKD, v_HKD = (
            part.weight.to(y_BMD.dtype).unflatten(0, (self.heads, -1)) for part in (self.k_proj, self.v_proj)
        )
        k_HK, v_HK = (part.bias.to(y_BMD.dtype).unflatten(0, (self.heads, -1)) for part in (self.k_proj, self.v_proj))
        scores = torch.einsum("bhk,hkd->bhd", q_BHK, k_HKD) @ y_BMD.transpose(1, 2)
        scores = scores + (q_BHK * k_HK).sum(-1, keepdim=True)
        mixed_BHD = scores.softmax(dim=-1) @ y_BMD
        return self.out_proj((torch.einsum("bhd,hkd->bhk", mixed_BHD, v_HKD) + v_HK).flatten(1))

    def _by_heads(self, part: Linear, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [H, K, D] and bias [H, K]."""
        weight, bias = part.weight.to(like.dtype), part.bias.to(like.dtype)
        return weight.unflatten(0, (self.heads, -1)), bias.unflatten(0, (self.heads, -1))


class QueryMLP(nn.Module):
    """The feed-forward layer, with QuickGELU as `model.vit.MLP` computes it and dropout of its hidden features."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        for part in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(part.weight)
            nn.init.normal_(part.bias, std=1e-6)

    def forward(self, x_BD: Tensor, mask: Tensor | None) -> Tensor:
        h = F.silu(self.fc1(x_BD, output_factor=1.702))
        return self.fc2(h if mask is None else h * mask, input_factor=1 / 1.702)


def _read(entry: Format, shapes: Shapes) -> Reading:
    """How large the decoder is and what it has, beside the image model."""
    geometry = read_vit(
        entry,
        shapes,
        normalisation="openai_clip",
        quick_gelu=True,
        ln_pre="backbone.ln_pre.weight" in shapes,
        patch_bias=False,  # the method's own, whatever the image model has
        eps=1e-5,
    )
    layer = f"{_DECODER}.decoder_layers.0."
    inner, width = shape_of(entry, shapes, f"{layer}attn.q_proj.weight", 2)
    hidden, _ = shape_of(entry, shapes, f"{layer}mlp.fc1.weight", 2)
    options = {
        "decoder_layers": len({match[1] for name in shapes if (match := _LAYER.match(name))}),
        "decoder_width": 0 if inner == width else inner,
        "decoder_mlp_ratio": ratio_of(hidden, width),
        "temporal_conv": has(rf"^{_DECODER}\.temporal_conv\.", shapes),
        "temporal_positions": has(rf"^{_DECODER}\.temporal_pos_embed\.", shapes),
        "temporal_attention": has(rf"^{_DECODER}\.cross_attention\.", shapes),
    }
    assumed = {"heads": geometry.heads, "quick_gelu": geometry.quick_gelu}
    if options["temporal_positions"]:
        frames, _ = shape_of(entry, shapes, f"{_DECODER}.temporal_pos_embed.0", 2)
        return reading(entry, shapes, geometry, frames, options, assumed)
    return reading(entry, shapes, geometry, PUBLISHED_FRAMES, options, assumed | {"num_frames": PUBLISHED_FRAMES})


_DECODER = f"{BACKBONE}.decoder"
_LAYER = re.compile(rf"{_DECODER}\.decoder_layers\.(\d+)\.")

METHODS = (
    Method(
        "evl",
        "decoder on the last blocks of a frozen image model",
        EVLOptions,
        {ViTGeometry: EVL},
        (
            Format(
                name="evl",
                summary="EVL on CLIP's ViT",
                family="evl",
                method="evl",
                # Those of AdaptFormer's image form, and the decoder.
                marks=(
                    TIMM_MARK,
                    r"^blocks\.\d+\.attn\.q_proj\.",
                    r"^cls_token$",
                    r"^decoder\.decoder_layers\.\d+\.",
                ),
                read=_read,
                holds=lambda description: description["method"] == "evl",
                names={name: ours for name, ours in TIMM_NAMES.items() if not name.startswith("attn.")},
                blocks="blocks",
                outside={"decoder": "backbone.decoder", "proj.0": "backbone.ln_post", "proj.2": "cls_head.fc_cls"},
                fused={
                    f"attn.in_proj_{kind}": tuple(f"attn.{part}_proj.{kind}" for part in "qkv")
                    for kind in ("weight", "bias")
                },
                flat=("conv1.weight",),
            ),
        ),
        shown_options=(
            "decoder_layers",
            "decoder_width",
            "decoder_mlp_ratio",
            "temporal_conv",
            "temporal_positions",
            "temporal_attention",
        ),
        paper='Lin et al., "Frozen CLIP Models are Efficient Video Learners", ECCV 2022',
    ),
)
