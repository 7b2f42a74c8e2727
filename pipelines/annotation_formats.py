"""Annotation files as they are published: one reader a format turns a file into rows, `recognise` says which it is.

    list         `path label [split]` as of MMAction2, SlowFast, VideoMAE, V-JEPA, with spaces, tabs, `,`, `;` or `::`
                 between them; or a table with a header: path, label or labels (joined by `;`), split; others are named
    multi-label  `path label label …` without a header, MMAction2's multi_class lists
    frames-list  `folder frames label …`, lists of extracted frames, where folder.<suffix> is the video
    kinetics     label, youtube_id, time_start, time_end, split: Kinetics-400, 600, 700
    ssv2         Something-Something V2, json beside a json of classes
    diving48     Diving-48 V2, json beside a json of classes
    ucf101       trainlist01.txt, testlist01.txt beside classInd.txt
    hmdb51       <class>_test_split1.txt: 1 is train, 2 test, 0 neither

Files are treated as hostile: text or json of bounded size, and every ValueError is one line that names the file and the
line or entry.
"""

from __future__ import annotations

import csv
import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".divx", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv",
    ".wmv", ".asf", ".ogv",
)  # fmt: skip
SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MAX_FILE_BYTES = 2**29  # the largest published list (Kinetics-700) has 30 MB
MAX_LINE = 2**16  # characters

_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "video", "video_path"),
    "label": ("label", "class", "label_index", "class_name"),
    "labels": ("labels",),
    "split": ("split", "subset"),
}
_NEVER = r"(?!)"
_SUFFIX = "|".join(re.escape(suffix) for suffix in VIDEO_SUFFIXES)
# Path, separator, rest: a path ends with the last suffix of a video that a separator follows.
_PATH_FIRST = re.compile(rf'"?(.*(?:{_SUFFIX}))"?(?:\s*(::|[\t,;])\s*|(\s+)|$)(.*)', re.IGNORECASE)
_HINT = (
    "Several labels a video need --format multi-label or a header 'path,labels'; frame numbers before the label "
    "--format frames-list; spaces in labels another separator than spaces; further columns a header"
)


class Row(NamedTuple):
    """One line or entry of an annotation file."""

    number: int
    """Of the line or entry in its file, 1-based."""
    names: tuple[str, ...]
    """A path; or, where clips are looked for, ends of paths without the suffix, the most precise one first."""
    labels: tuple[str, ...]
    split: str | None = None
    """`train`, `val` or `test` where the row says it."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds."""

    rows: list[Row]
    several: bool = False
    """Whether a video may have several labels, or none."""
    note: str = ""
    """What was left out, for the user."""


class Unlabelled(ValueError):
    """A file that is in order but holds no labels, like the test lists of competitions."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one kind of annotation file is read."""

    about: str
    read: Callable[[Path], Contents]
    official: str = _NEVER
    """File name; group `split` where the name says it, `fold` where it is one of several official divisions."""
    classes: str = _NEVER
    """Name of the class file that belongs to it and lies beside it."""
    unit: str = "line"
    """What `Row.number` counts."""
    looked_for: bool = True
    """Whether rows name clips that may lie anywhere, instead of paths."""

    @property
    def needs_classes(self) -> bool:
        return self.classes != _NEVER


def recognise(path: Path) -> str:
    """The key in `FORMATS` of an annotation file; ValueError where a json is of no known kind."""
    for name in ("ucf101", "hmdb51"):
        if re.fullmatch(FORMATS[name].official, path.name):
            return name
    _require_file(path)
    with path.open("rb") as file:
        head = file.read(MAX_LINE).decode("utf-8-sig", "replace")
    if path.suffix.lower() == ".json":
        if '"vid_name"' in head:
            return "diving48"
        if '"id"' in head:
            return "ssv2"
        raise ValueError(
            f"{path}: entries have neither a vid_name (Diving-48) nor an id (Something-Something V2); if it is one of "
            "them, name it with --format"
        )
    columns = {text.strip(' "\r').lower() for text in head.partition("\n")[0].split(",")}
    return "kinetics" if "youtube_id" in columns else "list"


