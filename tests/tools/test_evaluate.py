"""The evaluation of a run's checkpoint: the run's own numbers, the same however shared out, and clear refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoints import of_model, write_folder
from model.geometry import ImageTower
from model.methods import create
from pipelines.shards import ShardSet, read_manifest, write_manifest
from tests.sets import make_set
from tests.train.runs import FP32, metrics, run_here, start
from tools.evaluate import main
from train.evaluate import Evaluation
from train.trained import open_trained

LENGTHS = [12, 20, 9, 16, 31] * 2 + [11, 14, 40]
"""13 videos: neither 1 nor 2 processes with micro-batches of 7 share them equally."""
VIEWS = ("data.test_clips=2", "data.test_crops=3")


@pytest.fixture(autouse=True)
def one_thread_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what a training in this process leaves in the environment."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "set"
    return make_set(folder, LENGTHS, classes=3, splits=("train", "val"))


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny training in float32 whose last evaluation took six views."""
    out = tmp_path_factory.mktemp("runs") / "run"
    environment = dict(os.environ)
    run_here(packed, out, FP32, *VIEWS, "optimizer.lr=0.01", "run.trace=false")
    os.environ.clear()
    os.environ.update(environment)
    return out


def answers(folder: Path) -> np.ndarray:
    with np.load(folder / "predictions.npz") as file:
        return np.asarray(file["logits"])


