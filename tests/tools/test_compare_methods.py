"""The comparison of methods: one row measured for real, the table of several, equal budgets, blindness to order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.sets import make_set
from tests.shell import LAUNCHER
from tools import compare_methods
from tools.compare_methods import common_budget, draw, main, markdown
from tools.parts.method_cost import measure_alone, sees_order
from tools.run_ablation import Ablation, Row, Run, read_ablation
from train.loop import PREDICTIONS
from train.resolve import load_config

ROWS = """
title = "Two methods"
recipe = "demo"
[[row]]
name = "frozen"
set = ['model.method="frozen"']
note = "looks at frames alone"
[[row]]
name = "AIM"
"""
SMALL = ("model.pretrained=none", "data.num_frames=4", "data.workers=1", "ds.train_batch_size=2", "speed.compile=off")


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that `main` starts must not find what a training in this process has joined."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pretend_to_train(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Leaves what finished trainings leave behind, a better one with every run."""
    for number, run in enumerate(runs, start=1):
        out = folder / run.key
        out.mkdir(parents=True, exist_ok=True)
        (out / PREDICTIONS).touch()
        facts = {"parameters": {"total": 2, "trainable": 1}, "samples": 4}
        facts |= dict.fromkeys(("config", "world_size", "device", "cores", "platform", "packages", "git"))
        (out / "run.json").write_text(json.dumps(facts))
        lines = [{"kind": "eval", "step": 9, "top1": number / 10}, {"kind": "end", "step": 9, "clips_per_s": None}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return []


def test_from_end_to_end_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = make_set(tmp_path / "set", [12, 9], splits=("train", "val"))
    (tmp_path / "rows.toml").write_text(ROWS)
    measured: list[dict[str, Any]] = []

    def measure_once(*arguments: Any) -> dict[str, Any]:
        measured.append(measured[0] | {"sees_order": True} if measured else measure_alone(*arguments))
        return measured[-1]

    monkeypatch.setattr(compare_methods, "measure_alone", measure_once)
    monkeypatch.setattr(compare_methods, "train_all", pretend_to_train)
    out = tmp_path / "out"
    command = [str(tmp_path / "rows.toml"), "--seeds", "0,1", "--out", str(out), "--shards", str(packed)]
    command += ["--seconds", "0.01", *(word for text in SMALL for word in ("--set", text))]
    assert main(command) == 0 and len(measured) == 2
    cost = measured[0]
    assert cost["parameters"]["trainable"] < 0.01 * cost["parameters"]["total"] and not cost["sees_order"]
    assert 0 < cost["gmac"] < cost["training_gmac"] < 1.1 * cost["gmac"]
    assert 0 < cost["kept_bytes"] < 2**16, "nothing of the frozen trunk"
    for way in ("training", "inference"):
        assert cost["clips_per_s"][way] > 0 and cost["peak_bytes"][way] >= cost["held_bytes"][way] > 2**20
    assert (cost["micro_batch"], cost["frames"], cost["environment"]["kind"]) == (2, 4, "cpu")

    table = json.loads((out / "compare_methods.json").read_text())
    assert table["budget"] == {"epochs": 9, "clips_a_step": 2, "fraction": 1}
    assert [row["cost"] for row in table["rows"]] == measured
    assert [row["top1"]["seeds"] for row in table["rows"]] == [{"0": 0.1, "1": 0.2}, {"0": 0.3, "1": 0.4}]
    text = (out / "compare_methods.md").read_text()
    assert "| frozen | blind |" in text and "| AIM | seen |" in text and "- frozen: looks at frames alone" in text
    assert "9 epochs in steps of 2; seeds 0, 1. " in text and text in capsys.readouterr().out
    assert Image.open(out / "compare_methods.png").size[0] > 1000

    assert main(command) == 0 and len(measured) == 2, "measured again"


def cost(**changes: Any) -> dict[str, Any]:
    """Of a row, in numbers that are easy to recognise."""
    return {
        "parameters": {"total": 1_234_567, "trainable": 12_345},
        "gmac": 0.1666,
        "training_gmac": 12.34,
        "kept_bytes": 5 * 2**19,
        "clips_per_s": {"training": 20.4, "inference": 41.0},
        "peak_bytes": {"training": 300 * 2**20, "inference": 200 * 2**20},
        "held_bytes": {"training": 100 * 2**20, "inference": 150 * 2**20},
        "sees_order": True,
        "others_cores": 0.0,
        "micro_batch": 4,
        "frames": 8,
        "environment": {"device": "a processor"},
    } | changes


def test_the_table_for_people(tmp_path: Path) -> None:
    top1 = {"mean": 0.75, "std": 0.125, "min": 0.5, "max": 1.0, "seeds": {0: 0.5, 1: 1.0}}
    one = {"name": "one", "note": "", "top1": top1, "cost": cost()}
    untrained = {"name": "two", "note": "failed", "top1": None, "cost": cost(sees_order=False, others_cores=1.5)}
    budget = {"epochs": 9.0, "clips_a_step": 32, "fraction": 0.5}
    table = {"title": "T", "seeds": [0, 1], "budget": budget, "rows": [one, untrained]}
    text = markdown(table)
    numbers = "1,234,567 | 12,345 | 0.167 | 12.3 | 20 | 41 | 2.50 | 200 | 50"
    assert f"| one | seen | {numbers} | 75.0 ± 12.5 | 50.0–100.0 |" in text
    assert f"| two | blind | {numbers} | – | – |" in text and text.endswith("\n- two: failed\n")
    assert "9 epochs of 50 % of the clips in steps of 32; seeds 0, 1" in text
    assert "micro-batches of 4 clips of 8 frames, on a processor. Other programs kept up to 1.5 cores busy" in text
    draw(tmp_path / "plot.png", table)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("method", "adapters", "seen"), [("frozen", None, False), ("aim", ["spatial"], False), ("aim", None, True)]
)
def test_blindness_to_the_order_of_frames_is_found_out(method: str, adapters: list[str] | None, seen: bool) -> None:
    chosen = [] if adapters is None else [f"model.adapters={json.dumps(adapters)}"]
    config = load_config("demo", ["data.shards=x", f"model.method={method}", *SMALL, *chosen])
    assert sees_order(config, ["a", "b", "c"]) == seen


