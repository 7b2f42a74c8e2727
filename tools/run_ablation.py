"""Runs sets of recipes that differ in one thing, over several seeds, and writes the paper's tables of them.

    python tools/run_ablation.py --list
    python tools/run_ablation.py components positions --seeds 0,1,2

An ablation is a file of train/recipes/ablations: a recipe, and rows that each change some of its keys. Every row is
trained once a seed, one after the other, on the motion set of the demo (made and packed at the first call) or on
--shards. A seed decides initialisation, order and augmentation (train.seed), and where only a part of the data is used,
which (data.fraction_seed).

A run is known by all its settings and by the shards' fingerprint: rows of several ablations that agree are trained
once, the same command goes on where it was stopped, and other settings never meet old results. For each ablation
OUT/NAME.json, .md and .png hold the table: parameters, clips/s in training (the median over seeds; worth comparing only
if nothing else ran), top-1 of every seed, mean, deviation and range, and beside them the published numbers, which are
of another data set and model. On two CPU cores a run takes one to two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

from pipelines.cli import run_cli
from pipelines.remote import open_set
from pipelines.shards import write_durably
from tools.run_demo import QUICK_COUNTS, QUICK_SETTINGS, environment, make_motion_set
from train.checkpoint import identity
from train.config import Config, DataConfig
from train.resolve import RECIPES, ROOT, load_config
from train.run_folder import PREDICTIONS, read_run

ABLATIONS = RECIPES / "ablations"
MARKER = ".made-by-run_ablation"
_OURS = {"train.seed": "--seeds", "data.fraction_seed": "--seeds", "data.shards": "--shards", "run.out": "--out"}
_CHECKPOINTS = "train.checkpoint_every=100"  # a run of the demo has 450 steps
_EVALUATION = ("val_split", "eval_crop", "test_clips", "test_crops")
_ROW_KEYS: dict[str, Any] = {"name": str, "recipe": str, "set": list, "published": int | float, "note": str}
_KEYS: dict[str, Any] = {"title": str, "recipe": str, "published": str, "row": list}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    """`section.key=value`, as after --set."""
    published: float | None
    """Top-1 in percent, of what the ablation says."""
    note: str = ""
    """What must be known of it, under the table."""


@dataclass(frozen=True)
class Ablation:
    """A table to be made."""

    name: str
    title: str
    published: str
    """Of what the published numbers are; empty: there are none."""
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Run:
    """One training: a row and a seed."""

    row: Row
    seed: int
    overrides: tuple[str, ...]
    """Everything that is set beyond the recipe, but for run.out."""
    key: str
    """Hexadecimal digits that stand for all of its settings."""
    cost: float
    """Passes over the whole training split: what its time is reckoned by."""

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ablations; returns the exit status. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    if arguments.list:
        print(list_ablations())
        return 0
    if not arguments.names:
        print(f"name one or more ablations:\n{list_ablations()}", file=sys.stderr)
        return 2
    ablations = [read_ablation(name) for name in dict.fromkeys(arguments.names)]
    seeds, settings, out = parse_seeds(arguments.seeds), parse_settings(arguments), arguments.out
    plan_runs(ablations, seeds, settings, shards="unknown", fingerprint="")  # mistakes are told before anything is made
    prepare_folder(out)
    shards = arguments.shards or str(motion_set(out, quick=arguments.quick))
    fingerprint = read_fingerprint(shards)
    runs = plan_runs(ablations, seeds, settings, shards=shards, fingerprint=fingerprint)
    failed = train_all(out / "runs", list({run.key: run for run in runs.values()}.values()))
    for ablation in ablations:
        table = make_table(ablation, seeds, runs, out / "runs")
        facts = {
            "command": shlex.join(["python", *(sys.argv if argv is None else ["tools/run_ablation.py", *argv])]),
            "quick": arguments.quick,
            "shards_fingerprint": fingerprint,
        }
        write_table(out / ablation.name, table | facts, markdown, draw)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed and are not in the tables: {'; '.join(failed)}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="of an ablation in train/recipes/ablations, or the path of one")
    add("--list", action="store_true", help="list the ablations and stop")
    add("--seeds", default="0,1,2", help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="default: %(default)s")
    add("--shards", metavar="SET", help="a packed set; default: the demo's, made in OUT/motion")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every row (repeatable)")
    add("--quick", action="store_true", help="few clips, few steps: a rehearsal in which nobody learns much")
    return parser.parse_args(argv)


def list_ablations() -> str:
    """One line an ablation: its name and its title."""
    found = [read_ablation(path.stem) for path in sorted(ABLATIONS.glob("*.toml"))]
    width = max(len(ablation.name) for ablation in found)
    return "\n".join(f"  {a.name:{width}}  {a.title} ({len(a.rows)} rows)" for a in found)


def read_ablation(name: str) -> Ablation:
    """Reads an ablation by name or path; ValueError or OSError names what is wrong with which file."""
    paths = [path for path in (Path(name), ABLATIONS / f"{name.removesuffix('.toml')}.toml") if path.is_file()]
    if not paths:
        known = ", ".join(path.stem for path in sorted(ABLATIONS.glob("*.toml")))
        raise FileNotFoundError(f"no such ablation: {name}; train/recipes/ablations has {known}, or give a path")
    path = paths[0]
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    _check_keys(document, _KEYS, ("title", "recipe", "row"), str(path))
    rows = []
    for number, entry in enumerate(document["row"], start=1):
        where = f"{path}: row {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no table; write [[row]] before its keys")
        _check_keys(entry, _ROW_KEYS, ("name",), where)
        if not all(isinstance(text, str) for text in entry.get("set", [])):
            raise ValueError(f"{where}: set holds texts such as 'model.adapters=[]'")
        settings = tuple(entry.get("set", []))
        recipe, published = entry.get("recipe", document["recipe"]), entry.get("published")
        rows.append(Row(entry["name"], recipe, settings, published, entry.get("note", "")))
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ValueError(f"{path}: rows need names that differ" if rows else f"{path} has no rows")
    return Ablation(path.stem, document["title"], document.get("published", ""), tuple(rows))


def _check_keys(table: Mapping[str, Any], known: Mapping[str, Any], needed: Sequence[str], where: str) -> None:
    """ValueError unless the keys are known, of their types, and those that are needed are there."""
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}; allowed are {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            words = {str: "text", list: "a list"}
            raise ValueError(
                f"{where}: {key} = {json.dumps(value, default=str)}; allowed is {words.get(known[key], 'a number')}"
            )
    for key in needed:
        if key not in table:
            raise ValueError(f"{where}: {key} is missing")


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` → [0, 1, 2]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 19 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"--seeds {text}: give different whole numbers from 0, with commas, such as 0,1,2")
    return [int(part) for part in parts]


def parse_settings(arguments: argparse.Namespace) -> list[str]:
    """What is set in every row; ValueError for what this program sets itself."""
    for text in arguments.set:
        key = text.partition("=")[0].strip()
        if key in _OURS:
            raise ValueError(f"--set {text}: this program sets {key}; use {_OURS[key]}")
    return [*(QUICK_SETTINGS if arguments.quick else ()), *arguments.set]


def prepare_folder(out: Path) -> None:
    """Makes the folder, or takes an earlier one of this program; anything else is refused."""
    if out.exists() and not (out / MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and not of an earlier ablation; give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def motion_set(out: Path, *, quick: bool) -> Path:
    """The demo's packed set, made if it is not there; a quick one is kept apart."""
    return make_motion_set(out / ("motion_quick" if quick else "motion"), *(QUICK_COUNTS if quick else ()))


