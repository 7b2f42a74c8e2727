"""What tools/predict.py writes: the table for people, JSON and CSV for programs, and names for its other files.

Rows are written as answers come, so nothing of a video is kept once its row is there.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipelines.files import printable
from tools.parts.captions import Label

KEY_WIDTH = 40
"""Characters of the table's first column, if there is anything as long."""


@dataclass(frozen=True)
class Answer:
    """What the model says of one video."""

    key: str
    labels: Sequence[Label]
    """The likeliest classes; empty where no view could be decoded."""
    views: int
    """That could be decoded."""
    error: str
    """Why others, or all, could not; empty: all could."""

    def __str__(self) -> str:
        """`kickflip 93.1 %, ollie 6.9 %`, and what is wrong."""
        if not self.labels:
            return f"cannot be decoded: {self.error}"
        text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.labels)
        return f"{text} ({self.error}; views: {self.views})" if self.error else text


class Outputs:
    """The table, and the files that were asked for; they appear when the stack is closed without an error."""

    def __init__(
        self, json_file: Path | None, csv_file: Path | None, *, top: int, key_width: int, stack: ExitStack
    ) -> None:
        self._key_width = key_width
        self._to_stdout = json_file is not None and str(json_file) == "-"
        self._json: TextIO | None = None
        self._csv: Any = None
        self._entries = 0
        if json_file is not None:
            self._json = sys.stdout if self._to_stdout else stack.enter_context(appearing(json_file))
        if csv_file is not None:
            self._csv = csv.writer(stack.enter_context(appearing(csv_file)), lineterminator="\n")
            self._csv.writerow(["key", "error", *label_columns(top)])

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Before the first answer: what holds for all."""
        if self._json is not None:
            text = json.dumps(dict(facts), indent=1, ensure_ascii=False)
            self._json.write(text.removesuffix("\n}") + ',\n "videos": [')

    def add(self, answer: Answer, *, shown: bool = True) -> None:
        """One video; in the table where it is to be `shown`."""
        if shown and not self._to_stdout:
            tqdm.write(f"{answer.key:<{self._key_width}}  {answer}")
        if self._json is not None:
            entry = {
                **{"key": answer.key, "labels": [name for name, _ in answer.labels]},
                **{"probabilities": [share for _, share in answer.labels], "views": answer.views},
                "error": answer.error or None,
            }
            self._json.write((",\n  " if self._entries else "\n  ") + json.dumps(entry, ensure_ascii=False))
            self._entries += 1
        if self._csv is not None:
            self._csv.writerow([answer.key, answer.error, *label_cells(answer.labels)])

    def end(self, failed: int) -> None:
        """After the last one."""
        if self._json is not None:
            self._json.write(f'\n ],\n "failed": {failed}\n}}\n')


def label_columns(count: int) -> list[str]:
    """Headings for so many labels."""
    numbers = ["", *(f"_{k}" for k in range(2, count + 1))]
    return [f"{name}{number}" for number in numbers for name in ("label", "probability")]


def label_cells(labels: Sequence[Label]) -> list[object]:
    """What stands below them."""
    return [cell for label in labels for cell in label]


def file_names(paths: Sequence[Path]) -> list[str]:
    """A name of its own for what is written about each: its stem, and a number where there are several of them."""
    taken: set[str] = set()
    names = []
    for path in paths:
        stem, number = re.sub(r"[^\w .()+-]", "_", path.stem), 1
        while (name := stem if number == 1 else f"{stem}-{number}").lower() in taken:
            number += 1
        taken.add(name.lower())
        names.append(name)
    return names


def annotation_places(out: Path, paths: Sequence[Path]) -> dict[str, tuple[Path, Path]]:
    """For each video by its key: itself and where it goes with labels; makes a folder if need be.

    Raises ValueError or OSError where it cannot go there.
    """
    if out.suffix.lower() == ".mp4" and not out.is_dir():
        if len(paths) > 1:
            raise ValueError(f"--annotate {out}: {len(paths)} videos do not go into one file; name a folder")
        if not out.parent.is_dir():
            raise ValueError(f"--annotate {out}: there is no folder {out.parent}; name a file in one that exists")
        places = [out]
    else:
        if out.suffix and not out.is_dir():
            raise ValueError(f"--annotate {out}: what is written is an .mp4; name one, or a folder")
        out.mkdir(parents=True, exist_ok=True)
        places = [out / f"{name}.mp4" for name in file_names(paths)]
    for place in places:
        if place.exists() and any(os.path.samefile(place, path) for path in paths):
            raise ValueError(f"--annotate {out}: that would write over the video {place}; name another place")
    return {printable(path): (path, place) for path, place in zip(paths, places, strict=True)}


@contextmanager
def appearing(path: Path) -> Iterator[TextIO]:
    """A text file that is there whole at the end of the block, or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