def two_rows(*second: str) -> Ablation:
    return Ablation("two", "Two", "", (Row("a", "demo", (), None), Row("b", "demo", second, None)))


def test_rows_must_have_one_budget() -> None:
    same = ("optimizer.lr=1e-3", "model.method=frozen")
    assert common_budget(two_rows(*same), []) == {"epochs": 9, "clips_a_step": 32, "fraction": 1}
    assert common_budget(two_rows("schedule.epochs=5"), ["schedule.epochs=2"])["epochs"] == 2
    for setting, said in (
        (
            "schedule.epochs=5",
            "row 'b' has the budget 5 epochs in steps of 32, and row 'a' has 9 epochs in steps of 32",
        ),
        ("ds.train_batch_size=16", "9 epochs in steps of 16"),
        ("data.fraction=0.5", "9 epochs of 50 % of the clips in steps of 32"),
    ):
        with pytest.raises(ValueError, match=said):
            common_budget(two_rows(setting), [])


def test_the_rows_that_ship_are_read_and_have_one_budget() -> None:
    common_budget(read_ablation("methods"), [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "0"], "--seconds 0; allowed are more than 0"),
        (["nothing"], "no such ablation: nothing"),
        (["--seeds", "1,1"], "--seeds 1,1: give different whole numbers"),
    ],
)
def test_mistakes_are_answered_with_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)) as failure:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert said in str(failure.value) and "\n" not in str(failure.value)
    assert not (tmp_path / "out").exists()
