"""How published checkpoints name and shape what the models here hold, and what can be read off their tensors.

A `Format` is one implementation's state dict: its names, mapped one to one to ours and back, the entries that are no
part of a video model, and the settings that follow from shapes alone. Each method's file (`model.methods`) declares its
own; here is what they are made of. Nothing here reads or writes a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from model.backbone import NORMALISATIONS
from model.geometry import Geometry, SwinGeometry, ViTGeometry
from model.timm_models import CLIP_NAMES
from model.video import BACKBONE

Shapes = Mapping[str, tuple[int, ...]]
HEAD = "cls_head"
HEAD_WIDTH = 64  # of every published ViT: heads = width / 64
BLOCKS = "transformer.resblocks"
"""What our lists of blocks on a ViT are called."""
CLIP_MARK = r"^class_embedding$|(^|\.)resblocks\.\d+\."
"""What is found in every state dict under CLIP's names,"""
TIMM_MARK = r"^cls_token$|^blocks\.\d+\."
"""and under timm's."""
TIMM_NAMES = {part: ours for part, ours in CLIP_NAMES.items() if ours not in ("ln_pre", "ln_post")}
PROJECTION = (r"proj", "CLIP's projection to the texts' space: the head reads the features before it")
IMAGE_HEAD = (r"(head|head_dist|fc_norm|pre_logits)\..*", "a classifier of images: the video model has its own head")
TEXT_TOWER = (
    r"(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|logit_scale",
    "CLIP's text tower: the video model reads no texts",
)
"""Of a format whose own names begin with a `root`."""


@dataclass(frozen=True)
class Format:
    """One implementation's state dict. "Bare" names are those without what wraps a model (see `bare_names`)."""

    name: str
    summary: str
    family: str
    """What it is called together with its siblings (`--from`, `--to`)."""
    method: str
    """Of `model.methods`: what a state dict becomes."""
    marks: tuple[str | Callable[[Shapes], bool], ...]
    """Patterns, each found in some bare name of every state dict of this format, and tests of all of them. Where
    several formats fit, the one whose marks contain the others' is meant."""
    read: Callable[[Format, Shapes], Reading]
    """The format and shapes by our names → what they say of the model; ValueError names a tensor that is missing or
    cannot be so."""
    holds: Callable[[Mapping[str, Any]], bool]
    """Whether it publishes models of such a description (`model.methods.describe`)."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of its names → ours, without a block's prefix, with or without `.weight`; the rest is named alike."""
    blocks: str = BLOCKS
    """What its list of blocks is called."""
    outside: Mapping[str, str] = field(default_factory=lambda: {HEAD: HEAD})
    """Beginnings of its bare names → the beginnings of ours, of all that is not in our backbone, or is there under a
    name of another order; the longest that fits counts."""
    prefix: str = f"{BACKBONE}."
    """Before all names but those outside, when it is written."""
    root: str = ""
    """Before all names of the video model in a file that holds more; a file of the model alone may do without it."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Patterns of bare names that are no part of the model, and why."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Our part of a name → the format's parts, whose tensors along their first axis are ours (q, k and v)."""
    leading_ones: Mapping[str, int] = field(default_factory=dict)
    """Our name within the backbone → how many axes of length 1 the format's tensor begins with."""
    scalars: tuple[str, ...] = ()
    """Our names within the backbone of tensors [1] that the format has without an axis."""
    flat: tuple[str, ...] = ()
    """Our names within the backbone of kernels [D, C, p, p] that the format has as matrices [D, C · p · p]."""


