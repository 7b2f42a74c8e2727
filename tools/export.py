"""Writes a trained model as others take it: a folder for a model hub, with a card that says what it is and how it runs.

    python tools/export.py runs/k400 k400                                   weights, for this project
    python tools/export.py runs/k400 k400_adapters --adapters-only          what was trained; the image model is fetched
    python tools/export.py runs/k400 k400_onnx --format onnx                for onnxruntime, without this project
    python tools/export.py runs/k400 k400_torch --format torch_export       for PyTorch, without this project

CHECKPOINT is a run's folder, one of its checkpoints, or what tools/convert_checkpoint.py made; or the recipe of a
method that trains nothing, with --classes. Writes into OUT, whole or not at all:

    config.json         what the model is, its classes, how clips are cut, checksums
    README.md           the card: metadata, a short program for each format, input, what the run measured, settings
    model.safetensors   of --format safetensors (default): float32 weights, which `model.load` opens
    model.pt2           of --format torch_export: uint8 clips to logits, any number at once; PyTorch alone runs it
    model.onnx          of --format onnx: the same for onnxruntime (ONNX operators of version 20); of weights above 2 GB
                        they go to model.onnx.data beside it

What a method can merge exactly is merged: ZeroI2V's adapters fold into the image model's weights, which leaves a model
of the image model's own size and cost. Any other model is written as it is. A merged model, model.pt2 and model.onnx
are first compared with the trained model on clips of noise; nothing is written unless their logits agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from model import checkpoints
from model.checkpoints import Backbone, Converted
from model.flops import count_cost
from model.graphs import WRITERS
from model.parameters import backbone_checksum, count_parameters
from model.video import VideoModel
from pipelines.annotation_formats import read_classes
from pipelines.cli import run_cli
from tools.parts.model_card import UNKNOWN_LICENCE, model_card, own_answers, without_folder
from train.trained import Trained, open_trained

SAFETENSORS = "safetensors"
FORMATS = (SAFETENSORS, *WRITERS)
TOLERANCE = 1e-4
"""How far the merged model's logits may be off, of the largest; rounding in float32 makes 1e-6."""


def main(argv: Sequence[str] | None = None) -> None:
    """One export. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    formats = tuple(dict.fromkeys(arguments.format or [SAFETENSORS]))
    require_sense(arguments, formats)
    trained = with_classes(open_trained(arguments.checkpoint, arguments.set), arguments.classes)
    require_names(trained, formats)
    backbone = backbone_of(trained) if arguments.adapters_only else None
    answers = own_answers(trained)

    model = trained.model if arguments.adapters_only else merged(trained.model)
    converted, known = described(trained, model, arguments.checkpoint)
    with checkpoints.new_folder(arguments.out) as part:
        document = checkpoints.document_of(converted)
        if SAFETENSORS in formats:
            document |= checkpoints.write_tensors(converted, part, backbone)
        document |= write_graphs(model, part, [name for name in formats if name != SAFETENSORS])
        checkpoints.write_document(document, part)
        config = trained.config if known else None
        card = model_card(
            arguments.out.name, model, document, config=config, answers=answers, licence=arguments.licence
        )
        (part / "README.md").write_text(card, encoding="utf-8")

    opened = f"; open it with model.load({str(arguments.out)!r})" if SAFETENSORS in formats else ""
    print(f"{arguments.out}: written{opened}; README.md says how to run it")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint, a converted folder, a recipe")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add(
        "--format",
        action="append",
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} (default: {SAFETENSORS}); may be repeated",
    )
    add("--adapters-only", action="store_true", help="leave out the frozen image model, which is fetched when loaded")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one a line, where they are not known")
    add("--licence", default=UNKNOWN_LICENCE, metavar="ID", help="of the weights, for the card (default: unknown)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="changes the configuration, such as model.adapter_scale=1.0 of a converted checkpoint; may be repeated",
    )
    return parser.parse_args(argv)


def require_sense(arguments: argparse.Namespace, formats: Sequence[str]) -> None:
    """ValueError for what need not be tried."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"--format {unknown[0]}; allowed is {', '.join(FORMATS)}")
    if arguments.adapters_only and tuple(formats) != (SAFETENSORS,):
        raise ValueError(
            f"--adapters-only writes weights for this project to put together; --format {formats[-1]} needs the whole "
            "model: leave one of them out"
        )
    checkpoints.require_place(arguments.out, folder=True)