def read_fingerprint(shards: str) -> str:
    """Of a packed set; ValueError for one whose videos have several labels: it has no top-1."""
    opened = open_set(shards, DataConfig().train_split)
    if opened.multi_label:
        raise ValueError(f"{shards}: its videos have several labels each; ablations need sets with one")
    return opened.fingerprint


def plan_runs(
    ablations: Sequence[Ablation], seeds: Sequence[int], settings: Sequence[str], *, shards: str, fingerprint: str
) -> dict[tuple[Row, int], Run]:
    """The run of every row and seed; equal ones have equal keys. ValueError names the row whose settings are wrong."""
    runs = {}
    for ablation in ablations:
        for row in ablation.rows:
            for seed in seeds:
                own = {"data.shards": shards, "data.fraction_seed": seed, "train.seed": seed}
                own_texts = [f"{key}={json.dumps(value)}" for key, value in own.items()]
                overrides = (_CHECKPOINTS, *row.settings, *settings, *own_texts)
                try:
                    config = load_config(row.recipe, overrides)
                except (ValueError, OSError) as error:
                    raise ValueError(f"{ablation.name}, row {row.name!r}: {error}") from error
                cost = config.schedule.epochs * config.data.fraction
                runs[row, seed] = Run(row, seed, overrides, run_key(config, fingerprint), cost)
    return runs


