"""Runs side by side: what is shown, the paired test by hand, runs that can be compared in part, and refusals."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.sets import make_set
from tests.shell import call_program
from tests.train.runs import run_here
from tools.compare_runs import Pair, main, mcnemar, pair_of, read_runs, verdict

KEYS = [f"{i:03d}_video" for i in range(40)]
CLASSES = ["one", "two", "th|ree", "$four$"]
CONFIG: dict[str, Any] = {
    "data": {"shards": "data/x", "num_frames": 8},
    "model": {"method": "aim", "adapters": ["joint"]},
    "schedule": {"epochs": 2.0},
    "run": {"out": ""},
    "deepspeed": {"train_batch_size": 8, "torch_autocast": {"enabled": True}},
}


def write_run(
    out: Path,
    right: Sequence[bool] | None,
    *,
    settings: Mapping[str, Any] | None = None,
    keys: Sequence[str] = KEYS,
    classes: Sequence[str] = CLASSES,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """A run's folder as the trainer leaves it; `right` are the videos that it recognises, None: it is not finished."""
    out.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG)) | {"run": {"out": str(out)}}
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        config[section][name] = value
    document = {
        **{"config": config, "parameters": {"total": 1000, "trainable": 100}, "samples": 26, "world_size": 1},
        **{"device": "processor", "packages": {"torch": "2.11.0"}, "shards_fingerprint": "same", "micro_batch": 8},
    }
    (out / "run.json").write_text(json.dumps(document | dict(facts or {})))
    pace = {"clips_per_s": 20.0, "wait_share": 0.25}
    lines: list[dict[str, Any]] = [{"kind": "train", "step": 3, "epoch": 1.0, "loss": 1.5, **pace}]
    if right is not None:
        top1 = float(np.mean(right))
        lines += [{"kind": "eval", "step": 3, "epoch": 1.0, "top1": 0.99, "loss": 1.0, "samples": len(right)}]
        lines += [{"kind": "eval", "step": 6, "epoch": 2.0, "top1": top1, "loss": 0.5, "samples": len(right)}]
        lines += [{"kind": "end", "step": 6, "clips_per_s": 40.0, "wait_share": 0.5}]
        labels = np.arange(len(right)) % len(classes)
        answers = np.where(right, labels, (labels + 1) % len(classes))
        np.savez(
            out / "predictions.npz",
            keys=np.asarray(keys),
            classes=np.asarray(classes),
            labels=labels,
            logits=np.eye(len(classes), dtype=np.float32)[answers],
            valid=np.ones(len(right), bool),
        )
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def rights(*spans: tuple[int, bool]) -> list[bool]:
    return [value for count, value in spans for _ in range(count)]