def with_classes(trained: Trained, file: Path | None) -> Trained:
    """The model with the names of a file for its classes; ValueError where they do not fit."""
    if file is None:
        return trained
    names = read_classes(file)
    if trained.model.reads_class_names:
        trained.model.name_classes(names)
    elif trained.classes is not None and trained.classes != names:
        raise ValueError(f"--classes {file}: the names are known, and others than these; leave it out")
    elif trained.model.num_classes != len(names):
        raise ValueError(f"--classes {file} has {len(names)} names, and the model {trained.model.num_classes} classes")
    return dataclasses.replace(trained, classes=names)


def require_names(trained: Trained, formats: Sequence[str]) -> None:
    """ValueError where a model is to run by itself, or answers for names, and has none."""
    if trained.model.reads_class_names and trained.classes is None:
        raise ValueError("the model answers for the classes that it is told, and was told none: give --classes FILE")
    alone = [name for name in formats if name != SAFETENSORS]
    if alone and trained.model.num_classes is None:
        raise ValueError(f"--format {alone[0]}: the model has no classifier, so nothing to answer; train it")
    if alone and trained.classes is None:
        raise ValueError(f"--format {alone[0]}: the names of the classes are not known: give --classes FILE")


def backbone_of(trained: Trained) -> Backbone:
    """The image model of a run by name, for its adapters alone; ValueError where it has none."""
    if trained.step is None:
        raise ValueError(
            "--adapters-only is for a run, whose configuration names its image model; this is none: export it whole"
        )
    config, seed = trained.config.model, trained.config.train.seed
    weights = without_folder(config.pretrained)
    return Backbone(config.name, weights, config.normalisation, seed, backbone_checksum(trained.model))


def merged(model: VideoModel) -> VideoModel:
    """The model with all merged that can be, after a line that says what it saves."""
    result = model.merged()
    print("nothing to merge: the model is written as it was trained" if result is model else compare(model, result))
    return result


def compare(trained: VideoModel, merged: VideoModel) -> str:
    """A line that says what merging saves; ValueError where the two models do not agree."""
    size, generator = trained.geometry.image_size, torch.Generator().manual_seed(0)
    noise = torch.randn((1, trained.num_frames, 3, size, size), generator=generator)
    with torch.inference_mode():
        expected, logits = trained(noise), merged(noise)
    off = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not off <= TOLERANCE:
        raise ValueError(
            f"the merged model is off by {off:.1e} of the largest logit, allowed is {TOLERANCE}: its weights are too "
            "large to be merged in float32; use it as it was trained"
        )
    parameters = [count_parameters(model)[0] for model in (trained, merged)]
    costs = [count_cost(model).gmac for model in (trained, merged)]
    return (
        f"merged: {parameters[0]:,} → {parameters[1]:,} parameters, {costs[0]:.1f} → {costs[1]:.1f} GMAC a clip; "
        f"the logits of a clip of noise differ by {off:.1e} of the largest"
    )


def described(trained: Trained, model: VideoModel, checkpoint: Path) -> tuple[Converted, bool]:
    """The model with what is known of the trained one, and whether its configuration is known."""
    converted = checkpoints.of_model(model)
    options = converted.description["options"]
    if options.get("class_texts"):
        name = Path(options["class_texts"]).name
        description = {**converted.description, "options": {**options, "class_texts": name}}
        converted = dataclasses.replace(converted, description=description)
        print(f"note: words for its classes come from {name}: whoever loads the weights says model.class_texts=PATH")
    if trained.step is None and checkpoint.is_dir():  # a converted checkpoint, whose configuration is assumed in part
        known = checkpoints.read_known(trained.folder)
        return dataclasses.replace(converted, **{**known, "classes": trained.classes}), False
    data = trained.config.data
    known = {"classes": trained.classes, "sampling": data.sampling, "interval": data.interval}
    return dataclasses.replace(converted, **known), True


def write_graphs(model: VideoModel, folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Writes the model in formats that run by themselves; what config.json says of them."""
    graphs: dict[str, Any] = {}
    for name in tqdm(formats, desc="converting and comparing", disable=None if formats else True, leave=False):
        file, write = WRITERS[name]
        said = write(model, folder / file)
        beside = folder / f"{file}.data"
        sums = {path.name: checkpoints.sha256(path) for path in (folder / file, beside) if path.exists()}
        graphs[file] = {**said, "sha256": sums}
        print(f"{file}: logits differ from the model's by {said['largest_error']:.1g} of the largest at most")
    return {"graphs": graphs} if graphs else {}


if __name__ == "__main__":
    run_cli(main)
