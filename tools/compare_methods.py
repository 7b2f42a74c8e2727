"""Compares the methods on one set at equal budget: what each costs, and what it learns.

    python tools/compare_methods.py --out runs/compare_methods
    python tools/compare_methods.py my_rows.toml --shards data/mine --seeds 0,1,2

The rows are an ablation's (see tools/run_ablation.py), by default train/recipes/ablations/methods.toml: a recipe, and a
row a method with the settings it needs. All see the same clips as often, in steps of the same size: rows that differ in
epochs, batch or share of the data are refused. Each row is measured first, in a process of its own, then trained once a
seed; both go on where they were cut, and what an earlier call finished is kept.

    parameters, tunable   of the model with its head; tunable: those of them that train
    GMAC                  10⁹ multiply-adds of one clip: answering, and learning (forward and backward pass)
    clips/s               of whole training steps, and of answers, on input that lies on the device: worth comparing
                          only if nothing else ran (the table says what others took)
    kept                  MiB that autograd keeps of one clip for the backward pass, counted: no activation of a frozen
                          trunk that no gradient passes
    peak                  MiB that a step adds at most: on a CPU to the process, on CUDA to what PyTorch holds
    order                 whether the answer depends on the order of the frames, tried with scattered weights: a blind
                          model cannot tell clips apart that differ only in that

OUT/compare_methods.json, .md and .png hold the table and accuracy against tunable parameters, multiply-adds and speed.
On two CPU cores a row takes half a minute and each of its trainings one to three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# As in train/main.py, before torch is loaded: threads that spin while they wait take the cores from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

from pipelines.cli import run_cli
from pipelines.shards import write_durably
from tools.parts.method_cost import measure_alone
from tools.run_ablation import (
    Ablation,
    Run,
    accuracy_cells,
    make_table,
    motion_set,
    notes,
    parse_seeds,
    parse_settings,
    plan_runs,
    prepare_folder,
    read_ablation,
    read_fingerprint,
    train_all,
    write_table,
)
from train.resolve import load_config

NAME = "compare_methods"
MIB = 2**20
_BUSY = 0.15  # cores that others may take before the table says so
_PLOTS = (
    ("tunable parameters", lambda row: row["cost"]["parameters"]["trainable"]),
    ("10⁹ multiply-adds of a clip", lambda row: row["cost"]["gmac"]),
    ("clips/s in training", lambda row: row["cost"]["clips_per_s"]["training"]),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares; returns the exit status. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    ablation, seeds = read_ablation(arguments.rows), parse_seeds(arguments.seeds)
    settings, out = parse_settings(arguments), arguments.out
    plan_runs([ablation], seeds, settings, shards="unknown", fingerprint="")  # mistakes are told before all else
    budget = common_budget(ablation, settings)
    prepare_folder(out)
    shards = arguments.shards or str(motion_set(out, quick=arguments.quick))
    fingerprint = read_fingerprint(shards)
    runs = plan_runs([ablation], seeds, settings, shards=shards, fingerprint=fingerprint)
    costs = measure_all(out / "costs", [runs[row, seeds[0]] for row in ablation.rows], arguments.seconds)
    failed = train_all(out / "runs", list({run.key: run for run in runs.values()}.values()))
    table = make_table(ablation, seeds, runs, out / "runs")
    for row, cost in zip(table["rows"], costs, strict=True):
        row["cost"] = cost
    table |= {
        "budget": budget,
        "command": shlex.join(["python", *(sys.argv if argv is None else [f"tools/{NAME}.py", *argv])]),
        "quick": arguments.quick,
        "shards_fingerprint": fingerprint,
    }
    write_table(out / NAME, table, markdown, draw)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed and are not in the table: {'; '.join(failed)}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", nargs="?", default="methods", metavar="NAME", help="of an ablation, or its path; default: %(default)s")
    add("--seeds", default="0,1,2", help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/compare_methods"), metavar="DIR", help="default: %(default)s")
    add("--shards", metavar="SET", help="a packed set; default: the demo's, made in OUT/motion")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every row (repeatable)")
    add("--seconds", type=float, default=2.0, metavar="S", help="of each measurement, at least (default: %(default)g)")
    add("--quick", action="store_true", help="few clips, few steps: a rehearsal in which nobody learns much")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds <= 3600:
        raise ValueError(f"--seconds {arguments.seconds:g}; allowed are more than 0, up to an hour")
    return arguments


def common_budget(ablation: Ablation, settings: Sequence[str]) -> dict[str, float]:
    """What every row may see of the training set: epochs, clips a step, share of the data. ValueError names a row that
    has another budget than the first."""
    budgets = {}
    for row in ablation.rows:
        config = load_config(row.recipe, (*row.settings, *settings, "data.shards=unknown"))
        budgets[row.name] = {
            "epochs": config.schedule.epochs,
            "clips_a_step": config.deepspeed["train_batch_size"],
            "fraction": config.data.fraction,
        }
    first, budget = next(iter(budgets.items()))
    for name, other in budgets.items():
        if other != budget:
            raise ValueError(
                f"{ablation.name}: row {name!r} has the budget {_words(other)}, and row {first!r} has "
                f"{_words(budget)}; give all the same schedule.epochs, ds.train_batch_size and data.fraction"
            )
    return budget


def _words(budget: Mapping[str, float]) -> str:
    share = "" if budget["fraction"] == 1 else f" of {100 * budget['fraction']:g} % of the clips"
    return f"{budget['epochs']:g} epochs{share} in steps of {budget['clips_a_step']:g}"


def measure_all(folder: Path, runs: Sequence[Run], seconds: float) -> list[dict[str, Any]]:
    """The cost of every row, of which a run is given, measured unless an earlier call did."""
    folder.mkdir(exist_ok=True)
    costs = []
    for number, run in enumerate(runs, start=1):
        path = folder / f"{run.key}.json"
        if not path.exists():
            print(f"[{number}/{len(runs)}] what {run.row.name} costs", flush=True)
            cost = _measure(run, seconds, path.with_suffix(".log"))
            write_durably(path, (json.dumps(cost, indent=1, ensure_ascii=False) + "\n").encode())
        costs.append(json.loads(path.read_text(encoding="utf-8")))
    return costs


def _measure(run: Run, seconds: float, log: Path) -> dict[str, Any]:
    try:
        return measure_alone(run.row.recipe, run.overrides, seconds, log)
    except (ValueError, OSError) as error:
        raise ValueError(f"row {run.row.name!r}: {error} (what it printed is in {log})") from error


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people; accuracy in percent."""
    head = [
        "method",
        "order",
        "parameters",
        "tunable",
        "GMAC",
        "GMAC, training",
        "clips/s, training",
        "clips/s",
        "kept MiB a clip",
        "peak MiB, training",
        "peak MiB",
        "top-1 %, mean ± std",
        "min–max",
    ]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *(_cells(row) for row in table["rows"])]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"# {table['title']}\n\n{_conditions(table)}\n\n{body}\n{notes(table['rows'])}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    cost = row["cost"]
    return [
        row["name"],
        "seen" if cost["sees_order"] else "blind",
        f"{cost['parameters']['total']:,}",
        f"{cost['parameters']['trainable']:,}",
        f"{cost['gmac']:.3g}",
        f"{cost['training_gmac']:.3g}",
        *(f"{cost['clips_per_s'][way]:.0f}" for way in ("training", "inference")),
        f"{cost['kept_bytes'] / MIB:.2f}",
        *(f"{(cost['peak_bytes'][way] - cost['held_bytes'][way]) / MIB:.0f}" for way in ("training", "inference")),
        *accuracy_cells(row["top1"]),
    ]