def run_key(config: Config, fingerprint: str) -> str:
    """Digits that stand for all that decides a run's result."""
    data = config.as_dict()["data"]
    facts = identity(config, fingerprint=fingerprint, backbone=config.model.pretrained)
    facts |= {name: data[name] for name in _EVALUATION}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def train_all(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Trains what is not finished, a line a run; returns what failed, each with its reason."""
    folder.mkdir(exist_ok=True)
    waiting = [run for run in runs if not is_finished(folder / run.key)]
    print(f"{len(runs)} different runs, {len(runs) - len(waiting)} of them done before", flush=True)
    failed, seconds, done = [], 0.0, 0.0
    for number, run in enumerate(waiting, start=1):
        print(f"[{number}/{len(waiting)}] {run.title}: ", end="", flush=True)
        start = time.monotonic()
        problem = train(folder, run)
        seconds, done = seconds + time.monotonic() - start, done + run.cost
        if problem is not None:
            failed.append(f"{run.title}: {problem}")
        result = "failed" if problem is not None else f"top-1 {100 * top1(folder / run.key):.1f} %"
        left = timedelta(seconds=round(seconds / done * sum(other.cost for other in waiting[number:])))
        print(f"{result} in {time.monotonic() - start:.0f} s, left {left}", flush=True)
    return failed


def is_finished(folder: Path) -> bool:
    """Whether a run's last evaluation is written."""
    return (folder / PREDICTIONS).exists()


def train(folder: Path, run: Run) -> str | None:
    """Trains, or goes on with what was cut; what it prints goes to a file. Returns what went wrong, if anything did."""
    overrides = (*run.overrides, f"run.out={json.dumps(str(folder / run.key))}", "run.report=false")
    command = [sys.executable, str(ROOT / "train/main.py"), "--recipe", run.row.recipe, "--resume"]
    command += [word for text in overrides for word in ("--set", text)]
    log = folder / f"{run.key}.log"
    with log.open("a", encoding="utf-8") as file:
        print(f"# {run.title}\n$ {shlex.join(command)}", file=file, flush=True)
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0 and is_finished(folder / run.key):
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].removeprefix('error: ')} (status {status}; all of it in {log})"


def top1(folder: Path) -> float:
    """Of a finished run's last evaluation, as a share."""
    return float(read_run(folder).of_kind("eval")[-1]["top1"])


def clips_per_s(folder: Path) -> float | None:
    """Of a finished run's training steps since it was last started; None where those were too few to measure."""
    pace = read_run(folder).of_kind("end")[-1]["clips_per_s"]
    return None if pace is None else round(pace, 2)


def make_table(
    ablation: Ablation, seeds: Sequence[int], runs: Mapping[tuple[Row, int], Run], folder: Path
) -> dict[str, Any]:
    """The table as plain values; runs that are not finished are left out."""
    rows, environments = [], []
    for row in ablation.rows:
        finished = {seed: folder / runs[row, seed].key for seed in seeds if is_finished(folder / runs[row, seed].key)}
        facts = [read_run(path).facts for path in finished.values()]
        environments += [environment(path) for path in finished.values()]
        rows.append(
            {
                "name": row.name,
                "recipe": row.recipe,
                "set": list(row.settings),
                "parameters": facts[0]["parameters"] if facts else None,
                "training_clips": facts[0]["samples"] if facts else None,
                "top1": summarise({seed: top1(path) for seed, path in finished.items()}),
                "clips_per_s": {seed: clips_per_s(path) for seed, path in finished.items()},
                "published": row.published,
                "note": row.note,
                "runs": {seed: path.name for seed, path in finished.items()},
            }
        )
    different = list({json.dumps(entry, sort_keys=True): entry for entry in environments}.values())
    return {
        "ablation": ablation.name,
        "title": ablation.title,
        "published_are_of": ablation.published,
        "seeds": list(seeds),
        "rows": rows,
        "environments": different,
    }