@dataclass(frozen=True)
class Reading:
    """What the tensors of a checkpoint say of their model."""

    description: dict[str, Any]
    """As `model.methods.from_description` takes it; options that no tensor shows have their defaults."""
    assumed: dict[str, Any]
    """What no tensor shows and `model.load` can change: setting → the value it has."""


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Key → the same without what training wraps a model in (`module.`, `model.`) and without `backbone.`."""
    bare = {key: key for key in keys}
    for wrapper in ("module.", "model.", "module."):
        if bare and all(name.startswith(wrapper) for name in bare.values()):
            bare = {key: name.removeprefix(wrapper) for key, name in bare.items()}
    bare = {key: name.removeprefix(f"{BACKBONE}.") for key, name in bare.items()}
    seen: dict[str, str] = {}
    for key, name in bare.items():
        if name in seen:
            raise ValueError(f"{seen[name]!r} and {key!r} are two tensors for one place; remove one of them")
        seen[name] = key
    return bare


def recognise(shapes: Shapes, formats: Iterable[Format]) -> Format:
    """The format of a state dict by its bare names; ValueError for none, or for a mixture."""
    formats = list(formats)
    fitting = [entry for entry in formats if all(_has_mark(mark, shapes) for mark in entry.marks)]
    marks = [set(entry.marks) for entry in fitting]
    found = [entry for entry, own in zip(fitting, marks, strict=True) if not any(own < other for other in marks)]
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise ValueError(f"the tensors have names of several formats ({names}); a checkpoint has one")
    if not found:
        known = "; ".join(f"{entry.name}: {entry.summary}" for entry in formats)
        shown = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise ValueError(f"the tensors ({shown}, …) have the names of no known format ({known})")
    return found[0]


def _has_mark(mark: str | Callable[[Shapes], bool], shapes: Shapes) -> bool:
    return has(mark, shapes) if isinstance(mark, str) else mark(shapes)


def has(pattern: str, shapes: Iterable[str]) -> bool:
    """Whether a pattern is found in one of the names."""
    return any(re.search(pattern, name) for name in shapes)


def our_names(entry: Format, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Tensors by bare names → by our names and in our shapes, and what was dropped: bare name and reason."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    dropped = []
    if not any(name.startswith(entry.root) for name in tensors):
        tensors = {entry.root + name: tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        reason = next((reason for pattern, reason in entry.dropped if re.fullmatch(pattern, name)), None)
        if reason is not None:
            dropped.append((name, reason))
            continue
        whole = _whole(entry, name)
        if whole != name:
            parts.setdefault(whole, {})[name] = tensor
            continue
        renamed = _our_name(entry, name)
        if renamed in ours:
            raise ValueError(f"{name!r} is a second tensor for {renamed}; remove one of them")
        ours[renamed] = _in_our_shape(entry, name, tensor, renamed)
    for whole, found in parts.items():
        ours[_our_name(entry, whole)] = _joined(entry, whole, found)
    return ours, dropped


def official_name(entry: Format, name: str) -> str:
    """Our name of a tensor → the format's; of one that it keeps in parts, the first part's."""
    return official_names(entry, name)[0]


def official_names(entry: Format, name: str) -> tuple[str, ...]:
    """Our name of a tensor → the format's, several where it keeps it in parts."""
    for theirs, ours in sorted(entry.outside.items(), key=lambda pair: -len(pair[1])):
        if name == ours or name.startswith(f"{ours}."):
            return (theirs + name.removeprefix(ours),)
    back = {ours: theirs for theirs, ours in entry.names.items()}
    renamed = _renamed(name.removeprefix(f"{BACKBONE}."), BLOCKS, entry.blocks, back)
    for part, theirs_of in entry.fused.items():
        if renamed == part or renamed.endswith(f".{part}"):
            return tuple(entry.prefix + renamed.removesuffix(part) + theirs for theirs in theirs_of)
    return (entry.prefix + renamed,)


