"""Evaluates a trained model on a packed set, on one process or many, and writes what it got right and wrong.

    python tools/evaluate.py runs/k400 --shards SHARDS --views 3x1
    deepspeed tools/evaluate.py runs/k400/checkpoint-008000 --shards SHARDS --views 3x3

CHECKPOINT is a run's folder (its newest checkpoint), one of its checkpoints, or what tools/convert_checkpoint.py made;
of a method that trains nothing (zero_shot) its recipe. Models that read class names (prompt_clip, zero_shot) answer for
the set's classes, whatever they were trained for: on other classes than those that is zero-shot recognition.
Clips are cut as in the run; of a published checkpoint densely, 128 source frames a clip, unless --set data.sampling and
data.interval say otherwise. The metrics are the same for any batch and any number of processes.

Writes into OUT: metrics.json; per_class.csv; predictions.npz (keys, classes, logits, labels, valid); and, where a video
has one label, confusion.csv (row: the truth, column: the answer) and confusion.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; train/main.py says why

import torch
from tqdm import tqdm

from model.speed import SpeedOptions, speed_up
from pipelines.cli import one_of_several, run_cli
from pipelines.loader import default_workers
from pipelines.machine import installed_versions, processor_name
from pipelines.plan import ClipOptions
from pipelines.remote import open_set
from pipelines.shards import ShardSet, write_durably
from train.engine import World, start_world
from train.evaluate import AVERAGINGS, Evaluation, evaluate
from train.feature_sets import check_feature_set
from train.metrics import metrics_text
from train.run_folder import PREDICTIONS
from train.start import PACKAGES
from train.tables import write_tables
from train.trained import Trained, open_trained

METRICS = "metrics.json"
LOSS_DIGITS = 5
"""What of a mean loss does not depend on the batch."""


def main(argv: Sequence[str] | None = None) -> int:
    """One evaluation. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    trained = open_trained(arguments.checkpoint, arguments.set)
    data = trained.config.data
    options = with_views(data, arguments.views)
    location = arguments.shards or data.shards
    if not location:
        raise ValueError(f"{arguments.checkpoint} names no set: add --shards FOLDER, made by tools/make_shards.py")
    split = arguments.split or data.val_split or "val"
    shards = data.part.of_testing(open_set(location, split, cache=data.cache, window=1))
    trained.require_classes(tuple(shards.classes), f"{location}")
    check_feature_set(shards, trained.model, trained.config)
    if trained.assumed and os.environ.get("RANK", "0") == "0":
        print(trained.assumed, flush=True)
    bf16 = trained.config.bf16 if arguments.precision is None else arguments.precision == "bf16"
    precision, views = "bf16" if bf16 else "fp32", f"{options.test_clips}x{options.test_crops}"
    world = start_world() if "RANK" in os.environ else _alone()
    out = arguments.out or default_folder(trained, shards.split, views, arguments.average, precision)
    world.agree(_failure_of_making(out) if world.rank == 0 else None)
    if bf16:
        trained.model.set_compute_dtype(torch.bfloat16)
    speed_up(trained.model.to(world.device), speed := for_evaluation(trained.config.speed, bf16), world.device)

    start, micro_batch = time.monotonic(), arguments.batch or trained.micro_batch
    clips = len(shards) * options.num_views
    with _Progress(clips, micro_batch * world.size, shown=world.rank == 0) as progress:
        result = evaluate(
            trained.model,
            shards,
            world,
            micro_batch=micro_batch,
            loader_options={
                "options": options,
                "workers": data.workers or default_workers(world.local_size, world.device.type),
                "prefetch": data.prefetch,
                "max_bad_fraction": data.max_bad_fraction,
                "ranks": world.size,
                "device": world.device,
            },
            averaging=arguments.average,
            on_batch=progress.step,
        )
    if world.rank == 0:
        seconds = time.monotonic() - start
        settings = {
            **{"checkpoint": str(arguments.checkpoint), "step": trained.step},
            **{"shards": str(location), "split": shards.split, "fingerprint": shards.fingerprint},
            **{"views": views, "averaging": arguments.average, "precision": precision},
            **{"num_frames": options.num_frames, "sampling": options.sampling, "interval": options.interval},
            **{"world_size": world.size, "micro_batch": micro_batch, "speed": dataclasses.asdict(speed)},
            **{"seconds": round(seconds, 1), "clips_per_s": round(clips / seconds, 2)},
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else processor_name(),
            "packages": installed_versions(PACKAGES),
        }
        metrics = write_report(out, result, shards, settings)
        text = metrics_text(metrics, len(shards.classes))
        print(f"{shards.folder}, split {shards.split}, {views} views, {precision}: {text}")
        print(out, flush=True)
    return 0


