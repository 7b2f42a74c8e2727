"""The whole way on this machine: make videos, pack them, train the paper's ladder, evaluate, draw (`make demo`).

    python tools/run_demo.py [--quick] [--out runs/demo]

Four models learn from the same shards with the same steps, batch, schedule and seed: the frozen image model with a new
head, then with spatial adapters, with temporal ones, and with joint ones (AIM). The clips come in pairs that differ
only in the order of their frames, so the first two cannot pass 50 % however long they train.

Writes OUT/summary.json and OUT/report.png. It runs the project's own commands and shows each before it does. On two
CPU cores about 8 minutes; `--quick` is a rehearsal of one minute in which nobody learns much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
import numpy as np

from pipelines.cli import run_cli
from pipelines.loader import ClipLoader
from pipelines.plan import EVAL_EPOCH, Turn
from pipelines.shards import ShardSet, write_durably
from tools.make_motion_videos import PAIRS
from train.pictures import filmstrips
from train.resolve import load_config
from train.run_folder import read_answers, read_run

ROOT = Path(__file__).resolve().parents[1]
LADDER = {
    "frozen": ("frozen, space-only", []),
    "spatial": ("+ spatial adapters", ["spatial"]),
    "temporal": ("+ temporal adapters", ["spatial", "temporal"]),
    "joint": ("+ joint adapters (AIM)", ["spatial", "temporal", "joint"]),
}
"""Rung → what it is called, model.adapters."""
MARKER = ".made-by-run_demo"
QUICK_COUNTS = ("--train", "96", "--val", "32")
QUICK_SETTINGS = ("schedule.epochs=3", "schedule.warmup_epochs=0.3", "train.log_every=1", "run.report=false")


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    start = time.monotonic()
    prepare_folder(out)
    counts = QUICK_COUNTS if arguments.quick else ()
    make_motion_set(out, *counts)
    for rung, (title, adapters) in LADDER.items():
        print(f"\n=== {title} ===", flush=True)
        settings: dict[str, object] = {
            "data.shards": str(out / "shards"),
            "model.adapters": adapters,
            "run.out": str(out / rung),
        }
        texts = [*(QUICK_SETTINGS if arguments.quick else ()), *(f"{k}={json.dumps(v)}" for k, v in settings.items())]
        overrides = [word for text in texts for word in ("--set", text)]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "1"]
        run("train/main.py", "--recipe", "demo", *overrides, launcher=launcher)
    draw_report(out)
    summary = {
        "rungs": {rung: summarise(out / rung) for rung in LADDER},
        "seconds": round(time.monotonic() - start, 1),
        "quick": arguments.quick,
        "environment": environment(out / "joint"),
    }
    write_durably(out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    print("\n" + table(summary))
    print(f"\n{out / 'summary.json'}   {out / 'report.png'}   {summary['seconds']:.0f} s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--quick", action="store_true", help="few clips, few steps: a rehearsal of one minute")
    return parser.parse_args()


def prepare_folder(out: Path) -> None:
    """An empty folder: an earlier demo's is cleared, anything else is refused."""
    if out.exists() and not (out / MARKER).exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and not of an earlier demo; give another folder with --out")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def make_motion_set(folder: Path, *counts: str) -> Path:
    """Makes the motion videos in `folder` and packs them, unless that was done before; returns the packed set."""
    videos, shards = folder / "videos", folder / "shards"
    if not videos.exists():
        run("tools/make_motion_videos.py", "--out", str(videos), *counts)
    if not shards.exists():
        annotations = str(videos / "annotations.tsv")
        run("tools/make_shards.py", str(videos), "--annotations", annotations, "--out", str(shards))
    return shards


def run(*command: str, launcher: list[str] | None = None) -> None:
    """Runs one of the project's programs as a person would, showing the command; ValueError when it fails."""
    name = ["python"] if launcher is None else ["deepspeed", *launcher[1:]]
    print(
        "\n$ "
        + " ".join([*name, *(word if word.isprintable() and " " not in word else f"'{word}'" for word in command)])
    )
    sys.stdout.flush()
    status = subprocess.run(
        [*(launcher or [sys.executable]), str(ROOT / command[0]), *command[1:]], check=False
    ).returncode
    if status != 0:
        raise ValueError(f"{command[0]} ended with status {status}; its message is above")


