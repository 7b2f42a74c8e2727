"""Side4Video: a narrow network beside an image model which stays as it is (Yao et al., "Side4Video: Spatial-Temporal
Side Network for Memory-Efficient Image-to-Video Transfer Learning", 2023; official file `Recognition/clip/model.py` of
HJYao00/Side4Video).

    pixels ─ 3-D convolution, BN ─▶ side patches s ─ side block ─ … ─ side block ─▶ BN ─▶ mean over patches and frames
                                                        ▲ half of the way towards linear(norm(tokens)) of its block
    frames ─ frozen ViT, no gradients ─▶ tokens ─ block ┴ … ─ block

A side block: s ← (s + tokens) / 2; a convolution over time between two linear layers, after BN; attention of a frame's
patches to each other and to the class token of the neighbouring frames (half of its features from the next frame, half
from the one before); a feed-forward layer, after BN.

The gradient never enters the image model, and of its activations nothing is kept but the tokens that the side network
reads, normed. The batch norms' statistics are those of a micro-batch on all processes together, and are part of a
checkpoint: the side network wants many clips in a micro-batch.

What differs from the published code, in the order of operations and not in what is computed: the weights of the norms
between the two networks are multiplied into the linear layers that follow, so that of the tokens one copy is kept and
not two; the first convolution is one of images with three times the features, added over time; and the class tokens
attend too, which nothing reads (0.02 % of the multiply-adds).

Legend of shapes: B clips, T frames, N tokens a frame (class token first), P patches a frame, D the image model's width,
S that of the side network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import AIMOptions
from model.geometry import ImageTower, ViTGeometry
from model.layers import BatchNorm, LayerNorm, Linear, convolve_time, linear
from model.method import Method
from model.methods.aim import Block
from model.official import CLIP_MARK, HEAD_WIDTH, Format, Reading, Shapes, read_clip_vit, reading, shape_of
from model.speed import call_block
from model.video import Head, VideoModel, check_rates, load_tower_weights
from model.vit import Attention, ViT, initialise

PUBLISHED_FRAMES = 8
"""Of the published models on which most is reported; no tensor depends on it."""
_DEPTH = 12  # of the network that the published initialisation is for, whatever the model's


@dataclass(frozen=True)
class Side4VideoOptions:
    """What can be set of Side4Video; the defaults are as published."""

    side_width: int = 320
    """Of the side network, in heads of 64."""
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.side_width < HEAD_WIDTH or self.side_width % HEAD_WIDTH:
            raise ValueError(f"model.side_width = {self.side_width}; allowed is a multiple of {HEAD_WIDTH}")
        check_rates(self, "head_dropout")


class Side4Video(VideoModel):
    """Side4Video on a ViT with a class token; arguments as `model.methods.create` says."""

    trained_names = ("side_", "cls_head")

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: Side4VideoOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, options.side_width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.backbone = LadderViT(geometry, options.side_width)
        weights = {name: weight for name, weight in tower.state_dict.items() if not name.startswith("ln_post.")}
        load_tower_weights(self.backbone, weights, ("side_",))
        self.finish()

    def make_head(self, num_classes: int) -> nn.Module:
        head = Head(self.features, num_classes)
        head.fc_cls.reset_parameters()  # published: PyTorch's own start
        return head


class LadderViT(ViT):
    """Normalised clips [B, T, 3, H, W] → features of the clip [B, S]."""

    stem_trains = True  # the side network reads pixels

    def __init__(self, geometry: ViTGeometry, side_width: int) -> None:
        plain = AIMOptions(adapters=())
        super().__init__(geometry, lambda _: Block(geometry, plain), None)
        del self.ln_post  # the last block's tokens are read without it
        initialise(self)
        layers = range(geometry.layers)
        self.side_conv1 = SideStem(side_width, geometry.patch_size)
        self.side_pre_bn3d = BatchNorm(side_width)
        self.side_spatial_position_embeddings = nn.Parameter(0.01 * torch.randn(geometry.num_tokens - 1, side_width))
        self.side_lns = nn.ModuleList(LayerNorm(geometry.width) for _ in layers)
        self.side_linears = nn.ModuleList(Linear(geometry.width, side_width) for _ in layers)
        self.side_transformer = nn.ModuleList(SideBlock(side_width) for _ in layers)
        self.side_post_bn = BatchNorm(side_width)
        for part in self.side_linears:
            assert isinstance(part, Linear)
            nn.init.normal_(part.weight, std=(2 * side_width) ** -0.5)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        side_BTPS = self.side_pre_bn3d(self.side_conv1(clips))
        with torch.no_grad():
            x_BTND = self.stem(clips)
        for layer, block in enumerate(self.transformer.resblocks):
            with torch.no_grad():
                x_BTND = call_block(block, x_BTND, None)
            norm, narrow = self.side_lns[layer], self.side_linears[layer]
            assert isinstance(norm, LayerNorm) and isinstance(narrow, Linear)
            read_BTNS = read(x_BTND, norm, narrow)
            side_block = self.side_transformer[layer]
            side_BTPS = call_block(side_block, side_BTPS, read_BTNS, self.side_spatial_position_embeddings)
        return self.side_post_bn(side_BTPS).mean(dim=(1, 2))

    @property
    def blocks(self) -> list[nn.Module]:
        """Of both networks, in the order in which they compute."""
        pairs = zip(self.transformer.resblocks, self.side_transformer, strict=True)
        return [block for pair in pairs for block in pair]

    @property
    def _stem_blocks(self) -> int:
        return 0


def read(x_BTND: Tensor, norm: LayerNorm, narrow: Linear) -> Tensor:
    """narrow(norm(x)), for which autograd keeps one tensor as large as x: [B, T, N, S]."""
    with torch.no_grad():
        normed_BTND = F.layer_norm(x_BTND, norm.normalized_shape, eps=norm.eps)
    return linear(normed_BTND, narrow.weight * norm.weight, narrow.bias + narrow.weight @ norm.bias)


class SideStem(nn.Conv3d):
    """Patches of three frames to side patches: [B, T, 3, H, W] → [B, T, P, S]; zeros beyond the clip's ends."""

    def __init__(self, side_width: int, patch_size: int) -> None:
        super().__init__(3, side_width, (3, patch_size, patch_size))

    def forward(self, clips: Tensor) -> Tensor:
        B, T, _, _, _ = clips.shape
        kernels = self.weight.transpose(0, 1).movedim(2, 0)  # [3 frames, 3 colours, S, p, p]
        kernels = kernels.transpose(1, 2).flatten(0, 1).to(clips.dtype)
        parts = F.conv2d(clips.flatten(0, 1), kernels, stride=self.kernel_size[1:])
        before, own, after = parts.flatten(2).transpose(1, 2).unflatten(0, (B, T)).chunk(3, dim=-1)
        assert self.bias is not None
        return own + F.pad(before[:, :-1], _ONE_BEFORE) + F.pad(after[:, 1:], _ONE_AFTER) + self.bias.to(clips.dtype)


