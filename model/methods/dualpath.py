"""DualPath: one frozen image transformer that looks at a clip twice, at some of its frames as they are and at all of
them shrunk and tiled into images (Park et al., "Dual-path Adaptation from Image to Video Transformers", CVPR 2023;
official file `CLIP_custom/clip/model.py` of park-jungin/DualPath).

The spatial path takes a strided subset of the frames. The temporal path takes framesets: images of the usual size, each
a grid of consecutive frames in the order of time, row by row, so that attention over space is attention over time
there. Both go through the same frozen blocks, each with adapters of its own:

    spatial    x' = x + MHA(LN x) + A(LN x)      x = x' + MLP(LN x') + A(LN x')
    temporal   x' = x + A(MHA(LN x))             x = x' + A(MLP(LN x'))

The class tokens go through CLIP's projection, where there is one, and are averaged in each path; a hidden layer and the
classifier read both averages, the temporal one first.

Adapters are down, GELU, up, and start at zero: so the temporal path starts without the blocks' help, as published.
Two forms. "paper" is as above: the framesets' positions are fixed, sines and cosines of the time and of the place
within the frame. "published_code" is the official file, which differs: an adapter without skip connection stands before
the temporal attention too, the positions are sines and cosines of the frame's number alone plus an embedding that
trains, and the image model's own class and positional embeddings train. The paper does not say how the three parts of
a fixed position share the width (here equally) nor where in the grid a token that covers two frames stands (here where
its middle is), and whether the image model's own positions stay: by default they do not (see `positions`).

What differs from the official code on purpose: framesets are made here, on the device; dropout drops a hidden feature
of an adapter in all of a clip's tokens, not in every token anew, so that masks belong to the data plan. The official
file does not run as it is published (its class token's map uses a name before it is assigned).

Legend of shapes: B clips, T frames, G framesets, S frames of the spatial path, F = G + S images (framesets first), g
frames along a side of a frameset, P tokens along a side of an image, N tokens an image (class token first), D width,
E features of a path, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.layers import Linear
from model.method import Method
from model.methods.aim import stands_on
from model.official import CLIP_MARK, TEXT_TOWER, Format, Reading, Shapes, read_clip_vit, reading, shape_of
from model.video import BACKBONE, VideoModel, check_rates, load_tower_weights
from model.vit import Block, ViT, initialise

PUBLISHED_FRAMES = 16
"""The fewest that the official code takes; no tensor depends on the number."""
_FORMS = ("paper", "published_code")
_PLACES = ("instead", "added")
_MOST_CELLS = 4  # along a side, as published
_MOST_SPATIAL = 8
_CANVAS = 16  # side of the published map of frame numbers, before it is resized to the tokens
_ADAPTERS = ("t_adapter_attn", "s_adapter_attn", "t_adapter_mlp", "s_adapter_mlp")
_ADDED = ("_adapter_", "head.", "spatial_positional_embedding")


@dataclass(frozen=True)
class DualPathOptions:
    """What can be set of DualPath; the defaults are the paper's."""

    form: str = "paper"
    """"paper", or "published_code": what the official file computes (see the module's docstring)."""
    bottleneck: int = 0
    """Hidden width of the adapters; 0: as the form has it, 128 in the paper's and a quarter of the width in the
    code's."""
    grid: int = 0
    """Frames along a side of a frameset; 0: the most, up to the published 4, of which whole framesets can be made."""
    spatial_frames: int = 0
    """Frames of the spatial path, from the first on, equally far from each other; 0: the most, up to the published 8,
    for which that is so."""
    positions: str = "instead"
    """Of the paper's form: where the fixed positions of framesets go. "instead" of the image model's, as published; or
    "added" to those, in their size, so that frozen attention finds what it was trained with."""
    antialias: bool = True
    """Whether frames are shrunk with a filter as wide as the shrinking, as torchvision does since 0.17."""
    adapter_dropout: float = 0.1
    """Of the adapters' hidden features."""
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ValueError(f"model.form = {self.form!r}; allowed is {' or '.join(_FORMS)}")
        places = _PLACES if self.form == "paper" else _PLACES[:1]
        if self.positions not in places:
            raise ValueError(f"model.positions = {self.positions!r} with this form; allowed is {' or '.join(places)}")
        for name in ("bottleneck", "grid", "spatial_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} = {getattr(self, name)}; allowed is 1 or more, or 0 for the published")
        check_rates(self, "adapter_dropout", "head_dropout")

    def paths(self, frames: int) -> tuple[int, int, int]:
        """g, G and S for clips of so many frames; ValueError where they do not come out even."""
        grid = self.grid or max(g for g in range(1, _MOST_CELLS + 1) if frames % g**2 == 0)
        spatial = self.spatial_frames or max(s for s in range(1, _MOST_SPATIAL + 1) if frames % s == 0)
        if frames % grid**2:
            raise ValueError(f"model.grid = {grid} needs {grid**2}, or a multiple, of data.num_frames, not {frames}")
        if frames % spatial:
            raise ValueError(f"model.spatial_frames = {spatial}; allowed is a divisor of data.num_frames = {frames}")
        return grid, frames // grid**2, spatial

    def hidden(self, width: int) -> int:
        """Hidden width of the adapters in a model of this width."""
        return self.bottleneck or (128 if self.form == "paper" else width // 4)


class DualPath(VideoModel):
    """DualPath on a ViT with a class token; arguments as `model.methods.create` says. Everything that trains is
    decayed, as published."""

    uses_projection = True

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: DualPathOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.embed_dim or geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.backbone = DualPathViT(geometry, options, num_frames)
        initialise(self.backbone)
        load_tower_weights(self.backbone, _weights(tower), _ADDED)
        for module in self.backbone.modules():
            if isinstance(module, Adapter | Fusion):
                module.reset()
        self.finish()

    def make_head(self, num_classes: int) -> nn.Module:
        """The usual classifier with PyTorch's start."""
        head: Any = super().make_head(num_classes)
        head.fc_cls.reset_parameters()
        return head

    def trains(self, name: str) -> bool:
        """The adapters and the head; in the published code all embeddings too."""
        parts = ("_adapter_", "head", *(("class_embedding", "positional_embedding") if self._is_code else ()))
        return any(part in name for part in parts)

    @property
    def _is_code(self) -> bool:
        return self.options.form == "published_code"

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`adapter_dropout` [L, adapters, hidden]; `head_dropout` [E]."""
        assert isinstance(self.geometry, ViTGeometry)
        shape = (self.geometry.layers, len(_ADAPTERS) + self._is_code, self.options.hidden(self.geometry.width))
        rates = torch.full(shape, self.options.adapter_dropout, dtype=torch.float64)
        return {"adapter_dropout": rates, **super().random_masks}


def _weights(tower: ImageTower) -> dict[str, Tensor]:
    """The image model's, with its projection."""
    return tower.state_dict if tower.projection is None else {**tower.state_dict, "proj": tower.projection}


class DualPathViT(ViT):
    """Normalised clips [B, T, 3, H, W] → what both paths make of them [B, E]."""

    block_masks = "adapter_dropout"
    positions: Tensor

    def __init__(self, geometry: ViTGeometry, options: DualPathOptions, frames: int) -> None:
        self.grid, self.framesets, self.spatial_frames = options.paths(frames)
        super().__init__(geometry, lambda _: DualBlock(geometry, options, self.framesets), None)
        width, code = geometry.width, options.form == "published_code"
        self.antialias, self.adds_positions = options.antialias, options.positions == "added"
        scale, tokens = width**-0.5, geometry.num_tokens
        self.proj = nn.Parameter(scale * torch.randn(width, geometry.embed_dim)) if geometry.embed_dim else None
        self.spatial_positional_embedding = nn.Parameter(scale * torch.randn(tokens, width)) if code else None
        self.head = Fusion(geometry.embed_dim or width)
        side = geometry.image_size // geometry.patch_size
        numbers = _frame_numbers(self.grid, side, self.framesets, options.antialias)
        positions = _sinusoids(numbers, width) if code else _positions(self.grid, side, self.framesets, width)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks[block_masks]`: scaled keep masks [B, L, adapters, hidden], absent for no drop. Instead of clips
        it takes what `stem` made of them."""
        x_BFND = clips if clips.ndim == 4 else self.stem(clips)
        # A path's images in one piece: its adapters then work on views.
        x_FBND = x_BFND.transpose(0, 1).contiguous()
        x_FBND = self.transformer(x_FBND, masks.get(self.block_masks), range(len(self.blocks)))
        class_tokens = self.ln_post(x_FBND[:, :, 0]).float()
        means = [path.mean(0) for path in (class_tokens[: self.framesets], class_tokens[self.framesets :])]
        if self.proj is not None:
            means = [mean @ self.proj.float() for mean in means]
        return self.head(torch.cat(means, dim=1))

    def stem(self, clips: Tensor) -> Tensor:
        """[B, T, 3, H, W] → tokens of the framesets, then of the spatial path's frames, x_BFND."""
        frames = clips[:, :: clips.shape[1] // self.spatial_frames]
        framesets = make_framesets(clips, self.grid, antialias=self.antialias)
        patches = self.conv1(torch.cat([framesets, frames], dim=1).flatten(0, 1)).unflatten(0, (clips.shape[0], -1))
        dtype = patches.dtype
        class_tokens = self.class_embedding.to(dtype).expand(*patches.shape[:2], 1, -1)
        x_BFND = torch.cat([class_tokens, patches], dim=2) + self.place().to(dtype)
        return x_BFND if self.ln_pre is None else self.ln_pre(x_BFND)

    def place(self) -> Tensor:
        """What is added to the tokens of the images [F, N, D]."""
        temporal = self.positions
        if self.adds_positions:
            own = self.positional_embedding.to(temporal.dtype)
            temporal = own + temporal * (own.square().mean() / temporal.square().mean()).sqrt()
        if self.spatial_positional_embedding is not None:
            temporal = temporal + self.spatial_positional_embedding
        spatial = self.positional_embedding.to(temporal.dtype).expand(self.spatial_frames, -1, -1)
        return torch.cat([temporal, spatial])

    @property
    def stem_trains(self) -> bool:
        """Whether something does in what `stem` computes."""
        return super().stem_trains or self.spatial_positional_embedding is not None


class DualBlock(Block):
    """A block whose attention and MLP work on the images of both paths at once, with the adapters of each."""

    def __init__(self, geometry: ViTGeometry, options: DualPathOptions, framesets: int) -> None:
        super().__init__(geometry)
        width, hidden = geometry.width, options.hidden(geometry.width)
        self.framesets = framesets
        self.t_adapter_attn_b = Adapter(width, hidden) if options.form == "published_code" else None
        self.t_adapter_attn = Adapter(width, hidden)
        self.s_adapter_attn = Adapter(width, hidden)
        self.t_adapter_mlp = Adapter(width, hidden)
        self.s_adapter_mlp = Adapter(width, hidden)

    def forward(self, x_FBND: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks`: scaled keep masks [B, adapters, hidden] in the order of `_ADAPTERS`, then that of the adapter before
        attention; or None."""
        G = self.framesets
        t_attn, s_attn, t_mlp, s_mlp, *before = _columns(masks)
        x, y = x_FBND, self.ln_1(x_FBND)
        seen = y
        if self.t_adapter_attn_b is not None:
            seen = torch.cat([self.t_adapter_attn_b(y[:G], *before), y[G:]])
        z = self.attn.over_space(seen)
        x = x + torch.cat([self.t_adapter_attn(z[:G], t_attn), z[G:] + self.s_adapter_attn(y[G:], s_attn)])
        y = self.ln_2(x)
        z = self.mlp(y)
        return x + torch.cat([self.t_adapter_mlp(z[:G], t_mlp), z[G:] + self.s_adapter_mlp(y[G:], s_mlp)])


def _columns(masks: Tensor | None) -> list[Tensor | None]:
    """Masks [B, adapters, hidden] → one [B, 1, hidden] an adapter."""
    if masks is None:
        return [None] * (len(_ADAPTERS) + 1)
    return [mask.unsqueeze(1) for mask in masks.unbind(1)]


class Adapter(nn.Module):
    """Bottleneck D → hidden → D with GELU between, without a skip connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down_proj = Linear(width, hidden)
        self.up_proj = Linear(hidden, width)

    def reset(self) -> None:
        """The start of LoRA: down at random, up at zero."""
        nn.init.kaiming_uniform_(self.down_proj.weight, a=sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: scaled keep mask of the hidden features, to be broadcast."""
        hidden = F.gelu(self.down_proj(x))
        return self.up_proj(hidden if mask is None else hidden * mask)


class Fusion(nn.Module):
    """The head's hidden layer: both paths' features [B, 2E] → [B, E]. The classifier after it is the model's own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear1 = Linear(2 * features, features)

    def reset(self) -> None:
        """PyTorch's start."""
        self.linear1.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear1(x))


def make_framesets(clips: Tensor, grid: int, *, antialias: bool) -> Tensor:
    """Clips [B, T, 3, H, W] → framesets [B, T / grid², 3, H, W].

    Whole frames are tiled, then the mosaic is shrunk, so that neighbours mix a little where they meet, as published.
    """
    B, T, C, H, W = clips.shape
    cells = clips.reshape(B * T // grid**2, grid, grid, C, H, W)
    mosaics = cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, C, grid * H, grid * W)
    return _resized(mosaics, (H, W), antialias).unflatten(0, (B, -1))


def _resized(images: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Bilinearly, in float32: not every device has the filter in 16 bits."""
    return F.interpolate(images.float(), size, mode="bilinear", antialias=antialias).to(images.dtype)


def _frame_numbers(grid: int, side: int, framesets: int, antialias: bool) -> Tensor:
    """The published map: which frame of the clip a token shows, from 1, a fraction where it shows several, and 0 for
    the class token [G, N]."""
    cell = max(_CANVAS // grid, 1)
    numbers = torch.arange(1.0, framesets * grid**2 + 1).view(framesets, 1, grid, grid)
    canvas = numbers.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return F.pad(_resized(canvas, (side, side), antialias).flatten(1), (1, 0))


def _positions(grid: int, side: int, framesets: int, width: int) -> Tensor:
    """The paper's three-dimensional code of time and place [G, N, D]: a third of the features for the frame's number,
    from 1, one for the row and one for the column within the frame, in tokens. The class token's are those of 0."""
    middles = (torch.arange(side) + 0.5) * grid / side  # in frames
    cells = middles.floor()
    within = (middles - cells) * side / grid
    first = torch.arange(framesets) * grid**2 + 1
    time = first[:, None, None] + grid * cells[:, None] + cells  # [G, P, P]
    third = width // 6 * 2
    parts = (
        (time, width - 2 * third),
        (within[:, None].expand_as(time), third),
        (within.expand_as(time), third),
    )
    return torch.cat([_sinusoids(F.pad(part.flatten(1), (1, 0)), size) for part, size in parts], dim=2)


def _sinusoids(numbers: Tensor, width: int) -> Tensor:
    """Numbers [...] → sines and cosines of them in turn [..., width], at the Transformer's frequencies."""
    angles = numbers[..., None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _read(entry: Format, shapes: Shapes) -> Reading:
    geometry = read_clip_vit(entry, shapes, normalisation="imagenet")  # which the official code uses with CLIP too
    if f"{BACKBONE}.proj" in shapes:
        geometry = replace(geometry, embed_dim=shape_of(entry, shapes, f"{BACKBONE}.proj", 2)[1])
    adapter = f"{BACKBONE}.transformer.resblocks.0.t_adapter_mlp.down_proj.weight"
    form = "published_code" if f"{BACKBONE}.spatial_positional_embedding" in shapes else "paper"
    options = {"form": form, "bottleneck": shape_of(entry, shapes, adapter, 2)[0]}
    defaults = DualPathOptions()
    assumed = {
        "heads": geometry.heads,
        "quick_gelu": geometry.quick_gelu,
        "num_frames": PUBLISHED_FRAMES,
        "grid": defaults.grid,
        "spatial_frames": defaults.spatial_frames,
        "antialias": defaults.antialias,
    }
    return reading(entry, shapes, geometry, PUBLISHED_FRAMES, options, assumed)


METHODS = (
    Method(
        "dualpath",
        "frozen image model, frames as they are and shrunk into grids, adapters for both",
        DualPathOptions,
        {ViTGeometry: DualPath},
        (
            Format(
                name="dualpath",
                summary="DualPath on CLIP's ViT",
                family="dualpath",
                method="dualpath",
                marks=(CLIP_MARK, r"\.t_adapter_mlp\."),
                read=_read,
                holds=lambda description: description["method"] == "dualpath" and stands_on(description, ln_pre=True),
                outside={"visual.head.linear2": "cls_head.fc_cls", "visual": BACKBONE},
                root="visual.",
                dropped=(TEXT_TOWER,),
            ),
        ),
        shown_options=("form", "bottleneck"),
        paper='Park et al., "Dual-path Adaptation from Image to Video Transformers", CVPR 2023',
    ),
)
