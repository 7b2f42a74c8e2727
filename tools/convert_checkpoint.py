"""Makes of a published checkpoint a folder that `model.load` and the other tools open, and the way back.

    python tools/convert_checkpoint.py vit_b_clip_8frame_k400.pth aim_b16
    python tools/convert_checkpoint.py ssv2.pth aim_ssv2 --set mean=[0.5,0.5,0.5] --set std=[0.5,0.5,0.5]
    python tools/convert_checkpoint.py aim_b16 official.pth --to aim

IN is a .safetensors or PyTorch file under the official names of AIM (CLIP, ImageNet-21k, Swin), TimeSformer or Video
Swin; its format is recognised by those names, and every tensor must have its place. Frames, classes, adapters and sizes
are read off the tensors. Nothing in the file is executed: pickled objects and TorchScript archives are refused.

What no tensor shows has the published values; --set says others, and the folder keeps them. The settings are those of
`model.load`: scale (or adapter_scale), num_frames, quick_gelu, heads, mean, std, …

With --to, IN is such a folder, or a run of train/main.py (its folder or one of its checkpoints), and OUT a .safetensors
or .pth file under the official names. A run without --to becomes a folder too, with its frozen weights in it, the names
of its classes and how its clips are cut.

Then, in Python: `model.load("aim_b16")`, with other settings for once: `model.load("aim_b16", scale=0.5)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model import checkpoints
from model.checkpoints import Converted
from model.methods import FORMATS
from pipelines.cli import run_cli
from train.resolve import parse_value
from train.trained import open_trained

_SHOWN = 3  # names of a list; the folder's config.json has all


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    checkpoints.require_place(arguments.out, folder=arguments.to is None)  # before minutes of reading
    settings = parse_settings(arguments.set)
    converted = checkpoints.with_settings(open_source(arguments), settings)
    if arguments.to is None:
        print(describe(converted))
        if settings:
            print(f"as --set says: {settings_text(settings)}")
        checkpoints.write_folder(converted, arguments.out)
        print(f"{arguments.out}: written; open it with model.load({str(arguments.out)!r})")
        return
    entry = checkpoints.official_format(converted, arguments.to)  # before anything is said
    print(describe(converted))
    checkpoints.write_official(converted, arguments.out, arguments.to)
    print(f"{arguments.out}: {len(converted.tensors)} tensors under the names of {entry.name} ({entry.summary})")
    print(f"not in it, for no tensor shows it: {settings_text(unshown(converted))}")
    method = converted.description["method"]
    if method != entry.method:
        print(
            f"official files do not hold the method: converted back, {method} becomes {entry.method} without adapters"
        )
    if way := way_back(converted, arguments.out):
        print(way)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint file; a converted folder; or a run's")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; with --to, the file")
    parser.add_argument(
        "--from",
        dest="format",
        default="auto",
        choices=checkpoints.SOURCES,
        metavar="FORMAT",
        help=f"refuse a file that is not of this format: {', '.join(checkpoints.SOURCES[1:])} "
        "(default: whichever is recognised; aim is AIM on any image model)",
    )
    families = sorted({entry.family for entry in FORMATS.values()})
    parser.add_argument(
        "--to",
        choices=families,
        metavar="FAMILY",
        help=f"write official names instead of a folder: {', '.join(families)}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of model.load that no tensor shows, such as adapter_scale=1.0 or mean=[0.5,0.5,0.5] (TOML); "
        "may be repeated",
    )
    arguments = parser.parse_args(argv)
    if arguments.to and arguments.set:
        parser.error("--set is kept in a folder, and official files have no place for it; leave it out with --to")
    if arguments.to and arguments.format != "auto":
        parser.error("--from is for reading published files, --to for writing them; give one of them")
    return arguments


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Every `--set NAME=VALUE`; ValueError for another form, or a name that is set twice."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {text}: the form is NAME=VALUE, such as adapter_scale=1.0")
        if name in settings:
            raise ValueError(f"--set {text}: {name} is set twice; give it once")
        settings[name] = parse_value(value, text)
    return settings


def open_source(arguments: argparse.Namespace) -> Converted:
    """The model of IN, whatever it is; ValueError or OSError for what cannot be read, or goes the other way."""
    source: Path = arguments.source
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_file():
        if arguments.to:
            raise ValueError(f"{source} is a file already; --to takes a converted folder or a run: convert it first")
        return checkpoints.convert(source, arguments.format)
    if arguments.format != "auto":
        raise ValueError(f"{source} is a folder; --from says the format of a file")
    if checkpoints.find_document(source):
        if not arguments.to:
            raise ValueError(f"{source} is converted already; --to aim writes the official names")
        return checkpoints.read_folder(source)
    trained = open_trained(source)
    data = trained.config.data
    return dataclasses.replace(
        checkpoints.of_model(trained.model), classes=trained.classes, sampling=data.sampling, interval=data.interval
    )


def describe(converted: Converted) -> str:
    """What was found, in lines."""
    model, geometry = converted.description, converted.description["geometry"]
    total, trainable = checkpoints.count(converted)
    summary = FORMATS[converted.source].summary if converted.source in FORMATS else "a training run"
    classes = "no head" if model["num_classes"] is None else f"{model['num_classes']} classes"
    lines = [
        f"format: {converted.source} ({summary})",
        f"model: {model['method']} on {model['backbone']}, width {geometry['width']}, patch {geometry['patch_size']}, "
        f"image {geometry['image_size']}, {model['num_frames']} frames, {classes}",
        f"options: {settings_text(model['options'])}",
        f"parameters: {total:,}, of which {trainable:,} train",
    ]
    for reason in dict.fromkeys(reason for _, reason in converted.dropped):
        lines.append(f"dropped: {listed(name for name, why in converted.dropped if why == reason)}: {reason}")
    if converted.kept_buffers:
        lines.append(f"kept as constructed, for the file lacks them: {listed(converted.kept_buffers)}")
    if converted.assumed:
        lines.append(f"assumed, for no tensor shows it (settings of model.load): {settings_text(converted.assumed)}")
    return "\n".join(lines)


def unshown(converted: Converted) -> dict[str, object]:
    """What the reader of the official names has to know besides."""
    model = converted.description
    names = ("quick_gelu", "heads", "mean", "std")
    found = {name: model["geometry"][name] for name in names if name in model["geometry"]}
    if "adapter_scale" in model["options"]:
        found["adapter_scale"] = model["options"]["adapter_scale"]
    return {**found, "num_frames": model["num_frames"]}


def way_back(converted: Converted, out: Path) -> str:
    """A line that says how the official file becomes the same model again; empty where it does by itself."""
    try:
        lost = checkpoints.lost_settings(converted)
    except ValueError as error:
        return f"it cannot be converted back, keep the folder: {error}"
    if not lost:
        return ""
    command = ["python", "tools/convert_checkpoint.py", str(out), "NEW"]
    for name, value in lost.items():
        command += ["--set", f"{name}={json.dumps(value, separators=(',', ':'))}"]
    return f"the way back, where other values would be assumed: {shlex.join(command)}"


def settings_text(settings: dict[str, Any]) -> str:
    """Name and value of each."""

    def shown(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"({', '.join(map(shown, value))})" if isinstance(value, list | tuple) else str(value)

    return ", ".join(f"{name} = {shown(value)}" for name, value in settings.items())


def listed(names: Iterable[str]) -> str:
    """The first few of many, and how many they are."""
    all_names = list(names)
    more = f" and {len(all_names) - _SHOWN} more" if len(all_names) > _SHOWN else ""
    return ", ".join(all_names[:_SHOWN]) + more


if __name__ == "__main__":
    run_cli(main)
