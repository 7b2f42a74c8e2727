"""Numbers as others published them, which `tools/model_table.py` sets beside ours, or lists alone.

GFLOPs are multiply-adds in 10⁹ over all views, parameters are in millions, accuracies in percent. None: not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLIP_B = "ViT-B-16-quickgelu"
CLIP_L = "ViT-L-14-quickgelu"
IN21K_B = "vit_base_patch16_224"
SWIN_B = "swin_base_patch4_window7_224"


@dataclass(frozen=True)
class Rebuilt:
    """The model of this project that a published row is of."""

    method: str
    """A key of `model.methods.METHODS`."""
    name: str
    """`model.name`: the image model."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the method's defaults."""


@dataclass(frozen=True)
class Published:
    """A row of a published table."""

    method: str
    backbone: str
    pretrain: str
    views: str
    """Frames × clips × crops; empty: not stated."""
    gflops: float | None
    params_m: float | None
    tunable_m: float | None
    top1: float | None
    top5: float | None
    rebuilt: Rebuilt | None = None
    memory_gb: float | None = None
    """Of each of 8 V100, in training."""
    hours: float | None = None
    """Of training on them, wall clock."""


@dataclass(frozen=True)
class PublishedTable:
    """A published table; without rebuilt rows it is of others' models alone."""

    title: str
    source: str
    classes: int
    rows: tuple[Published, ...]


_AIM = "Yang et al., AIM, ICLR 2023"
_SSV2 = {"temporal_adapters": 2, "adapter_scale": 1.0}


def _aim_b(**options: Any) -> Rebuilt:
    return Rebuilt("aim", CLIP_B, options)


def _aim_l(**options: Any) -> Rebuilt:
    return Rebuilt("aim", CLIP_L, options)


def _in21k(method: str, **options: Any) -> Rebuilt:
    return Rebuilt(method, IN21K_B, options)


KINETICS400 = PublishedTable(
    "Kinetics-400",
    f"{_AIM}, comparison on K400",
    400,
    (
        Published("AIM", "ViT-B/16", "CLIP", "8x3x1", 606, 97, 11, 83.9, 96.3, _aim_b()),
        Published("AIM", "ViT-B/16", "CLIP", "16x3x1", 1214, 97, 11, 84.5, 96.6, _aim_b()),
        Published("AIM", "ViT-B/16", "CLIP", "32x3x1", 2428, 97, 11, 84.7, 96.7, _aim_b()),
        Published("AIM", "ViT-L/14", "CLIP", "8x3x1", 2802, 341, 38, 86.8, 97.2, _aim_l()),
        Published("AIM", "ViT-L/14", "CLIP", "16x3x1", 5604, 341, 38, 87.3, 97.6, _aim_l()),
        Published("AIM", "ViT-L/14", "CLIP", "32x3x1", 11208, 341, 38, 87.5, 97.7, _aim_l()),
        Published("MViT-B", "", "", "64x3x3", 4095, 37, 37, 81.2, 95.1),
        Published("UniFormer-B", "", "IN-1K", "32x4x3", 3108, 50, 50, 83.0, 95.4),
        Published("TimeSformer-L", "", "IN-21K", "64x1x3", 7140, 121, 121, 80.7, 94.7),
        Published("ViViT-L/16x2 FE", "", "IN-21K", "32x1x1", 3980, 311, 311, 80.6, 92.7),
        Published("VideoSwin-L", "", "IN-21K", "32x4x3", 7248, 197, 197, 83.1, 95.9),
        Published("MViTv2-L (312)", "", "IN-21K", "32x3x5", 42420, 218, 218, 86.1, 97.0),
        Published("MTV-L", "", "JFT", "32x4x3", 18050, 876, 876, 84.3, 96.3),
        Published("TokenLearner-L/10", "", "JFT", "64x4x3", 48912, 450, 450, 85.4, 96.3),
        Published("PromptCLIP A7", "", "CLIP", "16x5x1", None, None, None, 76.8, 93.5),
        Published("ActionCLIP", "", "CLIP", "32x10x3", 16890, 142, 142, 83.8, 97.1),
        Published("X-CLIP-L/14", "", "CLIP", "8x4x3", 7890, 420, 420, 87.1, 97.6),
        Published("EVL ViT-L/14", "", "CLIP", "32x3x1", 8088, 368, 59, 87.3, None),
    ),
)

