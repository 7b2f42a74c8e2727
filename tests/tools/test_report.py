"""The program that writes a report again: of a run that has nothing but its log, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.shell import call_program
from tools.report import main
from train.config import Config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed before its first checkpoint, on another machine."""
    out = tmp_path / "killed"
    out.mkdir()
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    facts = {
        **{"command": ["train/main.py", "--local_rank=0", "--recipe", "a b"], "config": Config().as_dict()},
        **{"parameters": {"total": 1234567, "trainable": 89}, "samples": 100, "world_size": 2, "device": "a GPU"},
        "packages": {"torch": "2.11.0"},
    }
    facts["config"] |= {"deepspeed": batch}  # type: ignore[operator]
    (out / "run.json").write_text(json.dumps(facts))
    (out / "metrics.jsonl").write_text('{"kind": "train", "step": 20, "loss": 2.5, "lr": 0.1}\n{"kind": "tr')
    return out


def test_it_writes_where_it_is_told(run: Path, tmp_path: Path) -> None:
    for more, page in (((), run / "report.html"), (("--out", tmp_path / "mail.html"), tmp_path / "mail.html")):
        done = call_program(main, run, *more)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{page}\n", "")
        text = page.read_text()
        assert "not finished: step 20 of 375 is the last that was logged" in text and "1,234,567" in text
        assert "deepspeed train/main.py --recipe &#x27;a b&#x27; --resume" in text and "--local_rank" not in text
        assert sorted(path.name for path in page.with_suffix("").iterdir()) == ["learning_rate.png", "loss.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "is no run: there is no run.json in it; give the folder that run.out named"),
        (["{tmp}"], "is no run: there is no run.json in it"),
        (["{run}/run.json"], "is no run"),
        (["{run}", "--out", "{tmp}/none/x.html"], "--out {tmp}/none/x.html: there is no folder {tmp}/none"),
        (["{run}", "--out", "{tmp}/report.pdf"], "it is a .html file"),
        (["{run}", "--out", "{tmp}/folder.html"], "--out {tmp}/folder.html: is a folder"),
        (["{run}", "--out", "{tmp}/file.html"], "File exists"),
        (["{tmp}/evaluation"], "is an evaluation of {tmp}/converted, which is no run"),
        (["{tmp}/damaged"], "metrics.json is damaged"),
        ([], "required: RUN"),
        (["{run}", "{run}"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_reported_is_said(run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    for name, text in (("evaluation", json.dumps({"checkpoint": f"{tmp_path}/converted"})), ("damaged", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()  # where the pictures would go
    done = call_program(main, *(argument.format(run=run, tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2 and message.format(tmp=tmp_path) in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not (run / "report.html").exists()
