"""What a model answered, as files for people: per_class.csv and, where a video has one label, confusion.csv (row: the
truth, column: the answer) and confusion.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipelines.shards import write_durably
from train.evaluate import Evaluation
from train.pictures import draw_confusion

PER_CLASS = "per_class.csv"
CONFUSION = "confusion.csv"
CONFUSION_PICTURE = "confusion.png"


def write_tables(folder: Path, result: Evaluation, names: Sequence[str]) -> None:
    """All that fits the set into a folder that exists."""
    write_durably(folder / PER_CLASS, as_csv(per_class(result, names)))
    if not result.multi_label:
        confusion = result.confusion()
        rows = ([name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True))
        write_durably(folder / CONFUSION, as_csv([["", *names], *rows]))
        write_durably(folder / CONFUSION_PICTURE, draw_confusion(confusion, names))


def per_class(result: Evaluation, names: Sequence[str]) -> list[list[object]]:
    """A heading and one row a class; cells of classes without samples are empty."""
    samples = result.class_samples().tolist()
    if result.multi_label:
        precision = [f"{p:.6f}" if n else "" for p, n in zip(result.class_precision(), samples, strict=True)]
        return [["class", "samples", "average_precision"], *map(list, zip(names, samples, precision, strict=True))]
    confusion, accuracy = result.confusion(), result.class_accuracy()
    wrong = confusion - np.diag(np.diagonal(confusion))
    rows: list[list[object]] = [["class", "samples", "correct", "accuracy", "most_confused_with", "as_often"]]
    for c, name in enumerate(names):
        worst = int(wrong[c].argmax())
        confused = [names[worst], int(wrong[c, worst])] if wrong[c, worst] else ["", ""]
        shown = f"{accuracy[c]:.6f}" if samples[c] else ""
        rows.append([name, samples[c], int(confusion[c, c]), shown, *confused])
    return rows


def as_csv(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows as UTF-8; what UTF-8 cannot hold becomes a question mark."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="replace")
