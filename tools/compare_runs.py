"""Puts training runs side by side: what they reached, what they cost, in which settings they differ, and whether the
difference in accuracy is more than chance.

    python tools/compare_runs.py runs/aim runs/st_adapter
    python tools/compare_runs.py runs/ablations --out runs/compared

Each argument is a run's folder, or a folder that holds runs. Unfinished runs take part with what they have; settings
that all runs share are left out. Runs that answered on the same videos are tested in pairs against the first: McNemar's
exact test asks how likely so uneven a share of the videos that only one of them gets right would be if both were
equally good. It knows these videos and these two trainings; another seed may decide otherwise.

Prints tables; --out writes them to DIR as compare_runs.md, compare_runs.csv (a row a quantity, a column a run) and
compare_runs.png (learning curves, accuracy, share of the time spent waiting for data).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.cli import run_cli
from pipelines.shards import write_durably
from train.pictures import printable, shortened
from train.run_folder import RUN, Answers, RunFolder, read_answers, read_bad_samples, read_run
from train.tables import as_csv

NAME = "compare_runs"
LEVEL = 0.05
"""Chance below which a difference counts as one."""
MOST_CLASSES = 8
_MANY = 3  # tests, from which on some may succeed by chance
_SMALL = 20  # videos that only one of two gets right: with fewer, only lopsided shares can be told from chance
_NOTHING = "–"
_LARGEST = 1e300
_ALWAYS_OTHER = ("run.out",)
_LONGEST_VALUE = 40  # letters of a setting


@dataclass(frozen=True)
class Run:
    """A run that takes part."""

    name: str
    folder: RunFolder
    answers: Answers | None
    bad: int
    """Samples that could not be decoded."""


@dataclass(frozen=True)
class Pair:
    """What two runs answered to the same videos."""

    both: int
    first_only: int
    """Videos that only the first gets right."""
    second_only: int
    neither: int
    repacked: bool
    """Whether the videos came from sets that are not the same to the last byte."""

    @property
    def videos(self) -> int:
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def p(self) -> float:
        """Of McNemar's exact test, two-sided."""
        return mcnemar(self.first_only, self.second_only)


Tables = dict[str, list[list[str]]]
"""Title → a heading and rows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compares; returns the exit status. Raises ValueError or OSError for what a user can mend."""
    args = parse_arguments(argv)
    runs = read_runs(args.runs)
    tables, remarks = compare(runs)
    text = markdown(tables, remarks)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_durably(args.out / f"{NAME}.md", text.encode(errors="replace"))
        rows = [[title, *row] for title, table in tables.items() for row in table]
        write_durably(args.out / f"{NAME}.csv", as_csv(rows))
        write_durably(args.out / f"{NAME}.png", draw(runs))
        print("   ".join(str(args.out / f"{NAME}.{kind}") for kind in ("md", "csv", "png")))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder that holds runs")
    add("--out", type=Path, metavar="DIR", help="write the tables and a picture there")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: it is a file; name a folder, which is made if need be")
    return args


# ------------------------------------------------------------------------------------------- reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that are named, and those in the folders that are named; each once. ValueError: fewer than two.

    One that is named must be readable; of a folder's runs, those that are not are said and left out.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "there is no such folder"
            raise ValueError(f"{path}: {what}; name a run's folder (which has a {RUN}), or one that holds runs")
        inside = [] if (path / RUN).exists() else sorted(file.parent for file in path.rglob(RUN))
        if not inside:
            found.setdefault(path.resolve(), _read(path))
        for folder in inside:
            try:
                found.setdefault(folder.resolve(), _read(folder))
            except (ValueError, OSError) as error:
                print(f"left out: {' '.join(str(error).split())}", file=sys.stderr)
    if len(found) < 2:
        only = f"only {next(iter(found))} was found" if found else "no readable run was found"
        raise ValueError(f"{only}: two or more runs are compared; name them, or a folder that holds several")
    return _named(list(found.values()))


def _read(path: Path) -> Run:
    run = read_run(path)
    for fact in ("config", "parameters", "packages"):
        if not isinstance(run.facts[fact], dict):
            raise ValueError(f"{path / RUN}: {fact} is not as the trainer writes it; the file is damaged")
    return Run(str(path), run, read_answers(path), len(read_bad_samples(path)))