PRETRAINED_MODELS = PublishedTable(
    "Pre-trained models, Kinetics-400",
    f"{_AIM}, ablation of pre-trained models; GFLOPs of TimeSformer and Video Swin from their own papers (a view times "
    "the views)",
    400,
    (
        Published(
            *("TimeSformer", "ViT-B/16", "IN-21K", "8x1x3", 590, None, 121, 78.5, None),
            *(_in21k("timesformer"), 10, 20),
        ),
        Published("AIM", "ViT-B/16", "IN-21K", "8x3x1", None, None, 11, 78.8, None, _in21k("aim"), 7, 15),
        Published(
            *("TimeSformer", "ViT-B/16", "CLIP", "8x3x1", None, None, 121, 82.0, None),
            *(Rebuilt("timesformer_clip", CLIP_B), 10, 20),
        ),
        Published("AIM", "ViT-B/16", "CLIP", "8x3x1", 606, 97, 11, 83.9, 96.3, _aim_b(), 7, 15),
        Published(
            *("VideoSwin-B", "Swin-B", "IN-21K", "32x4x3", 12 * 282, None, 88, 82.7, None),
            *(Rebuilt("video_swin", SWIN_B), 18, 64),
        ),
        Published(
            *("AIM", "Swin-B", "IN-21K", "32x4x3", None, None, 9.2, 82.1, None),
            *(Rebuilt("aim", SWIN_B), 9, 37),
        ),
    ),
)

COMPONENTS = PublishedTable(
    "Components, Something-Something V2",
    f"{_AIM}, ablation of components; GFLOPs of the last row from a later paper's table",
    174,
    (
        Published("frozen space-only", "ViT-B/16", "IN-21K", "8x1x3", None, 86, 0.1, 15.1, 36.9, _in21k("frozen")),
        Published("finetuned space-only", "ViT-B/16", "IN-21K", "8x1x3", None, 86, 86, 36.2, 68.1, _in21k("finetuned")),
        Published(
            *("finetuned space-time", "ViT-B/16", "IN-21K", "8x1x3", None, 121, 121, 59.5, 85.6),
            _in21k("timesformer"),
        ),
        Published(
            *("frozen + spatial", "ViT-B/16", "IN-21K", "8x1x3", None, 89, 3.7, 36.7, 68.3),
            _in21k("aim", adapters=("spatial",), **_SSV2),
        ),
        Published(
            *("+ temporal", "ViT-B/16", "IN-21K", "8x1x3", None, 97, 10.8, 61.2, 87.7),
            _in21k("aim", adapters=("spatial", "temporal"), **_SSV2),
        ),
        Published("+ joint (AIM)", "ViT-B/16", "IN-21K", "8x1x3", None, 100, 14.3, 62.0, 87.9, _in21k("aim", **_SSV2)),
        Published("AIM", "ViT-B/16", "CLIP", "8x1x3", 624, 100, 14.3, 66.4, 90.5, _aim_b(**_SSV2)),
    ),
)

POSITIONS = PublishedTable(
    "Positions of the adapters, Kinetics-400",
    f"{_AIM}, ablation of positions",
    400,
    (
        *(
            Published(
                *(f"AIM, {name}", "ViT-B/16", "CLIP", "8x3x1", None, None, 5.6, top1, None),
                _aim_b(positions=positions),
            )
            for name, positions, top1 in (
                ("bottom 6", "bottom 6", 80.7),
                ("top 6", "top 6", 83.3),
                ("skip", "every 2", 83.2),
            )
        ),
        Published("AIM, all", "ViT-B/16", "CLIP", "8x3x1", 606, 97, 11, 83.9, 96.3, _aim_b()),
    ),
)

RATIOS = PublishedTable(
    "Bottleneck ratios, Kinetics-400",
    f"{_AIM}, ablation of ratios (only the chosen one's numbers are known here)",
    400,
    (
        *(
            Published(
                *(f"AIM, ratio {ratio}", "ViT-B/16", "CLIP", "8x3x1", None, None, None, None, None),
                _aim_b(adapter_ratio=ratio),
            )
            for ratio in (0.0625, 0.125)
        ),
        Published("AIM, ratio 0.25", "ViT-B/16", "CLIP", "8x3x1", 606, 97, 11, 83.9, 96.3, _aim_b()),
        Published(
            *("AIM, ratio 0.5", "ViT-B/16", "CLIP", "8x3x1", None, None, None, None, None),
            _aim_b(adapter_ratio=0.5),
        ),
    ),
)

