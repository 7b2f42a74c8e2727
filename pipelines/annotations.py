"""What is to be packed: a folder of videos, with or without an annotation file, becomes a list of labelled videos.

Three layouts are read:

    SOURCE/<class>/…/clip.mp4
    SOURCE/<split>/<class>/…/clip.mp4        where every top folder is train, val, validation or test
    --annotations FILE                       lines of `path label [split]`, paths relative to SOURCE

An annotation file is separated by tabs, commas or spaces (what its first line holds, in this order) and may start with
a header that names its columns; further columns are then ignored. Labels that are all whole numbers become classes of
the same digits in numeric order, other classes are sorted by name. Nothing is dropped silently: files that are no
videos are counted, listed files that are missing are named, and a path can never leave SOURCE.
"""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

SPLITS = ("train", "val", "test")
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".divx", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv",
    ".wmv", ".asf", ".ogv",
)  # fmt: skip
_SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_COLUMNS = {
    "path": ("path", "file", "filename", "video", "video_path"),
    "label": ("label", "class", "label_index", "class_name"),
    "split": ("split", "subset"),
}


@dataclass(frozen=True, slots=True)
class Video:
    """One video to pack."""

    path: Path
    """Relative to SOURCE."""
    label: str
    split: str
    """One of `SPLITS`."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything found in a SOURCE, sorted by path."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    """Class names; a video's label index is its position here."""
    missing: tuple[Path, ...] = ()
    """Listed in the annotation file but not in SOURCE."""
    other_files: Counter[str] = field(default_factory=Counter)
    """Files that were left alone because they are no videos, counted by suffix."""


