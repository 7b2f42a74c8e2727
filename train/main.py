"""Trains a video classifier: `python train/main.py --recipe NAME`, or `deepspeed train/main.py …` on several devices.

Without --recipe it lists the recipes. What a run writes goes to its folder (run.out): run.json (what was run, on what),
metrics.jsonl and tensorboard/, checkpoint-<step>/ (the last few), predictions.npz (answers of the last evaluation), and
bad_samples.tsv where some could not be decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Before torch is loaded: threads that spin while they wait take the cores from the decode workers; on a busy machine a
# step of the tiny model went from 0.1 to 5 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pipelines.cli import one_of_several, run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status, after SIGTERM, Ctrl-C or SIGHUP the shell's 143, 130 or 129.

    Raises ValueError or OSError for what a user can mend.
    """
    arguments = _parse(argv)
    from train.resolve import list_recipes, load_config, resolve_batch

    if arguments.recipe is None:
        print(f"name a recipe, such as --recipe demo:\n{list_recipes()}", file=sys.stderr)
        return 2
    config = load_config(arguments.recipe, arguments.set, arguments.deepspeed_config)
    batch = resolve_batch(config.deepspeed, int(os.environ.get("WORLD_SIZE", "1")), in_pairs=config.data.mixes)
    if arguments.print_config:
        print(json.dumps(config.as_dict(), indent=1))
        return 0
    from train.control import Control, Stopped
    from train.start import prepare

    command = sys.argv if argv is None else ["train/main.py", *argv]
    try:
        with Control() as control:
            prepare(config, batch, resume=arguments.resume).run(command, control)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr, flush=True)
        return stop.status
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a TOML file, or the name of one in train/recipes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key: section.key=value of the recipe, ds.key=value of the DeepSpeed file (repeatable)",
    )
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON; default: what the recipe names, or ds_config.json")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in run.out")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(lambda: one_of_several(main))