def cells(text: str, row: str) -> list[str]:
    """Of the row of a printed table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("| ").split(" | ")][1:]


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),  # 2 · P(X <= 5 of 10) would be above 1
        (0, 6, 2 / 2**6),
        (9, 2, 2 * (1 + 11 + 55) / 2**11),
        (2, 9, 2 * (1 + 11 + 55) / 2**11),
    ],
)
def test_mcnemar_by_hand(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many() -> None:
    assert mcnemar(4000, 4000) == 1.0 and mcnemar(3000, 5000) < 1e-50


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    """20 of 40 and 27 of 40: only the first is right on 2, only the second on 9."""
    first = write_run(tmp_path / "aim", rights((20, True), (20, False)))
    right = rights((2, False), (18, True), (9, True), (11, False))
    settings = {"model.adapters": ["joint", "spatial"], "deepspeed.train_batch_size": 16}
    second = write_run(tmp_path / "_other", right, settings=settings)
    run = call_program(main, first, second, "--out", tmp_path / "out")
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert cells(run.stdout, "state") == ["done, 6 steps"] * 2
    assert cells(run.stdout, "top-1 %, last") == ["50.00", "67.50"]
    assert cells(run.stdout, "top-1 %, best") == ["99.00", "99.00"]
    assert cells(run.stdout, "clips/s") == ["40", "40"] and cells(run.stdout, "waiting for data %") == ["50.00"] * 2
    assert cells(run.stdout, "trainable") == ["100", "100"]
    assert cells(run.stdout, "model.adapters") == ['["joint"]', '["joint", "spatial"]']
    assert cells(run.stdout, "ds.train_batch_size") == ["8", "16"]
    assert "num_frames" not in run.stdout and "run.out" not in run.stdout, "what is the same is left out"
    said = "only aim is right on 2, only _other on 9: p = 0.065 (McNemar, exact), within noise: too few videos are"
    assert "aim 50.0 %, _other 67.5 % of the same 40 videos" in run.stdout and said in run.stdout
    assert "th\\|ree" in run.stdout, "a bar in a name does not end a cell"
    assert run.stdout.startswith((tmp_path / "out" / "compare_runs.md").read_text())
    rows = list(csv.reader(io.StringIO((tmp_path / "out" / "compare_runs.csv").read_text())))
    assert ["results", "top-1 %, last", "50.00", "67.50"] in rows
    with Image.open(tmp_path / "out" / "compare_runs.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_classes_are_those_that_differ_most(tmp_path: Path) -> None:
    """All videos of class two (1, 5, 9 …) are right for the second alone."""
    first = write_run(tmp_path / "a", rights((40, False)))
    second = write_run(tmp_path / "b", [i % 4 == 1 for i in range(40)])
    run = call_program(main, first, second)
    assert cells(run.stdout, "two") == ["10", "0.0", "100.0"]
    assert "| one " not in run.stdout
    assert "p = 0.002 (McNemar, exact), b is better by more than chance" in run.stdout


def test_videos_may_stand_in_another_order(tmp_path: Path) -> None:
    """And a sample that one of them could not decode counts for neither."""
    write_run(tmp_path / "a", rights((20, True), (20, False)))
    turned = write_run(
        tmp_path / "b", rights((20, False), (20, True)), keys=KEYS[::-1], facts={"shards_fingerprint": "x"}
    )
    with np.load(turned / "predictions.npz") as file:
        arrays = dict(file)
    arrays["labels"], arrays["logits"] = arrays["labels"][::-1], arrays["logits"]
    arrays["logits"] = np.eye(4, dtype=np.float32)[
        np.where(np.arange(40) < 20, (arrays["labels"] + 1) % 4, arrays["labels"])
    ]
    arrays["valid"][0] = False  # the last of a
    np.savez(turned / "predictions.npz", **arrays)
    first, second = read_runs([tmp_path])
    assert pair_of(first, second) == Pair(20, 0, 0, 19, repacked=True)


def test_more_by_chance_than_not() -> None:
    assert "b is better by more than chance" in verdict("a", "b", Pair(50, 10, 40, 100, repacked=False))
    assert verdict("a", "b", Pair(50, 30, 32, 100, repacked=True)).endswith(
        "noise (their sets were packed differently)"
    )


def test_runs_that_can_be_compared_in_part(tmp_path: Path) -> None:
    """Unfinished, other videos, other classes, a damaged one in a folder: everybody else is still compared."""
    write_run(tmp_path / "runs" / "a", rights((30, True), (10, False)))
    write_run(tmp_path / "runs" / "b", None)
    write_run(tmp_path / "runs" / "c", rights((40, True)), keys=[f"other{i}" for i in range(40)])
    write_run(tmp_path / "runs" / "d", rights((40, True)), classes=["x", "y"], settings={"model.method": "vpt"})
    write_run(tmp_path / "runs" / "e" / "f", rights((40, True)), keys=[f"other{i}" for i in range(40)])
    damaged = tmp_path / "runs" / "z"
    damaged.mkdir()
    (damaged / "run.json").write_text("{")
    run = call_program(main, tmp_path / "runs")
    assert run.returncode == 0
    assert run.stderr.startswith("left out: ") and "z/run.json is damaged" in run.stderr
    assert cells(run.stdout, "state")[1] == "step 3, epoch 1.00 of 2" and cells(run.stdout, "clips/s")[1] == "20"
    assert cells(run.stdout, "top-1 %, last") == ["75.00", "–", "100.00", "100.00", "100.00"]
    assert "b is not finished: it stands at step 3" in run.stdout
    assert "a and b cannot be tested: no answers of b (predictions.npz" in run.stdout
    assert "a and c cannot be tested: they answered on other videos (0 of 40 are the same)" in run.stdout
    assert "a and d cannot be tested: they were asked for other classes" in run.stdout
    assert "c 100.0 %, f 100.0 % of the same 40 videos" in run.stdout
    assert cells(run.stdout, "model.method") == ['"aim"', '"aim"', '"aim"', '"vpt"', '"aim"']


def test_runs_with_several_labels_a_video(tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 1)):
        out = write_run(tmp_path / name, rights((40, True)))
        with np.load(out / "predictions.npz") as file:
            arrays = dict(file)
        truth = np.eye(4, dtype=np.uint8)[arrays["labels"]] | np.eye(4, dtype=np.uint8)[0]
        arrays |= {"labels": truth, "logits": np.roll(arrays["logits"], shift, 1)}
        np.savez(out / "predictions.npz", **arrays)
        line = {"kind": "eval", "step": 6, "epoch": 2.0, "mean_average_precision": 0.5 + shift / 4}
        (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    run = call_program(main, tmp_path, "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert cells(run.stdout, "mAP %, best") == ["50.00", "75.00"] and "top-1" not in run.stdout.split("## settings")[0]
    assert "a 100.0 %, b 25.0 % of the same 40 videos" in run.stdout, "b says the class before: 0 of 0 and 3 only"
    assert "average precision %" in run.stdout


def test_a_run_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one beside a copy of another name: nothing differs."""
    packed = make_set(tmp_path / "set", [12, 20, 9] * 3, classes=3, splits=("train", "val"))
    environment = dict(os.environ)
    run_here(packed, tmp_path / "runs" / "a", "schedule.epochs=6", "run.trace=false", "train.eval_every=1")
    os.environ.clear()
    os.environ.update(environment)
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    run = call_program(main, tmp_path / "runs")
    assert run.returncode == 0, run.stderr
    assert "settings that differ" not in run.stdout and "classes that differ" not in run.stdout
    for row in ("state", "top-1 %, best", "clips/s", "waiting for data %", "trainable", "clips a step"):
        first, second = cells(run.stdout, row)
        assert first == second != "–", row
    assert "only a is right on 0, only b on 0: p = 1 " in run.stdout