def _named(runs: Sequence[Run]) -> list[Run]:
    """With names that are as short as they can be and differ: what the paths do not share."""
    paths = [Path(run.name).resolve() for run in runs]
    shared = Path(os.path.commonpath(paths))
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path.relative_to(shared)) if path != shared else path.name for path in paths]
    return [Run(printable(name), run.folder, run.answers, run.bad) for name, run in zip(names, runs, strict=True)]


# ------------------------------------------------------------------------------------------- comparing


def compare(runs: Sequence[Run]) -> tuple[Tables, list[str]]:
    """The tables, and what there is to say of single runs and pairs."""
    tables = {"results": _results(runs)}
    if len(settings := _settings(runs)) > 1:
        tables["settings that differ"] = settings
    remarks = [
        f"{run.name} is not finished: it stands at {_progress(run)}" for run in runs if not run.folder.of_kind("end")
    ]
    groups, verdicts = in_groups(runs)
    for number, group in enumerate(group for group in groups if len(group) > 1):
        if len(classes := _classes(group)) > 1:
            tables["classes that differ most" + f", {group[0].name} and others" * (number > 0)] = classes
    return tables, remarks + verdicts


def in_groups(runs: Sequence[Run]) -> tuple[list[list[Run]], list[str]]:
    """Runs that answered on the same videos, together, and what their first one's pairs with the others say."""
    groups: list[list[Run]] = []
    remarks, tested = [], 0
    for run in runs:
        reason = ""
        for group in groups:
            pair = pair_of(group[0], run)
            if isinstance(pair, Pair):
                group.append(run)
                remarks.append(verdict(group[0].name, run.name, pair))
                tested += 1
                break
            reason = reason or f"{group[0].name} and {run.name} cannot be tested: {pair}"
        else:
            groups.append([run])
            remarks += [reason] * bool(reason)
    if tested > _MANY:
        remarks.append(
            f"of {tested} tests one in {1 / LEVEL:.0f} falls below p = {LEVEL} by chance: trust smaller ones"
        )
    return groups, remarks


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of McNemar's exact test: a fair coin is thrown for every video that only one of two gets right."""
    n, few = first_only + second_only, min(first_only, second_only)
    ways = accumulate(range(few), lambda way, k: way * (n - k) // (k + 1), initial=1)  # n over 0, 1, … few
    return min(1.0, 2 * sum(ways) / 2**n)


def pair_of(first: Run, second: Run) -> Pair | str:
    """What two runs answered to the same videos, or why that cannot be compared."""
    if first.answers is None or second.answers is None:
        lacking = [run.name for run in (first, second) if run.answers is None]
        return f"no answers of {' and '.join(lacking)} (predictions.npz, written after the last step)"
    if first.answers.classes != second.answers.classes:
        return "they were asked for other classes"
    order = _same_videos(first.answers.keys, second.answers.keys)
    if order is None:
        common = len(set(first.answers.keys) & set(second.answers.keys))
        return f"they answered on other videos ({common} of {len(first.answers.keys)} are the same)"
    one, two = first.answers.evaluation, second.answers.evaluation
    if one.multi_label != two.multi_label or not np.array_equal(one.labels, two.labels[order]):
        return "the same videos have other labels"
    valid = one.valid & two.valid[order]
    a, b = _right(first.answers)[valid], _right(second.answers)[order][valid]
    if not len(a):
        return "no video could be decoded by both"
    both, first_only, second_only, neither = (int(cell.sum()) for cell in (a & b, a & ~b, ~a & b, ~a & ~b))
    repacked = first.folder.facts.get("shards_fingerprint") != second.folder.facts.get("shards_fingerprint")
    return Pair(both, first_only, second_only, neither, repacked)


def _same_videos(first: Sequence[str], second: Sequence[str]) -> NDArray[np.int64] | None:
    """Where the first's videos stand among the second's; None where they are not the same videos."""
    if tuple(first) == tuple(second):
        return np.arange(len(first))
    place = {key: i for i, key in enumerate(second)}
    if len(place) != len(second) or len(set(first)) != len(first) or set(first) != set(second):
        return None
    return np.asarray([place[key] for key in first], np.int64)


def _right(answers: Answers) -> NDArray[np.bool_]:
    """[n]: whether the likeliest class is the sample's, or one of its classes."""
    result = answers.evaluation
    if not result.multi_label:
        return np.asarray(result.predicted == result.labels)
    return np.asarray(np.take_along_axis(result.labels, result.predicted[:, None], 1)[:, 0] > 0)


def verdict(first: str, second: str, pair: Pair) -> str:
    """A sentence or two on a pair."""
    shares = [100 * (pair.both + only) / pair.videos for only in (pair.first_only, pair.second_only)]
    text = (
        f"{first} {shares[0]:.1f} %, {second} {shares[1]:.1f} % of the same {pair.videos} videos; only {first} is "
        f"right on {pair.first_only}, only {second} on {pair.second_only}: p = {pair.p:.2g} (McNemar, exact)"
    )
    if pair.p < LEVEL:
        better = first if pair.first_only > pair.second_only else second
        text += f", {better} is better by more than chance"
    else:
        text += ", within noise"
        few = pair.first_only + pair.second_only < _SMALL
        text += ": too few videos are answered differently to tell" if few else ""
    return text + (" (their sets were packed differently)" if pair.repacked else "")


# ------------------------------------------------------------------------------------------- tables


def _results(runs: Sequence[Run]) -> list[list[str]]:
    """A row a quantity; those that no run has are left out."""
    quantities: list[tuple[str, Callable[[Run], str]]] = [
        ("state", _progress),
        ("top-1 %, last", lambda run: _percent(_last(run, "eval", "top1"))),
        ("top-1 %, best", lambda run: _percent(_best(run, "top1"))),
        ("mAP %, last", lambda run: _percent(_last(run, "eval", "mean_average_precision"))),
        ("mAP %, best", lambda run: _percent(_best(run, "mean_average_precision"))),
        ("mean class %, last", lambda run: _percent(_last(run, "eval", "mean_class_accuracy"))),
        ("videos evaluated", lambda run: _count(_last(run, "eval", "samples"))),
        ("loss, evaluation", lambda run: _short(_last(run, "eval", "loss"))),
        ("loss, training", lambda run: _short(_last(run, "train", "loss"))),
        ("clips/s", lambda run: _short(_pace(run, "clips_per_s"))),
        ("waiting for data %", lambda run: _percent(_pace(run, "wait_share"))),
        ("parameters", lambda run: _count(run.folder.facts["parameters"].get("total"))),
        ("trainable", lambda run: _count(run.folder.facts["parameters"].get("trainable"))),
        ("training samples", lambda run: _count(run.folder.facts["samples"])),
        ("clips a step", lambda run: _count(_setting(run, "deepspeed", "train_batch_size"))),
        ("micro-batch", lambda run: _count(run.folder.facts.get("micro_batch"))),
        ("processes", lambda run: _count(run.folder.facts["world_size"])),
        ("device", lambda run: shortened(str(run.folder.facts["device"]))),
        ("cores", lambda run: _count(run.folder.facts.get("cores"))),
        ("bad samples", lambda run: str(run.bad) if run.bad else _NOTHING),
        ("begun", lambda run: printable(str(run.folder.facts.get("started", _NOTHING)))[:16]),
    ]
    rows = [[name, *map(value, runs)] for name, value in quantities]
    return [["", *(run.name for run in runs)], *(row for row in rows if set(row[1:]) != {_NOTHING})]


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """A row a key of the recipe, or package, that is not the same in all runs."""
    flat = [
        _flat(run.folder.facts["config"])
        | _flat({"packages": run.folder.facts["packages"]})
        | {name: str(run.folder.facts.get(name))[:12] for name in ("shards_fingerprint", "backbone_checksum")}
        for run in runs
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in _ALWAYS_OTHER)
    rows = []
    for key in keys:
        values = [_value(settings[key]) if key in settings else _NOTHING for settings in flat]
        if len(set(values)) > 1:
            rows.append([printable(key), *(shortened(value, _LONGEST_VALUE) for value in values)])
    return [["", *(run.name for run in runs)], *rows]


def _classes(runs: Sequence[Run]) -> list[list[str]]:
    """The classes in which runs that answered on the same videos differ most, in percent; empty for one run."""
    answers = [run.answers for run in runs if run.answers is not None]
    if len(answers) < 2:
        return []
    first = answers[0].evaluation
    values = np.stack(
        [a.evaluation.class_precision() if first.multi_label else a.evaluation.class_accuracy() for a in answers]
    )
    samples = first.class_samples()
    spread = np.nan_to_num(values.max(0) - values.min(0))
    most = [c for c in np.argsort(-spread * np.sqrt(samples), kind="stable")[:MOST_CLASSES] if spread[c] > 0]
    rows = [
        [shortened(answers[0].classes[c]), str(samples[c]), *(f"{100 * value:.1f}" for value in values[:, c])]
        for c in most
    ]
    quantity = "average precision %" if first.multi_label else "accuracy %"
    return [[quantity, "videos", *(run.name for run in runs if run.answers is not None)], *rows]


def markdown(tables: Tables, remarks: Sequence[str]) -> str:
    """For people."""
    parts = []
    for title, (head, *rows) in tables.items():
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells)
        body = "\n".join(f"| {' | '.join(line)} |" for line in padded)
        parts.append(f"## {title}\n\n{body}\n")
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks) + "\n")
    return "\n".join(parts)


