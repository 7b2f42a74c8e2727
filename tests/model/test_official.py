"""Official names and ours: recognised, mapped one to one, and what is read off the tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model import official
from model.methods import FORMATS, format_of, from_description
from model.official import Format, Reading
from model.parameters import count_parameters
from tests import official_files
from tests.official_files import Shapes

WRITERS: dict[str, Callable[..., Shapes]] = {name: getattr(official_files, name) for name in FORMATS}
TWO = ("S_Adapter", "T_Adapter_in", "T_Adapter", "MLP_Adapter")
B16: dict[str, Any] = {"width": 768, "layers": 12, "grid": 14}
L14: dict[str, Any] = {"width": 1024, "layers": 24, "grid": 16, "patch": 14, "hidden": 256}
SWIN_B: dict[str, Any] = {"width": 128, "depths": (2, 2, 18, 2)}


def read(shapes: Shapes) -> tuple[Format, Reading]:
    """The format and the settings of tensors that have shapes alone."""
    bare = official.bare_names(shapes)
    entry = official.recognise({bare[key]: shape for key, shape in shapes.items()}, FORMATS.values())
    tensors = {bare[key]: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    ours, _ = official.our_names(entry, tensors)
    return entry, entry.read(entry, {name: tuple(tensor.shape) for name, tensor in ours.items()})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("classes", [5, None])
def test_names_and_values_survive_the_way_to_ours_and_back(name: str, classes: int | None) -> None:
    state = official_files.filled(WRITERS[name](classes=classes))
    entry, _ = read({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert entry.name == name
    bare = official.bare_names(state)
    ours, dropped = official.our_names(entry, {bare[key]: tensor for key, tensor in state.items()})
    assert not dropped and sum(len(official.official_names(entry, key)) for key in ours) == len(state)
    assert all(key.startswith(("backbone.", "cls_head.")) for key in ours)
    back = official.official_tensors(entry, ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_of_a_model_is_one_that_the_official_code_has(name: str) -> None:
    shapes = WRITERS[name]()
    entry, reading = read(shapes)
    with torch.device("meta"):
        model = from_description(reading.description)
    names = [name for key in model.state_dict() for name in official.official_names(entry, key)]
    assert set(names) == set(shapes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("cut", "put"), [("backbone.", ""), ("", "module."), ("", "model."), ("", "module.model.")])
def test_wrappers_are_taken_off(name: str, cut: str, put: str) -> None:
    shapes = {put + key.removeprefix(cut): shape for key, shape in WRITERS[name]().items()}
    entry, reading = read(shapes)
    assert (entry.name, reading.description["num_classes"]) == (name, None if name == "efficient_prompt" else 5)


@pytest.mark.parametrize(
    ("name", "arguments", "total", "trainable"),
    [
        ("aim_clip", {**B16, "frames": 16, "classes": 400, "hidden": 192}, 96_770_704, 10_972_816),
        ("aim_clip", {**B16, "frames": 8, "classes": 174, "hidden": 192, "adapters": TWO}, 100_141_230, 14_343_342),
        ("aim_clip", {**L14, "frames": 32, "classes": 400}, 341_463_440, 38_285_712),
        ("aim_clip", {**L14, "frames": 8, "classes": 174, "adapters": TWO}, 353_820_846, 50_643_118),
        ("aim_in21k", {**B16, "frames": 8, "classes": 174, "adapters": TWO}, 100_140_462, 14_343_342),
        ("aim_swin", {**SWIN_B, "frames": 32, "classes": 400}, 95_927_276, 9_179_956),
        ("timesformer_clip", {**B16, "frames": 8, "classes": 400}, 121_567_120, 121_567_120),
        ("video_swin", {**SWIN_B, "window": 8, "classes": 400}, 88_048_984, 88_048_984),
        ("video_swin", {**SWIN_B, "window": 16, "classes": 174}, 88_834_038, 88_834_038),
    ],
)
def test_settings_of_published_models_are_read_off_the_tensors(
    name: str, arguments: dict[str, Any], total: int, trainable: int
) -> None:
    entry, reading = read(WRITERS[name](**arguments))
    assert entry.name == name
    with torch.device("meta"):
        model = from_description(reading.description)
    assert count_parameters(model) == (total, trainable)
    assert (model.num_frames, model.num_classes) == (arguments.get("frames", 32), arguments["classes"])
    if name.startswith("aim"):
        two = arguments.get("adapters") == TWO
        options = reading.description["options"]
        assert (options["temporal_adapters"], options["adapter_scale"]) == ((2, 1.0) if two else (1, 0.5))


def test_geometry_of_the_trunks() -> None:
    geometry = {name: read(WRITERS[name]())[1].description["geometry"] for name in FORMATS}
    large = read(official_files.aim_clip(**L14))[1].description["geometry"]
    named = ("width", "layers", "heads", "patch_size", "image_size", "quick_gelu", "ln_pre", "patch_bias", "eps")
    assert [large[key] for key in named] == [1024, 24, 16, 14, 224, True, True, False, 1e-5]
    assert [geometry["aim_in21k"][key] for key in named] == [128, 2, 2, 16, 32, False, False, True, 1e-6]
    assert [geometry["timesformer"][key] for key in named] == [128, 2, 2, 16, 32, False, False, True, 1e-6]
    swin = read(official_files.aim_swin(**SWIN_B))[1].description["geometry"]
    assert (swin["depths"], swin["heads"]) == ((2, 2, 18, 2), (4, 8, 16, 32))
    assert (swin["window"], swin["patch_size"], swin["image_size"]) == (7, 4, 224)
    assert [round(255 * part, 3) for part in geometry["aim_clip"]["mean"]] == [122.769, 116.74, 104.04]
    assert geometry["aim_in21k"]["mean"] == geometry["aim_swin"]["mean"] == (0.485, 0.456, 0.406)
    assert geometry["timesformer"]["std"] == (0.225, 0.225, 0.225)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"adapters": (), "frames": None}, {"adapters": (), "positions": "all"}),
        ({"adapters": ("S_Adapter",), "frames": None}, {"adapters": ("spatial",), "positions": "all"}),
        ({"adapters": ("S_Adapter", "T_Adapter")}, {"adapters": ("spatial", "temporal")}),
        ({"blocks": (2, 3)}, {"positions": (2, 3)}),
        ({"blocks": (1, 3), "adapters": TWO}, {"positions": (1, 3), "temporal_adapters": 2, "adapter_scale": 1.0}),
        ({"hidden": 8}, {"adapter_ratio": 8 / 128}),
        ({"hidden": 77}, {"adapter_ratio": 77 / 128}),
    ],
)
def test_ladder_position_and_ratio_are_read_off(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    _, reading = read(official_files.aim_clip(layers=4, **arguments))
    options = reading.description["options"]
    assert {key: options[key] for key in expected} == expected
    assert reading.description["num_frames"] == (8 if arguments.get("frames", 4) is None else 4)
    assert ("num_frames" in reading.assumed) == (arguments.get("frames", 4) is None)


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [((), ()), (("S_Adapter2",), ("spatial",)), (("S_Adapter2", "T_Adapter"), ("spatial", "temporal"))],
)
def test_ladder_of_swin_is_read_off(adapters: tuple[str, ...], expected: tuple[str, ...]) -> None:
    entry, reading = read(official_files.aim_swin(adapters=adapters))
    assert (entry.name, reading.description["options"]["adapters"]) == ("aim_swin", expected)
    assert reading.description["num_frames"] == (4 if "temporal" in expected else 32)


@pytest.mark.parametrize(
    ("name", "extra", "reason"),
    [
        ("aim_clip", "backbone.proj", "texts"),
        ("aim_in21k", "backbone.head.weight", "images"),
        ("aim_swin", "backbone.layers.0.blocks.0.attn.relative_position_index", "geometry"),
        ("aim_swin", "backbone.layers.0.blocks.1.attn_mask", "geometry"),
        ("video_swin", "backbone.head.bias", "images"),
    ],
)
def test_what_is_no_part_of_the_model_is_dropped_with_its_reason(name: str, extra: str, reason: str) -> None:
    entry = FORMATS[name]
    bare = extra.removeprefix("backbone.")
    ours, dropped = official.our_names(entry, {bare: torch.zeros(3, 3)})
    assert not ours and [name for name, _ in dropped] == [bare] and reason in dropped[0][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | official_files.aim_in21k(), "names of several formats"),
        (lambda s: s | {"class_embedding": (128,)}, "two tensors for one place"),
        (lambda s: {"a.weight": (1, 2)}, "names of no known format"),
        (lambda s: {}, "names of no known format"),
        (lambda s: {k: v for k, v in s.items() if k != "backbone.conv1.weight"}, "there is no backbone.conv1.weight"),
        (lambda s: s | {"backbone.positional_embedding": (6, 128)}, "has 6 rows"),
        (lambda s: s | {"backbone.conv1.weight": (100, 3, 16, 16)}, "no multiple of 64"),
        (lambda s: s | {"backbone.conv1.weight": (128, 3, 16)}, "4 axes are needed"),
        (lambda s: s | {"backbone.positional_embedding": (0, 128)}, r"has the shape \[0, 128\]: an axis is empty"),
        (
            lambda s: {k: v for k, v in s.items() if "_Adapter" not in k},
            "temporal_embedding is there and no T_Adapter: a model without temporal adapters has no temporal embedding",
        ),
        (lambda s: {k: v for k, v in s.items() if "1.S_Adapter" not in k}, "block 1 has no S_Adapter"),
        (
            lambda s: s | {"backbone.transformer.resblocks.1.S_Adapter.D_fc1.weight": (16, 128)},
            "different ratios",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "cls_head.fc_cls.weight"}, "there is no cls_head.fc_cls.weight"),
    ],
)
def test_what_cannot_be_read_is_named(change: Callable[[Shapes], Shapes], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(change(official_files.aim_clip()))
    assert "\n" not in str(error.value)


def test_a_name_that_is_already_ours_is_refused_among_timms() -> None:
    shapes = official_files.aim_in21k()
    shapes["backbone.blocks.0.ln_1.weight"] = shapes.pop("backbone.blocks.0.norm1.weight")
    with pytest.raises(ValueError, match="belongs to another format"):
        read(shapes)
    shapes = official_files.aim_in21k()
    shapes["backbone.cls_token"] = (2, 1, 128)
    with pytest.raises(ValueError, match=r"cls_token has the shape \[2, 1, 128\]"):
        read(shapes)


def test_swin_that_cannot_be_is_named() -> None:
    shapes = official_files.video_swin()
    table = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match="has 500 rows"):
        read(shapes | {table: (500, 1)})
    with pytest.raises(ValueError, match="of stage 0"):
        read({key: shape for key, shape in shapes.items() if "layers.0" not in key})
    with pytest.raises(ValueError, match=r"no tensor of stage 2 \(layers\.2"):
        read(shapes | {"backbone.layers.999999999.blocks.0.norm1.weight": (32,)})
    with pytest.raises(ValueError, match="has 1000000000 blocks"):
        read(shapes | {"backbone.layers.1.blocks.999999999.norm1.weight": (32,)})
    with pytest.raises(ValueError, match="5 axes are needed"):
        read(shapes | {"backbone.patch_embed.proj.weight": (32, 3, 4, 4)})


def test_a_model_without_a_published_format_has_no_official_names() -> None:
    _, reading = read(official_files.aim_clip())
    description = reading.description
    assert format_of(description).name == "aim_clip"
    by_text, late = (
        {**description, "options": {**description["options"], **changed}}
        for changed in ({"temporal_weights": "text"}, {"temporal_embedding": "adapters"})
    )
    strange = {**description, "geometry": {**description["geometry"], "patch_bias": True}}
    for other in (by_text, late, strange):
        with pytest.raises(ValueError, match="no published format"):
            format_of(other)
