"""Published checkpoints: read with nothing executed, every tensor checked, kept as a folder that says what it holds.

    FOLDER/model.safetensors   every parameter in float32, under our names; of adapters alone what training changes
    FOLDER/config.json         what the model is, which format it came from, what was dropped, checksum of the tensors;
                               of a training run also its classes and how its clips are cut; of adapters alone the image
                               model that they stand on, by name and checksum (earlier versions wrote model.json)

`convert` reads a published file, `write_folder` writes such a folder, `load` makes the model from it, `write_official`
goes the way back. tools/convert_checkpoint.py and tools/export.py are the programs around them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import official
from model.backbone import is_weight_file
from model.geometry import CLIPGeometry, SwinGeometry, ViTGeometry
from model.methods import FORMATS, METHODS, build, describe, format_of, from_description
from model.official import Format
from model.parameters import backbone_checksum
from model.video import VideoModel
from model.weight_files import read_tensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
DOCUMENT = "config.json"
_EARLIER_DOCUMENT = "model.json"
SOURCES = ("auto", *sorted({entry.family for entry in FORMATS.values()} | set(FORMATS)))
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_JSON_BYTES = 16 * 2**20
_SAMPLINGS = ("dense", "uniform")  # as `pipelines.plan` has them
_MOST_INTERVAL = 1024
_SHORT_NAMES = {"scale": "adapter_scale"}  # of settings
_OF_A_RUN = ("classes", "sampling", "interval")  # fields of Converted that only a run has
# What the tensors show: a setting of that name could only contradict them.
_OF_A_VIT = ("width", "layers", "patch_size", "image_size", "ln_pre", "patch_bias", "mlp_width", "embed_dim")
_SHOWN_GEOMETRY = {
    ViTGeometry.kind: _OF_A_VIT,
    CLIPGeometry.kind: (*_OF_A_VIT, "text_width", "text_layers", "context_length", "vocab_size"),
    SwinGeometry.kind: ("width", "depths", "heads", "window", "patch_size"),
}
_WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    ".safetensors": save_file,
    ".pth": lambda tensors, path: torch.save({"state_dict": tensors}, path),
}


@dataclass(frozen=True)
class Converted:
    """A model's parameters under our names, and what is known of them."""

    description: dict[str, Any]
    """As `model.methods.describe` writes it."""
    tensors: dict[str, Tensor]
    """float32, one for every parameter of the model."""
    source: str
    """The format that they came from, a key of `model.methods.FORMATS`; "run": a training run."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """What the file held besides: name and reason."""
    kept_buffers: list[str] = field(default_factory=list)
    """Buffers that the file lacks: they keep the values that they are constructed with."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """What no tensor shows: setting of `load` → the value it has."""
    classes: tuple[str, ...] | None = None
    """Names of the classes; None where they are not known, as of a published file."""
    sampling: str | None = None
    interval: int | None = None
    """How clips were cut in training (`pipelines.plan.ClipOptions`); None where that is not known."""


@dataclass(frozen=True)
class Backbone:
    """The image model that adapters stand on."""

    name: str
    """`model.name` of the run,"""
    pretrained: str
    """and its `model.pretrained`; of a file the name, without its folder."""
    normalisation: str
    seed: int
    """Which some of the frozen weights may come from."""
    checksum: str
    """`model.parameters.backbone_checksum` of the weights."""


def convert(path: Path, source: str = "auto") -> Converted:
    """Reads a published checkpoint: .safetensors, or a PyTorch file of tensors and plain values.

    `source`: a format or family of them that it must have (SOURCES). Raises ValueError or OSError naming the tensor or
    the entry that is not as it should be.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown format {source!r}; allowed is {', '.join(SOURCES)}")
    tensors, dropped = read_tensors(path)
    try:
        bare = official.bare_names(tensors)
        entry = official.recognise({name: tuple(tensors[key].shape) for key, name in bare.items()}, FORMATS.values())
        if source not in ("auto", entry.name, entry.family):
            raise ValueError(f"the tensors have the names of {entry.name} ({entry.summary}), not of {source}")
        ours, unused = official.our_names(entry, {name: tensors[key] for key, name in bare.items()})
        shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
        reading = entry.read(entry, shapes)
        model = _blueprint(reading.description)
        _require_fit(entry, shapes, model)
        keys = {name: key for key, name in bare.items()}
        constructed = _absent_buffers(reading.description, model, ours)
        return Converted(
            description=describe(model),
            tensors={
                name: _float32(official.official_name(entry, name), tensor)
                for name, tensor in (ours | constructed).items()
            },
            source=entry.name,
            dropped=dropped + [(keys[name], reason) for name, reason in unused],
            kept_buffers=[
                *(name for name in _computed_buffers(model) if name.removeprefix("backbone.") not in keys),
                *constructed,
            ],
            assumed=reading.assumed,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def of_model(model: VideoModel) -> Converted:
    """A model as it stands, such as a training run's."""
    tensors = {name: _float32(name, tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    return Converted(describe(model), tensors, "run", kept_buffers=_computed_buffers(model))


def count(converted: Converted) -> tuple[int, int]:
    """Parameters of the model, and how many of them train."""
    parameters = list(_blueprint(converted.description).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def write_folder(converted: Converted, out: Path) -> None:
    """Writes the folder `out`, whole or not at all; ValueError if it is taken, OSError if it cannot be written."""
    with new_folder(out) as part:
        write_document({**document_of(converted), **write_tensors(converted, part)}, part)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes `out` once that has gone well, and is gone if not; ValueError if
    `out` is taken."""
    require_place(out, folder=True)
    part = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    if part.exists():  # of a process that was killed while writing
        shutil.rmtree(part)
    part.mkdir()
    try:
        yield part
        for path in (*part.iterdir(), part):
            _sync(path)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(out.parent)


def document_of(converted: Converted) -> dict[str, Any]:
    """What config.json says of a model whatever files lie beside it."""
    return {
        "format_version": FORMAT_VERSION,
        "source": converted.source,
        "model": converted.description,
        "dropped": converted.dropped,
        "kept_buffers": converted.kept_buffers,
        "assumed": converted.assumed,
        **{name: getattr(converted, name) for name in _OF_A_RUN if getattr(converted, name) is not None},
    }


def write_document(document: Mapping[str, Any], folder: Path) -> None:
    """Writes config.json."""
    (folder / DOCUMENT).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_tensors(converted: Converted, folder: Path, backbone: Backbone | None = None) -> dict[str, Any]:
    """Writes model.safetensors and returns what config.json says of it; with a `backbone` only what training changes.
    Raises ValueError where that is nothing, or all."""
    tensors = converted.tensors
    if backbone is not None:
        changed = _changed_names(_blueprint(converted.description))
        tensors = {name: tensor for name, tensor in tensors.items() if name in changed}
        if not 0 < len(tensors) < len(converted.tensors):
            what = "all of this model trains" if tensors else "nothing of this model trains"
            raise ValueError(f"{what}, so there are no adapters to write alone; export the whole model")
    save_file(tensors, folder / TENSORS)
    (folder / TENSORS).chmod(folder.stat().st_mode & 0o666)  # it is written for its owner alone
    said = {} if backbone is None else {"backbone": dataclasses.asdict(backbone)}
    return {"tensors_sha256": sha256(folder / TENSORS), **said}


def find_document(folder: Path) -> Path | None:
    """The document of a folder, of this or an earlier version; None where there is none."""
    paths = (folder / DOCUMENT, folder / _EARLIER_DOCUMENT)
    return next((path for path in paths if path.is_file()), None)


def read_folder(folder: Path, pretrained: str | None = None) -> Converted:
    """What `write_folder` or tools/export.py wrote, checked; ValueError or OSError names what is damaged.

    Of adapters alone, the image model is loaded by its tag, which needs a network the first time, or from `pretrained`,
    a file of its weights.
    """
    document = _read_document(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}; convert the checkpoint again")
    if sha256(path) != document["tensors_sha256"]:
        raise ValueError(f"{path} is damaged (checksum); convert the checkpoint again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); convert the checkpoint again") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path} is none of ours: {name} is of {tensor.dtype}; convert the checkpoint again")
        _require_finite(f"{path}: {name}", tensor)
    description = document["model"]
    if "backbone" in document:
        description, tensors = _on_backbone(folder, document, tensors, pretrained)
    elif pretrained is not None:
        raise ValueError(f"pretrained = {pretrained!r:.200}: {folder} holds all of its weights; leave that out")
    return Converted(description, tensors, **_known(folder, document))


def read_known(folder: Path) -> dict[str, Any]:
    """What a folder says of its model's origin, without reading the tensors: `source`, and where they are known
    `classes`, `sampling` and `interval`, as in `Converted`. Raises as `read_folder`."""
    return _known(folder, _read_document(folder))


def load(folder: str | Path, **settings: Any) -> VideoModel:
    """The model of a folder that tools/convert_checkpoint.py or tools/export.py made: in eval mode, in float32, on the
    CPU.

    Its forward takes normalised float clips [B, T, 3, H, W], or uint8 frames [B, T, H, W, 3], and returns logits
    [B, C]; of a checkpoint without a head what the published backbone returns ([B, D, T, 1, 1] for AIM on a ViT).

    `settings` say what no tensor shows, any option of the method or of the geometry:
        adapter_scale, or its short name scale: s, by default 1 with two temporal adapters and 0.5 with one;
        num_frames: T. Another number than the temporal embedding's length interpolates it linearly over time;
        quick_gelu, heads, mean, std, drop_path, …;
        class_names: of models that read texts, the names of the classes that it answers for;
        pretrained: of adapters alone, a file of the image model's weights; without, they are fetched by their tag.
    Raises ValueError for a setting that there is not or that a tensor contradicts, and for a damaged folder.
    """
    class_names = settings.pop("class_names", None)
    pretrained = settings.pop("pretrained", None)
    converted = with_settings(read_folder(Path(folder), pretrained), settings)
    if class_names is not None:
        converted = dataclasses.replace(converted, classes=tuple(class_names))
    model = model_of(converted)
    if class_names is not None and not model.reads_class_names:
        method = converted.description["method"]
        raise ValueError(f"class_names: a model of method {method} reads none; leave them out")
    return model


def model_of(converted: Converted) -> VideoModel:
    """The model of a checked description and the tensors that fit it, as `load` returns it."""
    with torch.random.fork_rng(devices=[]):  # the initialisation, soon overwritten, draws from it
        model = from_description(converted.description)
    model.load_state_dict(converted.tensors)  # which copies: a tensor of a file may be a view of it on the disk
    if converted.classes is not None:
        model.name_classes(converted.classes)
    return model.eval()


def with_settings(converted: Converted, settings: Mapping[str, Any]) -> Converted:
    """The same with settings of `load`, which are no longer assumed then; ValueError for what there is not, or what a
    tensor contradicts."""
    description = _described_with(converted.description, settings)
    model = _blueprint(description)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = _over_time(converted.tensors, shapes, model.time_axes)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        wrong = next(
            name for name in sorted({*shapes, *tensors})
            if name not in tensors or shapes.get(name) != tuple(tensors[name].shape)
        )  # fmt: skip
        there = list(tensors[wrong].shape) if wrong in tensors else "missing"
        raise ValueError(
            f"the tensors do not fit {DOCUMENT} and the settings: {wrong} is {there}, and "
            f"{list(shapes[wrong]) if wrong in shapes else 'no such tensor'} is needed"
        )
    known = {_SHORT_NAMES.get(name, name) for name in settings}
    assumed = {name: value for name, value in converted.assumed.items() if name not in known}
    return dataclasses.replace(converted, description=description, tensors=tensors, assumed=assumed)


def lost_settings(converted: Converted) -> dict[str, Any]:
    """What official names do not keep: setting of `load` → the value here, where `convert` would assume another.

    Raises ValueError where `convert` could not read the official names of this model at all.
    """
    entry = format_of(converted.description)
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.tensors.items()}
    again = _blueprint(entry.read(entry, shapes).description)
    _require_fit(entry, shapes, again)
    ours, theirs = (_settable(describe(model)) for model in (_blueprint(converted.description), again))
    return {name: value for name, value in ours.items() if name in theirs and theirs[name] != value}


def official_format(converted: Converted, target: str) -> Format:
    """The model's own format, if that or its family is `target`; ValueError if not, or where no format holds it."""
    entry = format_of(converted.description)
    if target not in (entry.name, entry.family):
        raise ValueError(f"the model is published in the format {entry.name}, not {target}: say --to {entry.family}")
    return entry


def write_official(converted: Converted, out: Path, target: str) -> Format:
    """Writes the tensors under the published names of the model's own format: `.safetensors`, or `.pth` under
    'state_dict'. `target`: that format or its family. Raises ValueError where there is none or `out` is there."""
    require_place(out, folder=False)
    entry = official_format(converted, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        _WRITERS[out.suffix](official.official_tensors(entry, converted.tensors), part)
        _sync(part)
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    _sync(out.parent)
    return entry


def require_place(out: Path, *, folder: bool) -> None:
    """ValueError unless a folder, or a file of official names, can be made at `out`.

    What is there stays, an empty folder excepted where one is written: nothing is lost.
    """
    if not folder and out.suffix not in _WRITERS:
        raise ValueError(f"{out}: the name of the file must end in {' or '.join(_WRITERS)}")
    above = next((parent for parent in out.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{out} cannot be made, for {above} is a file; give a name in a folder")
    empty = folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if not empty and (out.exists() or out.is_symlink()):
        raise ValueError(f"{out} is there already; remove it, or give another name")


def _float32(name: str, tensor: Tensor) -> Tensor:
    """A copy in float32 that shares no memory; ValueError for other than finite floats."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}; floating point is needed")
    copied = tensor.detach().to(torch.float32, copy=True).contiguous()
    _require_finite(name, copied)
    return copied


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        what = "NaN" if torch.isnan(tensor).any() else "an infinite number"
        raise ValueError(f"{name} holds {what}; the file is damaged, or its training had failed")


def _require_fit(entry: Format, shapes: Mapping[str, tuple[int, ...]], model: VideoModel) -> None:
    """ValueError unless there is exactly one tensor for every parameter, of its shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = [name for name in wanted if name not in model.extra_tensors()]
    missing = [official.official_name(entry, name) for name in needed if name not in shapes]
    unknown = [name for name in shapes if name not in wanted]
    if unknown:
        theirs = official.official_name(entry, unknown[0])
        close = difflib.get_close_matches(theirs, missing, n=1, cutoff=0.8)
        raise ValueError(
            f"unknown tensor {theirs[:120]} in the format {entry.name}"
            + (f"; is it {close[0]}, which is missing?" if close else f" ({len(unknown)} such)")
        )
    if missing:
        raise ValueError(f"there is no {missing[0]}, which this {entry.name} model needs ({len(missing)} missing)")
    for name, shape in shapes.items():
        if shape != wanted[name]:
            raise ValueError(
                f"{official.official_name(entry, name)} has the shape {list(shape)}, and the others ask for "
                f"{list(wanted[name])}"
            )


def _blueprint(description: Mapping[str, Any]) -> VideoModel:
    """The described model without memory for its weights."""
    with torch.device("meta"):
        return from_description(description)


def _computed_buffers(model: VideoModel) -> list[str]:
    """Those that no checkpoint of ours holds."""
    hidden = ("pixel_mean", "pixel_std", *model.extra_tensors())
    return [name for name, _ in model.named_buffers() if name not in hidden]


def _absent_buffers(description: Mapping[str, Any], model: VideoModel, tensors: Iterable[str]) -> dict[str, Tensor]:
    """Running statistics that a file lacks, as they are before training."""
    absent = set(model.extra_tensors()) - set(tensors)
    if not absent:
        return {}
    with torch.random.fork_rng(devices=[]):
        return {name: t for name, t in from_description(description).extra_tensors().items() if name in absent}


def _changed_names(model: VideoModel) -> set[str]:
    """Tensors that training changes."""
    return {name for name, p in model.named_parameters() if p.requires_grad} | model.extra_tensors().keys()


def _on_backbone(
    folder: Path, document: Mapping[str, Any], adapters: Mapping[str, Tensor], pretrained: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and all tensors of a model whose folder holds what training changes."""
    backbone = _read_backbone(folder, document["backbone"])
    if pretrained is None and is_weight_file(backbone.pretrained):
        raise ValueError(
            f"{folder} holds adapters alone, and the image model's weights were read from a file "
            f"({backbone.pretrained}): say where it is, model.load({str(folder)!r}, pretrained=PATH)"
        )
    blueprint = _blueprint(document["model"])
    description, source = describe(blueprint), pretrained or backbone.pretrained
    with torch.random.fork_rng(devices=[]):
        model = build(
            description["method"],
            backbone.name,
            source,
            num_classes=blueprint.num_classes,
            num_frames=blueprint.num_frames,
            seed=backbone.seed,
            normalisation=backbone.normalisation,
            options=blueprint.options,
        )
    if describe(model) != description or backbone_checksum(model) != backbone.checksum:
        raise ValueError(
            f"the weights of {backbone.name} ({source}) are not those that the adapters in {folder} were trained on "
            f"(checksum); give those: model.load({str(folder)!r}, pretrained=PATH)"
        )
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name in _changed_names(model)}
    if shapes != {name: list(tensor.shape) for name, tensor in adapters.items()}:
        raise ValueError(f"{folder / TENSORS} does not fit {DOCUMENT}; export the model again")
    model.load_state_dict(adapters, strict=False)
    return description, of_model(model).tensors


def _read_backbone(folder: Path, values: Any) -> Backbone:
    kinds = {"name": str, "pretrained": str, "normalisation": str, "seed": int, "checksum": str}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
        raise ValueError(f"{folder / DOCUMENT} is damaged (backbone); export the model again")
    return Backbone(**values)


def _read_document(folder: Path) -> dict[str, Any]:
    path = find_document(folder)
    if path is None:
        raise (NotADirectoryError if folder.is_file() else FileNotFoundError)(_not_converted(folder))
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_JSON_BYTES} bytes; it is none of ours")
    try:
        document = json.loads(path.read_bytes())
        version = document["format_version"]
        described = isinstance(document["model"], dict) and isinstance(document.get("tensors_sha256"), str)
        graphs = [str(name) for name in document.get("graphs", ())]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"is damaged, or another program's ({type(error).__name__})"
        raise ValueError(f"{path} {what}; convert the checkpoint again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {str(version)[:20]}, this program reads {FORMAT_VERSION}")
    if graphs and not described:
        raise ValueError(
            f"{folder} holds {', '.join(graphs)[:80]}, to be run without this project (README.md beside it says how), "
            "and no weights that can be loaded here; export the model once more, without --format"
        )
    if not described:
        raise ValueError(f"{path} is damaged (model, tensors_sha256); convert the checkpoint again")
    return dict(document)


def _not_converted(path: Path) -> str:
    """What is wrong with a path where there should be a converted checkpoint, and what to do."""
    convert_it = f"python tools/convert_checkpoint.py {path} NEW"
    if path.is_file():
        return f"{path} is a file; convert it to a folder of another name: {convert_it}"
    if (path / "state.json").is_file() or any(path.glob("checkpoint-*/state.json")):
        return f"{path} is of a training run, not converted; convert it: {convert_it}"
    return (
        f"{path} is no converted checkpoint: a folder with {DOCUMENT} and {TENSORS} is expected, which "
        "tools/convert_checkpoint.py makes of a checkpoint file or a run"
    )


def _known(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    return {"source": str(document.get("source", "")), **_read_training(folder, document)}


def _read_training(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """What the document says of a run's training, checked; folders of published files do not have it."""
    found = {name: document[name] for name in _OF_A_RUN if name in document}
    classes, count = found.get("classes", []), document["model"].get("num_classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        wrong = f"classes = {classes!r:.80}; allowed is a list of names"
    elif "classes" in found and len(classes) != count:
        wrong = f"classes has {len(classes)} names; num_classes = {count!r:.80} are needed"
    elif "sampling" in found and found["sampling"] not in _SAMPLINGS:
        wrong = f"sampling = {found['sampling']!r:.80}; allowed is {' or '.join(_SAMPLINGS)}"
    elif "interval" in found and (type(found["interval"]) is not int or not 1 <= found["interval"] <= _MOST_INTERVAL):
        wrong = f"interval = {found['interval']!r:.80}; allowed is 1 to {_MOST_INTERVAL}"
    else:
        return found | ({"classes": tuple(classes)} if "classes" in found else {})
    raise ValueError(f"{folder / DOCUMENT}: {wrong}; convert the checkpoint again")


def _settable(description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `load` and their values in a complete description."""
    method = METHODS[description["method"]]
    shown = {*method.shown_options, *_SHOWN_GEOMETRY[description["backbone"]]} - set(method.hidden_geometry)
    every = {"num_frames": description["num_frames"], **description["options"], **description["geometry"]}
    return {name: value for name, value in every.items() if name not in shown}


def _described_with(description: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The description with what the caller of `load` knows better, complete and checked."""
    kept = describe(_blueprint(description))
    known = list(_settable(kept))
    given = {}
    for name, value in settings.items():
        full = _SHORT_NAMES.get(name, name)
        if full not in known:
            shown = [also for long in known for also in (*(s for s in _SHORT_NAMES if _SHORT_NAMES[s] == long), long)]
            raise ValueError(f"unknown setting {name!r}; of this model can be set: {', '.join(shown)}")
        if full in given:
            raise ValueError(f"{name} and {full} are two names of one setting; give one of them")
        given[full] = value
    for name, value in given.items():
        section = next((kept[part] for part in ("options", "geometry") if name in kept[part]), kept)
        section[name] = value
    return describe(_blueprint(kept))


def _over_time(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], time_axes: Mapping[str, int]
) -> dict[str, Tensor]:
    """The tensors, those that belong to another number of frames than `shapes` interpolated linearly over time."""
    fitted, changed = dict(tensors), []
    for name, tensor in tensors.items():
        axis = next((axis for part, axis in time_axes.items() if part in name), None)
        shape = shapes.get(name)
        if axis is None or shape is None or tuple(tensor.shape) == shape or tensor.ndim != len(shape):
            continue
        rows = tensor.movedim(axis, -1)
        flat = rows.reshape(1, -1, rows.shape[-1])
        # A bias table's ends are the largest distances in time, which stay the ends; an embedding's rows are spans.
        ends = name.endswith("bias_table")
        fitted[name] = (
            F.interpolate(flat, size=shape[axis], mode="linear", align_corners=ends)
            .reshape(*rows.shape[:-1], shape[axis])
            .movedim(-1, axis)
            .contiguous()
        )
        changed.append(f"{name} from {tensor.shape[axis]} to {shape[axis]} rows")
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        logger.warning("num_frames is not the checkpoint's: %s%s, linearly over time", changed[0], more)
    return fitted


def sha256(path: Path) -> str:
    """Of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
