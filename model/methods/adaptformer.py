"""AdaptFormer: in every block of a frozen transformer a bottleneck beside the MLP (Chen et al., "AdaptFormer: Adapting
Vision Transformers for Scalable Visual Recognition", NeurIPS 2022; official files `models/adapter.py`,
`custom_modules.py`, `vit_image.py` and `vit_video.py` of ShoufaChen/AdaptFormer).

    x' = x + attention(norm(x))
    x'' = x' + MLP(norm(x')) + s · up(ReLU(down(x')))      the bottleneck reads x' itself, not its norm

Two published forms, with the same bottleneck and the same head (a batch norm without parameters, then a linear layer):

`AdaptFormer`: on an image model, frame by frame; the class tokens' mean goes to the head (the code's `global_pool`, off
    as published, is not here), so the order of frames is not seen. `up` starts at zero, so that the model starts as the
    image model.
`AdaptFormerVideo`: on VideoMAE's trunk (`model.videomae`), whose tokens attend over space and time at once; the norm
    of the tokens' mean trains too. The published video code initialises all linear layers anew after the bottlenecks,
    so that they do not start at zero: `adapter_start` chooses.

The video trunk has the shape of a plain ViT (`model.name`, such as vit_base_patch16_224); neither timm nor open_clip
has its weights. They come from a file of VideoMAE (`model.video_weights`, with model.pretrained = "none"); without
such a file all is random, or an image model's weights are taken and its patches' kernel spread over the tubelet's
frames. The image model's positions, class token, first and last norm have no place there, so that this is no start
that was published. With `prompts` and without `bottleneck` it is the paper's VPT on video, with neither its linear
probe.

Dropout between `down` and `up` drops a hidden feature for all tokens of a clip; the official code drops single numbers.
The batch norm's statistics are those of a micro-batch on all processes together: it wants many clips in one, and of a
single clip nothing is left.

A published file whose head is the linear layer alone is read as one whose batch norm is at its start, where it divides
by 1.0000005.

Legend of shapes: B clips, T frames, N tokens, D width, C bottleneck, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import NORMALISATIONS
from model.geometry import RANDOM_WEIGHTS, ImageTower, ViTGeometry
from model.layers import BatchNorm, Linear
from model.method import Method
from model.methods.aim import stands_on
from model.official import (
    BLOCKS,
    HEAD_WIDTH,
    TIMM_MARK,
    TIMM_NAMES,
    Format,
    Reading,
    Shapes,
    blocks_of,
    our_names,
    read_timm_vit,
    reading,
    shape_of,
)
from model.timm_models import LEADING_ONES
from model.video import BACKBONE, Head, VideoModel, check_rates, load_tower_weights
from model.videomae import UnbiasedKeys, VideoMAE
from model.vit import Attention, Block, ViT, initialise
from model.weight_files import read_tensors

PUBLISHED_SIZE, PUBLISHED_FRAMES = 224, 16
"""Of the published video models, where no tensor depends on them."""


@dataclass(frozen=True)
class AdaptFormerOptions:
    """What can be set of AdaptFormer; the defaults are as published."""

    bottleneck: int = 64
    """C; 0: no bottlenecks."""
    adapter_scale: float = 0.1
    """s."""
    adapter_dropout: float = 0.1
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.bottleneck < 0:
            raise ValueError(f"model.bottleneck = {self.bottleneck}; allowed is 0 (none) or more")
        if not 0 <= self.adapter_scale < float("inf"):
            raise ValueError(f"model.adapter_scale = {self.adapter_scale}; allowed is 0 or more")
        check_rates(self, "adapter_dropout", "head_dropout")


@dataclass(frozen=True)
class AdaptFormerVideoOptions(AdaptFormerOptions):
    """The same for the form on VideoMAE's trunk."""

    adapter_dropout: float = 0.0
    adapter_start: str = "random"
    """How bottlenecks start: "random", as the published video code has it, or "zero", as the paper."""
    tubelet: int = 2
    """Frames of a token."""
    prompts: int = 0
    """Learned tokens of every block, as in the paper's comparison with VPT."""
    video_weights: str = ""
    """A weight file of VideoMAE, before or after finetuning (.pth or .safetensors). Its path is no part of the model
    that is made of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_start not in ("random", "zero"):
            raise ValueError(f'model.adapter_start = "{self.adapter_start}"; allowed is random or zero')
        if self.tubelet < 1:
            raise ValueError(f"model.tubelet = {self.tubelet}; allowed is 1 or more")
        if self.prompts < 0:
            raise ValueError(f"model.prompts = {self.prompts}; allowed is 0 (none) or more")


class AdaptMLP(nn.Module):
    """Bottleneck D → C → D with ReLU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down_proj = Linear(width, hidden)
        self.up_proj = Linear(hidden, width)

    def forward(self, x: Tensor, factor: float, mask: Tensor | None) -> Tensor:
        """`mask`: scaled keep mask of the hidden features [B, C], or None."""
        hidden = F.relu(self.down_proj(x))
        if mask is not None:
            hidden = hidden * mask[:, None, None]
        return self.up_proj(hidden, output_factor=factor)

    def start_at_zero(self) -> None:
        """The paper's start: `down` as torch makes linear layers, `up` and all biases at zero."""
        nn.init.kaiming_uniform_(self.down_proj.weight, a=sqrt(5))
        for parameter in (self.down_proj.bias, *self.up_proj.parameters()):
            nn.init.zeros_(parameter)


