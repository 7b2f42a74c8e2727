"""How published checkpoints name and shape what the models here hold, and what can be read off their tensors.

A format is one implementation's state dict: its names, mapped one to one to ours and back, the entries that are no part
of a video model, and the settings that follow from shapes alone. Nothing here reads or writes a file.

Sources: AIM's repository (`vit_clip.py`, `vit_imagenet.py`, `swin2d_adapter.py`, `timesformer.py`, mmaction's names
`backbone.…` and `cls_head.fc_cls`), facebookresearch/TimeSformer (`timesformer/models/vit.py`), Video Swin Transformer
(`swin_transformer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isqrt
from typing import Any

from torch import Tensor

from model.aim import ADAPTERS
from model.backbone import NORMALISATIONS
from model.geometry import Geometry, SwinGeometry, ViTGeometry
from model.timm_models import CLIP_NAMES, LEADING_ONES
from model.video import BACKBONE

HEAD = "cls_head"
HEAD_WIDTH = 64  # of every published ViT: heads = width / 64
_SWIN_WINDOW = 7  # of every published Video Swin; its tables show no more than the product of the window's sides
_SWIN_FRAMES, _VIT_FRAMES = 32, 8  # as published for Kinetics-400, where no tensor depends on it
_MOST_BLOCKS = 512

_TIMM_NAMES = {part: ours for part, ours in CLIP_NAMES.items() if ours not in ("ln_pre", "ln_post")}
_FACEBOOK_NAMES = {
    **_TIMM_NAMES,
    "time_embed": "temporal_embedding",
    "norm": "ln_post",
    "temporal_norm1": "t_norm",
    "temporal_attn.qkv.weight": "t_attn.in_proj_weight",
    "temporal_attn.qkv.bias": "t_attn.in_proj_bias",
    "temporal_attn.proj": "t_attn.out_proj",
    "temporal_fc": "T_Adapter",
}
_PROJECTION = (r"proj", "CLIP's projection to the texts' space: the head reads the features before it")
_IMAGE_HEAD = (r"(head|head_dist|fc_norm|pre_logits)\..*", "a classifier of images: the video model has its own head")
_COMPUTED = (
    r".*\.(relative_position_index|attn_mask|t_relative_coords)",
    "computed from the geometry when the model is built",
)


@dataclass(frozen=True)
class Format:
    """One implementation's state dict."""

    name: str
    summary: str
    family: str
    """What it is called together with its siblings (`--from`, `--to`)."""
    method: str
    """Of `model.methods`."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of its names → ours, without a block's prefix, with or without `.weight`; the rest is named alike."""
    blocks: str = "transformer.resblocks"
    """What its list of blocks is called; ours is the default."""
    head: str = f"{HEAD}.fc_cls"
    prefix: str = f"{BACKBONE}."
    """Before all but the head's names, when it is written."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Patterns of names that are no part of the model, and why."""


