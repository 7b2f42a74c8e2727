"""A run's folder as reports read it: what was run (run.json), how it went (metrics.jsonl), what it answered
(predictions.npz), what could not be decoded (bad_samples.tsv).

The folder may come from a stranger or from a run that was killed: half a last line of the metrics is left out, anything
else that is not as the trainer writes it is a ValueError naming the file.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.bad_samples import COLUMNS, FILE_NAME
from train.evaluate import Evaluation

RUN = "run.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.npz"
_MOST_BYTES = 2**30
_FACTS = ("config", "parameters", "samples", "world_size", "device", "packages")


@dataclass(frozen=True)
class RunFolder:
    """What a run has written so far."""

    path: Path
    facts: dict[str, Any]
    """run.json."""
    lines: list[dict[str, Any]]
    """Those of metrics.jsonl in their order; each has kind (train, eval, end) and step."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]


@dataclass(frozen=True)
class Answers:
    """predictions.npz: what the model said after the last step."""

    keys: tuple[str, ...]
    classes: tuple[str, ...]
    evaluation: Evaluation


def read_run(path: Path) -> RunFolder:
    """The run in a folder. Raises ValueError or OSError: there is none, or a file of it is damaged."""
    facts = read_facts(path)
    lines: list[dict[str, Any]] = []
    if (path / METRICS).is_file():
        texts = _text(path / METRICS).split("\n")
        for number, text in enumerate(texts[:-1], 1):  # what follows the last newline is of a killed process
            line = _object(text, f"{path / METRICS}, line {number}")
            if not isinstance(line.get("kind"), str) or not isinstance(line.get("step"), int):
                raise ValueError(f"{path / METRICS}, line {number}: it has no kind and step")
            lines.append(line)
    return RunFolder(path, facts, lines)


def read_facts(path: Path) -> dict[str, Any]:
    """run.json of the run in a folder. Raises ValueError or OSError: there is none, or it is damaged."""
    if not (path / RUN).is_file():
        raise FileNotFoundError(f"{path} is no run: there is no {RUN} in it; give the folder that run.out named")
    facts = _object(_text(path / RUN), str(path / RUN))
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise ValueError(f"{path / RUN} has no {missing[0]!r}: it is damaged, or another program's")
    return facts


def read_answers(path: Path) -> Answers | None:
    """The answers in a run's (or an evaluation's) folder; None where there are none yet. ValueError: damaged."""
    file = path / PREDICTIONS
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            arrays: dict[str, NDArray[Any]] = {
                name: stored[name] for name in ("keys", "classes", "logits", "labels", "valid")
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    n, classes = len(arrays["keys"]), len(arrays["classes"])
    labels = arrays["labels"]
    fits = (
        arrays["logits"].shape == (n, classes)
        and arrays["logits"].dtype.kind == "f"
        and arrays["valid"].shape == (n,)
        and arrays["valid"].dtype == bool
        and labels.dtype.kind in "iu"
        and (labels.shape == (n, classes) or (labels.shape == (n,) and np.all((labels >= 0) & (labels < classes))))
        and all(arrays[name].dtype.kind == "U" and arrays[name].ndim == 1 for name in ("keys", "classes"))
    )
    if not fits:
        raise ValueError(f"{file} is damaged: its arrays do not fit together")
    evaluation = Evaluation(arrays["logits"].astype(np.float32), labels, arrays["valid"])
    return Answers(tuple(arrays["keys"].tolist()), tuple(arrays["classes"].tolist()), evaluation)


def read_bad_samples(path: Path) -> list[dict[str, str]]:
    """The rows of bad_samples.tsv by its columns; none where there is no such file."""
    if not (path / FILE_NAME).is_file():
        return []
    rows = [line.split("\t") for line in _text(path / FILE_NAME).splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) != len(COLUMNS):
            raise ValueError(f"{path / FILE_NAME}, line {number}: {len(row)} columns, must be {', '.join(COLUMNS)}")
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:]]


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8", errors="replace")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is no JSON object")
    return value