class AdaptedBlock(Block):
    """A block of the trunk with a bottleneck beside its MLP."""

    def __init__(
        self, geometry: ViTGeometry, options: AdaptFormerOptions, attention: type[Attention] = Attention
    ) -> None:
        super().__init__(geometry, attention)
        self.scale = options.adapter_scale
        self.adaptmlp = AdaptMLP(geometry.width, options.bottleneck) if options.bottleneck else None

    def forward(self, x_BTND: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks`: scaled keep masks of the bottleneck's features [B, C], or None."""
        x = x_BTND + self.attn.over_space(self.ln_1(x_BTND))
        y = x + self.mlp(self.ln_2(x))
        return y if self.adaptmlp is None else y + self.adaptmlp(x, self.scale, masks)


class NormedHead(Head):
    """Features [B, D] → batch norm without parameters → linear layer → logits."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__(features, num_classes)
        self.norm = BatchNorm(features, affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_cls(self.norm(x))


class _Adapted(VideoModel):
    """What both forms share; arguments as `model.methods.create` says."""

    options: AdaptFormerOptions

    def __init__(
        self, tower: ImageTower, num_classes: int | None, num_frames: int, options: AdaptFormerOptions
    ) -> None:
        assert isinstance(tower.geometry, ViTGeometry)
        super().__init__(tower.geometry, tower.geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options

    def make_head(self, num_classes: int) -> nn.Module:
        return NormedHead(self.features, num_classes)

    def start_at_zero(self) -> None:
        """All bottlenecks."""
        for module in self.backbone.modules():
            if isinstance(module, AdaptMLP):
                module.start_at_zero()

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`adapter_dropout` [L, C], if there are bottlenecks; `head_dropout` [D]."""
        assert isinstance(self.geometry, ViTGeometry)
        if not self.options.bottleneck:
            return super().random_masks
        shape = (self.geometry.layers, self.options.bottleneck)
        rates = torch.full(shape, self.options.adapter_dropout, dtype=torch.float64)
        return {"adapter_dropout": rates, **super().random_masks}


class _FrameViT(ViT):
    block_masks = "adapter_dropout"


class AdaptFormer(_Adapted):
    """The form on a ViT with a class token."""

    trained_names = ("adaptmlp", "cls_head")

    def __init__(
        self, tower: ImageTower, num_classes: int | None, num_frames: int, options: AdaptFormerOptions
    ) -> None:
        super().__init__(tower, num_classes, num_frames, options)
        assert isinstance(self.geometry, ViTGeometry)
        geometry = self.geometry
        self.backbone = _FrameViT(geometry, lambda _: AdaptedBlock(geometry, options), None)
        initialise(self.backbone)
        load_tower_weights(self.backbone, tower.state_dict, ("adaptmlp",))
        self.start_at_zero()
        self.finish()


class AdaptFormerVideo(_Adapted):
    """The form on VideoMAE's trunk."""

    trained_names = ("adaptmlp", "embeddings", "fc_norm", "cls_head")
    options: AdaptFormerVideoOptions

    def __init__(
        self, tower: ImageTower, num_classes: int | None, num_frames: int, options: AdaptFormerVideoOptions
    ) -> None:
        super().__init__(tower, num_classes, num_frames, replace(options, video_weights=""))
        assert isinstance(self.geometry, ViTGeometry)
        if num_frames % options.tubelet:
            raise ValueError(
                f"data.num_frames = {num_frames}; allowed are multiples of model.tubelet = {options.tubelet}"
            )
        geometry, tubelet = self.geometry, options.tubelet
        make_block = partial(AdaptedBlock, geometry, options, UnbiasedKeys)
        self.backbone = VideoMAE(geometry, lambda _: make_block(), num_frames, tubelet, options.prompts)
        initialise(self.backbone)
        weights = _pretrained(tower, options)
        load_tower_weights(self.backbone, weights, ("adaptmlp", "embeddings", "fc_norm"))
        if options.adapter_start == "zero":
            self.start_at_zero()
        self.finish()


def _pretrained(tower: ImageTower, options: AdaptFormerVideoOptions) -> dict[str, Tensor]:
    """The trunk's weights under our names; empty where all is to be random."""
    if not options.video_weights:
        return spread(tower.state_dict, options.tubelet)
    if tower.state_dict:
        raise ValueError(
            f'model.video_weights = "{options.video_weights}", and the image model has weights too: set '
            f'model.pretrained = "{RANDOM_WEIGHTS}"'
        )
    return read_videomae(Path(options.video_weights))


def spread(image_weights: Mapping[str, Tensor], tubelet: int) -> dict[str, Tensor]:
    """What of an image model's weights has a place in the video trunk: of a still clip every tubelet gives the token
    that the image model's patch gives."""
    weights = {}
    for name, weight in image_weights.items():
        if name == "conv1.weight":
            weights[name] = (weight / tubelet).unsqueeze(2).repeat(1, 1, tubelet, 1, 1)
        elif name.endswith("attn.in_proj_bias"):
            q, _, v = weight.chunk(3)  # a bias of keys changes no softmax
            stem = name.removesuffix("in_proj_bias")
            weights |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
        elif name == "conv1.bias" or name.startswith(f"{BLOCKS}."):
            weights[name] = weight
    if weights and "conv1.bias" not in weights:  # CLIP has none
        weights["conv1.bias"] = torch.zeros(len(weights["conv1.weight"]))
    return weights


def read_videomae(path: Path) -> dict[str, Tensor]:
    """A file of VideoMAE, its pretraining or a finetuned model, as the trunk's weights; its decoder, norms and head are
    left out, as the official code does. Raises ValueError for another file."""
    if not path.is_file():
        raise ValueError(f"model.video_weights: no such weight file: {path}")
    found = {key.removeprefix("encoder."): tensor for key, tensor in read_tensors(path)[0].items()}
    trunk: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if key.endswith(".attn.qkv.weight"):
            names = (f"{key.removesuffix('qkv.weight')}{part}_proj.weight" for part in "qkv")
            trunk |= zip(names, tensor.chunk(3), strict=True)
        elif key.startswith(("patch_embed.", "blocks.")):
            trunk[key.replace(".mlp.fc", ".fc")] = tensor
    if not any(key.endswith(".attn.q_bias") for key in trunk):
        raise ValueError(f"model.video_weights: {path} holds no video transformer of VideoMAE's")
    ours, _ = our_names(VIDEO, trunk)
    return {name.removeprefix(f"{BACKBONE}."): tensor.float() for name, tensor in ours.items()}


def _bottleneck(entry: Format, shapes: Shapes) -> int:
    """Hidden width of the first block's bottleneck; 0 where there is none."""
    name = f"{BACKBONE}.{BLOCKS}.0.adaptmlp.down_proj.weight"
    return shape_of(entry, shapes, name, 2)[0] if name in shapes else 0


def _read_image(entry: Format, shapes: Shapes) -> Reading:
    geometry = read_timm_vit(entry, shapes)
    options = {"bottleneck": _bottleneck(entry, shapes)}
    assumed: dict[str, Any] = {"heads": geometry.heads, "quick_gelu": geometry.quick_gelu, "num_frames": 1}
    return reading(entry, shapes, geometry, 1, options, assumed | {"adapter_scale": AdaptFormerOptions.adapter_scale})


def _read_video(entry: Format, shapes: Shapes) -> Reading:
    width, _, tubelet, patch, _ = shape_of(entry, shapes, f"{BACKBONE}.conv1.weight", 5)
    hidden, _ = shape_of(entry, shapes, f"{BACKBONE}.{BLOCKS}.0.mlp.c_fc.weight", 2)
    if width % HEAD_WIDTH:
        raise ValueError(f"the width {width} is no multiple of {HEAD_WIDTH}, the width of a head in {entry.name}")
    mean, std = NORMALISATIONS["imagenet"]
    geometry = ViTGeometry(
        width=width,
        layers=1 + max(number for number, _ in blocks_of(shapes)),
        heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=PUBLISHED_SIZE // patch * patch,
        quick_gelu=False,
        mean=mean,
        std=std,
        ln_pre=False,
        patch_bias=True,
        eps=1e-6,
        mlp_width=0 if hidden == 4 * width else hidden,
    )
    prompts = f"{BACKBONE}.embeddings.0"
    options = {
        "bottleneck": _bottleneck(entry, shapes),
        "tubelet": tubelet,
        "prompts": shape_of(entry, shapes, prompts, 3)[1] if prompts in shapes else 0,
    }
    frames = -(-PUBLISHED_FRAMES // tubelet) * tubelet
    assumed = {
        "heads": geometry.heads,
        "quick_gelu": geometry.quick_gelu,
        "num_frames": frames,
        "image_size": geometry.image_size,
        "adapter_scale": AdaptFormerOptions.adapter_scale,
    }
    return reading(entry, shapes, geometry, frames, options, assumed)


_NAMES = {part: ours for part, ours in TIMM_NAMES.items() if not part.startswith(("attn.qkv", "mlp"))}
_NAMES |= {"fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
_SPLIT = r"^blocks\.\d+\.attn\.q_proj\."
_HEAD = {"head.0": "cls_head.norm", "head.1": "cls_head.fc_cls", "head": "cls_head.fc_cls"}  # written by the first
_COUNTER = (r"head\.0\.num_batches_tracked", "a count of the batch norm's steps, which its momentum does not need")


def _in_parts(kind: str) -> tuple[str, ...]:
    return tuple(f"attn.{part}_proj.{kind}" for part in "qkv")


IMAGE = Format(
    name="adaptformer_image",
    summary="AdaptFormer on ImageNet's ViT",
    family="adaptformer",
    method="adaptformer",
    marks=(TIMM_MARK, _SPLIT, r"^cls_token$"),
    read=_read_image,
    holds=lambda description: description["method"] == "adaptformer" and stands_on(description, ln_pre=False),
    names={**_NAMES, "norm": "ln_post"},
    blocks="blocks",
    outside=_HEAD,
    prefix="",
    dropped=(_COUNTER,),
    fused={"attn.in_proj_weight": _in_parts("weight"), "attn.in_proj_bias": _in_parts("bias")},
    leading_ones=LEADING_ONES,
)
VIDEO = Format(
    name="adaptformer_video",
    summary="AdaptFormer on VideoMAE",
    family="adaptformer",
    method="adaptformer_video",
    marks=(TIMM_MARK, _SPLIT, lambda shapes: len(shapes.get("patch_embed.proj.weight", ())) == 5),
    read=_read_video,
    holds=lambda description: description["method"] == "adaptformer_video" and stands_on(description, ln_pre=False),
    names=_NAMES,
    blocks="blocks",
    outside=_HEAD,
    prefix="",
    dropped=(_COUNTER,),
    fused={"attn.in_proj_weight": _in_parts("weight")},
)
METHODS = (
    Method(
        "adaptformer",
        "frozen image model with a bottleneck beside each MLP",
        AdaptFormerOptions,
        {ViTGeometry: AdaptFormer},
        (IMAGE,),
        shown_options=("bottleneck",),
        paper=(
            'Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022'
        ),
    ),
    Method(
        "adaptformer_video",
        "the same on a video transformer of tubelets, joint attention",
        AdaptFormerVideoOptions,
        {ViTGeometry: AdaptFormerVideo},
        (VIDEO,),
        shown_options=("bottleneck", "tubelet", "prompts", "adapter_start", "video_weights"),
        hidden_geometry=("image_size",),
        paper=(
            'Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022'
        ),
    ),
)
