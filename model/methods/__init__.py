"""The methods by name: how each is built from a recipe, and built again from what a checkpoint says of it.

Every file of this folder declares `METHODS` (see `model.method`); what is here finds them.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from model.backbone import load_image_tower
from model.geometry import CLIPGeometry, Geometry, ImageTower, SwinGeometry, ViTGeometry
from model.method import Method
from model.official import Format
from model.video import VideoModel

_GEOMETRIES: dict[str, type[Geometry]] = {kind.kind: kind for kind in (ViTGeometry, CLIPGeometry, SwinGeometry)}
_KINDS_OF_MODEL = {
    ViTGeometry: "an image transformer with a class token",
    CLIPGeometry: "a CLIP model with its text tower",
    SwinGeometry: "a Swin transformer",
}
_DESCRIBED = ("method", "backbone", "geometry", "num_classes", "num_frames", "options")
_MOST = 10**9  # of any number in a description, so that no damaged one claims a machine's memory
_MOST_INT = 10**6
_MOST_WIDTH = 16384
_MOST_FRAMES = 4096
_MOST_LAYERS = 512

_KINDS = {int: f"a whole number, 0 to {_MOST_INT}", float: "a number", bool: "true or false", str: "text"}
_LISTED = {int: "whole numbers", float: "numbers", str: "texts"}


def _collected() -> dict[str, Method]:
    """What the files of this folder declare, in the order of their names."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {method.name: method for file in files for method in importlib.import_module(f"{__name__}.{file}").METHODS}


METHODS: dict[str, Method] = _collected()
FORMATS: dict[str, Format] = {entry.name: entry for method in METHODS.values() for entry in method.formats}
"""Every form in which models of these methods are published."""


def format_of(description: Mapping[str, Any]) -> Format:
    """The format that publishes models like the described one; ValueError if none does."""
    for entry in FORMATS.values():
        if entry.holds(description):
            return entry
    raise ValueError(
        f"no published format holds a model of method {description['method']} like this one: its image model, or its "
        f"options, are others than in {', '.join(FORMATS)}"
    )


def create(
    method: str, tower: ImageTower, *, num_classes: int | None, num_frames: int, options: Any | None = None
) -> VideoModel:
    """The model of a method on an image tower, at its initialisation, in float32; without classes it has no head.

    `options` is an instance of the method's dataclass; None: its defaults. Raises ValueError for an unknown method, or
    an image model that it cannot adapt.
    """
    entry = METHODS.get(method)
    if entry is None:
        raise ValueError(f"unknown method {method!r}; allowed is {', '.join(METHODS)}")
    model = next((model for kind, model in entry.models.items() if isinstance(tower.geometry, kind)), None)
    if model is None:
        needed = " or ".join(_KINDS_OF_MODEL[kind] for kind in entry.models)
        raise ValueError(f"method {method} needs {needed}, and model.name is {_KINDS_OF_MODEL[type(tower.geometry)]}")
    return model(tower, num_classes, num_frames, entry.options() if options is None else options)


def build(
    method: str,
    name: str,
    pretrained: str,
    *,
    num_classes: int | None,
    num_frames: int,
    seed: int = 0,
    normalisation: str = "",
    options: Any | None = None,
    class_names: Sequence[str] | None = None,
) -> VideoModel:
    """As `create`, on an image model by name (`model.backbone.load_image_tower`); the same for the same arguments.

    `class_names`: of the classes, for models that read them.
    """
    torch.manual_seed(seed)
    tower = load_tower(method, name, pretrained, normalisation=normalisation, options=options)
    model = create(method, tower, num_classes=num_classes, num_frames=num_frames, options=options)
    if class_names is not None:
        model.name_classes(class_names)
    return model


def load_tower(
    method: str, name: str, pretrained: str, *, normalisation: str = "", options: Any | None = None
) -> ImageTower:
    """The image model that a method with these options stands on, with its text tower where it reads texts; arguments
    and errors as of `model.backbone.load_image_tower`."""
    entry = METHODS[method]
    texts = entry.reads_texts(entry.options() if options is None else options)
    return load_image_tower(name, pretrained, normalisation=normalisation, text_tower=texts)


def describe(model: VideoModel) -> dict[str, Any]:
    """What `from_description` needs to build an equal model: plain values, for JSON."""
    method = next(name for name, entry in METHODS.items() if type(model) in entry.models.values())
    return {
        "method": method,
        "backbone": model.geometry.kind,
        "geometry": dataclasses.asdict(model.geometry),
        "num_classes": model.num_classes,
        "num_frames": model.num_frames,
        "options": dataclasses.asdict(model.options),  # type: ignore[call-overload]
    }


def from_description(description: Mapping[str, Any]) -> VideoModel:
    """The model that `describe` described, with random weights.

    Raises ValueError naming what is not as it should be: a description may come from a stranger's file.
    """
    method, geometry, options, num_classes, num_frames = _parse(description)
    return create(method, ImageTower(geometry, {}), num_classes=num_classes, num_frames=num_frames, options=options)


def _parse(description: Mapping[str, Any]) -> tuple[str, Geometry, Any, int | None, int]:
    """What `create` takes, each value checked."""
    _require_keys("model", description, _DESCRIBED, _DESCRIBED)
    method, backbone = description["method"], description["backbone"]
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"model.method = {_shown(method)}; allowed is {', '.join(METHODS)}")
    if not isinstance(backbone, str) or backbone not in _GEOMETRIES:
        raise ValueError(f"model.backbone = {_shown(backbone)}; allowed is {' or '.join(_GEOMETRIES)}")
    geometry = _filled(_GEOMETRIES[backbone], "geometry", description["geometry"])
    _require_sane(geometry)
    options = _filled(METHODS[method].options, "options", description["options"])
    classes, frames = description["num_classes"], description["num_frames"]
    if classes is not None and not _is(classes, int, 1, _MOST):
        raise ValueError(f"model.num_classes = {_shown(classes)}; allowed is null, or 1 to {_MOST}")
    if not _is(frames, int, 1, _MOST_FRAMES):
        raise ValueError(f"model.num_frames = {_shown(frames)}; allowed is 1 to {_MOST_FRAMES}")
    return method, geometry, options, classes, frames


