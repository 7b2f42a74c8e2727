"""What is to be packed: a folder of videos, with or without annotation files, becomes a list of labelled videos.

    SOURCE/<class>/…/clip.mp4                 no annotation file: folders are classes
    SOURCE/<split>/<class>/…/clip.mp4         the same, where every top folder is train, val, validation or test
    --annotations [SPLIT=]FILE …              what `annotation_formats.py` reads: one file, or one a split
    --annotations FOLDER                      the official files of Kinetics, SSv2, Diving-48, UCF-101 or HMDB-51
    --annotations classes=FILE                class names in the order of their numbers

Lists name files: `path` relative to SOURCE, or to the one folder in it that is named after the split (videos_train).
Official formats name clips, which are looked for in all of SOURCE, whatever folders and suffixes a download has. What
could mean two things is refused, and `Listing.notes` says what was recognised.

Classes are in the order of the class file, else whole numbers in numeric order, else names sorted. A listed class
counts even if all its files are missing, so that an index never depends on what was downloaded. Nothing is dropped
silently: listed files that are missing are named, files that are no videos counted. No path can leave SOURCE; links
inside it are followed, for they are the user's own.

Cost on one core: 100,000 videos 1 s from folders, 2 s from a list, 3 s from a Kinetics csv.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipelines.annotation_formats import (
    FORMATS,
    SPLIT_OF_WORD,
    VIDEO_SUFFIXES,
    Row,
    Unlabelled,
    class_file_beside,
    official_files,
    read_classes,
    recognise,
    split_in_name,
)
from pipelines.source_files import SourceFiles, is_video, subfolders, suffix_of

SPLITS = ("train", "val", "test")

MAX_LABEL = 500  # characters

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NO_CLASS = re.compile(
    r"-\d+|[-+]?\d*\.\d+", re.ASCII
)  # not labelled, or whole numbers that a program made fractions of


@dataclass(frozen=True, slots=True)
class Video:
    """One video to pack."""

    path: Path
    """Relative to SOURCE."""
    labels: tuple[str, ...]
    """One class name; in a multi-label listing any number, none included."""
    split: str
    """One of `SPLITS`."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything found in a SOURCE, sorted by path."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    """Class names; a video's label index is its position here."""
    multi_label: bool = False
    """Whether a video may have several labels, or none."""
    missing: tuple[Path, ...] = ()
    """Listed in an annotation file but not in SOURCE; of clips that are looked for, the most precise name."""
    other_files: Counter[str] = field(default_factory=Counter)
    """Files that were left alone because they are no videos, counted by suffix."""
    notes: tuple[str, ...] = ()
    """What was recognised and what was left out, for the user, one line each."""