def for_evaluation(speed: SpeedOptions, bf16: bool) -> SpeedOptions:
    """Of a run's ways to compute a step those that matter here: blocks are compiled only where that was asked for (few
    clips do not earn the minute that it takes), and in float32 nothing is computed in 8 bits."""
    compiled = "on" if speed.compile == "on" else "off"
    return SpeedOptions(attention=speed.attention, compile=compiled, fp8=speed.fp8 and bf16)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "a run, a checkpoint, a converted one, or the .toml recipe of a method without training"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=what)
    parser.add_argument("--shards", metavar="SET", help="a packed set: a folder, or its address (default: the run's)")
    parser.add_argument("--split", help="default: the run's validation split, or val")
    parser.add_argument("--views", metavar="CLIPSxCROPS", help="such as 3x1 or 1x3 (default: the run's)")
    parser.add_argument("--average", choices=AVERAGINGS, default="prob", help="of the views (default: prob)")
    parser.add_argument("--batch", type=int, metavar="N", help="clips at once (default: as in training)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: evaluation-… beside the checkpoint")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change one key of the run's recipe; of a converted checkpoint data.…, ds.…, model.… and speed.…",
    )
    precision = parser.add_mutually_exclusive_group()
    for name, what in (("bf16", "bfloat16"), ("fp32", "float32")):
        text = f"compute in {what} (default: as trained; a converted checkpoint in float32)"
        precision.add_argument(f"--{name}", action="store_const", const=name, dest="precision", help=text)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_args(argv)
    if arguments.batch is not None and not 1 <= arguments.batch <= 4096:
        parser.error(f"--batch {arguments.batch}: allowed are 1 to 4096 clips")
    if arguments.views is not None and not re.fullmatch(r"[1-9][0-9]{0,2}x[13]", arguments.views):
        parser.error(f"--views {arguments.views}: the form is CLIPSxCROPS, such as 3x1; crops are 1 or 3")
    return arguments


def with_views(options: ClipOptions, views: str | None) -> ClipOptions:
    """The options with other test views; as they are for None."""
    if views is None:
        return options
    clips, crops = map(int, views.split("x"))
    return dataclasses.replace(options, test_clips=clips, test_crops=crops)


def default_folder(trained: Trained, split: str, views: str, average: str, precision: str) -> Path:
    """Where a report goes: one folder for each way to evaluate."""
    step = "" if trained.step is None else f"{trained.step:06d}-"
    return trained.folder / f"evaluation-{step}{re.sub(r'[^A-Za-z0-9._-]', '_', split)}-{views}-{average}-{precision}"


def _alone() -> World:
    """A world of this process, which needs none of what several do."""
    return World(0, 1, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _failure_of_making(folder: Path) -> OSError | None:
    """Makes the folder, before hours of work rather than after; what is wrong, if anything."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return OSError(f"--out {folder}: no folder can be made there ({error.strerror})")
    if any(folder.iterdir()) and not (folder / METRICS).exists():
        return FileExistsError(f"--out {folder} holds other files than an earlier evaluation's: give another folder")
    return None


class _Progress:
    """A bar of clips, on one process for all of them."""

    def __init__(self, clips: int, clips_a_step: int, *, shown: bool) -> None:
        self._clips_a_step = clips_a_step
        self._bar = tqdm(total=clips, unit="clip", disable=None if shown else True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """All processes have done a micro-batch, the last one perhaps less."""
        self._bar.update(min(self._clips_a_step, self._bar.total - self._bar.n))


def write_report(out: Path, result: Evaluation, shards: ShardSet, settings: dict[str, Any]) -> dict[str, float]:
    """All files of an evaluation; returns the metrics as they stand in metrics.json."""
    metrics = result.metrics()
    metrics["loss"] = round(metrics["loss"], LOSS_DIGITS)
    plain = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    write_durably(out / METRICS, (json.dumps(plain | settings, indent=1, ensure_ascii=False) + "\n").encode())
    write_tables(out, result, shards.classes)
    result.save(out / PREDICTIONS, shards)
    return metrics


if __name__ == "__main__":
    run_cli(lambda: one_of_several(main))
