"""Draws what the model really gets: clips decoded, cropped, resized, flipped, augmented and mixed, with their labels.

    python tools/view_clips.py SHARDS --out clips.png

One row a clip, one column a frame; over each row stand the class, the sample's key, its source frame numbers and what
was done to it. With `--recipe` (and `--set`) the clips are cut and changed as that recipe does it in its first step.
`--eval` shows what the final test averages: all views of the first videos. A look costs a second or two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from model.backbone import image_size
from pipelines.augment import CLIP_MEAN, augment_clips, mix_clips
from pipelines.cli import run_cli
from pipelines.loader import ClipBatch, ClipLoader
from pipelines.plan import ClipPlan, Order, Turn, eval_turns, plan_mix
from pipelines.remote import open_set
from pipelines.shards import ShardSet
from train.config import Config
from train.loss import soft_targets
from train.pictures import filmstrips
from train.resolve import load_config


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.recipe, [*arguments.set, f"data.shards={json.dumps(arguments.shards)}"])
    split = arguments.split or (config.data.val_split if arguments.eval else config.data.train_split)
    shards = open_set(arguments.shards, split, cache=config.data.cache)
    part = config.data.part
    shards = part.of_testing(shards) if arguments.eval else part.of_training(shards)
    turns = first_turns(shards, arguments.clips, config, arguments.eval)
    count = len(turns)
    with ClipLoader(
        shards,
        [turns],
        micro_batch=count,
        size=arguments.size or image_size(config.model.name),
        options=config.data,
        seed=config.train.seed,
    ) as loader:
        batch = next(loader)  # a bad sample is named by the loader
        if not batch.valid.any():
            raise ValueError(f"none of the {count} clips of {arguments.shards} can be decoded; the reasons are above")
        targets = soft_targets(batch.labels, len(shards.classes))
        if not arguments.eval:
            augment_clips(batch.frames, batch.plans, torch.tensor(CLIP_MEAN, dtype=torch.uint8))
            mix = plan_mix(config.train.seed, 0, config.data)
            targets = targets if mix is None else mix_clips(batch.frames, targets, mix)
        sheet = contact_sheet(batch, targets.numpy(), shards)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out)
    print(f"{arguments.out}: {count} clips of {config.data.num_frames} frames from {arguments.shards}, split {split}")


def first_turns(shards: ShardSet, count: int, config: Config, evaluation: bool) -> Sequence[Turn | None]:
    """The first `count` clips that training, or the final test, would see: no more than there are, and one more where
    clips are mixed in pairs and one would be left alone."""
    options = config.data
    if evaluation:
        count = min(count, len(shards) * options.num_views)
        return next(eval_turns(len(shards), options.num_views, micro_batch=count, rank=0, world=1))
    count = min(count, shards.num_kept)
    sizes = [shard.samples for shard in shards.shards]
    order = Order(sizes, config.train.seed, window=options.shuffle_shards, kept=shards.kept)
    return [order.turn(position) for position in range(count + (options.mixes and count % 2))]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", help="a packed set: a folder, or its address")
    parser.add_argument("--out", type=Path, default=Path("clips.png"), metavar="FILE", help="picture to write (PNG)")
    parser.add_argument("--split", help="split to show (default: the recipe's training or validation split)")
    parser.add_argument("--eval", action="store_true", help="show the test views: nothing random")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="how many clips (default: 8)")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="frame size (default: what the recipe's model takes)"
    )
    parser.add_argument("--recipe", default="my_videos", help="recipe that cuts the clips (default: my_videos)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one key of the recipe")
    arguments = parser.parse_args()
    if not 1 <= arguments.clips <= 256:
        parser.error(f"--clips {arguments.clips}: allowed are 1 to 256")
    if arguments.size is not None and not 16 <= arguments.size <= 4096:
        parser.error(f"--size {arguments.size}: allowed are 16 to 4096 pixels")
    if arguments.out.suffix.lower() != ".png":
        parser.error(f"--out {arguments.out}: the picture is a .png file")
    return arguments


def contact_sheet(batch: ClipBatch, targets: np.ndarray, shards: ShardSet) -> Image.Image:
    """A picture of all valid clips of a batch, one row each; targets are [B, C]."""
    captions, rows = [], []
    for row in np.flatnonzero(batch.valid.numpy()):
        shares = [(shards.classes[c], targets[row, c]) for c in np.flatnonzero(targets[row])]
        label = " + ".join(name if share == 1 else f"{share:.2f} {name}" for name, share in shares)
        stored = shards[batch.turns[row].sample_id].frames.source_frame[list(batch.plans[row].stored)]
        captions.append(f"{label}   {batch.keys[row]}   {describe(batch.plans[row], stored.tolist())}")
        rows.append(batch.frames[row].numpy())
    return filmstrips(rows, captions)


def describe(plan: ClipPlan, shown: Sequence[int]) -> str:
    """Which source frames are shown (of those stored the nearest to the planned ones), and what is done to them."""
    done = [f"frames {' '.join(map(str, shown))}"]
    done += ["flipped"] * plan.flip + [f"{name} {amount:.2g}" if amount else name for name, amount in plan.ops]
    done += ["erased"] * (plan.erase is not None)
    return ", ".join(done)


if __name__ == "__main__":
    run_cli(main)