def _progress(run: Run) -> str:
    steps = [line["step"] for line in run.folder.lines if line["kind"] != "eval"]
    if run.folder.of_kind("end"):
        return f"done, {max(steps):,} steps"
    epoch, epochs = _last(run, "train", "epoch"), _setting(run, "schedule", "epochs")
    of = f" of {epochs:g}" if _is_number(epochs) else ""
    return f"step {max(steps):,}, epoch {epoch:.2f}{of}" if steps and epoch is not None else "no step logged yet"


def _last(run: Run, kind: str, name: str) -> float | None:
    """The newest number of that name."""
    values = _series(run, kind, name)[1]
    return values[-1] if values else None


def _best(run: Run, name: str) -> float | None:
    return max(_series(run, "eval", name)[1], default=None)


def _pace(run: Run, name: str) -> float | None:
    """Of the whole run where it ended, else the median of its log lines."""
    whole = _last(run, "end", name)
    lines = _series(run, "train", name)[1]
    return whole if whole is not None or not lines else statistics.median(lines)


def _series(run: Run, kind: str, name: str) -> tuple[list[float], list[float]]:
    """Epochs (steps where no epoch is noted) and numbers of that name in the lines of one kind."""
    lines = [line for line in run.folder.of_kind(kind) if _is_number(line.get(name))]
    places = [line["epoch"] if _is_number(line.get("epoch")) else line["step"] for line in lines]
    return places, [line[name] for line in lines]