def summarise(folder: Path) -> dict[str, float]:
    """Accuracy and cost of one rung."""
    run = read_run(folder)
    last, pace = run.of_kind("eval")[-1], run.of_kind("end")[-1]
    return {
        "top1": round(last["top1"], 4),
        "trainable": run.facts["parameters"]["trainable"],
        "clips_per_s": pace["clips_per_s"],
        "wait_share": pace["wait_share"],
    }


def environment(folder: Path) -> dict[str, Any]:
    """Where and with what a run was made: for results that are kept."""
    facts = read_run(folder).facts
    return {name: facts[name] for name in ("device", "cores", "platform", "packages", "git")}


def table(summary: dict[str, Any]) -> str:
    """The ladder for people."""
    lines = [f"{'':24} {'top-1':>7} {'trainable':>10} {'clips/s':>8} {'waiting':>8}"]
    for rung, row in summary["rungs"].items():
        waiting = "–" if row["wait_share"] is None else f"{100 * row['wait_share']:.1f} %"
        pace = "–" if row["clips_per_s"] is None else f"{row['clips_per_s']:.0f}"
        lines.append(f"{LADDER[rung][0]:24} {100 * row['top1']:5.1f} % {row['trainable']:>10,} {pace:>8} {waiting:>8}")
    return "\n".join(lines)


def draw_report(out: Path) -> None:
    """OUT/report.png: loss curves, the accuracy ladder, and clips with what each end of the ladder says of them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(15, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    (curves, ladder), strip = above.subplots(1, 2), below.subplots()
    tops = []
    for rung, (title, _) in LADDER.items():
        run = read_run(out / rung)
        train = run.of_kind("train")
        curves.plot([line["step"] for line in train], [line["loss"] for line in train], label=title)
        tops.append(100 * run.of_kind("eval")[-1]["top1"])
    curves.set(xlabel="step", ylabel="training loss", title="Learning")
    curves.legend()
    bars = ladder.barh([title for title, _ in LADDER.values()], tops, color=["0.7", "0.7", "C2", "C3"])
    ladder.bar_label(bars, fmt="%.1f %%", padding=3)
    ladder.axvline(50, color="black", linestyle="--", linewidth=1)
    ladder.text(51, 0.55, "the most that can be told\nwithout the order of frames", fontsize=8, va="center")
    ladder.set(xlim=(0, 112), xlabel="top-1 on the val split, %", title="Accuracy")
    ladder.invert_yaxis()
    strip.imshow(prediction_strip(out))
    strip.set_axis_off()
    strip.set_title("Val clips and the same frames in reverse: the truth, and what two rungs say")
    figure.savefig(out / "report.png", dpi=110)
    plt.close(figure)


def prediction_strip(out: Path) -> np.ndarray:
    """A drawing of every pair, forwards on the left and backwards on the right, captioned with the predictions."""
    config = load_config("demo", [f"data.shards={json.dumps(str(out / 'shards'))}"])
    shards = ShardSet.open(out / "shards", config.data.val_split)
    predictions = {rung: load_predictions(out / rung) for rung in ("spatial", "joint")}
    samples = [shards[i] for i in range(len(shards))]
    names = [f"{shards.classes[sample.label]}/{sample.key.rpartition('_')[2]}" for sample in samples]
    columns = []
    for direction in (0, 1):
        chosen = [names.index(f"{pair[direction]}/{0:05d}") for pair in PAIRS]
        turns: list[Turn | None] = [Turn(i, EVAL_EPOCH) for i in chosen]
        with ClipLoader(shards, [turns], micro_batch=len(turns), size=96, options=config.data) as loader:
            clips = list(next(loader).frames.numpy().copy())
        said = [
            ", ".join(f"{rung}: {shards.classes[answers[i]]}" for rung, answers in predictions.items()) for i in chosen
        ]
        captions = [f"{pair[direction]}    ({words})" for pair, words in zip(PAIRS, said, strict=True)]
        columns.append(np.pad(np.asarray(filmstrips(clips, captions)), ((0, 0), (0, 24), (0, 0)), constant_values=255))
    return np.concatenate(columns, axis=1)


def load_predictions(folder: Path) -> np.ndarray:
    """Predicted class of every val sample, from a run's final evaluation."""
    answers = read_answers(folder)
    assert answers is not None, f"{folder} was not evaluated"
    return answers.evaluation.predicted


if __name__ == "__main__":
    run_cli(main)