def official_files(folder: Path, name: str, fold: int) -> tuple[str, list[Path]]:
    """The format, and the official annotation files of it in a folder; `name` may be `auto`."""
    inside = sorted(path for path in folder.iterdir() if path.is_file())
    found: dict[str, list[Path]] = {}
    for key, form in FORMATS.items():
        for path in inside:
            match = re.fullmatch(form.official, path.name)
            if not match or int(match.groupdict().get("fold") or fold) != fold:
                continue
            if name == key or (name == "auto" and recognise(path) == key):
                found.setdefault(key, []).append(path)
    if len(found) != 1:
        what = " and ".join(found) or "no known"
        raise ValueError(f"{folder} holds {what} annotation files (fold {fold}); name the files or the --format")
    return found.popitem()


def split_in_name(path: Path, format_name: str) -> str | None:
    """As in `trainlist01.txt`, `kinetics400_val_list_videos.txt`; None where a name says no split, or several."""
    official = re.fullmatch(FORMATS[format_name].official, path.name)
    word = official.groupdict().get("split") if official else None
    said = {SPLIT_OF_WORD[word]} if word else split_words(path.stem)
    return said.pop() if len(said) == 1 else None


def split_words(name: str) -> set[str]:
    """The splits that a name speaks of: `videos_train` → {train}."""
    return {SPLIT_OF_WORD[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_OF_WORD}


def class_file_beside(path: Path, name: str) -> Path:
    """The official class file in the folder of an annotation file; ValueError where there is none."""
    for other in sorted(path.parent.iterdir()):
        if re.fullmatch(FORMATS[name].classes, other.name, re.IGNORECASE):
            return other
    raise ValueError(f"{path}: {name} needs its class file beside it; name it: --annotations classes=FILE")


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in the order of their numbers.

    A json of {name: number} or a list of names (or of their parts), or lines of `name`, or of `number name` from 0 or
    1 on. Raises ValueError unless numbers are complete and names unique.
    """
    numbers: list[int] = []
    if path.suffix.lower() == ".json":
        document = _read_json(path)
        if isinstance(document, dict):
            numbers = [_whole(value, f"{path}, class {name!r}") for name, value in document.items()]
            names = list(document)
        elif isinstance(document, list):
            names = [_class_in_json(entry, f"{path}, entry {i}") for i, entry in enumerate(document, 1)]
        else:
            raise ValueError(f"{path}: expected an object of class numbers or a list of class names")
    else:
        names = [line.strip() for _, line in _read_lines(path)]
        matches = [re.fullmatch(r"(\d{1,6})[\s,]+(\S.*)", name) for name in names]
        if all(matches):
            numbers = [int(match[1]) for match in matches if match]
            names = [match[2] for match in matches if match]
    names = [name.replace('"', "").strip() for name in names]
    first = min(numbers, default=0)
    if numbers:
        if first not in (0, 1) or sorted(numbers) != list(range(first, first + len(numbers))):
            raise ValueError(f"{path}: class numbers must be each of 0..{len(names) - 1}, or of 1..{len(names)}, once")
        names = [name for _, name in sorted(zip(numbers, names, strict=True))]
    if not all(names) or len(set(names)) < len(names):
        twice = next((name for name in names if not name or names.count(name) > 1), "")
        raise ValueError(f"{path}: class name {twice!r} is empty or stands there twice")
    return tuple(names)


def _read_list(path: Path) -> Contents:
    lines = _read_lines(path)
    first = lines[0][1]
    separator = _separator(first)
    header = _header_columns(_fields(first, separator, f"{path}, line 1"))
    if header:
        return _read_table(path, lines, separator, header)
    rows: list[Row] = []
    for number, line in lines:
        where = f"{path}, line {number}"
        fields = _cut(line, separator, where)
        if not 2 <= len(fields) <= 3 or not all(fields[:2]) or (rows and (len(fields) == 3) != bool(rows[0].split)):
            raise ValueError(
                f"{where}: expected 'path label [split]', as in the other lines, got {line[:200]!r}. {_HINT}"
            )
        split = _split_word(fields[2], where) if len(fields) == 3 else None
        rows.append(Row(number, (fields[0],), (fields[1],), split))
    return Contents(rows)


def _read_table(path: Path, lines: Sequence[tuple[int, str]], separator: str, columns: dict[str, int]) -> Contents:
    if separator == " " and [*columns.values()] != [*range(len(columns))]:
        raise ValueError(
            f"{path}, line 1: separated by spaces a header must be 'path label [split]'; use tabs or commas"
        )
    several = "labels" in columns
    rows = []
    for number, line in lines[1:]:
        where = f"{path}, line {number}"
        fields = _cut(line, separator, where) if separator == " " else _fields(line, separator, where)
        fields += [""] * (several and len(fields) == columns["labels"])  # no label is no reason for a separator
        if len(fields) <= max(columns.values()) or not fields[columns["path"]]:
            raise ValueError(f"{where}: expected the columns {', '.join(columns)} as in the header, got {line[:200]!r}")
        text = fields[columns["labels" if several else "label"]]
        if not several and not text:
            raise ValueError(f"{where}: expected a label, got {line[:200]!r}")
        labels = tuple(label.strip() for label in text.split(";") if label.strip()) if several else (text,)
        split = _split_word(fields[columns["split"]], where) if "split" in columns else None
        rows.append(Row(number, (fields[columns["path"]],), labels, split))
    unused = _unused_columns(_fields(lines[0][1], separator, f"{path}, line 1"), columns)
    return Contents(rows, several, f"columns not used: {', '.join(unused)}" if unused else "")


def _unused_columns(names: Sequence[str], columns: dict[str, int]) -> list[str]:
    """Of a header; as a hostile file may hold anything, what does not print is escaped."""
    used = {place for key, place in columns.items() if key != "label" or "labels" not in columns}
    unused = [name[:100] for place, name in enumerate(names) if place not in used and name]
    return [name if name.isprintable() else ascii(name) for name in unused]


def _read_multi_label(path: Path) -> Contents:
    rows = []
    for number, line in _read_lines(path):
        match = _PATH_FIRST.fullmatch(line)
        if not match:
            raise ValueError(f"{path}, line {number}: expected 'path label label …', got {line[:200]!r}")
        labels = re.split(r"[,;]|::|\t" if match[2] else r"[,;\s]", match[4])
        rows.append(Row(number, (match[1],), tuple(label.strip() for label in labels if label.strip())))
    return Contents(rows, several=True)


def _read_frames_list(path: Path) -> Contents:
    rows = []
    for number, line in _read_lines(path):
        folder, *numbers = line.replace(",", " ").split()
        if len(numbers) < 2 or not all(text.isascii() and text.isdigit() for text in numbers):
            raise ValueError(f"{path}, line {number}: expected 'folder frames label …', got {line[:200]!r}")
        rows.append(Row(number, (folder,), tuple(numbers[1:])))
    return Contents(rows, several=any(len(row.labels) > 1 for row in rows))


def _read_kinetics(path: Path) -> Contents:
    (_, header), *lines = _read_lines(path)
    names = [name.lower() for name in _fields(header, ",", f"{path}, line 1")]
    missing = [name for name in ("youtube_id", "time_start", "time_end") if name not in names]
    if missing:
        raise ValueError(f"{path}, line 1: a Kinetics list has a header with {', '.join(missing)}")
    if "label" not in names:
        raise Unlabelled(f"{path} has no column label: a test list without labels; leave it out")
    at = {name: column for column, name in enumerate(names)}
    rows = []
    for number, line in lines:
        where = f"{path}, line {number}"
        fields = _fields(line, ",", where)
        if len(fields) != len(names):
            raise ValueError(f"{where}: expected {len(names)} columns, got {line[:200]!r}")
        label, video = fields[at["label"]].replace('"', "").strip(), fields[at["youtube_id"]]
        if not label or not re.fullmatch(r"[\w-]{1,100}", video):
            raise ValueError(f"{where}: expected a label and a YouTube id, got {line[:200]!r}")
        start, end = (_seconds(fields[at[name]], where) for name in ("time_start", "time_end"))
        clip = f"{video}_{start:06d}_{end:06d}"
        folders = (f"{label}/", f"{label.replace(' ', '_')}/", "")
        ends = dict.fromkeys(f"{folder}{name}" for name in (clip, video) for folder in folders)
        split = _split_word(fields[at["split"]], where) if "split" in at else None
        rows.append(Row(number, tuple(ends), (label,), split))
    return Contents(rows)


def _read_ssv2(path: Path) -> Contents:
    rows = []
    for number, entry in _read_entries(path):
        where = f"{path}, entry {number}"
        template = entry.get("template", entry.get("label"))
        if template is None and number == 1:
            raise Unlabelled(f"{path} has no templates: a test list without labels; leave it out")
        text = _text(template, f"{where}: template").translate({ord("["): None, ord("]"): None})
        rows.append(Row(number, (_clip_name(entry.get("id"), f"{where}: id"),), (text.strip(),)))
    return Contents(rows)


def _read_diving48(path: Path) -> Contents:
    rows, cut = [], 0
    for number, entry in _read_entries(path):
        where = f"{path}, entry {number}"
        name = _clip_name(entry.get("vid_name"), f"{where}: vid_name")
        rows.append(Row(number, (name,), (str(_whole(entry.get("label"), f"{where}: label")),)))
        cut += _whole(entry.get("start_frame", 0), f"{where}: start_frame") > 0
    return Contents(rows, note=f"{cut} of its clips start after frame 0; whole files are taken" if cut else "")


def _read_ucf101(path: Path) -> Contents:
    rows = []
    for number, line in _read_lines(path):
        match = re.fullmatch(r"([^/]+)/([^/]+\.\w+)(?:\s+\d+)?", line)
        if not match:
            raise ValueError(
                f"{path}, line {number}: expected 'Class/v_Class_g01_c01.avi [number]', got {line[:200]!r}"
            )
        stem = PurePosixPath(match[2]).stem
        rows.append(Row(number, (f"{match[1]}/{stem}", stem), (match[1],)))
    return Contents(rows)


def _read_hmdb51(path: Path) -> Contents:
    name = re.fullmatch(FORMATS["hmdb51"].official, path.name)
    if not name:
        raise ValueError(f"{path}: the files of HMDB-51 are named <class>_test_split1.txt; this name says no class")
    rows, unused = [], 0
    for number, line in _read_lines(path):
        match = re.fullmatch(r"([^/]+\.\w+)\s+([012])", line)
        if not match:
            raise ValueError(f"{path}, line {number}: expected 'name.avi 0', 1 (train) or 2 (test), got {line[:200]!r}")
        unused += match[2] == "0"
        if match[2] != "0":
            stem = PurePosixPath(match[1]).stem
            split = "train" if match[2] == "1" else "test"
            rows.append(Row(number, (f"{name['label']}/{stem}", stem), (name["label"],), split))
    return Contents(rows, note=f"{unused} videos marked 0, in neither split" if unused else "")


FORMATS: dict[str, Format] = {
    "list": Format("lines of 'path label [split]', or a table with a header", _read_list, looked_for=False),
    "multi-label": Format("lines of 'path label label …'", _read_multi_label, looked_for=False),
    "frames-list": Format("lines of 'folder frames label …'", _read_frames_list),
    "kinetics": Format("Kinetics csv", _read_kinetics, r".*(?P<split>train|val|validate|test)\.csv"),
    "ssv2": Format(
        "Something-Something V2 json",
        _read_ssv2,
        r"(?:something-something-v2-)?(?P<split>train|validation|test)\.json",
        r"(?:something-something-v2-)?labels\.json",
        unit="entry",
    ),
    "diving48": Format(
        "Diving-48 json",
        _read_diving48,
        r"Diving48_V2_(?P<split>train|test)\.json",
        r"Diving48_vocab\.json",
        unit="entry",
    ),
    "ucf101": Format(
        "UCF-101 split files", _read_ucf101, r"(?P<split>train|test)list(?P<fold>\d\d)\.txt", r"classInd\.txt"
    ),
    "hmdb51": Format("HMDB-51 split files", _read_hmdb51, r"(?P<label>.+)_test_split(?P<fold>\d)\.txt"),
}


def _separator(line: str) -> str:
    """What follows the path; a space stands for any white space."""
    match = _PATH_FIRST.fullmatch(line)
    if match and (match[2] or match[3]):
        return match[2] or " "
    return next((separator for separator in ("\t", "::", ",", ";") if separator in line), " ")


def _fields(line: str, separator: str, where: str) -> list[str]:
    if separator == " ":
        return line.split()
    if '"' in line and separator in ",;":
        try:
            fields = next(csv.reader([line], delimiter=separator, strict=True))
        except csv.Error as error:
            raise ValueError(f"{where}: {error}, in {line[:200]!r}") from error
    else:
        fields = line.split(separator)
    return [text.strip() for text in fields]


def _cut(line: str, separator: str, where: str) -> list[str]:
    """The fields of a line that begins with a path, which may hold the separator."""
    match = _PATH_FIRST.fullmatch(line)
    if match and '"' not in line and (match[2] or " ") == separator:
        return [match[1], *_fields(match[4], separator, where)]
    if separator == " ":  # a path without a suffix may hold spaces too, a label and a split not
        words = line.split()
        return line.rsplit(maxsplit=2 if len(words) > 2 and words[-1] in SPLIT_OF_WORD else 1)
    return _fields(line, separator, where)


def _header_columns(row: Sequence[str]) -> dict[str, int] | None:
    names = [text.lower() for text in row]
    found = {key: [i for i, name in enumerate(names) if name in words] for key, words in _COLUMNS.items()}
    columns = {key: places[0] for key, places in found.items() if places}
    return columns if "path" in columns and columns.keys() & {"label", "labels"} else None


def _split_word(text: str, where: str) -> str:
    if text.lower() not in SPLIT_OF_WORD:
        raise ValueError(f"{where}: split {text[:100]!r}; allowed are train, val, test. {_HINT}")
    return SPLIT_OF_WORD[text.lower()]


def _seconds(text: str, where: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e6:
        raise ValueError(f"{where}: expected seconds, got {text[:100]!r}")
    return int(value)


def _require_file(path: Path) -> None:
    """A pipe or a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no file; name an annotation file")


def _read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark; any line ends become newlines."""
    _require_file(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; an annotation file has at most {MAX_FILE_BYTES}")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not a text file in UTF-8 ({error.reason})") from error


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank; at least one."""
    lines = [(number, line.strip()) for number, line in enumerate(_read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; expected lines of 'path label [split]', or what its format has")
    for number, line in lines:
        if len(line) > MAX_LINE:
            raise ValueError(f"{path}, line {number}: {len(line)} characters; allowed are {MAX_LINE}")
    return lines


def _read_json(path: Path) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no value of json")

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError(f"a key stands twice among {', '.join(repr(name) for name, _ in pairs)[:200]}")
        return names

    try:
        return json.loads(_read_text(path), parse_constant=no_constant, object_pairs_hook=no_twins)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for an annotation file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no json ({error.msg})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def _read_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    document = _read_json(path)
    if not isinstance(document, list) or not document:
        raise ValueError(f"{path}: expected a list of entries, got {type(document).__name__} of {str(document)[:50]!r}")
    for number, entry in enumerate(document, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {number}: expected an object, got {str(entry)[:100]!r}")
        yield number, entry


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected text, got {str(value)[:100]!r}")
    return value


def _whole(value: Any, where: str) -> int:
    digits = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[0-9]{1,9}", digits):
        raise ValueError(f"{where}: expected a whole number from 0 on, got {str(value)[:100]!r}")
    return int(digits)


def _clip_name(value: Any, where: str) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, where)
    if "/" in name:
        raise ValueError(f"{where}: expected the name of a clip, got {name[:100]!r}")
    return name


def _class_in_json(entry: Any, where: str) -> str:
    parts = entry if isinstance(entry, list) else [entry]
    return " ".join(_text(part, where) for part in parts)