def list_videos(
    source: Path,
    *,
    annotations: Path | None = None,
    max_missing: int = 0,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> Listing:
    """Lists the videos of `source` with their classes and splits.

    `val_fraction` moves this part of every class, drawn by `seed`, to the split val; only where no split is given.
    Raises ValueError or OSError, naming the file or folder, when there is nothing to pack, a class is empty or the
    only one, a split is unknown, a path leaves `source`, or more than `max_missing` listed files are missing.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder of videos: {source}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val fraction {val_fraction}: allowed are 0 (no split) up to, but not including, 1")
    if annotations is not None:
        listing, has_splits = _from_file(source, annotations, max_missing)
    else:
        listing, has_splits = _from_folders(source)
    if len(listing.classes) < 2:
        names = ", ".join(listing.classes) or "none"
        raise ValueError(
            f"{annotations or source} holds {len(listing.classes)} class ({names}); two or more are needed"
        )
    if val_fraction and has_splits:
        raise ValueError(f"{annotations or source} says which video is in which split: leave out the val fraction")
    if val_fraction:
        listing = replace(listing, videos=_split_off(listing, val_fraction, seed))
    return listing


def _from_folders(source: Path) -> tuple[Listing, bool]:
    folders = _subfolders(source)
    if not folders:
        raise ValueError(f"{source} holds no folders; expected one folder for each class, or an annotation file")
    named = [f for f in folders if f.name in _SPLIT_NAMES]
    has_splits = len(named) == len(folders)
    if named and not has_splits and any(_subfolders(f) for f in named):
        other = next(f.name for f in folders if f.name not in _SPLIT_NAMES)
        raise ValueError(
            f"{source} holds both a split ({named[0].name}) and another folder ({other}); allowed are only splits "
            "(train, val, validation, test) or only classes"
        )
    other_files = Counter(_suffix_of(path) for path in source.iterdir() if path.is_file())
    videos: list[Video] = []
    for top in folders:
        split = _SPLIT_NAMES[top.name] if has_splits else "train"
        for folder in _subfolders(top) if has_splits else [top]:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            found = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
            if not found:
                raise ValueError(
                    f"class folder {folder} holds no video ({len(files)} other files); remove it or fill it. "
                    f"Videos end in {' '.join(VIDEO_SUFFIXES)}"
                )
            videos += [Video(path.relative_to(source), folder.name, split) for path in found]
            other_files.update(_suffix_of(path) for path in files if path.suffix.lower() not in VIDEO_SUFFIXES)
        if has_splits:
            other_files.update(_suffix_of(path) for path in top.iterdir() if path.is_file())
    return Listing(tuple(videos), _sort_classes({v.label for v in videos}), other_files=other_files), has_splits


def _from_file(source: Path, annotations: Path, max_missing: int) -> tuple[Listing, bool]:
    rows, columns = _read_table(annotations)
    videos: list[Video] = []
    missing: list[Path] = []
    lines_of: dict[Path, int] = {}
    for line, row in rows:
        where = f"{annotations}, line {line}"
        if len(row) <= max(columns["path"], columns["label"]) or not row[columns["path"]] or not row[columns["label"]]:
            raise ValueError(f"{where}: expected 'path label [split]', got {row}")
        video = Video(_inside(row[columns["path"]], where), row[columns["label"]], _split_in(row, columns, where))
        if video.path in lines_of:
            raise ValueError(f"{where}: {video.path} was already listed in line {lines_of[video.path]}")
        lines_of[video.path] = line
        if (source / video.path).is_file():
            videos.append(video)
        else:
            missing.append(video.path)
    if len(missing) > max_missing:
        names = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of the {len(videos) + len(missing)} files in {annotations} are missing from {source} "
            f"({names}); allowed are {max_missing}: correct the paths or raise --max-missing"
        )
    videos.sort(key=lambda video: video.path)
    listing = Listing(tuple(videos), _sort_classes({v.label for v in videos}), tuple(sorted(missing)))
    return listing, "split" in columns


def _read_table(annotations: Path) -> tuple[list[tuple[int, list[str]]], dict[str, int]]:
    """The rows with their line numbers, and which column is what."""
    try:
        lines = annotations.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{annotations} is not a text file in UTF-8 ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{annotations} is empty; expected lines of 'path label [split]'")
    first = numbered[0][1]
    separator = "\t" if "\t" in first else "," if "," in first else " "
    rows = [(number, _fields(line, separator)) for number, line in numbered]
    columns = _header_columns(rows[0][1] if separator != " " else first.split())
    if columns:
        return rows[1:], columns
    has_split = max(len(row) for _, row in rows) > 2
    return rows, {"path": 0, "label": 1} | ({"split": 2} if has_split else {})


def _fields(line: str, separator: str) -> list[str]:
    if separator == " ":  # a path may hold spaces, a label and a split not
        last = line.split()[-1]
        fields = line.rsplit(maxsplit=2 if last in _SPLIT_NAMES and len(line.split()) > 2 else 1)
    elif separator == ",":
        fields = next(csv.reader([line]))
    else:
        fields = line.split("\t")
    return [text.strip() for text in fields]


def _header_columns(row: Sequence[str]) -> dict[str, int] | None:
    names = [text.lower() for text in row]
    columns = {}
    for column, synonyms in _COLUMNS.items():
        found = [i for i, name in enumerate(names) if name in synonyms]
        if found:
            columns[column] = found[0]
    return columns if {"path", "label"} <= columns.keys() else None


def _inside(text: str, where: str) -> Path:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise ValueError(f"{where}: path {text!r} leaves the source folder; paths must be relative and without '..'")
    return Path(path)


def _split_in(row: Sequence[str], columns: dict[str, int], where: str) -> str:
    if "split" not in columns:
        return "train"
    text = row[columns["split"]] if len(row) > columns["split"] else ""
    if text not in _SPLIT_NAMES:
        raise ValueError(
            f"{where}: split {text!r}; allowed are train, val, test. Columns other than path, label and split need a "
            "header line to be ignored"
        )
    return _SPLIT_NAMES[text]


def _split_off(listing: Listing, val_fraction: float, seed: int) -> tuple[Video, ...]:
    """Moves a part of every class to val: at least one video, never all; a class of one stays in train."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for position, video in enumerate(listing.videos):
        by_class[video.label].append(position)
    videos = list(listing.videos)
    for number, name in enumerate(listing.classes):
        positions = by_class[name]
        count = min(len(positions) - 1, max(1, round(val_fraction * len(positions))))
        order = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(len(positions))
        for chosen in order[:count]:
            videos[positions[chosen]] = replace(videos[positions[chosen]], split="val")
    return tuple(videos)


def _sort_classes(names: set[str]) -> tuple[str, ...]:
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _suffix_of(path: Path) -> str:
    return path.suffix.lower() or os.fspath(path.name)
