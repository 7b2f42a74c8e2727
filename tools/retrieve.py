"""How well sentences find their videos and videos their sentences: recall at 1, 5 and 10, and the median rank.

    python tools/retrieve.py runs/prompts --shards SET

The classes of the packed set are the sentences; those of one class are all right answers to it. A model that reads its
class names (method prompt_clip) is given these, whatever it was trained on, so a set of captions has each of them as a
class. Of other methods they must be the classes of the training: then a video's scores are the logits of its classes,
which nothing makes comparable between videos, and what sentences find says little.

CHECKPOINT is a run's folder, one of its checkpoints, or what tools/convert_checkpoint.py made; the set holds videos, or
features of frames (tools/extract_features.py). Several views of a video are averaged as logits. Equal scores count
against the right answer (train/retrieval.py). All similarities are kept at once, 8 bytes for each video and sentence.
One process; writes retrieval.json and retrieval.md into OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; train/main.py says why

import torch
from tqdm import tqdm

from model.speed import speed_up
from pipelines.cli import run_cli
from pipelines.loader import default_workers
from pipelines.machine import installed_versions, processor_name
from pipelines.remote import open_set
from pipelines.shards import write_durably
from tools.evaluate import for_evaluation, with_views
from train.engine import World
from train.evaluate import evaluate
from train.feature_sets import check_feature_set
from train.retrieval import DEPTHS, retrieve
from train.start import PACKAGES
from train.trained import Trained, open_trained

_DIRECTIONS = {"text_to_video": "text → video", "video_to_text": "video → text"}


def main(argv: Sequence[str] | None = None) -> int:
    """One measurement. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    trained = open_trained(arguments.checkpoint, arguments.set)
    data, options = trained.config.data, with_views(trained.config.data, arguments.views)
    split = arguments.split or data.val_split or "val"
    shards = data.part.of_testing(open_set(arguments.shards, split, cache=data.cache, window=1))
    if shards.multi_label:
        raise ValueError(f"{shards.folder}: its videos have several labels each; retrieval needs sets with one")
    trained.require_classes(shards.classes, arguments.shards)
    check_feature_set(shards, trained.model, trained.config)
    world = make_ready(trained, arguments.precision)
    out = arguments.out or trained.folder / f"retrieval-{split}"
    out.mkdir(parents=True, exist_ok=True)

    start, micro_batch = time.monotonic(), arguments.batch or trained.micro_batch
    with tqdm(total=len(shards) * options.num_views, unit="clip", disable=None) as bar:
        result = evaluate(
            trained.model,
            shards,
            world,
            micro_batch=micro_batch,
            loader_options={
                "options": options,
                "workers": data.workers or default_workers(1, world.device.type),
                "prefetch": data.prefetch,
                "max_bad_fraction": data.max_bad_fraction,
                "device": world.device,
            },
            averaging="logits",
            on_batch=lambda: bar.update(min(micro_batch, bar.total - bar.n)),
        )
    found: dict[str, Any] = dict(retrieve(result.logits[result.valid], result.labels[result.valid]))
    facts = {
        **{"command": shlex.join(["python", *(sys.argv if argv is None else ["tools/retrieve.py", *argv])])},
        **{"checkpoint": str(arguments.checkpoint), "step": trained.step},
        **{"shards": arguments.shards, "split": split, "fingerprint": shards.fingerprint},
        **{"undecodable": int((~result.valid).sum()), "views": options.num_views},
        **{"seconds": round(time.monotonic() - start, 1), **machine(world)},
    }
    write_durably(out / "retrieval.json", (json.dumps(found | facts, indent=1, ensure_ascii=False) + "\n").encode())
    text = markdown(found)
    write_durably(out / "retrieval.md", f"# Retrieval: {arguments.shards}, {split}\n\n{text}".encode())
    print(f"{text}{out}", flush=True)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--shards", required=True, metavar="SET", help="a packed set: a folder, or its address")
    parser.add_argument("--split", help="default: the run's validation split, or val")
    parser.add_argument("--views", metavar="CLIPSxCROPS", help="such as 3x1 (default: the run's)")
    arguments = parser.parse_args(argv)
    if arguments.batch is not None and not 1 <= arguments.batch <= 4096:
        parser.error(f"--batch {arguments.batch}: allowed are 1 to 4096 clips")
    return arguments


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and how it is computed."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint, or a converted one")
    parser.add_argument("--batch", type=int, metavar="N", help="clips at once (default: as in training)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change one key of the run's recipe (repeatable)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: as trained")


def make_ready(trained: Trained, precision: str | None) -> World:
    """Puts the model on this machine's device as it will compute there ("bf16", "fp32", None: as trained); returns a
    world of this process alone."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    bf16 = trained.config.bf16 if precision is None else precision == "bf16"
    if bf16:
        trained.model.set_compute_dtype(torch.bfloat16)
    speed_up(trained.model.to(device), for_evaluation(trained.config.speed, bf16), device)
    return World(0, 1, 1, device)


def machine(world: World) -> dict[str, Any]:
    """On and with what something was computed."""
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else processor_name()
    return {"device": device, "packages": installed_versions(PACKAGES)}


def markdown(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row a direction; shares in percent."""
    lines = [
        f"| | {' | '.join(f'R@{depth}' for depth in DEPTHS)} | median rank | queries | among |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, title in _DIRECTIONS.items():
        row = found[way]
        shares = " | ".join(f"{100 * row[f'r{depth}']:.1f}" for depth in DEPTHS)
        lines.append(f"| {title} | {shares} | {row['median_rank']:g} | {row['queries']:,} | {row['candidates']:,} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main)
