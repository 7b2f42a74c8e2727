"""Parameter counts are the published implementations', to the last one; the table names every kind of part."""

from __future__ import annotations

from typing import Any

import pytest

from model.geometry import ImageTower, SwinGeometry, ViTGeometry
from model.methods import create
from model.parameters import count_parameters, parameter_table
from model.video import VideoModel
from tests.blank_models import CLIP_B, CLIP_L, IN21K_B, SWIN_B, blank_model

SSV2: dict[str, Any] = {"temporal_adapters": 2, "adapter_scale": 1.0}


@pytest.mark.parametrize(
    ("name", "classes", "frames", "options", "total", "trainable"),
    [
        (CLIP_B, 400, 8, {}, 96_764_560, 10_966_672),
        (CLIP_B, 400, 16, {}, 96_770_704, 10_972_816),
        (CLIP_B, 400, 32, {}, 96_782_992, 10_985_104),
        (CLIP_B, 700, 8, {}, 96_995_260, 11_197_372),
        (CLIP_B, 700, 32, {}, 97_013_692, 11_215_804),
        (CLIP_B, 48, 32, {}, 96_512_304, 10_714_416),
        (CLIP_B, 174, 8, SSV2, 100_141_230, 14_343_342),
        (CLIP_B, 174, 32, SSV2, 100_159_662, 14_361_774),
        (CLIP_L, 400, 8, {}, 341_438_864, 38_261_136),
        (CLIP_L, 400, 16, {}, 341_447_056, 38_269_328),
        (CLIP_L, 400, 32, {}, 341_463_440, 38_285_712),
        (CLIP_L, 700, 32, {}, 341_770_940, 38_593_212),
        (CLIP_L, 48, 32, {}, 341_102_640, 37_924_912),
        (CLIP_L, 174, 8, {}, 341_207_214, 38_029_486),
        (CLIP_L, 174, 8, SSV2, 353_820_846, 50_643_118),
        (IN21K_B, 400, 8, {}, 96_763_792, 10_966_672),
        (IN21K_B, 174, 8, SSV2, 100_140_462, 14_343_342),
        (SWIN_B, 400, 32, {"shipped_freezing": True}, 95_927_276, 9_172_080),
        (SWIN_B, 400, 32, {}, 95_927_276, 9_179_956),
    ],
)
def test_aim_counts_as_published(
    name: str, classes: int, frames: int, options: dict[str, Any], total: int, trainable: int
) -> None:
    assert count_parameters(blank_model("aim", name, classes, frames, **options)) == (total, trainable)


@pytest.mark.parametrize(
    ("method", "name", "classes", "frames", "options", "total"),
    [
        ("timesformer", IN21K_B, 400, 8, {}, 121_566_352),
        ("timesformer", IN21K_B, 174, 8, {}, 121_392_558),
        ("timesformer_clip", CLIP_B, 400, 8, {}, 121_567_120),
        ("finetuned", IN21K_B, 400, 8, {}, 86_106_256),
        ("video_swin", SWIN_B, 400, 32, {}, 88_048_984),
        ("video_swin", SWIN_B, 174, 32, {"temporal_window": 16}, 88_834_038),
    ],
)
def test_baselines_that_train_all_count_as_published(
    method: str, name: str, classes: int, frames: int, options: dict[str, Any], total: int
) -> None:
    assert count_parameters(blank_model(method, name, classes, frames, **options)) == (total, total)


@pytest.mark.parametrize(
    ("method", "options", "total", "trainable"),
    [
        ("frozen", {}, 85_932_462, 135_342),
        ("finetuned", {}, 85_932_462, 85_932_462),
        ("aim", {"adapters": ("spatial",)}, 89_482_926, 3_685_806),
        ("aim", {"adapters": ("spatial", "temporal"), **SSV2}, 96_589_998, 10_792_878),
        ("aim", SSV2, 100_140_462, 14_343_342),
    ],
)
def test_the_ladder_of_components_counts_as_published(
    method: str, options: dict[str, Any], total: int, trainable: int
) -> None:
    assert count_parameters(blank_model(method, IN21K_B, 174, 8, **options)) == (total, trainable)


@pytest.mark.parametrize("positions", ["bottom 6", "top 6", "every 2"])
def test_half_of_the_blocks_adapted(positions: str) -> None:
    assert count_parameters(blank_model("aim", CLIP_B, 400, 8, positions=positions))[1] == 5_640_976


@pytest.mark.parametrize(
    ("ratio", "trainable"), [(0.0625, 2_998_864), (0.125, 5_654_800), (0.25, 10_966_672), (0.5, 21_590_416)]
)
def test_bottleneck_ratios(ratio: float, trainable: int) -> None:
    assert count_parameters(blank_model("aim", CLIP_B, 400, 8, adapter_ratio=ratio))[1] == trainable


@pytest.mark.parametrize(
    ("name", "temporal_adapters", "tensors"), [(CLIP_B, 1, 144), (CLIP_B, 2, 192), (CLIP_L, 1, 288), (CLIP_L, 2, 384)]
)
def test_number_of_adapter_tensors(name: str, temporal_adapters: int, tensors: int) -> None:
    model = blank_model("aim", name, 400, 8, temporal_adapters=temporal_adapters)
    assert sum("Adapter" in key for key, _ in model.named_parameters()) == tensors


def small(method: str, geometry: ViTGeometry | SwinGeometry) -> VideoModel:
    return create(method, ImageTower(geometry, {}), num_classes=3, num_frames=4)


VIT = ViTGeometry(64, 2, 1, 16, 32, True, (0.5,) * 3, (0.5,) * 3)
SWIN = SwinGeometry(width=16, depths=(2, 2), heads=(1, 2), window=4, image_size=32)


@pytest.mark.parametrize(
    ("method", "geometry", "parts"),
    [
        (
            *("aim", VIT),
            "class_embedding positional_embedding temporal_embedding conv1 ln_pre ln_post cls_head resblocks.*.attn "
            "resblocks.*.ln_1 resblocks.*.ln_2 resblocks.*.mlp resblocks.*.S_Adapter resblocks.*.T_Adapter "
            "resblocks.*.MLP_Adapter",
        ),
        (
            *("aim", SWIN),
            "patch_embed norm cls_head layers.*.downsample layers.*.blocks.*.attn layers.*.blocks.*.norm1 "
            "layers.*.blocks.*.norm2 layers.*.blocks.*.mlp layers.*.blocks.*.S_Adapter layers.*.blocks.*.S_Adapter2 "
            "layers.*.blocks.*.T_Adapter",
        ),
    ],
)
def test_the_table_has_a_row_a_kind_of_part(method: str, geometry: ViTGeometry | SwinGeometry, parts: str) -> None:
    model = small(method, geometry)
    _, *lines, last = parameter_table(model).splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(parts.split())
    numbers = [[int(word.replace(",", "")) for word in line.split()[-2:]] for line in (*lines, last)]
    sums = [sum(column) for column in zip(*numbers[:-1], strict=True)]
    assert sums == numbers[-1] == list(count_parameters(model))
    assert last.startswith("all (")