FORMATS = {
    entry.name: entry
    for entry in (
        Format("aim_clip", "AIM on CLIP's ViT", "aim", "aim", dropped=(_PROJECTION,)),
        Format("aim_in21k", "AIM on ImageNet-21k's ViT", "aim", "aim", _TIMM_NAMES, "blocks", dropped=(_IMAGE_HEAD,)),
        Format("aim_swin", "AIM on Swin", "aim", "aim", dropped=(_COMPUTED, _IMAGE_HEAD)),
        Format(
            "timesformer",
            "TimeSformer, divided space-time attention",
            "timesformer",
            "timesformer",
            _FACEBOOK_NAMES,
            "blocks",
            "head",
            "",
        ),
        Format(
            "timesformer_clip",
            "TimeSformer on CLIP, of AIM's repository",
            "timesformer_clip",
            "timesformer_clip",
            dropped=(_PROJECTION,),
        ),
        Format("video_swin", "Video Swin", "video_swin", "video_swin", dropped=(_COMPUTED, _IMAGE_HEAD)),
    )
}


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


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Format:
    """The format of a state dict by its bare names (see `bare_names`); ValueError for none, or for a mixture."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in shapes)

    found = []
    if has(r"^class_embedding$|(^|\.)resblocks\.\d+\."):
        found.append("timesformer_clip" if has(r"\.t_(attn|norm)\.") else "aim_clip")
    if has(r"^cls_token$|^blocks\.\d+\."):
        found.append("timesformer" if has(r"^time_embed$|\.temporal_(attn|norm1|fc)\.") else "aim_in21k")
    if has(r"^layers\.\d+\.blocks\.\d+\."):
        flat = has(r"Adapter|\.temporal_position_bias_table$") or _has_flat_windows(shapes)
        found.append("aim_swin" if flat else "video_swin")
    if len(found) > 1:
        raise ValueError(f"the tensors have names of several formats ({', '.join(found)}); a checkpoint has one")
    if not found:
        known = "; ".join(f"{entry.name}: {entry.summary}" for entry in FORMATS.values())
        shown = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise ValueError(f"the tensors ({shown}, …) have the names of no known format ({known})")
    return FORMATS[found[0]]


def our_names(entry: Format, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Tensors by bare names → by our names and in our shapes, and what was dropped: bare name and reason."""
    ours: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in tensors.items():
        reason = next((reason for pattern, reason in entry.dropped if re.fullmatch(pattern, name)), None)
        if reason is not None:
            dropped.append((name, reason))
        elif name.startswith(f"{entry.head}."):
            ours[f"{HEAD}.fc_cls.{name.removeprefix(f'{entry.head}.')}"] = tensor
        elif name.startswith(f"{HEAD}."):
            ours[name] = tensor
        else:
            renamed = _renamed(name, entry.blocks, "transformer.resblocks", entry.names)
            ours[f"{BACKBONE}.{renamed}"] = _without_leading_ones(name, tensor, renamed if entry.names else "")
    return ours, dropped


def official_name(entry: Format, name: str) -> str:
    """Our name of a tensor → the format's."""
    if name.startswith(f"{HEAD}."):
        return name.replace(f"{HEAD}.fc_cls", entry.head)
    back = {ours: theirs for theirs, ours in entry.names.items()}
    return entry.prefix + _renamed(name.removeprefix(f"{BACKBONE}."), "transformer.resblocks", entry.blocks, back)