def _conditions(table: Mapping[str, Any]) -> str:
    """Under which the rows were made."""
    costs = [row["cost"] for row in table["rows"]]
    devices = " and ".join(sorted({cost["environment"]["device"] for cost in costs}))
    seeds = f"seed{'s' if len(table['seeds']) > 1 else ''} {', '.join(map(str, table['seeds']))}"
    micro = ", ".join(sorted({f"{cost['micro_batch']} clips of {cost['frames']} frames" for cost in costs}))
    others = max(cost["others_cores"] for cost in costs)
    busy = f" Other programs kept up to {others:.1f} cores busy meanwhile." if others > _BUSY else ""
    return f"{_words(table['budget'])}; {seeds}. Speed and memory: micro-batches of {micro}, on {devices}.{busy}"


def draw(path: Path, table: Mapping[str, Any]) -> None:
    """Accuracy against cost, three times: mean and range of every method; hollow: blind to the order of frames."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in table["rows"] if row["top1"] is not None]
    figure, panels = plt.subplots(1, len(_PLOTS), figsize=(15, 5 + 0.1 * len(rows)), layout="constrained", sharey=True)
    for axes, (label, cost_of) in zip(panels, _PLOTS, strict=True):
        for number, row in enumerate(rows):
            mean, low, high = (100 * row["top1"][name] for name in ("mean", "min", "max"))
            colour, marker = f"C{number % 10}", "os^Dv"[number // 10 % 5]
            axes.errorbar(
                cost_of(row),
                mean,
                yerr=[[mean - low], [high - mean]],
                color=colour,
                marker=marker,
                markerfacecolor=colour if row["cost"]["sees_order"] else "none",
                capsize=3,
                linestyle="none",
                label=row["name"],
            )
        axes.set(xscale="log", xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylim=(0, 102), ylabel="top-1 on the val split, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(f"{table['title']} (hollow: blind to the order of frames)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the training too
    run_cli(main)