OTHERS_K400 = PublishedTable(
    "Other methods, Kinetics-400",
    "the papers and repositories of the methods; GFLOPs of ST-Adapter from a later paper's table",
    400,
    (
        Published(
            *("ST-Adapter 12x384", "ViT-B/16", "CLIP", "8x3x1", 455, None, 7.2, 82.0, 95.7),
            Rebuilt("st_adapter", CLIP_B),
        ),
        Published(
            *("ST-Adapter 12x384", "ViT-L/14", "CLIP", "32x3x1", 8248, None, None, 87.2, 97.6),
            Rebuilt("st_adapter", CLIP_L),
        ),
        Published("EVL", "ViT-B/16", "CLIP", "8x3x1", None, None, None, 82.8, None, Rebuilt("evl", CLIP_B)),
        Published("EVL", "ViT-B/16", "CLIP", "16x3x1", None, None, None, 83.7, None, Rebuilt("evl", CLIP_B)),
        Published("EVL", "ViT-B/16", "CLIP", "32x3x1", None, None, None, 84.3, None, Rebuilt("evl", CLIP_B)),
        Published("EVL", "ViT-L/14", "CLIP", "8x3x1", None, None, None, 86.3, None, Rebuilt("evl", CLIP_L)),
        Published("EVL", "ViT-L/14", "CLIP", "16x3x1", None, None, None, 86.9, None, Rebuilt("evl", CLIP_L)),
        Published("EVL", "ViT-L/14", "CLIP", "32x3x1", 8088, 368, 59, 87.7, None, Rebuilt("evl", CLIP_L)),
        Published("DualPath", "ViT-B/16", "CLIP", "", None, 96, 10, 85.4, 97.1),
        Published("DualPath", "ViT-L/14", "CLIP", "", None, None, 27, 87.7, 97.8),
        Published(
            *("ZeroI2V", "ViT-B/16", "CLIP", "8x3x1", 422, None, None, 83.0, None),
            Rebuilt("zero_i2v", CLIP_B, {"folded": True}),
        ),
        Published(
            *("Side4Video", "ViT-B/16", "CLIP", "8x3x4", None, None, None, 83.6, None), Rebuilt("side4video", CLIP_B)
        ),
    ),
)

KINETICS700 = PublishedTable(
    "Kinetics-700",
    f"{_AIM}, comparison on K700",
    700,
    (
        Published("AIM", "ViT-B/16", "CLIP", "32x3x3", 7284, 97, 11, 76.9, None, _aim_b()),
        Published("AIM", "ViT-L/14", "CLIP", "32x3x3", 33624, 341, 38, 80.4, None, _aim_l()),
        Published("VidTR-L", "", "IN-21K", "", None, None, 91, 70.2, None),
        Published("MTV-L", "", "IN-21K", "", None, None, 876, 75.2, None),
        Published("MViTv2-B", "", "", "", None, None, 51, 76.6, None),
        Published("MViTv2-L (40x312)", "", "IN-21K", "", None, None, 218, 79.4, None),
        Published("MaskFeat (40x312)", "", "K700", "", None, None, 218, 80.4, None),
    ),
)

DIVING48 = PublishedTable(
    "Diving-48",
    f"{_AIM}, comparison on Diving-48",
    48,
    (
        Published("AIM", "ViT-B/16", "CLIP", "32x1x1", 809, 97, 11, 88.9, None, _aim_b()),
        Published("AIM", "ViT-L/14", "CLIP", "32x1x1", 3736, 341, 38, 90.6, None, _aim_l()),
        Published("TimeSformer-L", "", "IN-21K", "", None, None, 121, 81.0, None),
        Published("VideoSwin-B", "", "IN-21K", "", None, None, 88, 81.9, None),
        Published("BEVT", "", "K400", "", None, None, 88, 86.7, None),
        Published("SIFAR-B-14", "", "IN-21K", "", None, None, 87, 87.3, None),
        Published("ORViT", "", "IN-21K", "", None, None, 160, 88.0, None),
    ),
)

TABLES = (KINETICS400, PRETRAINED_MODELS, COMPONENTS, POSITIONS, RATIOS, OTHERS_K400, KINETICS700, DIVING48)
