"""Makes of a published checkpoint a folder that `model.load` and the other tools open, and the way back.

    python tools/convert_checkpoint.py vit_b_clip_8frame_k400.pth aim_b16
    python tools/convert_checkpoint.py aim_b16 official.pth --to aim

IN is a .safetensors or PyTorch file under the official names of AIM (CLIP, ImageNet-21k, Swin), TimeSformer or Video
Swin; its format is recognised by those names, and every tensor must have its place. Frames, classes, adapters and sizes
are read off the tensors. Nothing in the file is executed: pickled objects and TorchScript archives are refused.

With --to, IN is such a folder, or a run of train/main.py (its folder or one of its checkpoints), and OUT a .safetensors
or .pth file under the official names. A run without --to becomes a folder too, with its frozen weights in it.

Then, in Python: `model.load("aim_b16")`, with what no tensor shows as settings: `model.load("aim_b16", scale=0.5)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model import checkpoints
from model.checkpoints import Converted
from model.official import FORMATS
from pipelines.cli import run_cli

_SHOWN = 3  # names of a list; the folder's model.json has all


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    checkpoints.require_free(arguments.out, folder=arguments.to is None)  # before minutes of reading
    converted = open_source(arguments)
    print(describe(converted))
    if arguments.to is None:
        checkpoints.write_folder(converted, arguments.out)
        print(f"{arguments.out}: written; open it with model.load({str(arguments.out)!r})")
    else:
        entry = checkpoints.write_official(converted, arguments.out, arguments.to)
        print(f"{arguments.out}: {len(converted.tensors)} tensors under the names of {entry.name} ({entry.summary})")
        print(f"not in it, for no tensor shows it: {settings_text(unshown(converted))}")


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
    arguments = parser.parse_args(argv)
    if arguments.to and arguments.format != "auto":
        parser.error("--from is for reading published files, --to for writing them; give one of them")
    return arguments


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
    if (source / checkpoints.DOCUMENT).exists():
        if not arguments.to:
            raise ValueError(f"{source} is converted already; --to aim writes the official names")
        return checkpoints.read_folder(source)
    from train.trained import open_trained  # here: a published file needs nothing of training

    return checkpoints.of_model(open_trained(source).model)


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


def settings_text(settings: dict[str, object]) -> str:
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