def list_videos(
    source: Path,
    *,
    annotations: Sequence[str | Path] = (),
    annotation_format: str = "auto",
    fold: int = 1,
    max_missing: str | int = 0,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> Listing:
    """Lists the videos of `source` with their classes and splits.

    `annotations` are files or folders, each as PATH, SPLIT=PATH or classes=PATH; `annotation_format` is `auto` or a key
    of `FORMATS`; `fold` is which of the official divisions of UCF-101 and HMDB-51 is taken from a folder. `max_missing`
    is a number of files or a percentage, `5%`. `val_fraction` moves this part of every class (of first labels, where
    there are several), drawn by `seed`, to the split val; only where no split is given.
    Raises ValueError or OSError, naming the file or folder, when there is nothing to pack, a class is the only one or
    its folder empty, an annotation file makes no sense, a path leaves `source`, or too many listed files are missing.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder of videos: {source}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val fraction {val_fraction}: allowed are 0 (no split) up to, but not including, 1")
    if annotation_format not in ("auto", *FORMATS):
        raise ValueError(f"annotation format {annotation_format!r}: allowed are auto, {', '.join(FORMATS)}")
    if annotations:
        listing = _from_files(source, _collect(annotations, annotation_format, fold), max_missing)
    elif annotation_format != "auto":
        raise ValueError(f"annotation format {annotation_format} needs files: name them with --annotations")
    else:
        listing = _from_folders(source)
    what = ", ".join(map(str, annotations)) or source
    if len(listing.classes) < 2:
        names = ", ".join(listing.classes) or "none"
        raise ValueError(f"{what} holds {len(listing.classes)} class ({names}); two or more are needed")
    if val_fraction and any(video.split != "train" for video in listing.videos):
        raise ValueError(f"{what} says which video is in which split: leave out the val fraction")
    if val_fraction:
        listing = replace(listing, videos=_split_off(listing, val_fraction, seed))
    return listing


def _from_folders(source: Path) -> Listing:
    folders = subfolders(source)
    if not folders:
        raise ValueError(f"{source} holds no folders; expected one folder for each class, or an annotation file")
    named = [f for f in folders if f.name.lower() in SPLIT_OF_WORD]
    has_splits = len(named) == len(folders)
    if named and not has_splits and any(subfolders(f) for f in named):
        other = next(f.name for f in folders if f.name.lower() not in SPLIT_OF_WORD)
        raise ValueError(
            f"{source} holds both a split ({named[0].name}) and another folder ({other}); allowed are only splits "
            "(train, val, validation, test) or only classes"
        )
    files = SourceFiles(source)
    others = list(files.names(""))
    videos: list[Video] = []
    for top in folders:
        split = SPLIT_OF_WORD[top.name.lower()] if has_splits else "train"
        for folder in subfolders(top) if has_splits else [top]:
            inside = list(files.walk(folder.relative_to(source).as_posix()))
            found = [path for path in inside if is_video(path)]
            if not found:
                raise ValueError(
                    f"class folder {folder} holds no video ({len(inside)} other files); remove it or fill it. "
                    f"Videos end in {' '.join(VIDEO_SUFFIXES)}"
                )
            videos += [Video(Path(path), (folder.name,), split) for path in found]
            others += [path for path in inside if not is_video(path)]
        if has_splits:
            others += files.names(top.name)
    videos.sort(key=lambda video: video.path.parts)
    classes = _sort_classes({name for video in videos for name in video.labels})
    return Listing(tuple(videos), classes, other_files=Counter(map(suffix_of, others)))


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    said: str | None
    """The split that the user named."""
    split: str | None
    """The split that its name tells."""
    asked: bool
    """Named by the user, not found in a folder."""


@dataclass(frozen=True, slots=True)
class _Annotations:
    format: str
    files: list[_File]
    class_file: Path | None


def _collect(annotations: Sequence[str | Path], wanted: str, fold: int) -> _Annotations:
    """Which files are to be read as what."""
    files: list[_File] = []
    class_files: list[Path] = []
    formats: dict[str, Path] = {}
    for annotation in annotations:
        role, equals, name = str(annotation).partition("=")
        if not equals or role not in ("classes", *SPLIT_OF_WORD):
            role, name = "", str(annotation)
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"no such annotation file: {path}")
        if role == "classes":
            class_files.append(path)
        elif path.is_dir():
            if role:
                raise ValueError(
                    f"{annotation}: a folder has files of several splits; name the file, or leave out {role}="
                )
            found, paths = official_files(path, wanted, fold)
            formats[found] = path
            files += [_File(inside, None, split_in_name(inside, found), False) for inside in paths]
        else:
            found = recognise(path) if wanted == "auto" else wanted
            formats[found] = path
            files.append(_File(path, SPLIT_OF_WORD.get(role), split_in_name(path, found), True))
    if len(formats) != 1 or len(class_files) > 1:
        what = " and ".join(f"{path} ({found})" for found, path in formats.items()) or "no list of videos"
        raise ValueError(f"annotations must be of one format, with one class file at most; got {what}; see --format")
    (found,) = formats
    if not class_files and FORMATS[found].needs_classes:
        class_files.append(class_file_beside(files[0].path, found))
    return _Annotations(found, files, class_files[0] if class_files else None)


def _from_files(source: Path, annotations: _Annotations, max_missing: str | int) -> Listing:
    class_file = annotations.class_file
    names = read_classes(class_file) if class_file else ()
    rows, several, notes = _read_rows(annotations)
    class_of = {str(number): name for number, name in enumerate(names)} | {name: name for name in names}
    files = SourceFiles(source)
    find = files.find_clip if FORMATS[annotations.format].looked_for else files.find_file
    videos: dict[str, Video] = {}
    missing: list[Path] = []
    missing_of: Counter[str] = Counter()
    places: dict[str, str] = {}
    labels: set[str] = set()
    for row, split, where in rows:
        named = _named_labels(row, class_of, where, class_file)
        labels.update(named)
        path = find(row.names, split, where)
        if path is None:
            missing.append(Path(row.names[0]))
            missing_of[split] += 1
        elif path in places:
            before = places[path].removeprefix(where.rpartition(" ")[0].rpartition(" ")[0] + " ")  # the file once
            raise ValueError(f"{where}: {path} was already listed in {before}")
        else:
            places[path] = where
            videos[path] = Video(Path(path), named, split)
    _check_missing(source, annotations, missing, len(videos), max_missing)
    listing = Listing(
        videos=tuple(videos[path] for path in sorted(videos, key=_path_order)),
        classes=names or _sort_classes(labels),
        multi_label=several,
        missing=tuple(sorted(missing)),
    )
    return replace(listing, notes=(*notes, *_notes(annotations, listing, missing_of, files)))


def _read_rows(annotations: _Annotations) -> tuple[list[tuple[Row, str, str]], bool, list[str]]:
    """(row, split, where it stands) of all files, whether a video may have several labels, notes."""
    form = FORMATS[annotations.format]
    rows: list[tuple[Row, str, str]] = []
    several = False
    notes = [f"annotations: {annotations.format} ({form.about}) from {_some_names(annotations.files)}"]
    for file in annotations.files:
        try:
            contents = form.read(file.path)
        except Unlabelled as error:
            if file.asked:
                raise
            notes.append(f"  skipped: {error}")
            continue
        several |= contents.several
        splits = _splits(file, contents.rows, only=len(annotations.files) == 1)
        for row, split in zip(contents.rows, splits, strict=True):
            rows.append((row, split, f"{file.path}, {form.unit} {row.number}"))
        if contents.note:
            notes.append(f"  {file.path.name}: {contents.note}")
    return rows, several, notes


def _splits(file: _File, rows: Sequence[Row], *, only: bool) -> list[str]:
    """The split of every row: as the user says, else the row, else the file's name; a lone file of none is train."""
    told = {row.split for row in rows if row.split}
    if file.said:
        if len(told) > 1:
            raise ValueError(f"{file.path} says itself what is {' and '.join(sorted(told))}: leave out {file.said}=")
        return [file.said] * len(rows)
    default = file.split or ("train" if only else None)
    if default is None and not all(row.split for row in rows):
        raise ValueError(f"{file.path}: its videos are of which split? Say train={file.path}, or val=, or test=")
    return [row.split or default or "" for row in rows]


def _named_labels(row: Row, class_of: dict[str, str], where: str, class_file: Path | None) -> tuple[str, ...]:
    """The row's class names; numbers become names where there is a class file."""
    if _UNUSABLE.search("".join((row.names[0], *row.labels))):
        raise ValueError(f"{where}: control characters in {row.names[0][:100]!r} or its labels")
    for label in row.labels:
        if class_file is not None and label not in class_of:
            raise ValueError(f"{where}: label {label[:100]!r} is not in {class_file}")
        if class_file is None and (_NO_CLASS.fullmatch(label) or len(label) > MAX_LABEL):
            raise ValueError(f"{where}: label {label[:100]!r}; allowed are whole numbers from 0 on and names")
    named = tuple(class_of.get(label, label) for label in row.labels)
    if len(set(named)) < len(named):
        raise ValueError(f"{where}: a label stands there twice: {', '.join(named)[:200]}")
    return named


def _check_missing(
    source: Path, annotations: _Annotations, missing: Sequence[Path], found: int, max_missing: str | int
) -> None:
    """ValueError when more files are missing than allowed, or all of them."""
    match = re.fullmatch(r"(\d{1,12})|(\d{1,3}(?:\.\d{1,6})?)%", str(max_missing), re.ASCII)
    if not match or float(match[2] or 0) > 100:
        raise ValueError(f"max missing {max_missing!r}: allowed are a number, such as 12, and a percentage, such as 5%")
    total = found + len(missing)
    allowed = int(match[1]) if match[1] else int(total * float(match[2]) / 100)
    if len(missing) > allowed or not found:
        shown = ", ".join(str(path) for path in missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of the {total} files in {_some_names(annotations.files)} are missing from {source} "
            f"({shown}); allowed are {allowed}: correct the paths or raise --max-missing"
        )


def _some_names(files: Sequence[_File]) -> str:
    return ", ".join(str(file.path) for file in files[:3]) + (f", … ({len(files)} files)" if len(files) > 3 else "")


def _notes(
    annotations: _Annotations, listing: Listing, missing_of: Mapping[str, int], files: SourceFiles
) -> Iterator[str]:
    found_of = Counter(video.split for video in listing.videos)
    for split in SPLITS:
        if found_of[split] or missing_of[split]:
            missing = f", {missing_of[split]} missing" if missing_of[split] else ""
            yield f"  {split}: {found_of[split]} videos{missing}"
    for folder, count in files.found_in.items():
        yield f"  {count} of them in {folder}/"
    classes = listing.classes
    if annotations.class_file:
        yield f"  {len(classes)} classes from {annotations.class_file}"
    elif all(map(str.isdigit, classes)) and classes != tuple(map(str, range(len(classes)))):
        yield f"  class numbers are not 0 to {len(classes) - 1}: an index is the rank, unless classes=FILE is given"
    unlisted = files.num_clips - len(listing.videos) if FORMATS[annotations.format].looked_for else 0
    if unlisted:
        yield f"  {unlisted} videos of SOURCE are in no list: left alone"


def _path_order(path: str) -> list[str]:
    """Sorts as `Path` does, folder by folder, in a tenth of its time."""
    return path.split("/")


def _sort_classes(names: set[str]) -> tuple[str, ...]:
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _split_off(listing: Listing, val_fraction: float, seed: int) -> tuple[Video, ...]:
    """Moves a part of every class to val: at least one video, never all; a class of one stays in train.

    With several labels a video counts for its first one; those without any are a class of their own.
    """
    by_class: dict[str | None, list[int]] = defaultdict(list)
    for position, video in enumerate(listing.videos):
        by_class[video.labels[0] if video.labels else None].append(position)
    videos = list(listing.videos)
    for number, name in enumerate([*listing.classes, None]):
        positions = by_class[name]
        count = max(0, min(len(positions) - 1, max(1, round(val_fraction * len(positions)))))
        order = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(len(positions))
        for chosen in order[:count]:
            videos[positions[chosen]] = replace(videos[positions[chosen]], split="val")
    return tuple(videos)