_ONE_BEFORE, _ONE_AFTER = (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1)  # of the frames


class SideBlock(nn.Module):
    """One rung. Parameters bear the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn_1 = BatchNorm(width)
        self.conv = nn.Sequential(PointConvolution(width), TimeConvolution(width), PointConvolution(width))
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, width // HEAD_WIDTH)
        self.bn_2 = BatchNorm(width)
        self.mlp = SideMLP(width)
        to_residual = width**-0.5 * (2 * _DEPTH) ** -0.5
        for weight, std in (
            (self.attn.in_proj_weight, width**-0.5),
            (self.attn.out_proj.weight, to_residual),
            (self.mlp.fc1.weight, (2 * width) ** -0.5),
            (self.mlp.fc2.weight, to_residual),
        ):
            nn.init.normal_(weight, std=std)
        nn.init.zeros_(self.attn.out_proj.bias)

    def forward(self, side_BTPS: Tensor, read_BTNS: Tensor, positions_PS: Tensor) -> Tensor:
        """Side patches, what is read of the image model's tokens, and positions for the attention → side patches."""
        s = torch.lerp(side_BTPS, read_BTNS[:, :, 1:], 0.5)
        s = s + self.conv(self.bn_1(s))
        tokens_BTNS = torch.cat([neighbours(read_BTNS[:, :, :1]), s + positions_PS.to(s.dtype)], dim=2)
        s = s + self.attn.over_space(self.ln_1(tokens_BTNS))[:, :, 1:]
        return s + self.mlp(self.bn_2(s))


def neighbours(class_BT1S: Tensor) -> Tensor:
    """Half of the next frame's class token and half of that of the frame before; zeros beyond the clip's ends."""
    first, second = class_BT1S.chunk(2, dim=-1)
    return torch.cat([F.pad(first[:, 1:], _ONE_AFTER), F.pad(second[:, :-1], _ONE_BEFORE)], dim=-1)


class PointConvolution(nn.Conv3d):
    """A linear layer with the published shape: [B, T, P, S] → [B, T, P, S]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 1)

    def forward(self, x_BTPS: Tensor) -> Tensor:
        return linear(x_BTPS, self.weight.flatten(1), self.bias)


class TimeConvolution(nn.Conv3d):
    """Every feature by itself over three frames: [B, T, P, S] → [B, T, P, S]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, (3, 1, 1), groups=width)

    def forward(self, x_BTPS: Tensor) -> Tensor:
        return convolve_time(x_BTPS, self.weight.flatten(2), self.bias)


class SideMLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _read(entry: Format, shapes: Shapes) -> Reading:
    """How wide the side network is, beside the image model; no tensor shows how many frames a clip has."""
    geometry = read_clip_vit(entry, shapes, "openai_clip")
    side_width, _, _, _, _ = shape_of(entry, shapes, "backbone.side_conv1.weight", 5)
    assumed = {"heads": geometry.heads, "quick_gelu": geometry.quick_gelu, "num_frames": PUBLISHED_FRAMES}
    return reading(entry, shapes, geometry, PUBLISHED_FRAMES, {"side_width": side_width}, assumed)


METHODS = (
    Method(
        "side4video",
        "side network on all blocks of a frozen image model",
        Side4VideoOptions,
        {ViTGeometry: Side4Video},
        (
            Format(
                name="side4video",
                summary="Side4Video on CLIP's ViT",
                family="side4video",
                method="side4video",
                marks=(CLIP_MARK, r"\.side_transformer\.\d+\."),
                read=_read,
                holds=lambda description: (
                    description["method"] == "side4video"
                    and description["geometry"]["ln_pre"]
                    and not description["geometry"]["patch_bias"]
                ),
                outside={
                    "visual": "backbone",
                    **{
                        f"visual.transformer.{name}": f"backbone.{name}"
                        for name in ("side_transformer", "side_linears", "side_lns", "side_spatial_position_embeddings")
                    },
                    "fc": "cls_head.fc_cls",
                },
                prefix="",
                dropped=(
                    (
                        r".*\.num_batches_tracked",
                        "a count of the batch norms' steps, which their momentum does not need",
                    ),
                ),
            ),
        ),
        shown_options=("side_width",),
        paper=(
            'Yao et al., "Side4Video: Spatial-Temporal Side Network for Memory-Efficient '
            'Image-to-Video Transfer Learning", 2023'
        ),
    ),
)
