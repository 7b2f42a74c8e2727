"""The methods by name: what describes a model builds it again, and a stranger's description can do no harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.geometry import CLIPGeometry, ImageTower, SwinGeometry, ViTGeometry
from model.methods import METHODS, create, describe, from_description
from model.methods.aim import AIMOptions
from tests.towers import BOTH

VIT = ViTGeometry(128, 2, 2, 16, 32, True, (0.5, 0.4, 0.3), (0.25, 0.25, 0.2))
SWIN = SwinGeometry(width=32, depths=(2, 2), heads=(1, 2), image_size=56)
GEOMETRIES = {ViTGeometry: VIT, CLIPGeometry: BOTH, SwinGeometry: SWIN}
PAIRS = [(method, GEOMETRIES[kind]) for method, entry in METHODS.items() for kind in entry.models]


def described(method: str = "aim", geometry: Any = VIT, options: Any | None = None) -> dict[str, Any]:
    with torch.device("meta"):
        model = create(method, ImageTower(geometry, {}), num_classes=3, num_frames=4, options=options)
    return json.loads(json.dumps(describe(model)))


def rebuilt(description: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return from_description(description)


@pytest.mark.parametrize(("method", "geometry"), PAIRS)
def test_a_description_through_json_builds_an_equal_model(method: str, geometry: Any) -> None:
    description = described(method, geometry)
    model = rebuilt(description)
    assert type(model) is METHODS[method].models[type(geometry)]
    assert (model.geometry, model.num_classes, model.num_frames) == (geometry, 3, 4)
    assert model.options == METHODS[method].options()
    assert json.loads(json.dumps(describe(model))) == description


def test_options_survive_with_their_types() -> None:
    options = AIMOptions(adapters=("spatial", "joint"), positions=(0, 1), adapter_scale=1.0, temporal_adapters=2)
    assert rebuilt(described(options=options)).options == options
    description = described()
    description["options"] = {"adapter_scale": 1}
    model = rebuilt(description)
    assert model.options == AIMOptions(adapter_scale=1.0) and isinstance(model.options.adapter_scale, float)
    description["num_classes"] = None
    assert rebuilt(description).cls_head is None


def test_what_a_method_cannot_adapt_is_named() -> None:
    with pytest.raises(ValueError, match="method video_swin needs a Swin transformer"):
        described("video_swin", VIT)
    with pytest.raises(ValueError, match=r"unknown method 'aimm'; allowed is .*aim, frozen"):
        described("aimm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("method"), "lacks 'method'"),
        (lambda d: d.update(method="__init__"), "model.method = '__init__'; allowed is adaptformer, "),
        (lambda d: d.update(method=["aim"]), "model.method"),
        (lambda d: d.update(backbone="resnet"), "allowed is vit or clip or swin"),
        (lambda d: d.update(more=1), "unknown entry 'more'"),
        (lambda d: d.update(geometry=None), "model.geometry is None"),
        (lambda d: d["geometry"].update(__class__="os"), "unknown entry '__class__'"),
        (lambda d: d["geometry"].pop("width"), "model.geometry lacks 'width'"),
        (lambda d: d["geometry"].update(width=True), "model.geometry.width = True"),
        (
            lambda d: d["geometry"].update(width="128"),
            "model.geometry.width = '128'; allowed is a whole number, 0 to 1000000",
        ),
        (lambda d: d["geometry"].update(width=10**12), "model.geometry.width"),
        (lambda d: d["geometry"].update(mean=[0, 0]), "model.geometry.mean = [0, 0]; allowed is 3 numbers"),
        (lambda d: d["geometry"].update(mean=3), "model.geometry.mean = 3; allowed is 3 numbers"),
        (lambda d: d["options"].update(adapters="all"), "model.options.adapters = 'all'; allowed is up to 512 texts"),
        (lambda d: d["geometry"].update(width=0), "allowed is 1 to 16384"),
        (lambda d: d["geometry"].update(layers=1000), "allowed is 1 to 512"),
        (lambda d: d["geometry"].update(heads=3), "allowed is a divisor of the width 128"),
        (lambda d: d["geometry"].update(heads=0), "model.geometry.heads = 0"),
        (lambda d: d["geometry"].update(patch_size=0), "model.geometry.patch_size = 0"),
        (lambda d: d["geometry"].update(image_size=40), "no multiple of patch_size"),
        (lambda d: d["geometry"].update(mean=[0.5, 0.5]), "model.geometry.mean"),
        (lambda d: d["geometry"].update(mean=[0.5, 0.5, "x"]), "model.geometry.mean = 'x'"),
        (lambda d: d["geometry"].update(std=[0.5, 0.5, 0]), "allowed are numbers above 0"),
        (lambda d: d["geometry"].update(std=[0.5, 0.5, float("nan")]), "model.geometry.std = nan"),
        (lambda d: d["geometry"].update(eps=0), "model.geometry.eps"),
        (lambda d: d["geometry"].update(quick_gelu=1), "model.geometry.quick_gelu = 1; allowed is true or false"),
        (lambda d: d.update(num_classes=0), "model.num_classes = 0"),
        (lambda d: d.update(num_classes="x" * 1000), "model.num_classes = 'xxx"),
        (lambda d: d.update(num_frames=None), "model.num_frames = None"),
        (lambda d: d.update(num_frames=10**8), "model.num_frames = 100000000"),
        (lambda d: d["options"].update(forward=1), "unknown entry 'forward'"),
        (lambda d: d["options"].update(adapters="spatial"), "model.options.adapters = 'spatial'"),
        (lambda d: d["options"].update(adapters=["eval"]), "model.adapters: 'eval' is none of"),
        (lambda d: d["options"].update(positions={"a": 1}), "model.options.positions"),
        (lambda d: d["options"].update(positions=[7]), "model.positions = "),
        (lambda d: d["options"].update(adapter_scale=float("inf")), "model.options.adapter_scale = inf"),
        (lambda d: d["options"].update(adapter_ratio=-1), "model.adapter_ratio"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    description = described()
    change(description)
    with pytest.raises(ValueError) as error:
        rebuilt(description)
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 600, text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"depths": []}, "model.geometry.depths = []"),
        ({"depths": [2, 0]}, "model.geometry.depths"),
        ({"depths": [2]}, "allowed are as many of the one as of the other"),
        ({"depths": [400, 400]}, "allowed are 1 to 512 blocks"),
        ({"heads": [1, 3]}, "allowed is a divisor of the width 64"),
        ({"window": 0}, "window = 0"),
    ],
)
def test_a_wrong_swin_is_refused(entries: dict[str, Any], message: str) -> None:
    description = described("aim", SWIN)
    description["geometry"].update(entries)
    with pytest.raises(ValueError) as error:
        rebuilt(description)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [None, [], "aim", 3])
def test_a_description_that_is_no_table_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="a table of"):
        from_description(value)
