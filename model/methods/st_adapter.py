"""ST-Adapter: a frozen image transformer whose bottlenecks look at the neighbouring frames (Pan et al., "ST-Adapter:
Parameter-Efficient Image-to-Video Transfer Learning", NeurIPS 2022; official file `models_adapter.py` of
linziyi96/st-adapter).

    x_BTND ─ patches ─▶ fc1: D → C ─▶ depthwise convolution over time ─▶ fc2: C → D ─▶ added to the patches

An adapter stands before the MLP's norm ("12x384", Kinetics-400), or before the attention's norm as well ("24x384",
Something-Something V2). Class tokens pass by: they learn of other frames through the patches that they attend to. The
convolution starts at zero, weight and bias, so that the network starts as the image model applied frame by frame; `fc1`
and `fc2` start as torch makes linear layers, with biases 0.

The code has no activation and the paper has one, after the convolution: `activation` chooses. The class tokens' mean
over the frames comes before the last norm, which is frozen; there is no temporal embedding, and nothing depends on the
number of frames. Biases are not decayed.

Parameters bear CLIP's names and the official ones of the adapters. The convolution is computed as one over pictures of
T × P pixels whose channels come last, which is how tokens lie in memory: nothing is permuted.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), P patches a frame, D width, C bottleneck.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import adapted_layers, check_positions
from model.geometry import ImageTower, ViTGeometry
from model.layers import Linear
from model.method import Method
from model.methods.aim import PUBLISHED_FRAMES, stands_on
from model.official import (
    CLIP_MARK,
    PROJECTION,
    Format,
    Reading,
    Shapes,
    blocks_of,
    read_clip_vit,
    reading,
    shape_of,
)
from model.video import Head, VideoModel, check_rates, load_tower_weights
from model.vit import Block, ViT, add_to_patches, initialise

BEFORE = {"attention": ("adapter_pre_attn",), "mlp": ("adapter_pre_mlp",)}
PLACES = {**BEFORE, "both": BEFORE["attention"] + BEFORE["mlp"]}
"""Option `adapters` → the adapters of a block."""


@dataclass(frozen=True)
class STAdapterOptions:
    """What can be set of ST-Adapter; the defaults are as published for Kinetics-400."""

    adapters: str = "mlp"
    """Before what they stand in a block: "mlp" (12x384), "attention", or "both" (24x384)."""
    positions: str | tuple[int, ...] = "all"
    """Which blocks have adapters, as AIM's option of that name says."""
    bottleneck: int = 384
    """Features within an adapter."""
    kernel: int = 3
    """Frames that the convolution sees at once, odd: the frame itself in the middle."""
    activation: str = "none"
    """After the convolution: "none" as in the published code and its models, or "gelu" (the paper has one there)."""
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        for name, allowed in (("adapters", tuple(PLACES)), ("activation", ("none", "gelu"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name} = {getattr(self, name)!r}; allowed is {' or '.join(allowed)}")
        if not 1 <= self.bottleneck <= 65536:
            raise ValueError(f"model.bottleneck = {self.bottleneck}; allowed is 1 to 65536 features")
        if not (1 <= self.kernel <= 255 and self.kernel % 2):
            raise ValueError(f"model.kernel = {self.kernel}; allowed is an odd number of frames, 1 to 255")
        check_positions(self.positions)
        check_rates(self, "head_dropout")


class STAdapter(VideoModel):
    """ST-Adapter on a ViT with a class token; arguments as `model.methods.create` says."""

    any_frames = True
    trained_names = ("adapter_pre_", "cls_head")
    undecayed_names = (".bias",)

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: STAdapterOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        adapted = adapted_layers(options.positions, geometry.layers)
        self.backbone = PooledViT(geometry, lambda layer: AdaptedBlock(geometry, options, layer in adapted), None)
        initialise(self.backbone)
        load_tower_weights(self.backbone, tower.state_dict, ("adapter_pre_",))
        for module in self.backbone.modules():
            if isinstance(module, Adapter):
                module.start()
        self.finish()

    def make_head(self, num_classes: int) -> nn.Module:
        return Head(self.features, num_classes, std=0.02)


class PooledViT(ViT):
    """Normalised clips [B, T, 3, H, W] → the norm of the class tokens' mean over the frames [B, D]."""

    def tail(self, class_tokens_BTD: Tensor) -> Tensor:
        return self.ln_post(class_tokens_BTD.mean(dim=1))


class AdaptedBlock(Block):
    """A block of the image model with the adapters that its place in the model has."""

    def __init__(self, geometry: ViTGeometry, options: STAdapterOptions, adapted: bool) -> None:
        super().__init__(geometry)
        present = PLACES[options.adapters] if adapted else ()
        self.adapter_pre_attn = Adapter(geometry.width, options) if "adapter_pre_attn" in present else None
        self.adapter_pre_mlp = Adapter(geometry.width, options) if "adapter_pre_mlp" in present else None

    def forward(self, x_BTND: Tensor, masks: Tensor | None = None) -> Tensor:
        x = x_BTND
        if self.adapter_pre_attn is not None:
            x = self.adapter_pre_attn(x)
        x = x + self.attn.over_space(self.ln_1(x))
        if self.adapter_pre_mlp is not None:
            x = self.adapter_pre_mlp(x)
        return x + self.mlp(self.ln_2(x))


class Adapter(nn.Module):
    """Bottleneck with a convolution over time in it, and the skip connection around."""

    def __init__(self, width: int, options: STAdapterOptions) -> None:
        super().__init__()
        self.fc1 = Linear(width, options.bottleneck)
        self.conv = TimeConvolution(options.bottleneck, options.kernel)
        self.fc2 = Linear(options.bottleneck, width)
        self.gelu = options.activation == "gelu"

    def start(self) -> None:
        """The published initialisation."""
        for linear in (self.fc1, self.fc2):
            linear.reset_parameters()
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTND: Tensor) -> Tensor:
        h_BTPC = self.conv(self.fc1(x_BTND[:, :, 1:]))
        return add_to_patches(x_BTND, self.fc2(F.gelu(h_BTPC) if self.gelu else h_BTPC))


class TimeConvolution(nn.Module):
    """A convolution of every feature by itself over the frames: [B, T, P, C] → [B, T, P, C]; zero at the start.

    Beyond the clip's ends there are zeros.
    """

    def __init__(self, features: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, 1, kernel, 1, 1))  # the shape of an nn.Conv3d's
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, h_BTPC: Tensor) -> Tensor:
        weight, bias = self.weight.squeeze(-1).to(h_BTPC.dtype), self.bias.to(h_BTPC.dtype)
        features, _, kernel, _ = weight.shape
        h_BCTP = F.conv2d(h_BTPC.permute(0, 3, 1, 2), weight, bias, padding=(kernel // 2, 0), groups=features)
        return h_BCTP.permute(0, 2, 3, 1)


def _read(entry: Format, shapes: Shapes) -> Reading:
    """Where the adapters stand, how wide they are and how many frames they see; no tensor shows how many a clip has."""
    geometry = read_clip_vit(entry, shapes, "openai_clip")
    assumed = {
        "heads": geometry.heads,
        "quick_gelu": geometry.quick_gelu,
        "activation": "none",
        "num_frames": PUBLISHED_FRAMES,
    }
    standing: dict[int, set[str]] = {}
    sizes = set()
    for number, name in blocks_of(shapes):
        if match := re.search(r"\.(adapter_pre_\w+)\.conv\.weight$", name):
            standing.setdefault(number, set()).add(match[1])
            sizes.add(shape_of(entry, shapes, name, 5))
    kinds = {tuple(sorted(names)) for names in standing.values()}
    adapters = next((place for place, names in PLACES.items() if kinds == {names}), None)
    if adapters is None:
        raise ValueError(f"the adapters of the blocks are {sorted(kinds)}; allowed is one of them, or both, in all")
    if len(sizes) != 1:
        raise ValueError(f"the adapters' convolutions have the shapes {sorted(sizes)}; one is allowed")
    bottleneck, _, kernel, *_ = sizes.pop()
    options = {
        "adapters": adapters,
        "positions": "all" if len(standing) == geometry.layers else tuple(sorted(standing)),
        "bottleneck": bottleneck,
        "kernel": kernel,
    }
    return reading(entry, shapes, geometry, PUBLISHED_FRAMES, options, assumed)


METHODS = (
    Method(
        "st_adapter",
        "adapters with a convolution over time",
        STAdapterOptions,
        {ViTGeometry: STAdapter},
        (
            Format(
                name="st_adapter",
                summary="ST-Adapter on CLIP's ViT",
                family="st_adapter",
                method="st_adapter",
                marks=(CLIP_MARK, r"\.adapter_pre_(attn|mlp)\.conv\."),
                read=_read,
                holds=lambda description: description["method"] == "st_adapter" and stands_on(description, ln_pre=True),
                outside={"fc": "cls_head.fc_cls"},
                prefix="",
                dropped=(PROJECTION,),
            ),
        ),
        shown_options=("adapters", "positions", "bottleneck", "kernel"),
        paper='Pan et al., "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning", NeurIPS 2022',
    ),
)
