"""An ablation from end to end, going on after a cut, the arithmetic of its table, and the answers to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.sets import make_set
from tests.shell import LAUNCHER, shell_environment
from tools import run_demo
from tools.run_ablation import (
    MARKER,
    Ablation,
    Row,
    main,
    make_table,
    markdown,
    motion_set,
    parse_seeds,
    plan_runs,
    prepare_folder,
    read_ablation,
    summarise,
    train_all,
)

ROOT = Path(__file__).resolve().parents[2]
TWO_ROWS = """
title = "Two rows"
published = "another set"
recipe = "demo"
[[row]]
name = "frozen"
set = ["model.adapters=[]"]
published = 15.1
[[row]]
name = "all"
"""
SMALL = ("schedule.epochs=1", "schedule.warmup_epochs=0", "ds.train_batch_size=4", "data.workers=1")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 videos of 2 classes in splits train and val."""
    return make_set(tmp_path_factory.mktemp("packed") / "set", [12, 9] * 4, splits=("train", "val"))


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs that `main` starts must not find what a training in this process has joined."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/run_ablation.py"), *arguments]
    environment = shell_environment(OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_from_end_to_end_and_again(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablation, out = tmp_path / "two.toml", tmp_path / "out"
    ablation.write_text(TWO_ROWS)
    settings = [word for text in SMALL for word in ("--set", text)]
    command = [str(ablation), "--seeds", "3", "--out", str(out), "--shards", str(packed), *settings]
    done = start(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 different runs, 0 of them done before" in done.stdout
    assert "[2/2] all, seed 3: top-1 " in done.stdout and "left 0:00:00" in done.stdout
    table = json.loads((out / "two.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["frozen", "all"] and table["seeds"] == [3]
    assert [row["published"] for row in table["rows"]] == [15.1, None]
    assert table["rows"][0]["parameters"]["trainable"] < table["rows"][1]["parameters"]["trainable"]
    for row in table["rows"]:
        run = json.loads((out / "runs" / row["runs"]["3"] / "run.json").read_text())
        assert run["config"]["train"]["seed"] == 3 and row["training_clips"] == 8
        assert row["parameters"] == run["parameters"] and 0 <= row["top1"]["mean"] <= 1
    assert table["environments"][0]["packages"]["torch"] and table["environments"][0]["device"]
    assert "--seeds 3" in table["command"] and table["shards_fingerprint"]
    assert (out / "two.md").read_text() in done.stdout
    assert Image.open(out / "two.png").size[0] > 500

    cut = out / "runs" / table["rows"][1]["runs"]["3"]  # as if killed in its last evaluation
    (cut / "predictions.npz").unlink()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "st')
    (out / "two.json").unlink()
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "2 different runs, 1 of them done before" in again and "[1/1] all, seed 3" in again
    assert json.loads((out / "two.json").read_text())["rows"] == table["rows"]
    assert json.loads((cut / "run.json").read_text())["resumed_from_step"] == 2, "not trained again"


def two_rows(*, second: str = "model.adapter_ratio=0.5") -> Ablation:
    return Ablation("two", "Two", "", (Row("a", "demo", (), None), Row("b", "demo", (second,), None)))


def keys(ablation: Ablation, *settings: str, seeds: tuple[int, ...] = (0,), fingerprint: str = "f") -> list[str]:
    runs = plan_runs([ablation], seeds, settings, shards="x", fingerprint=fingerprint)
    return [run.key for run in runs.values()]


def test_a_run_is_known_by_what_decides_its_result() -> None:
    first = keys(two_rows())
    assert len(set(first)) == 2 and keys(two_rows()) == first
    changes = ("optimizer.lr=1e-3", "train.label_smoothing=0.1", "ds.train_batch_size=16", "data.test_crops=3")
    others = [keys(two_rows(), text) for text in (*changes, "model.pretrained=none")]
    others += [keys(two_rows(), fingerprint="g"), keys(two_rows(), seeds=(1,))]
    assert len({key for found in (first, *others) for key in found}) == 2 * (1 + len(others))
    for text in ("data.workers=3", "train.log_every=1", "train.keep=1"):
        assert keys(two_rows(), text) == first, "no other result"


def test_equal_rows_are_one_run() -> None:
    first, second = keys(two_rows(second="model.adapter_ratio=0.25"))
    assert first == second, "the default, spelt out"
    both = [read_ablation("ladder"), read_ablation("components")]
    runs = plan_runs(both, [0], [], shards="x", fingerprint="f")
    assert len({run.key for run in runs.values()}) == 6


def test_a_failed_run_is_told_and_left_out(packed: Path, tmp_path: Path) -> None:
    ablation = Ablation("one", "One", "", (Row("bad", "demo", ('model.pretrained="nowhere.safetensors"',), None),))
    runs = plan_runs([ablation], [0], SMALL, shards=str(packed), fingerprint="f")
    failed = train_all(tmp_path / "runs", list(runs.values()))
    assert len(failed) == 1 and failed[0].startswith("bad, seed 0: ") and "nowhere.safetensors" in failed[0]
    assert "\n" not in failed[0] and str(tmp_path) in failed[0]
    table = make_table(ablation, [0], runs, tmp_path / "runs")
    assert table["rows"][0]["top1"] is None and "| bad | – |" in markdown(table)


def test_arithmetic_of_the_table() -> None:
    found = summarise({0: 0.5, 1: 0.75, 5: 0.4})
    assert found == {"mean": 0.55, "std": 0.180278, "min": 0.4, "max": 0.75, "seeds": {0: 0.5, 1: 0.75, 5: 0.4}}
    assert summarise({2: 0.5}) == {"mean": 0.5, "std": None, "min": 0.5, "max": 0.5, "seeds": {2: 0.5}}
    assert summarise({}) is None


def test_table_for_people() -> None:
    row = {"name": "a", "parameters": {"total": 12345, "trainable": 678}, "training_clips": 1600, "published": 83.9}
    row["clips_per_s"] = {0: 100.0, 1: None, 5: 140.4}
    table = {"title": "T", "published_are_of": "K", "seeds": [0, 1, 5]}
    text = markdown(table | {"rows": [row | {"top1": summarise({0: 0.5, 5: 0.75})}]})
    assert "| a | 12,345 | 678 | 1,600 | 120 | 62.5 ± 17.7 | 50.0–75.0 | 50.0, –, 75.0 | 83.9 |" in text
    assert "published: K" in text and "not measured here" in text
    without = markdown(table | {"published_are_of": "", "rows": [row | {"top1": summarise({0: 0.5})}]})
    assert "| 50.0 | 50.0–50.0 | 50.0, –, – |\n" in without and "published" not in without


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["laddr"], "no such ablation: laddr; train/recipes/ablations has cheaper, components, data_efficiency, "),
        (["ladder", "--seeds", "0,0"], "--seeds 0,0: give different whole numbers"),
        (["ladder", "--seeds", "a"], "--seeds a: give different whole numbers"),
        (["ladder", "--set", "train.seed=1"], "this program sets train.seed; use --seeds"),
        (["ladder", "--set", "optimizer.lr=-1"], "ladder, row 'frozen, space-only': optimizer.lr = -1.0; allowed is"),
        (["ladder", "--shards", "nowhere"], "no such folder of shards: nowhere"),
    ],
)
def test_mistakes_are_answered_with_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)) as failure:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert said in str(failure.value) and "\n" not in str(failure.value)