def official_tensors(entry: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names → by the format's names and in its shapes: the inverse of `our_names`."""
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(f"{BACKBONE}.")
        shaped = tensor.flatten(1) if inner in entry.flat else tensor[(None,) * entry.leading_ones.get(inner, 0)]
        shaped = shaped.squeeze(0) if inner in entry.scalars else shaped
        names = official_names(entry, name)
        parts = shaped.chunk(len(names)) if shaped.ndim else (shaped,)
        official |= dict(zip(names, [part.contiguous() for part in parts], strict=True))
    return official


def reading(
    entry: Format,
    shapes: Shapes,
    geometry: Geometry,
    frames: int,
    options: Mapping[str, Any],
    assumed: Mapping[str, Any],
) -> Reading:
    """What `Format.read` returns; the number of classes is read off the head, and mean and std are always assumed.

    `frames` are those that tensors show, else those in `assumed`.
    """
    head = f"{HEAD}.fc_cls.weight"
    has_head = any(name.startswith(f"{HEAD}.") for name in shapes)
    description = {
        "method": entry.method,
        "backbone": geometry.kind,
        "geometry": asdict(geometry),
        "num_classes": shape_of(entry, shapes, head, 2)[0] if has_head else None,
        "num_frames": frames,
        "options": dict(options),
    }
    return Reading(description, {**assumed, "mean": list(geometry.mean), "std": list(geometry.std)})


def read_vit(
    entry: Format,
    shapes: Shapes,
    *,
    normalisation: str,
    quick_gelu: bool,
    ln_pre: bool,
    patch_bias: bool,
    eps: float,
    embed_dim: int = 0,
) -> ViTGeometry:
    """The geometry of a ViT whose tensors have our names; what no tensor shows is said by the caller."""
    width, _, patch, _ = shape_of(entry, shapes, "backbone.conv1.weight", 4)
    tokens, _ = shape_of(entry, shapes, "backbone.positional_embedding", 2)
    grid = isqrt(max(tokens - 1, 0))
    if grid < 1 or grid * grid != tokens - 1:
        name = official_name(entry, "backbone.positional_embedding")
        raise ValueError(f"{name} has {tokens} rows; a class token and a square of patches is needed, such as 197")
    if width % HEAD_WIDTH:
        raise ValueError(f"the width {width} is no multiple of {HEAD_WIDTH}, the width of a head in {entry.name}")
    mean, std = NORMALISATIONS[normalisation]
    layers = 1 + max((number for number, _ in blocks_of(shapes)), default=-1)
    hidden, _ = shape_of(entry, shapes, f"backbone.{BLOCKS}.0.mlp.c_fc.weight", 2)
    return ViTGeometry(
        width=width,
        layers=layers,
        heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=grid * patch,
        quick_gelu=quick_gelu,
        mean=mean,
        std=std,
        ln_pre=ln_pre,
        patch_bias=patch_bias,
        eps=eps,
        mlp_width=0 if hidden == 4 * width else hidden,
        embed_dim=embed_dim,
    )


def read_clip_vit(entry: Format, shapes: Shapes, normalisation: str = "aim_clip") -> ViTGeometry:
    """As `read_vit`, of CLIP's ViT as OpenAI published it."""
    kind: dict[str, Any] = {"quick_gelu": True, "ln_pre": True, "patch_bias": False, "eps": 1e-5}
    return read_vit(entry, shapes, normalisation=normalisation, **kind)


def read_timm_vit(entry: Format, shapes: Shapes, normalisation: str = "imagenet") -> ViTGeometry:
    """As `read_vit`, of ImageNet's ViT as timm has it."""
    kind: dict[str, Any] = {"quick_gelu": False, "ln_pre": False, "patch_bias": True, "eps": 1e-6}
    return read_vit(entry, shapes, normalisation=normalisation, **kind)


def blocks_of(shapes: Iterable[str], geometry: Geometry | None = None) -> list[tuple[int, str]]:
    """Number of the block, counted through all stages, and name, of every tensor in one."""
    found = []
    for name in shapes:
        if isinstance(geometry, SwinGeometry):
            if match := re.match(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", name):
                found.append((sum(geometry.depths[: int(match[1])]) + int(match[2]), name))
        elif match := re.match(r"backbone\.transformer\.resblocks\.(\d+)\.", name):
            found.append((int(match[1]), name))
    return found


def shape_of(entry: Format, shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """A tensor's shape; ValueError if it is missing, is empty, or has another number of axes."""
    theirs = official_name(entry, name)
    if name not in shapes:
        raise ValueError(f"there is no {theirs}, which every checkpoint of the format {entry.name} has")
    shape = shapes[name]
    if not all(shape):
        raise ValueError(f"{theirs} has the shape {list(shape)}: an axis is empty; the file is none of a trained model")
    if len(shape) != axes:
        raise ValueError(f"{theirs} has the shape {list(shape)}; {axes} axes are needed in the format {entry.name}")
    return shape


def ratio_of(hidden: int, width: int) -> float:
    """The ratio of which int(width · ratio) is `hidden` again."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio *= 1 + 2**-52
    return ratio


def _our_name(entry: Format, name: str) -> str:
    for theirs, ours in sorted(entry.outside.items(), key=lambda pair: -len(pair[0])):
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    if name.startswith(f"{HEAD}."):  # our own name, as a checkpoint under wrong names may have it
        return name
    return f"{BACKBONE}.{_renamed(name, entry.blocks, BLOCKS, entry.names)}"


def _renamed(name: str, blocks: str, other_blocks: str, parts: Mapping[str, str]) -> str:
    """A name with its block's prefix and its part exchanged; a name that is already what it would become is refused."""
    match = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name)
    prefix = f"{other_blocks}.{match[1]}." if match else ""
    rest = name[match.end() :] if match else name
    stem, dot, leaf = rest.rpartition(".")
    if rest in parts:
        return prefix + parts[rest]
    if stem in parts:
        return prefix + parts[stem] + dot + leaf
    if rest in parts.values() or stem in parts.values():
        raise ValueError(f"unknown name {name!r}: it belongs to another format than the other tensors")
    return prefix + rest


def _whole(entry: Format, name: str) -> str:
    """A name of a part of a fused tensor → a name of the whole; any other name as it is."""
    if any(name == theirs or name.startswith(f"{theirs}.") for theirs in entry.outside):
        return name
    for whole, theirs_of in entry.fused.items():
        for theirs in theirs_of:
            if name == theirs or name.endswith(f".{theirs}"):
                return name.removesuffix(theirs) + whole
    return name


def _joined(entry: Format, whole: str, found: Mapping[str, Tensor]) -> Tensor:
    """The tensor that the format keeps in parts."""
    part = next(part for part in entry.fused if whole == part or whole.endswith(f".{part}"))
    names = [whole.removesuffix(part) + theirs for theirs in entry.fused[part]]
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"there is no {missing[0]}, and there is {next(iter(found))}; the one needs the other")
    first = found[names[0]]
    for name in names:
        if found[name].shape != first.shape or not first.ndim:
            raise ValueError(
                f"{name} has the shape {list(found[name].shape)}; that of {names[0]}, {list(first.shape)}, is needed"
            )
    return torch.cat([found[name] for name in names])


def _in_our_shape(entry: Format, name: str, tensor: Tensor, renamed: str) -> Tensor:
    inner = renamed.removeprefix(f"{BACKBONE}.")
    if inner in entry.scalars:
        if tensor.numel() != 1:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}; it is one number")
        return tensor.reshape(1)
    if inner in entry.flat:
        side = isqrt(tensor.shape[1] // 3) if tensor.ndim == 2 else 0
        if tensor.ndim != 2 or prod((3, side, side)) != tensor.shape[1] or not side:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}; [width, 3 · side²] is needed")
        return tensor.unflatten(1, (3, side, side))
    ones = entry.leading_ones.get(inner, 0)
    if any(size != 1 for size in tensor.shape[:ones]) or (ones and tensor.ndim <= ones):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; it begins with {ones} of 1")
    return tensor.flatten(0, ones) if ones else tensor
