"""What a training will cost, before anything is packed, fetched or started: memory and hours, projected from counts.

    python tools/estimate_run.py aim_b16_k400 aim_l14_k400 --gpu "A100" --gpus 8

The model is built without weights and counted on one clip (see `model.flops`); nothing is run. The table says for each
recipe (without any: for all of them):

    clips               of the training split: of a published set its published number, else of --set
                        data.shards=FOLDER, or --samples
    steps               optimizer steps of the whole run
    micro-batch: GB     clips on one GPU at once, and what weights, gradients, optimizer and all that is kept for the
                        backward pass take then; what the allocator and the libraries take comes on top
    largest in 80 GB    micro-batch of 1, 2, 4, … clips that leaves a tenth of --memory free
    10^18 ops           operations of the whole training, two for each multiply-add, forward and backward
    hours               at --share of what the maker states for bf16 products on that GPU, waiting for nothing

The share is an assumption until `tools/profile_throughput.py` has measured it on your machine. Takes seconds a recipe.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from model.flops import GPU_PEAKS, WithoutData, count_cost, gpu_peak
from model.methods import METHODS, create, load_tower
from model.parameters import count_parameters
from model.video import VideoModel
from pipelines.cli import run_cli
from pipelines.plan import num_steps
from pipelines.shards import ShardSet
from train.config import Config
from train.resolve import RECIPES, load_config

PUBLISHED_SETS = {
    "data/k400": (240_436, 400),
    "data/k700": (542_357, 700),
    "data/ssv2": (168_913, 174),
    "data/diving48": (15_027, 48),
    "data/ucf101": (9_537, 101),
    "data/hmdb51": (3_570, 51),
}
"""Where the shipped recipes look for a set → its training videos and classes (Kinetics: the copies that MMAction2's
published models were trained on; UCF-101 and HMDB-51: the first division)."""
FEATURES = "_features"  # what the recipes that read frame features append to the set's name
GPU, SHARE, MEMORY_GB = "H200", 0.4, 80.0
_BYTES_A_TRAINED_WEIGHT = 16  # float32: itself, its gradient, Adam's two means
_FREE = 0.9


@dataclass(frozen=True)
class Estimate:
    """What a recipe will cost."""

    recipe: str
    samples: int
    steps: int
    epochs: float
    micro_batch: int
    fixed_bytes: int
    """Weights, gradients, optimizer, and what a micro-batch keeps however many clips it has."""
    bytes_per_clip: int
    operations: float
    """Of the whole training."""
    reads_features: bool
    """Whether the recipe's set holds frame features: then the image model, which is counted, is not run."""

    def memory_gb(self, clips: int) -> float:
        """10⁹ bytes of a GPU that has so many clips at once."""
        return (self.fixed_bytes + clips * self.bytes_per_clip) / 1e9

    def most_clips(self, memory_gb: float) -> int:
        """The largest power of two that leaves a tenth of the memory free; 0 where one clip does not fit."""
        room = _FREE * memory_gb * 1e9 - self.fixed_bytes
        return 2 ** int(math.log2(room / self.bytes_per_clip)) if room >= self.bytes_per_clip else 0

    def hours(self, operations_per_second: float) -> float:
        """Of the whole training at that speed."""
        return self.operations / operations_per_second / 3600

    def header(self) -> str:
        """The sentence about it in a shipped recipe: one GPU, everything at its default."""
        peak = gpu_peak(GPU, torch.bfloat16)
        assert peak is not None
        fits, fewer = self.most_clips(MEMORY_GB), ""
        if fits < self.micro_batch:
            fewer = f" ({fits} fit into {MEMORY_GB:.0f} GB: --set ds.train_micro_batch_size_per_gpu={fits})"
        less = ", with the image model run on every clip: from frame features less" * self.reads_features
        return (
            f"Projected, never run: {self.memory_gb(self.micro_batch):.1f} GB for {self.micro_batch} clips at once"
            f"{fewer}, {_short(self.hours(SHARE * peak))} hours on one {GPU} at {100 * SHARE:.0f} % of its peak{less} "
            "(tools/estimate_run.py)."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """One table. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    peak = gpu_peak(arguments.gpu, torch.bfloat16)
    if peak is None:
        raise ValueError(f"--gpu {arguments.gpu}: no speed is known of it; known are {', '.join(GPU_PEAKS)}")
    speed = arguments.share * peak * arguments.gpus
    largest = f"largest in {arguments.memory:g} GB"
    print(f"{'recipe':24} {'clips':>9} {'steps':>8} micro-batch: GB {largest} 10^18 ops {'hours':>7}")
    for name in arguments.recipes or trainable_recipes():
        known = samples_and_classes(load_config(name, arguments.set, needs_data=False), arguments)
        estimate = estimate_recipe(name, arguments.set, *known)
        at_once = f"{estimate.micro_batch}: {estimate.memory_gb(estimate.micro_batch):.1f}"
        print(
            f"{name:24} {estimate.samples:>9,} {estimate.steps:>8,} {at_once:>15} "
            f"{estimate.most_clips(arguments.memory):>{len(largest)}} {estimate.operations / 1e18:>9.2g} "
            f"{_short(estimate.hours(speed)):>7}",
            flush=True,
        )
    gpus = f"{arguments.gpus} × {arguments.gpu}"
    print(f"hours: on {gpus} at {100 * arguments.share:g} % of the {peak / 1e12:.0f} TFLOP/s that its maker states")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names or files (default: all that ship)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one key of the recipes")
    parser.add_argument("--samples", type=int, metavar="N", help="training videos, where no set is at hand")
    parser.add_argument("--classes", type=int, metavar="N", help="classes, where no set is at hand")
    parser.add_argument("--gpu", default=GPU, help=f"name of the GPU (default: {GPU})")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many work together (default: 1)")
    parser.add_argument("--memory", type=float, default=MEMORY_GB, metavar="GB", help="of a GPU (default: 80)")
    parser.add_argument("--share", type=float, default=SHARE, help=f"of the stated speed (default: {SHARE})")
    arguments = parser.parse_args(argv)
    for option in ("samples", "classes", "gpus"):
        given = getattr(arguments, option)
        if given is not None and not 1 <= given <= 10**9:
            parser.error(f"--{option} {given}: allowed are 1 to 1,000,000,000")
    if not 0 < arguments.share <= 1:
        parser.error(f"--share {arguments.share:g}: allowed is more than 0, at most 1")
    if not 1 <= arguments.memory <= 10**6:
        parser.error(f"--memory {arguments.memory:g}: allowed are 1 to 1,000,000 GB")
    return arguments


def trainable_recipes() -> list[str]:
    """Names of the shipped recipes of published sets."""
    configs = {path.stem: load_config(path.stem, needs_data=False) for path in sorted(RECIPES.glob("*.toml"))}
    return [name for name, config in configs.items() if _set_name(config) in PUBLISHED_SETS]


def samples_and_classes(config: Config, arguments: argparse.Namespace) -> tuple[int, int]:
    """Of the training split: as said, of the packed set if it is there, or of the published one."""
    location, samples, classes = config.data.shards, arguments.samples, arguments.classes
    if samples is not None and classes is not None:
        return samples, classes
    if (Path(location) / "manifest.json").is_file():
        shards = config.data.part.of_training(ShardSet.open(location, config.data.train_split))
        return samples or shards.num_kept, classes or len(shards.classes)
    if _set_name(config) in PUBLISHED_SETS:
        known = PUBLISHED_SETS[_set_name(config)]
        return samples or known[0], classes or known[1]
    raise ValueError(
        f"data.shards = {location!r}: no set is there, and none of that name is published; say --samples N --classes N"
    )


def estimate_recipe(recipe: str, overrides: Sequence[str], samples: int, classes: int) -> Estimate:
    """Counts the model of a recipe. Raises ValueError where it trains nothing, or its image model is unknown."""
    config = load_config(recipe, overrides, needs_data=False)
    if not METHODS[config.model.method].trains:
        raise ValueError(f"{recipe}: a model of method {config.model.method} is not trained")
    model = model_without_data(config, classes)
    total, trainable = count_parameters(model)
    # A text tower is the same for every clip of a micro-batch, so two counts tell what a clip adds.
    one = count_cost(model)
    two = count_cost(model, clips=2) if model.reads_class_names else None
    clip_bytes = one.kept_bytes if two is None else two.kept_bytes - one.kept_bytes
    clip_gmac = one.training_gmac if two is None else two.training_gmac - one.training_gmac
    batch = config.deepspeed["train_batch_size"]
    micro_batch = min(config.deepspeed["train_micro_batch_size_per_gpu"], batch)
    steps = num_steps(config.schedule.epochs, samples, batch)
    step_gmac = batch * clip_gmac + math.ceil(batch / micro_batch) * (one.training_gmac - clip_gmac)
    shared_bytes = one.kept_bytes - clip_bytes + one.copied_bytes
    return Estimate(
        recipe=recipe,
        samples=samples,
        steps=steps,
        epochs=config.schedule.epochs,
        micro_batch=micro_batch,
        fixed_bytes=2 * (total - trainable) + _BYTES_A_TRAINED_WEIGHT * trainable + shared_bytes,
        bytes_per_clip=clip_bytes,
        operations=2e9 * step_gmac * steps,
        reads_features=config.data.shards.endswith(FEATURES),
    )


def model_without_data(config: Config, classes: int) -> VideoModel:
    """The model of a run, with shapes alone."""
    settings = config.model
    with WithoutData():
        tower = load_tower(
            settings.method,
            settings.name,
            "none",
            normalisation=settings.normalisation,
            options=settings.options,
        )
        model = create(
            settings.method,
            tower,
            num_classes=classes,
            num_frames=config.data.num_frames,
            options=settings.options,
        )
    if model.reads_class_names:
        model.name_classes([f"class {number}" for number in range(classes)])
    return model


def _set_name(config: Config) -> str:
    return config.data.shards.removesuffix(FEATURES)


def _short(hours: float) -> str:
    """Two digits are more than a projection knows."""
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1g}" if hours < 1 else f"{hours:.1f}"


if __name__ == "__main__":
    run_cli(main)
