"""Few-shot learning: trains many small episodes by one recipe and says how well they went on average.

    python tools/few_shot.py RECIPE --shards SET --ways 5 --shots 5 --episodes 200
    python tools/few_shot.py RECIPE --shards SET --ways all --shots 5 --episodes 10     (5-shot C-way, 10 splits)
    python tools/few_shot.py RECIPE --shards SET --from EPISODES.json                   (those that somebody published)

An episode has a few classes, a few training clips of each, and all clips of these classes in the validation split to be
tested on. Both are drawn by --seed and the episode's number: the same in every run, on every machine, for every recipe.
`--set data.classes=[…]` names the classes to draw from; pipelines/subset.py shows what a file of episodes looks like.

Every episode is a training of its own by train/main.py's trainer, from the same initialisation, all in this process. A
finished one is known by its settings and the set's fingerprint and is not trained again: the same command goes on where
it was stopped, with more --episodes too. OUT/runs/KEY keeps an episode's metrics.jsonl, predictions.npz and run.json,
but not its weights; KEY.log what it printed. OUT/result.json and result.md hold the mean of the episodes' top-1 and its
95 % interval (1.96 standard errors).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; train/main.py says why

import xxhash

from pipelines.cli import one_of_several, run_cli
from pipelines.remote import open_set
from pipelines.shards import write_durably
from pipelines.subset import Part, draw_classes, read_episodes
from tools.run_ablation import is_finished, run_key, top1
from tools.run_demo import environment
from train.config import Config
from train.resolve import load_config, resolve_batch
from train.run_folder import read_run

_OURS = {"data.shards": "--shards", "data.shots": "--shots", "data.fraction_seed": "--seed", "data.episodes": "--from"}
_OURS |= {"run.out": "--out", "data.episode": "--episodes"}
_STANDARD_ERRORS = 1.96  # of a normal distribution 95 % lie within so many deviations of its mean


_PER_EPISODE = ("classes", "fraction_seed", "episode")


@dataclass(frozen=True)
class Episode:
    """One training."""

    number: int
    config: Config
    key: str
    """Hexadecimal digits that stand for all of its settings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    base = read_recipe(arguments)
    episodes = plan_episodes(arguments, base)
    runs = arguments.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    train_all(runs, episodes)
    if os.environ.get("RANK", "0") == "0":
        command = shlex.join(["python", *(sys.argv if argv is None else ["tools/few_shot.py", *argv])])
        write_result(arguments.out, summarise(runs, episodes) | {"command": command})
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a TOML file, or the name of one in train/recipes")
    add("--shards", metavar="SET", required=True, help="a packed set: a folder, or its address")
    add("--ways", type=_ways, default=5, metavar="N", help="classes an episode, or all (default: %(default)s)")
    add("--shots", type=int, default=5, metavar="K", help="training clips of each class (default: %(default)s)")
    add("--episodes", type=int, metavar="N", help="default: 200; of a file, all of it")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add("--from", type=Path, dest="file", metavar="JSON", help="episodes from a file, instead of drawing them")
    add("--out", type=Path, metavar="DIR", help="default: runs/few_shot-RECIPE")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe (repeatable)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_args(argv)
    for name, least in (("shots", 1), ("episodes", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**31:
            parser.error(f"--{name} {value}: allowed is {least} or more")
    arguments.out = arguments.out or Path("runs") / f"few_shot-{Path(arguments.recipe).stem}"
    return arguments


def _ways(text: str) -> int:
    """`5` → 5, `all` → 0."""
    if text != "all" and not (text.isdecimal() and 2 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text}: allowed is 2 or more, or all")
    return 0 if text == "all" else int(text)


def read_recipe(arguments: argparse.Namespace) -> Config:
    """The configuration that all episodes share. ValueError for what this program sets itself, or cannot do without."""
    for text in arguments.set:
        key = text.partition("=")[0].strip()
        if key in _OURS:
            raise ValueError(f"--set {text}: this program sets {key}; use {_OURS[key]}")
    shards = f"data.shards={json.dumps(arguments.shards)}"
    config = load_config(arguments.recipe, ["train.checkpoint_every=0", "train.eval_every=0", *arguments.set, shards])
    if not config.data.val_split:
        raise ValueError('data.val_split = ""; an episode is tested on a split: name it')
    if config.data.fraction != 1:
        raise ValueError(f"data.fraction = {config.data.fraction:g}; allowed is 1: --shots says what is learned from")
    return config


def plan_episodes(arguments: argparse.Namespace, base: Config) -> list[Episode]:
    """The episodes that were asked for, in their order. ValueError or OSError for what the set or the file has not."""
    data = base.data
    shards = open_set(data.shards, data.train_split, cache=data.cache, window=1)
    parts: list[dict[str, Any]]
    if arguments.file is not None:
        there = len(read_episodes(arguments.file))
        count = arguments.episodes or there
        if count > there:
            raise ValueError(f"--episodes {count}: {arguments.file} has {there}")
        parts = [{"episodes": str(arguments.file), "episode": number} for number in range(count)]
    else:
        Part(shots=arguments.shots, classes=data.classes).of_training(shards)  # a class that is too small is said now
        parts, names = [], data.classes or shards.classes
        for number in range(arguments.episodes or 200):
            seed = xxhash.xxh3_64_intdigest(f"episode {number}".encode(), arguments.seed) >> 1
            drawn = draw_classes(names, arguments.ways, seed) if arguments.ways else data.classes
            parts.append({"classes": drawn, "shots": arguments.shots, "fraction_seed": seed})
    return [_episode(arguments.out, base, number, part, shards.fingerprint) for number, part in enumerate(parts)]


def _episode(out: Path, base: Config, number: int, part: Mapping[str, Any], fingerprint: str) -> Episode:
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, **part))
    of_part = xxhash.xxh3_64_hexdigest(repr(config.data.part).encode())  # what a file says now, wherever it lies
    settings = dataclasses.replace(config, data=dataclasses.replace(config.data, episodes="", episode=0))
    key = run_key(settings, f"{fingerprint} {of_part}")
    run = dataclasses.replace(base.run, out=str(out / "runs" / key), report=False)
    return Episode(number, dataclasses.replace(config, run=run), key)