def facts(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return document


def scores(folder: Path) -> dict[str, Any]:
    names = ("top1", "top5", "mean_class_accuracy", "loss", "samples", "undecodable")
    return {name: facts(folder)[name] for name in names}


def test_it_repeats_what_the_run_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the run's own set, views, precision and batch; the report goes beside its checkpoints."""
    assert main([str(run)]) == 0
    (folder,) = run.glob("evaluation-*")
    assert folder.name == "evaluation-000005-val-2x3-prob-fp32" and str(folder) in capsys.readouterr().out
    np.testing.assert_array_equal(answers(folder), answers(run))
    last = metrics(run, "eval")[-1]
    assert {name: last[name] for name in scores(folder)} == {**scores(folder), "loss": last["loss"]}
    stated = facts(folder)
    expected = {"step": 5, "views": "2x3", "averaging": "prob", "precision": "fp32", "world_size": 1, "micro_batch": 8}
    assert {name: stated[name] for name in expected} == expected and "torch" in stated["packages"]


def test_the_same_for_any_batch_and_number_of_processes(run: Path, packed: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint-000005"
    arguments = (str(checkpoint), "--shards", str(packed), "--views", "3x1")
    port = str(29500 + os.getpid() % 1000)
    place = ("--num_accelerators", "2", "--master_port", port)
    process = start(
        *("deepspeed", *place, "tools/evaluate.py", *arguments, "--batch", "7", "--out", str(tmp_path / "two")),
        DS_ACCELERATOR="cpu",
    )
    for batch in ("1", "7"):
        assert main([*arguments, "--batch", batch, "--out", str(tmp_path / batch)]) == 0
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count("top-1") == 1, "one process speaks"
    assert facts(tmp_path / "two")["world_size"] == 2 and facts(tmp_path / "two")["samples"] == 13
    reference = answers(tmp_path / "7")
    for name in ("1", "two"):
        np.testing.assert_allclose(answers(tmp_path / name), reference, rtol=0, atol=1e-5 * np.abs(reference).max())
        assert scores(tmp_path / name) == scores(tmp_path / "7")
        for table in ("confusion.csv", "per_class.csv"):
            assert (tmp_path / name / table).read_bytes() == (tmp_path / "7" / table).read_bytes()


def test_bf16_is_within_a_sample_of_fp32(run: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        assert main([str(run), f"--{precision}", "--out", str(tmp_path / precision)]) == 0
    assert facts(tmp_path / "bf16")["precision"] == "bf16"
    assert not np.array_equal(answers(tmp_path / "bf16"), answers(tmp_path / "fp32"))
    assert abs(scores(tmp_path / "bf16")["top1"] - scores(tmp_path / "fp32")["top1"]) < 1.5 / 13


def test_it_is_computed_as_the_run_was_but_for_what_only_training_needs(run: Path, tmp_path: Path) -> None:
    eight = ["--set", "speed.fp8=true", "--set", "speed.checkpoint_blocks=-1"]
    for name, more in (("bf16", []), ("bf16", eight), ("fp32", eight)):
        assert main([str(run), f"--{name}", *more, "--out", str(tmp_path / f"{name}{len(more)}")]) == 0
    used = facts(tmp_path / "bf164")["speed"]
    assert used["fp8"] and used["checkpoint_blocks"] == 0 and not facts(tmp_path / "fp324")["speed"]["fp8"]
    plain, rounded = answers(tmp_path / "bf160"), answers(tmp_path / "bf164")
    assert 0 < np.abs(plain - rounded).max() < 0.2 * np.abs(plain).max()


def test_averaging_and_settings_can_be_chosen(run: Path, packed: Path, tmp_path: Path) -> None:
    assert main([str(run), "--average", "logits", "--split", "train", "--views", "2x3"]) == 0
    assert np.abs(answers(run / "evaluation-000005-train-2x3-logits-fp32") - answers(run)).max() > 1e-3
    assert main([str(run), "--set", "data.eval_crop=0.5", "--views", "1x1", "--out", str(tmp_path)]) == 0
    assert np.abs(answers(tmp_path) - answers(run)).max() > 1e-3


def test_tables_and_picture_say_what_was_mistaken_for_what(run: Path, packed: Path, tmp_path: Path) -> None:
    assert main([str(run), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "predictions.npz") as file:
        result = Evaluation(file["logits"], file["labels"], file["valid"])
    with (tmp_path / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    names = list(ShardSet.open(packed, "val").classes)
    assert rows[0][1:] == names and [row[0] for row in rows[1:]] == names
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == result.confusion().tolist()
    with (tmp_path / "per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["samples"]) for row in table] == [5, 4, 4]
    assert [float(row["accuracy"]) for row in table] == pytest.approx(result.class_accuracy().tolist(), abs=1e-6)
    for row, counts in zip(table, result.confusion(), strict=True):
        counts[names.index(row["class"])] = 0
        assert int(row["as_often"] or 0) == counts.max()
        assert not counts.any() or counts[names.index(row["most_confused_with"])] == counts.max()
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_sets_with_several_labels_have_precisions_instead(tmp_path: Path) -> None:
    packed = make_set(tmp_path / "set", LENGTHS[:6], classes=3, splits=("train", "val"), multi_label=True)
    environment = dict(os.environ)
    run_here(packed, tmp_path / "run", FP32, "schedule.epochs=1", "schedule.warmup_epochs=0", "run.trace=false")
    os.environ.clear()
    os.environ.update(environment)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("metrics.json", "per_class.csv", "predictions.npz")
    ]
    with (tmp_path / "out" / "per_class.csv").open() as file:
        precisions = [float(row["average_precision"]) for row in csv.DictReader(file)]
    assert facts(tmp_path / "out")["mean_average_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)


def test_a_converted_checkpoint_is_evaluated_as_the_run_it_was(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has every weight; how clips are cut, and the set, must be said, or are as published for Kinetics."""
    write_folder(of_model(open_trained(run).model), tmp_path / "converted")
    data = vars(open_trained(run).config.data)
    cut = [f"data.{name}={data[name]}" for name in ("sampling", "interval")]
    settings = [part for setting in cut for part in ("--set", setting)]
    assert main([str(tmp_path / "converted"), "--shards", str(packed), "--views", "2x3", *settings]) == 0
    folder = tmp_path / "converted" / "evaluation-val-2x3-prob-fp32"
    np.testing.assert_allclose(answers(folder), answers(run), atol=1e-5)
    assert facts(folder)["step"] is None and str(folder) in capsys.readouterr().out
    assert main([str(tmp_path / "converted"), "--shards", str(packed), "--out", str(tmp_path / "out")]) == 0
    assert [facts(tmp_path / "out")[name] for name in ("sampling", "interval", "views")] == ["dense", 32, "1x1"]

    with pytest.raises(ValueError, match="names no set: add --shards FOLDER"):
        main([str(tmp_path / "converted")])
    bare = create("frozen", ImageTower(open_trained(run).model.geometry, {}), num_classes=None, num_frames=4)
    write_folder(of_model(bare), tmp_path / "bare")
    with pytest.raises(ValueError, match="has no classifier"):
        main([str(tmp_path / "bare"), "--shards", str(packed)])


def test_settings_of_a_converted_checkpoint_are_those_of_load(run: Path, packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    write_folder(of_model(open_trained(run).model), folder)
    opened = open_trained(folder, ["model.adapter_scale=30.0", "model.mean=[0.1, 0.2, 0.3]", "data.eval_crop=0.5"])
    assert (opened.model.options.adapter_scale, opened.model.geometry.mean) == (30.0, (0.1, 0.2, 0.3))
    assert opened.config.data.eval_crop == 0.5
    longer = open_trained(folder, ["model.num_frames=8", "ds.torch_autocast.enabled=true"])
    assert (longer.model.num_frames, longer.config.data.num_frames, longer.config.bf16) == (8, 8, True)
    for name, more in (("as_it_is", ()), ("loud", ("--set", "model.adapter_scale=30.0"))):
        assert main([str(folder), "--shards", str(packed), "--out", str(tmp_path / name), *more]) == 0
    assert np.abs(answers(tmp_path / "loud") - answers(tmp_path / "as_it_is")).max() > 1e-3
    for setting, message in (
        ("model.scales=1", "unknown setting 'scales'"),
        ("model.mean=[1,2]", "allowed is 3 numbers"),
        ("optimizer.lr=1.0", "of it can be set model.X"),
        ("run.out=x", "of it can be set model.X"),
        ("data.intervall=3", "did you mean data.interval"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_trained(folder, [setting])
        assert "\n" not in str(error.value)


def test_what_is_assumed_of_a_converted_checkpoint_is_said(run: Path, tmp_path: Path) -> None:
    converted = of_model(open_trained(run).model)
    names = ("class0", "class1", "class2")
    write_folder(converted, tmp_path / "bare")
    write_folder(dataclasses.replace(converted, classes=names, sampling="dense", interval=3), tmp_path / "all")
    bare = open_trained(tmp_path / "bare")
    assert bare.assumed.startswith("clips are cut densely, 32 frames apart, as published for Kinetics: ")
    assert bare.assumed.endswith("class names are unknown, and only their number is compared")
    for cut in (["data.sampling=uniform"], ["data.sampling=dense", "data.interval=2"]):
        assert open_trained(tmp_path / "bare", cut).assumed.startswith("class names are unknown")
    whole = open_trained(tmp_path / "all")
    assert (whole.assumed, whole.classes, whole.config.data.interval) == ("", names, 3)
    with pytest.raises(ValueError, match="class 1 is 'other' there and was 'class1' in training"):
        whole.require_classes(("class0", "other", "class2"), "there")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nothing"], "is no folder; give a run, one of its checkpoints"),
        (["{run}", "--shards", "{tmp}/renamed"], "class 1 is 'other' there and was 'class1' in training"),
        (["{run}", "--shards", "{tmp}/two"], "has 2 classes and"),
        (["{run}", "--split", "test"], "split"),
        (["{run}", "--set", "model.pretrained=laion"], "tiny-clip"),
        (["{run}", "--set", "train.seed=5"], "are not those that .* was trained on"),
        (["{run}", "--set", "data.intervall=3"], "did you mean data.interval"),
        (["{run}", "--out", "{tmp}/file/out"], "--out .*: no folder can be made there"),
        (["{run}", "--out", "{run}"], "holds other files than an earlier evaluation's"),
        (["{tmp}/empty"], "empty is neither a run with a checkpoint .*, nor a checkpoint .*, nor a converted"),
        (["{tmp}/file"], "file is a file; convert it to a folder, .*: python tools/convert_checkpoint.py .*/file NEW"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(
    run: Path, packed: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shutil.copytree(packed, tmp_path / "renamed")
    manifest = read_manifest(packed) | {"classes": ["class0", "other", "class2"]}
    del manifest["fingerprint"]
    write_manifest(tmp_path / "renamed", manifest)
    make_set(tmp_path / "two", [6, 6], classes=2, splits=("val",))
    with pytest.raises((ValueError, OSError), match=message) as raised:
        main([text.format(tmp=tmp_path, run=run) for text in arguments])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [["--views", "3"], ["--views", "0x1"], ["--views", "1x2"], ["--batch", "0"]])
def test_wrong_arguments_end_it_before_anything_is_read(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nowhere", *arguments])
