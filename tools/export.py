"""Writes a trained model as it is used: a folder that `model.load` opens, what it learned merged into its weights.

    python tools/export.py runs/k400 k400_merged

CHECKPOINT is a run's folder, one of its checkpoints, or what tools/convert_checkpoint.py made. What a method can merge
exactly is merged: ZeroI2V's adapters fold into the image model's weights, which leaves a model of the image model's own
size and cost. Any other model is written as it is. Names of classes, and how clips are cut, stay with it.

A merged model is first compared with the trained one on a clip of noise; nothing is written unless their logits agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from model import checkpoints
from model.checkpoints import Converted
from model.flops import count_cost
from model.parameters import count_parameters
from model.video import VideoModel
from pipelines.cli import run_cli
from train.trained import Trained, open_trained

TOLERANCE = 1e-4
"""How far the merged model's logits may be off, of the largest; rounding in float32 makes 1e-6."""


def main(argv: Sequence[str] | None = None) -> None:
    """One export. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    checkpoints.require_place(arguments.out, folder=True)
    trained = open_trained(arguments.checkpoint, arguments.set)
    merged = trained.model.merged()
    if merged is trained.model:
        print("nothing to merge: the model is written as it was trained")
    else:
        print(compare(trained.model, merged))
    checkpoints.write_folder(described(trained, merged), arguments.out)
    print(f"{arguments.out}: written; open it with model.load({str(arguments.out)!r})")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint, a converted folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="changes the configuration, such as model.adapter_scale=1.0 of a converted checkpoint; may be repeated",
    )
    return parser.parse_args(argv)


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


def described(trained: Trained, merged: VideoModel) -> Converted:
    """The merged model with what is known of the trained one."""
    converted = checkpoints.of_model(merged)
    if trained.step is None:  # the folder of a converted checkpoint, whose configuration is assumed in part
        stored = checkpoints.read_folder(trained.folder)
        return dataclasses.replace(
            converted, source=stored.source, classes=stored.classes, sampling=stored.sampling, interval=stored.interval
        )
    data = trained.config.data
    return dataclasses.replace(converted, classes=trained.classes, sampling=data.sampling, interval=data.interval)


if __name__ == "__main__":
    run_cli(main)