def train_all(runs: Path, episodes: Sequence[Episode]) -> None:
    """Trains what is not finished, a line an episode."""
    waiting = [episode for episode in episodes if not is_finished(runs / episode.key)]
    tells = os.environ.get("RANK", "0") == "0"
    if tells:
        print(f"{_counted(len(episodes))}, {len(episodes) - len(waiting)} of them done before", flush=True)
    start, tops = time.monotonic(), [top1(runs / e.key) for e in episodes if e not in waiting]
    for number, episode in enumerate(waiting, start=1):
        begin = time.monotonic()
        try:
            train(runs, episode)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"episode {episode.number}: {error} (what it printed: {runs / episode.key}.log)"
            ) from error
        if tells:  # others may be here before the answers are written
            tops.append(top1(runs / episode.key))
            now = time.monotonic()
            left = timedelta(seconds=round((now - start) / number * (len(waiting) - number)))
            result = f"{_named(episode)}top-1 {100 * tops[-1]:.1f} %; {mean_text(tops)} so far"
            print(f"[{number}/{len(waiting)}] {result}; {now - begin:.1f} s, left {left}", flush=True)


def _named(episode: Episode) -> str:
    """`dive, pour: `; empty where all classes take part."""
    classes = episode.config.data.part.classes
    return f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}: " if classes else ""


def train(runs: Path, episode: Episode) -> None:
    """One episode by the trainer, which prints into KEY.log; its weights are removed."""
    from train.control import Control
    from train.start import prepare

    config = episode.config
    batch = resolve_batch(config.deepspeed, int(os.environ.get("WORLD_SIZE", "1")), in_pairs=config.data.mixes)
    with (runs / f"{episode.key}.log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        command = ["tools/few_shot.py", f"episode {episode.number}"]
        with Control() as control:
            prepare(config, batch, resume=True).run(command, control)
    gc.collect()  # the engine and its model refer to each other
    if os.environ.get("RANK", "0") == "0":
        for checkpoint in (runs / episode.key).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def mean_text(values: Sequence[float]) -> str:
    """Of accuracies: `81.2 ± 1.9 %`, without an interval for one alone."""
    interval = interval95(values)
    return f"mean {100 * statistics.fmean(values):.1f}{'' if interval is None else f' ± {100 * interval:.1f}'} %"


def _counted(episodes: int) -> str:
    return f"{episodes} episode{'' if episodes == 1 else 's'}"


def interval95(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95 % interval, taking it for normally distributed; None of fewer than two."""
    return _STANDARD_ERRORS * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summarise(runs: Path, episodes: Sequence[Episode]) -> dict[str, Any]:
    """All that is known of finished episodes, as plain values."""
    facts = read_run(runs / episodes[0].key).facts
    rows = []
    for episode in episodes:
        run = read_run(runs / episode.key).facts
        classes = list(episode.config.data.part.classes)
        rows.append(
            {"run": episode.key, "classes": classes, "training_clips": run["samples"], "top1": top1(runs / episode.key)}
        )
    values = [row["top1"] for row in rows]
    interval = interval95(values)
    data = {name: value for name, value in facts["config"]["data"].items() if name not in _PER_EPISODE}
    return {
        "mean_top1": round(statistics.fmean(values), 6),
        "interval95": None if interval is None else round(interval, 6),
        "num_episodes": len(rows),
        "training_clips": sorted({row["training_clips"] for row in rows}),
        "parameters": facts["parameters"],
        "config": facts["config"] | {"data": data},
        "environment": environment(runs / episodes[0].key),
        "episodes": rows,
    }


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """OUT/result.json and OUT/result.md; prints the latter's head."""
    write_durably(out / "result.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    text = markdown(result)
    write_durably(out / "result.md", text.encode())
    print(f"\n{text.partition('## ')[0]}{out / 'result.json'}   {out / 'result.md'}", flush=True)


def markdown(result: Mapping[str, Any]) -> str:
    """The result for people; accuracies in percent."""
    values = [row["top1"] for row in result["episodes"]]
    config, clips = result["config"], result["training_clips"]
    lines = [
        f"# Few-shot: {config['model']['method']} on {config['model']['name']}",
        "",
        f"{_counted(result['num_episodes'])} of {' to '.join(map(str, dict.fromkeys((clips[0], clips[-1]))))} training "
        f"clips; {result['parameters']['trainable']:,} trainable parameters.",
        "",
        "| top-1 %, mean ± 95 % | min–max |",
        "| ---: | ---: |",
        f"| {mean_text(values).removeprefix('mean ')} | {100 * min(values):.1f}–{100 * max(values):.1f} |",
        "",
        f"`{result['command']}`",
        "",
        "## Episodes",
        "",
        "| episode | classes | top-1 % |",
        "| ---: | --- | ---: |",
    ]
    for number, row in enumerate(result["episodes"]):
        lines.append(f"| {number} | {', '.join(row['classes']) or 'all'} | {100 * row['top1']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(lambda: one_of_several(main))