def official_tensors(entry: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names → by the format's names and in its shapes: the inverse of `our_names`."""
    official = {}
    for name, tensor in tensors.items():
        ones = LEADING_ONES.get(name.removeprefix(f"{BACKBONE}."), 0) if entry.names else 0
        official[official_name(entry, name)] = tensor[(None,) * ones]
    return official


def format_of(description: Mapping[str, Any]) -> Format:
    """The format that publishes models like the described one; ValueError if none does."""
    method, geometry, options = description["method"], description["geometry"], description["options"]
    if method in ("aim", "frozen", "finetuned"):
        if description["backbone"] == "swin":
            name = "aim_swin"
        else:
            name = {(True, False): "aim_clip", (False, True): "aim_in21k"}.get(
                (geometry["ln_pre"], geometry["patch_bias"]), ""
            )
    elif method == "timesformer":
        name = "" if geometry["ln_pre"] or not geometry["patch_bias"] else method
    elif method == "timesformer_clip":
        name = method if geometry["ln_pre"] and not geometry["patch_bias"] else ""
    else:
        name = method
    published = {"temporal_weights": "reuse", "temporal_embedding": "input"}
    if name not in FORMATS or any(options.get(key, value) != value for key, value in published.items()):
        raise ValueError(
            f"no published format holds a model of method {method} like this one: its image model, or its options, are "
            f"others than in {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def read_settings(entry: Format, tensors: Mapping[str, Tensor]) -> Reading:
    """What tensors under our names say of their model; ValueError names a tensor that is missing or cannot be so."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    swin = entry.name in ("aim_swin", "video_swin")
    geometry, frames, assumed = (_read_swin if swin else _read_vit)(entry, shapes)
    options: dict[str, Any] = {}
    if entry.method == "aim":
        options = _read_adapters(entry, shapes, geometry)
        if "joint" in options["adapters"] and not swin:
            assumed["adapter_scale"] = options["adapter_scale"]
    elif entry.name == "video_swin":
        options["temporal_window"] = _temporal_window(entry, shapes)
    if frames is None:
        frames = assumed["num_frames"] = _SWIN_FRAMES if swin else _VIT_FRAMES
    head = f"{HEAD}.fc_cls.weight"
    has_head = any(name.startswith(f"{HEAD}.") for name in shapes)
    description = {
        "method": entry.method,
        "backbone": "swin" if swin else "vit",
        "geometry": asdict(geometry),
        "num_classes": _shape(entry, shapes, head, 2)[0] if has_head else None,
        "num_frames": frames,
        "options": options,
    }
    return Reading(description, {**assumed, "mean": list(geometry.mean), "std": list(geometry.std)})


def _read_vit(entry: Format, shapes: Mapping[str, tuple[int, ...]]) -> tuple[ViTGeometry, int | None, dict[str, Any]]:
    """Geometry, frames where a temporal embedding tells them, and what was assumed."""
    width, _, patch, _ = _shape(entry, shapes, "backbone.conv1.weight", 4)
    tokens, _ = _shape(entry, shapes, "backbone.positional_embedding", 2)
    grid = isqrt(max(tokens - 1, 0))
    if grid < 1 or grid * grid != tokens - 1:
        name = official_name(entry, "backbone.positional_embedding")
        raise ValueError(f"{name} has {tokens} rows; a class token and a square of patches is needed, such as 197")
    if width % HEAD_WIDTH:
        raise ValueError(f"the width {width} is no multiple of {HEAD_WIDTH}, the width of a head in {entry.name}")
    of_clip = entry.name in ("aim_clip", "timesformer_clip")
    normalisation = "aim_clip" if of_clip else "timesformer" if entry.name == "timesformer" else "imagenet"
    mean, std = NORMALISATIONS[normalisation]
    layers = 1 + max((number for number, _ in _blocks(shapes)), default=-1)
    hidden, _ = _shape(entry, shapes, "backbone.transformer.resblocks.0.mlp.c_fc.weight", 2)
    geometry = ViTGeometry(
        width=width,
        layers=layers,
        heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=grid * patch,
        quick_gelu=of_clip,
        mean=mean,
        std=std,
        ln_pre=of_clip,
        patch_bias=not of_clip,
        eps=1e-5 if of_clip else 1e-6,
        mlp_width=0 if hidden == 4 * width else hidden,
    )
    name = "backbone.temporal_embedding"
    frames = _shape(entry, shapes, name, 3)[1] if name in shapes or entry.method != "aim" else None
    return geometry, frames, {"heads": geometry.heads, "quick_gelu": of_clip}


def _read_swin(entry: Format, shapes: Mapping[str, tuple[int, ...]]) -> tuple[SwinGeometry, int | None, dict[str, Any]]:
    """As `_read_vit`; a temporal table of 2T' - 1 rows tells T = 2T' frames, the masks of shifted windows the image."""
    width, _, _, patch, _ = _shape(entry, shapes, "backbone.patch_embed.proj.weight", 5)
    depths: dict[int, int] = {}
    for name in shapes:
        if match := re.match(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    if absent := [stage for stage in range(len(depths)) if stage not in depths]:
        raise ValueError(f"no tensor of stage {absent[0]} (layers.{absent[0]}.…) is there")
    if max(depths.values()) > _MOST_BLOCKS:
        raise ValueError(f"a stage has {max(depths.values())} blocks by its names; allowed are 1 to {_MOST_BLOCKS}")
    table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [_shape(entry, shapes, table.format(stage), 2) for stage in range(len(depths))]
    window = _flat_window(tables[0][0]) if entry.name == "aim_swin" else _SWIN_WINDOW
    if window is None:
        raise ValueError(f"{table.format(0)} has {tables[0][0]} rows; (2 · window - 1)² is needed, such as 169")
    mean, std = NORMALISATIONS["imagenet"]
    geometry = SwinGeometry(
        width=width,
        depths=tuple(depths[stage] for stage in range(len(depths))),
        heads=tuple(heads for _, heads in tables),
        window=window,
        patch_size=patch,
        image_size=patch * window * 2 ** (len(depths) - 1),  # as of every published Swin: the last stage is one window
        mean=mean,
        std=std,
    )
    temporal = [shape for name, shape in shapes.items() if name.endswith(".temporal_position_bias_table")]
    frames = temporal[0][0] + 1 if temporal else None
    return geometry, frames, {"image_size": geometry.image_size}


def _read_adapters(entry: Format, shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> dict[str, Any]:
    """Which adapters stand in which blocks, how wide they are, and the scale that was published with them."""
    of_swin = isinstance(geometry, SwinGeometry)
    names = ("S_Adapter2", "T_Adapter", "S_Adapter") if of_swin else ("S_Adapter", "T_Adapter", "MLP_Adapter")
    parts = dict(zip(names, ADAPTERS, strict=True))
    standing: dict[str, set[int]] = {name: set() for name in (*names, "T_Adapter_in")}
    ratios = set()
    for number, name in _blocks(shapes, geometry):
        adapter, _, rest = re.sub(r".*?blocks\.\d+\.", "", name, count=1).partition(".")
        if adapter in standing:
            standing[adapter].add(number)
            if rest == "D_fc1.weight":
                ratios.add(_ratio(*_shape(entry, shapes, name, 2)))
    present = [name for name in parts if standing[name]]
    adapted = set().union(*(standing[name] for name in present)) if present else set()
    for name in present:
        wanted = adapted
        if isinstance(geometry, SwinGeometry) and name == "T_Adapter":
            wanted = adapted & _unshifted(geometry)
        if lacking := sorted(wanted - standing[name]):
            raise ValueError(f"block {lacking[0]} has no {name} and other blocks have one; adapted blocks are alike")
    if len(ratios) > 1:
        raise ValueError(
            f"the adapters have different ratios of bottleneck to width ({sorted(ratios)}); one is allowed"
        )
    embedding = f"{BACKBONE}.temporal_embedding"
    if embedding in shapes and "T_Adapter" not in present:
        raise ValueError(
            f"{official_name(entry, embedding)} is there and no T_Adapter: a model without temporal adapters has no "
            "temporal embedding; remove it, or give the file that has them"
        )
    two = bool(standing["T_Adapter_in"])
    return {
        "adapters": tuple(parts[name] for name in present),
        "positions": "all" if not adapted or len(adapted) == geometry.layers else tuple(sorted(adapted)),
        "temporal_adapters": 2 if two else 1,
        "adapter_scale": 1.0 if two else 0.5,
        **({"adapter_ratio": ratios.pop()} if ratios else {}),
    }


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which int(width · ratio) is `hidden` again."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio *= 1 + 2**-52
    return ratio


def _temporal_window(entry: Format, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Time steps W of Video Swin's windows: a table has (2W - 1) · 13 · 13 rows."""
    name = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    rows = _shape(entry, shapes, name, 2)[0]
    quotient, rest = divmod(rows, (2 * _SWIN_WINDOW - 1) ** 2)
    if rest or quotient % 2 == 0:
        raise ValueError(f"{name} has {rows} rows; (2 · time steps - 1) · 13 · 13 is needed, such as 2535")
    return (quotient + 1) // 2


def _blocks(shapes: Iterable[str], geometry: Geometry | None = None) -> list[tuple[int, str]]:
    """Number of the block, counted through all stages, and name, of every tensor in one."""
    found = []
    for name in shapes:
        if isinstance(geometry, SwinGeometry):
            if match := re.match(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", name):
                found.append((sum(geometry.depths[: int(match[1])]) + int(match[2]), name))
        elif match := re.match(r"backbone\.transformer\.resblocks\.(\d+)\.", name):
            found.append((int(match[1]), name))
    return found


def _unshifted(geometry: SwinGeometry) -> set[int]:
    """The blocks that attend over time: every stage's first, third, …"""
    starts = [sum(geometry.depths[:stage]) for stage in range(len(geometry.depths))]
    return {start + i for start, depth in zip(starts, geometry.depths, strict=True) for i in range(0, depth, 2)}


def _has_flat_windows(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    tables = [shape for name, shape in shapes.items() if name.endswith(".relative_position_bias_table")]
    return bool(tables) and all(len(shape) == 2 and _flat_window(shape[0]) is not None for shape in tables)


def _flat_window(rows: int) -> int | None:
    """Side of a window whose bias table has (2 · side - 1)² rows."""
    side = isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def _shape(entry: Format, shapes: Mapping[str, tuple[int, ...]], name: str, axes: int) -> tuple[int, ...]:
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


def _without_leading_ones(name: str, tensor: Tensor, renamed: str) -> Tensor:
    ones = LEADING_ONES.get(renamed, 0)
    if any(size != 1 for size in tensor.shape[:ones]) or (ones and tensor.ndim <= ones):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; it begins with {ones} of 1")
    return tensor.flatten(0, ones) if ones else tensor