def test_a_mistake_shows_no_traceback(tmp_path: Path) -> None:
    done = start("ladder", "--seeds", "-1", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.startswith("error: --seeds") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_name_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--list"]) == 0
    shown = capsys.readouterr()
    assert shown.out in shown.err and "data_efficiency" in shown.out and "(8 rows)" in shown.out


def test_the_motion_set_is_made_once_and_a_quick_one_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def made(*command: str) -> None:
        commands.append(command)
        Path(command[command.index("--out") + 1]).mkdir(parents=True)

    monkeypatch.setattr(run_demo, "run", made)
    whole, quick = (motion_set(tmp_path, quick=quick) for quick in (False, True))
    assert [name for name, *_ in commands] == ["tools/make_motion_videos.py", "tools/make_shards.py"] * 2
    assert whole != quick and "--train" not in commands[0] and "--train" in commands[2]
    assert motion_set(tmp_path, quick=False) == whole and len(commands) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('title = "Two rows"', ""), "title is missing"),
        (('title = "Two rows"', "title = 3"), "title = 3; allowed is text"),
        (("published = 15.1", 'published = "15"'), 'row 1: published = "15"; allowed is a number'),
        (('name = "all"', 'nam = "all"'), "row 2: unknown key nam; allowed are name, recipe, set, published"),
        (('name = "all"', 'name = "frozen"'), "rows need names that differ"),
        (('"model.adapters=[]"', "1"), "row 1: set holds texts"),
        (("[[row]]", "[[row"), "is not valid TOML"),
    ],
)
def test_damaged_ablation(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.toml"
    path.write_text(TWO_ROWS.replace(*change))
    with pytest.raises(ValueError) as failure:
        read_ablation(str(path))
    assert said in str(failure.value) and str(path) in str(failure.value)


def test_seeds() -> None:
    assert parse_seeds("0, 1,12") == [0, 1, 12]


def test_only_an_earlier_ablation_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not of an earlier ablation"):
        prepare_folder(tmp_path)
    (tmp_path / MARKER).touch()
    prepare_folder(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