def _setting(run: Run, section: str, key: str) -> Any:
    entries = run.folder.facts["config"].get(section)
    return entries.get(key) if isinstance(entries, dict) else None


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections → dotted names, DeepSpeed's as after --set."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{'ds' if not prefix and key == 'deepspeed' else key}"
        if isinstance(value, dict) and name.count(".") < 4:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_number(value: Any) -> bool:
    """A metric that was not measured is None, one of a stranger's file anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.2f}"


def _short(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4g}"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if _is_number(value) else _NOTHING


# ------------------------------------------------------------------------------------------- picture


def draw(runs: Sequence[Run]) -> bytes:
    """A PNG: training loss and accuracy over epochs, the best accuracy of each run, its share of waiting."""
    accuracy = "top1" if any(_series(run, "eval", "top1")[1] for run in runs) else "mean_average_precision"
    title = {"top1": "top-1 %", "mean_average_precision": "mAP %"}[accuracy]
    figure = Figure(figsize=(12, 7 + 0.25 * max(0, len(runs) - 6)), layout="constrained")
    (loss, learnt), (reached, waiting) = figure.subplots(2, 2)
    names = [shortened(run.name) for run in runs]
    for axes, kind, name, factor in ((loss, "train", "loss", 1), (learnt, "eval", accuracy, 100)):
        for number, (run, label) in enumerate(zip(runs, names, strict=True)):
            places, values = _series(run, kind, name)
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(places, [factor * value for value in values], style, marker=".", label=f" {label}")
        axes.set(xlabel="epochs", title="training loss" if kind == "train" else f"{title} in evaluations")
        axes.grid(alpha=0.3)
    for axes, shares, what in (
        (reached, [_best(run, accuracy) for run in runs], f"best {title}"),
        (waiting, [_pace(run, "wait_share") for run in runs], "% of the time spent waiting for data"),
    ):
        percent = [100 * (share or 0.0) for share in shares]
        bars = axes.barh(range(len(runs)), percent, color=[f"C{number % 10}" for number in range(len(runs))])
        axes.bar_label(bars, [_percent(share) for share in shares], padding=3)
        axes.set_yticks(range(len(runs)), names, parse_math=False)
        axes.set(title=what, xlim=(0, 115))
        axes.invert_yaxis()
    legend = figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font does not have
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


if __name__ == "__main__":
    run_cli(main)