# ------------------------------------------------------------------------------------------- refusals


def nowhere(folder: Path) -> Sequence[str | Path]:
    return [folder / "a", folder / "nowhere"]


def a_file(folder: Path) -> Sequence[str | Path]:
    return [folder / "a" / "run.json", folder / "b"]


def only_one(folder: Path) -> Sequence[str | Path]:
    return [folder / "a"]


def twice_the_same(folder: Path) -> Sequence[str | Path]:
    return [folder / "a", folder / "b" / ".." / "a"]


def no_runs(folder: Path) -> Sequence[str | Path]:
    (folder / "empty").mkdir()
    return [folder / "empty", folder / "a"]


def damaged(name: str, content: bytes) -> Callable[[Path], Sequence[str | Path]]:
    def seed(folder: Path) -> Sequence[str | Path]:
        (folder / "a" / name).write_bytes(content)
        return [folder / "a", folder / "b"]

    return seed


def facts(**changed: Any) -> Callable[[Path], Sequence[str | Path]]:
    def seed(folder: Path) -> Sequence[str | Path]:
        document = json.loads((folder / "a" / "run.json").read_text()) | changed
        (folder / "a" / "run.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
        return [folder / "a", folder / "b"]

    return seed


def pickled(folder: Path) -> Sequence[str | Path]:
    np.savez(folder / "a" / "predictions.npz", keys=np.asarray([{"a": 1}], object))
    return [folder / "a", folder / "b"]


def out_is_a_file(folder: Path) -> Sequence[str | Path]:
    return [folder / "a", folder / "b", "--out", folder / "a" / "run.json"]


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        (nowhere, "nowhere: there is no such folder; name a run's folder"),
        (a_file, "run.json: is a file; name a run's folder"),
        (only_one, "was found: two or more runs are compared"),
        (twice_the_same, "was found: two or more runs are compared"),
        (no_runs, "empty is no run: there is no run.json in it"),
        (damaged("run.json", b'{"config": '), "run.json is damaged"),
        (damaged("run.json", b"[1, 2]"), "run.json is damaged: it is no JSON object"),
        (facts(samples=None), "run.json has no 'samples': it is damaged"),
        (facts(config=["x"]), "run.json: config is not as the trainer writes it"),
        (damaged("metrics.jsonl", b'{"kind": "eval", "step": 1}\n{"kind": 7\n'), "metrics.jsonl, line 2 is damaged"),
        (damaged("predictions.npz", b"PK\x03\x04 and no more"), "predictions.npz is damaged"),
        (pickled, "predictions.npz is damaged"),
        (damaged("bad_samples.tsv", b"sample_id\tkey\n"), "bad_samples.tsv, line 1: 2 columns"),
        (out_is_a_file, "it is a file; name a folder, which is made if need be"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told_in_a_line(
    seed: Callable[[Path], Sequence[str | Path]], said: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, rights((40, True)))
    run = call_program(main, *seed(tmp_path))
    assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1 and run.stdout == "", run.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {"config": {"data": 7, "deepspeed": None, "schedule": {"epochs": "many"}}},
        {"parameters": {"total": "x"}, "samples": [], "world_size": {}, "device": 3, "started": 4},
        {"packages": {"torch": {"torch": {"torch": {"torch": {}}}}}},
    ],
)
def test_strange_values_of_a_stranger_are_no_defect_of_ours(changed: Mapping[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "a", rights((40, True)))
    strange = write_run(tmp_path / "b\n$x", None, facts=changed)
    lines = [{"kind": "train", "step": 1, "loss": "low", "epoch": None}, {"kind": "eval", "step": 1, "top1": 1e400}]
    (strange / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = call_program(main, tmp_path / "a", strange, "--out", tmp_path / "out")
    assert run.returncode == 0 and run.stderr == "", run.stderr
