"""The command line: what it prints, what it refuses, and that a refused run leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sets import make_set
from tests.train.runs import SCRIPT, arguments, launch, start
from train.main import main
from train.start import LOCK


def test_without_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = capsys.readouterr().err
    assert "aim_b16_k400" in listed and "Kinetics-400" in listed and "demo" in listed


def test_print_config_resolves_and_stops(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(packed, tmp_path / "run"), "--print-config", "--local_rank=0"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["data"]["num_frames"] == 4 and document["deepspeed"]["train_batch_size"] == 8
    assert not (tmp_path / "run").exists()


def test_error_of_a_program_is_one_line(tmp_path: Path) -> None:
    process = start(sys.executable, SCRIPT, *arguments(tmp_path / "nowhere", tmp_path / "run"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == ""
    assert errors.startswith("error: no such folder of shards") and errors.count("\n") == 1


def test_error_of_several_processes_is_said_once(packed: Path, tmp_path: Path) -> None:
    process = launch(3, packed, tmp_path / "run")
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "Traceback" not in errors
    assert errors.count("error: ") == 1 and "cannot be shared equally by 3 processes: set it to 6 or 9" in errors
    assert not (tmp_path / "run").exists()


def copy_set(tmp_path: Path, **options: Any) -> Path:
    return make_set(tmp_path / "set", [6, 7, 8, 9], classes=2, splits=("train", "val"), **options)


def without_shard(tmp_path: Path) -> Path:
    folder = copy_set(tmp_path)
    (folder / "train-000000.tar").unlink()
    return folder


def truncated_shard(tmp_path: Path) -> Path:
    folder = copy_set(tmp_path)
    data = (folder / "val-000000.tar").read_bytes()
    (folder / "val-000000.tar").write_bytes(data[:-512])
    return folder


def damaged_index(tmp_path: Path) -> Path:
    folder = copy_set(tmp_path)
    (folder / "train-000000.index.safetensors").write_bytes(b"\0" * 100)
    return folder


def without_val(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set", [6, 7], splits=("train",))


def nowhere(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (nowhere, (), "no such folder of shards"),
        (without_shard, (), "4 of 4 samples of split 'train' cannot be read, more than data.max_bad_fraction = 0.01: "),
        (truncated_shard, (), "val-000000.tar has"),
        (without_val, (), "has no split 'val'; it has: train; name it in data.val_split, or train without"),
        (copy_set, ("data.train_split=training",), "has no split 'training'; it has: train, val"),
        (copy_set, ("model.name=ViT-B-61",), "'ViT-B-61'; close names: "),
        (copy_set, ("model.name=RN50",), "supported are plain CLIP ViTs"),
        (copy_set, ("model.pretrained=openia",), "has no weights 'openia'"),
        (copy_set, ("model.pretrained=none.safetensors",), "no such weight file: none.safetensors"),
        (copy_set, ("ds.train_batchsize=3",), "did you mean train_batch_size?"),
    ],
)
def test_refused_run_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], Path], settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises((ValueError, OSError)) as failure:
        main(arguments(make(tmp_path), tmp_path / "run", *settings))
    assert said in str(failure.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"set"}


def test_weights_without_network_are_one_line(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    settings = ("model.name=ViT-B-32-quickgelu", "model.pretrained=openai")
    with pytest.raises(ValueError, match=r"ViT-B-32-quickgelu: .* needs a network"):
        main(arguments(packed, tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()


def test_folder_in_use_is_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty: add --resume"):
        main(arguments(packed, tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        main(arguments(packed, tmp_path / "file"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_run_without_evaluation(tmp_path: Path) -> None:
    settings = ('data.val_split=""', "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert main(arguments(without_val(tmp_path), tmp_path / "run", *settings)) == 0
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoint-000001" in written and "predictions.npz" not in written
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["packages"]["torch"] and 0 < run["parameters"]["trainable"] < run["parameters"]["total"]
    assert run["command"][0] == "train/main.py" and run["world_size"] == 1


def zeroed_shard(tmp_path: Path) -> Path:
    """As long as it was, and all zero."""
    folder = copy_set(tmp_path)
    size = (folder / "train-000000.tar").stat().st_size
    (folder / "train-000000.tar").write_bytes(bytes(size))
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [(zeroed_shard, "checksum differs"), (damaged_index, "train-000000.index.safetensors is damaged")],
)
def test_data_that_cannot_be_decoded_stops_the_run_naming_it(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    with pytest.raises(ValueError, match=r"samples in a row cannot be decoded; last: ") as failure:
        main(arguments(make(tmp_path), tmp_path / "run"))
    assert said in str(failure.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_few_missing_shards_are_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_set(tmp_path / "set", [5] * 12, samples_a_shard=2, splits=("train",))
    (folder / "train-000003.tar").unlink()
    settings = ("data.max_bad_fraction=0.2", 'data.val_split=""', "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert main(arguments(folder, tmp_path / "run", *settings)) == 0
    output, errors = capfd.readouterr()
    assert (
        "warning: 2 of 12 samples of split 'train' cannot be read" in errors and "train-000003.tar is missing" in errors
    )
    assert f"2 of 12 samples could not be decoded and were replaced by others: {tmp_path / 'run'}" in output


def test_two_runs_do_not_write_into_one_folder(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run is writing into"):
            main(arguments(packed, folder))
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_finished_run_only_makes_up_for_its_evaluation(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(packed, tmp_path / "run", "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert main(command) == 0
    predictions = tmp_path / "run" / "predictions.npz"
    before = predictions.read_bytes()
    assert main([*command, "--resume"]) == 0
    assert "this run is finished: all 4 steps are done" in capsys.readouterr().out
    predictions.unlink()
    assert main([*command, "--resume"]) == 0
    assert predictions.read_bytes() == before


def test_a_damaged_index_of_the_validation_split_costs_its_samples(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [5] * 8, splits=("train", "val"))
    index = folder / "val-000001.index.safetensors"
    index.write_bytes(index.read_bytes()[:1000])
    settings = ("data.max_bad_fraction=0.9", "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert main(arguments(folder, tmp_path / "run", *settings)) == 0
    answers = np.load(tmp_path / "run" / "predictions.npz")
    assert answers["valid"].tolist() == [True] * 4 + [False] * 4
    assert all(answers["keys"][:4]) and not any(answers["keys"][4:])


@pytest.mark.parametrize(("interval", "warned"), [(3, True), (4, False), (8, False)])
def test_clips_that_the_stored_frames_cannot_serve_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: int, warned: bool
) -> None:
    folder = make_set(tmp_path / "set", [40] * 8, fps="source/4", splits=("train",))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["profile"]["fps"] == "source/4"
    settings = ("data.sampling=dense", f"data.interval={interval}", "data.val_split=", "schedule.epochs=1")
    assert main(arguments(folder, tmp_path / "run", *settings, "schedule.warmup_epochs=0")) == 0
    assert ("stores one frame in 4 and data.interval is 3" in capsys.readouterr().err) == warned