def summarise(by_seed: Mapping[int, float]) -> dict[str, Any] | None:
    """Mean, sample standard deviation (None of one seed), range, and every seed's value; None without any."""
    if not by_seed:
        return None
    values = list(by_seed.values())
    return {
        "mean": round(statistics.fmean(values), 6),
        "std": round(statistics.stdev(values), 6) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "seeds": dict(by_seed),
    }


def write_table(
    stem: Path,
    table: Mapping[str, Any],
    markdown: Callable[[Mapping[str, Any]], str],
    draw: Callable[[Path, Mapping[str, Any]], None],
) -> None:
    """STEM.json, STEM.md and STEM.png; prints the table."""
    text = markdown(table)
    write_durably(stem.with_suffix(".json"), (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
    write_durably(stem.with_suffix(".md"), text.encode())
    draw(stem.with_suffix(".png"), table)
    print(f"\n{text}\n{stem.with_suffix('.json')}   {stem.with_suffix('.md')}   {stem.with_suffix('.png')}", flush=True)


def accuracy_cells(result: Mapping[str, Any] | None) -> list[str]:
    """What `summarise` found, in percent: mean ± deviation, and range."""
    if result is None:
        return ["–", "–"]
    spread = "" if result["std"] is None else f" ± {100 * result['std']:.1f}"
    return [f"{100 * result['mean']:.1f}{spread}", f"{100 * result['min']:.1f}–{100 * result['max']:.1f}"]


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people; numbers in percent."""
    seeds = table["seeds"]
    head = [
        "row",
        "parameters",
        "trainable",
        "clips",
        "clips/s",
        "top-1 %, mean ± std",
        "min–max",
        f"seeds {', '.join(map(str, seeds))}",
    ]
    published = table["published_are_of"]
    head += [f"published: {published}"] if published else []
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in table["rows"]:
        cells = [row["name"], *["–"] * 7]
        if row["top1"] is not None:
            result, paces = row["top1"], [pace for pace in row["clips_per_s"].values() if pace is not None]
            each = [f"{100 * result['seeds'][seed]:.1f}" if seed in result["seeds"] else "–" for seed in seeds]
            cells[1:] = [
                f"{row['parameters']['total']:,}",
                f"{row['parameters']['trainable']:,}",
                f"{row['training_clips']:,}",
                f"{statistics.median(paces):.0f}" if paces else "–",
                *accuracy_cells(result),
                ", ".join(each),
            ]
        lines.append(
            cells + ([f"{row['published']:.1f}" if row["published"] is not None else "–"] if published else [])
        )
    note = "\nPublished numbers are the paper's, for the data and model named above them; not measured here.\n"
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"# {table['title']}\n\n{body}\n{note if published else ''}{notes(table['rows'])}"


def notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """What must be known of single rows, a line each."""
    found = "".join(f"- {row['name']}: {row['note']}\n" for row in rows if row.get("note"))
    return f"\n{found}" if found else ""


def draw(path: Path, table: Mapping[str, Any]) -> None:
    """A bar of the mean for each row, its range as a line, every seed as a dot."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in table["rows"] if row["top1"] is not None]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        result = row["top1"]
        mean, low, high = (100 * result[name] for name in ("mean", "min", "max"))
        axes.barh(place, mean, color="C0", alpha=0.6, height=0.7)
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="black", capsize=4, linewidth=1)
        axes.plot(
            [100 * value for value in result["seeds"].values()], [place] * len(result["seeds"]), "k.", markersize=4
        )
        axes.text(high + 1.5, place, f"{mean:.1f}", va="center")
    axes.set_yticks(range(len(rows)), [f"{row['name']}\n{row['parameters']['trainable']:,} trainable" for row in rows])
    axes.invert_yaxis()
    seeds = len(table["seeds"])
    axes.set(
        xlim=(0, 112), xlabel=f"top-1 on the val split, %: mean and range of {seeds} seed{'s' if seeds > 1 else ''}"
    )
    axes.set_title(table["title"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the training too
    run_cli(main)