def _filled(kind: type, section: str, values: Any) -> Any:
    """The dataclass `kind` from plain JSON values; fields that are not given have their defaults."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    _require_keys(f"model.{section}", values, fields, required)
    hints = get_type_hints(kind)
    return kind(**{name: _typed(f"model.{section}.{name}", value, hints[name]) for name, value in values.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` wants it: lists become tuples, whole numbers floats where those are wanted."""
    if get_origin(hint) in (Union, UnionType):
        listed = isinstance(value, list | tuple)
        fitting = [kind for kind in get_args(hint) if (get_origin(kind) is tuple) == listed]
        hint = fitting[0] if fitting else hint
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        open_ended = kinds[-1] is Ellipsis
        if isinstance(value, list | tuple) and len(value) <= _MOST_LAYERS and (open_ended or len(value) == len(kinds)):
            return tuple(_typed(name, part, kinds[0]) for part in value)
    elif hint is float and _is(value, int | float, -_MOST, _MOST):
        return float(value)
    elif _is(value, int, 0, _MOST_INT) if hint is int else hint in (bool, str) and isinstance(value, hint):
        return value
    raise ValueError(f"{name} = {_shown(value)}; allowed is {_allowed(hint)}")


def _allowed(hint: Any) -> str:
    """What an annotation stands for, in words."""
    if get_origin(hint) is not tuple:
        return _KINDS[hint]
    kinds = get_args(hint)
    return f"{f'up to {_MOST_LAYERS}' if kinds[-1] is Ellipsis else len(kinds)} {_LISTED[kinds[0]]}"


def _require_sane(geometry: Geometry) -> None:
    """ValueError for numbers of which no image model can be made, or only one too large for any machine."""
    plain = dataclasses.asdict(geometry)
    for name, most in {"width": _MOST_WIDTH, "layers": _MOST_LAYERS, "patch_size": 1024, "image_size": 8192}.items():
        if name in plain and not 1 <= plain[name] <= most:
            raise ValueError(f"model.geometry.{name} = {plain[name]}; allowed is 1 to {most}")
    if min(geometry.std) <= 0:
        raise ValueError(f"model.geometry.std = {list(geometry.std)}; allowed are numbers above 0")
    if geometry.image_size % geometry.patch_size:
        raise ValueError(
            f"model.geometry.image_size = {geometry.image_size} is no multiple of patch_size = {geometry.patch_size}"
        )
    if isinstance(geometry, ViTGeometry):
        widths, heads = [geometry.width], [geometry.heads]
        if geometry.embed_dim > _MOST_WIDTH:
            raise ValueError(f"model.geometry.embed_dim = {geometry.embed_dim}; allowed is 0 to {_MOST_WIDTH}")
        if not 0 < geometry.eps < 1:
            raise ValueError(f"model.geometry.eps = {geometry.eps}; allowed is 0 < eps < 1")
        if isinstance(geometry, CLIPGeometry):
            _require_sane_texts(geometry)
            widths, heads = [*widths, geometry.text_width], [*heads, geometry.text_heads]
    else:
        widths = [geometry.width * 2**stage for stage in range(len(geometry.depths))]
        heads = list(geometry.heads)
        if not 1 <= len(widths) <= 8 or len(heads) != len(widths) or min(geometry.depths) < 1:
            raise ValueError(
                f"model.geometry.depths = {list(geometry.depths)} and heads = {heads}; allowed are as many of the one "
                "as of the other, 1 to 8"
            )
        if not 1 <= geometry.layers <= _MOST_LAYERS or not 1 <= geometry.window <= 64:
            raise ValueError(
                f"model.geometry.depths = {list(geometry.depths)}, window = {geometry.window}; allowed are 1 to "
                f"{_MOST_LAYERS} blocks and windows of 1 to 64"
            )
    for width, count in zip(widths, heads, strict=True):
        if count < 1 or width % count:
            raise ValueError(f"model.geometry.heads = {count}; allowed is a divisor of the width {width}")


def _require_sane_texts(geometry: CLIPGeometry) -> None:
    """As `_require_sane`, of the text tower."""
    most = {
        "text_width": _MOST_WIDTH,
        "text_layers": _MOST_LAYERS,
        "context_length": _MOST_FRAMES,
        "vocab_size": _MOST_INT,
    }
    for name, allowed in most.items():
        if not 1 <= getattr(geometry, name) <= allowed:
            raise ValueError(f"model.geometry.{name} = {getattr(geometry, name)}; allowed is 1 to {allowed}")


def _require_keys(section: str, values: Any, allowed: Iterable[str], required: Iterable[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{section} is {_shown(values)}; a table of {', '.join(sorted(allowed))} is needed")
    unknown, missing = sorted(map(str, set(values) - set(allowed))), sorted(set(required) - set(values))
    if unknown:
        raise ValueError(
            f"{section} has an unknown entry {unknown[0][:80]!r}; allowed are {', '.join(sorted(allowed))}"
        )
    if missing:
        raise ValueError(f"{section} lacks {missing[0]!r}")


def _is(value: Any, kind: Any, least: float, most: float) -> bool:
    """Whether it is a number of that kind within the bounds; True and False are none, nor is NaN."""
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def _shown(value: Any) -> str:
    return repr(value)[:80]
