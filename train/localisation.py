"""Temporal localisation: which class happens from when to when in long videos, given segments where something may.

Files are ActivityNet's, or THUMOS14's own text files for the truth:

    {"database": {VIDEO: {"subset", "duration", "annotations": [{"segment": [start, end], "label"}]}}}     the truth
    {"results": {VIDEO: [{"segment": [start, end], "score", "label"}]}}              proposals (no label), detections
    Diving_test.txt, Billiards_test.txt, …                              one a class, `video start end` a line; seconds

`classify` gives proposals classes, `suppress` drops those that overlap better ones, `average_precision` judges as
ActivityNet's own evaluation does: detections of a class are taken from the highest score down; each takes the still
untaken segment of the truth in its video that it overlaps most, if that is enough (tIoU, intersection over union in
time), and is wrong otherwise; precision is interpolated (at each recall the best at that recall or beyond). All videos
and thresholds are matched at once: a million detections of 5,000 videos took 1.3 s on one CPU core, `suppress` 10 s.

A file may be a stranger's: what is not as it should be is a ValueError of one line. Two faults that ActivityNet's own
truth has are taken as its evaluation takes them: a segment of no length, which nothing can find, and one that goes on
after the video's end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shards import write_durably

THUMOS_TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOUS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
MAX_FILE_BYTES = 2**30
AMBIGUOUS = "Ambiguous"  # THUMOS14's name for what may be anything
_MOST_SECONDS = 1e7  # four months: more is damage
_TIE = 1e-9  # tIoU: 0.6 computed of decimals is 0.5999…


@dataclass(frozen=True)
class Segments:
    """n stretches of time in videos, in seconds."""

    video: NDArray[np.int64]
    """[n], a number into `Truth.videos`."""
    times: NDArray[np.float64]
    """[n, 2]: start and end."""
    label: NDArray[np.int64]
    """[n], a number into `Truth.classes`; -1: none."""
    score: NDArray[np.float64]
    """[n], of a detection or proposal; 1 in the truth."""

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, rows: NDArray[Any]) -> Segments:
        return Segments(self.video[rows], self.times[rows], self.label[rows], self.score[rows])


@dataclass(frozen=True)
class Truth:
    """What happens in the videos that are evaluated."""

    videos: tuple[str, ...]
    classes: tuple[str, ...]
    segments: Segments
    others: frozenset[str] = frozenset()
    """Videos that the file knows and that are not evaluated; what is detected in them is left out."""

    def of_classes(self, names: Sequence[str]) -> Truth:
        """The same with these classes alone, in this order, and the videos in which they happen. ValueError for a name
        that is no class."""
        for name in names:
            if name not in self.classes:
                raise ValueError(f"{name!r} is no class of the truth, which has {len(self.classes)}")
        new_label = np.full(len(self.classes), -1)
        new_label[[self.classes.index(name) for name in names]] = np.arange(len(names))
        kept = self.segments[new_label[self.segments.label] >= 0]
        present, video = np.unique(kept.video, return_inverse=True)
        videos = tuple(self.videos[i] for i in present)
        segments = replace(kept, video=video, label=new_label[kept.label])
        return Truth(videos, tuple(names), segments, self.others.union(self.videos).difference(videos))


def read_truth(path: Path, subset: str = "") -> Truth:
    """The truth from an ActivityNet json, or from a folder of THUMOS14's text files.

    Args:
        path: the file or the folder.
        subset: which videos of the json are evaluated, such as "validation"; empty: all, if they are of one subset.

    Raises ValueError or OSError naming the file, the video and what is wrong with it.
    """
    if path.is_dir():
        if subset:
            raise ValueError(f"{path} is a folder of text files, which know no subset {subset!r}; leave it out")
        return _truth_of_rows([row for file in sorted(path.glob("*.txt")) for row in _read_thumos(file)], str(path))
    database = _read_json(path, "database")
    subsets = {name: str(_get(entry, "subset", str, f"{path}: video {name!r}", "")) for name, entry in database.items()}
    allowed = sorted(set(subsets.values()))
    if subset not in allowed and (subset or len(allowed) > 1):
        raise ValueError(f"{path}: subset {subset!r} is not there; allowed is one of {', '.join(map(repr, allowed))}")
    rows, evaluated = [], []
    for name, entry in database.items():
        annotations = _get(entry, "annotations", list, f"{path}: video {name!r}", [])
        if subsets[name] != (subset or allowed[0]):
            continue
        evaluated.append(name)
        for number, annotation in enumerate(annotations):
            where = f"{path}: video {name!r}, annotation {number}"
            label = _get(annotation, "label", str, where)
            rows.append((name, *_read_times(annotation, where, may_be_empty=True), label))
    return _truth_of_rows(rows, str(path), evaluated, frozenset(database).difference(evaluated))


def read_segments(path: Path, truth: Truth) -> Segments:
    """Proposals or detections of the truth's videos, in the order of the file; what is of its other videos is left out.

    Raises ValueError or OSError naming the file, the video and what is wrong with it.
    """
    numbers = {name: i for i, name in enumerate(truth.videos)}
    labels = {name: i for i, name in enumerate(truth.classes)}
    video, times, label, score = [], [], [], []
    for name, entries in _read_json(path, "results").items():
        if name not in numbers and name not in truth.others:
            raise ValueError(f"{path}: video {name!r} is not in the truth, which has {len(truth.videos)} videos")
        if not isinstance(entries, list):
            raise ValueError(f"{path}: video {name!r} has {_shown(entries)}; allowed is a list of segments")
        for number, entry in enumerate(entries if name in numbers else ()):
            where = f"{path}: video {name!r}, entry {number}"
            times.append(_read_times(entry, where))
            score.append(_number(_get(entry, "score", float, where), f"{where}: score"))
            given = _get(entry, "label", str, where, None)
            if given is not None and given not in labels:
                raise ValueError(f"{where}: {given!r} is no class of the truth, which has {len(labels)}")
            label.append(-1 if given is None else labels[given])
            video.append(numbers[name])
    return _segments(video, times, label, score)


def write_segments(path: Path, truth: Truth, segments: Segments) -> None:
    """Writes detections as `read_segments` reads them, durably: scores of six digits, the best first."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in truth.videos}
    for row in np.lexsort((-segments.score, segments.video)):
        entry: dict[str, Any] = {"segment": segments.times[row].tolist()}
        entry["score"] = float(f"{segments.score[row]:.6g}")
        if segments.label[row] >= 0:
            entry["label"] = truth.classes[segments.label[row]]
        results[truth.videos[segments.video[row]]].append(entry)
    write_durably(path, (json.dumps({"results": results}, ensure_ascii=False) + "\n").encode())


def frames_inside(seconds: NDArray[np.float64], times: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """For each of p segments [p, 2] `count` of the n frames shown at these ascending `seconds`, as rows [p, count]: the
    middles of equal shares of those inside. A segment between two frames has the nearer one, `count` times."""
    first, end = np.searchsorted(seconds, times[:, 0]), np.searchsorted(seconds, times[:, 1], side="right")
    inside = end - first
    rows = first[:, None] + (np.arange(count) + 0.5) / count * inside[:, None]
    nearest = np.abs(seconds - times.mean(1)[:, None]).argmin(1) if (inside == 0).any() else first
    return np.where(inside[:, None] > 0, rows.astype(np.int64), nearest[:, None])


def classify(proposals: Segments, probabilities: NDArray[np.float64], top: int) -> Segments:
    """Every proposal once for each of its `top` likeliest classes (0: all), its score that of the proposal times the
    class's probability [n, C]; of equally likely classes the lower numbers."""
    num_classes = probabilities.shape[1]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : top or num_classes]
    rows = np.repeat(np.arange(len(proposals)), best.shape[1])
    score = proposals.score[rows] * probabilities[rows, best.ravel()]
    return replace(proposals[rows], label=best.ravel(), score=score)


def suppress(segments: Segments, tiou: float) -> Segments:
    """Without those that overlap a better one of the same video and class by more than `tiou` (non-maximum
    suppression), the best first."""
    order = _by_score(segments)
    ranked = segments[order]
    group = _pairs(ranked, int(ranked.label.max(initial=0)) + 1)
    kept = np.ones(len(ranked), bool)
    for rows in _groups(group):
        for i, row in enumerate(rows):
            if kept[row]:
                others = rows[i + 1 :]
                kept[others[_tious(ranked.times[row], ranked.times[others]) > tiou]] = False
    return ranked[np.flatnonzero(kept)]


def average_precision(truth: Truth, detections: Segments, tious: Sequence[float]) -> NDArray[np.float64]:
    """[C, K]: of each class at each tIoU; NaN for a class that does not happen. Detections that score alike are taken
    in the order of their videos and times.

    Raises ValueError for detections without a class.
    """
    if (detections.label < 0).any():
        raise ValueError(f"{(detections.label < 0).sum()} of {len(detections)} detections have no class; classify them")
    ranked = detections[_by_score(detections)]
    hits = _hits(truth, ranked, np.asarray(tious))
    result = np.full((len(truth.classes), len(tious)), math.nan)
    for label, of_class in enumerate(_rows_of(ranked.label, len(truth.classes))):
        positives = int((truth.segments.label == label).sum())
        if positives:
            result[label] = _interpolated(hits[of_class], positives)
    return result


def mean_average_precision(truth: Truth, detections: Segments, tious: Sequence[float]) -> dict[str, float]:
    """The mean over the classes that happen, by tIoU ("0.50"), and "mean" over these. Raises ValueError as
    `average_precision` does, and where nothing happens at all."""
    if not len(truth.segments):
        raise ValueError("the truth has no segment: there is nothing to find")
    means = np.nanmean(average_precision(truth, detections, tious), axis=0)
    return {f"{tiou:.2f}": float(mean) for tiou, mean in zip(tious, means, strict=True)} | {"mean": float(means.mean())}


def _hits(truth: Truth, ranked: Segments, tious: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[n, K]: whether each detection, the best first, finds a segment that none before it has found.

    All videos and classes at once: in round r the r-th detection of each takes what it overlaps most of what is left.
    """
    num_classes = len(truth.classes)
    groups, group = np.unique(_pairs(truth.segments, num_classes), return_inverse=True)
    members = _groups(group)
    most = max(map(len, members), default=0)
    times = np.full((len(groups), most, 2), math.nan)  # a NaN is overlapped by nothing
    for g, rows in enumerate(members):
        times[g, : len(rows)] = truth.segments.times[rows]
    left = np.ones((len(groups), len(tious), most), bool)
    hits = np.zeros((len(ranked), len(tious)), bool)
    place = np.searchsorted(groups, pairs := _pairs(ranked, num_classes))
    findable = np.flatnonzero((place < len(groups)) & (groups[np.minimum(place, len(groups) - 1)] == pairs))
    for rows in _rounds(findable, place[findable]):
        of = place[rows]
        overlap = _tious(ranked.times[rows][:, None], times[of])[:, None]  # [m, 1, most]
        overlap = np.where(left[of] & (overlap >= tious[:, None] - _TIE), overlap, -1.0)
        best = overlap.argmax(2)
        found = np.take_along_axis(overlap, best[:, :, None], 2)[:, :, 0] >= 0
        hits[rows] = found
        m, k = np.nonzero(found)
        left[of[m], k, best[m, k]] = False
    return hits


def _interpolated(hits: NDArray[np.bool_], positives: int) -> NDArray[np.float64]:
    """The area under interpolated precision over recall [K], of hits [n, K], the best first."""
    found = np.cumsum(hits, axis=0)
    precision = found / np.arange(1, len(hits) + 1)[:, None]
    best_from_here = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    return (best_from_here * hits).sum(0) / positives


def _tious(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of segments [..., 2], broadcast; 0 where one is NaN, or both are of no length."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shared = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
        shared = np.maximum(shared, 0.0)
        together = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - shared
        return np.nan_to_num(shared / together)


def _by_score(segments: Segments) -> NDArray[np.int64]:
    """The best first; of equal scores by video, start and end, so that the order of a file means nothing."""
    return np.lexsort((segments.times[:, 1], segments.times[:, 0], segments.video, -segments.score))


def _pairs(segments: Segments, num_classes: int) -> NDArray[np.int64]:
    """[n]: one number for each pair of video and class."""
    return segments.video * num_classes + segments.label


def _groups(group: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of each value, ascending, of the values in their order."""
    if not len(group):
        return []
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _rows_of(label: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """The rows of each of the labels 0 to count - 1, ascending."""
    order = np.argsort(label, kind="stable")
    borders = np.searchsorted(label[order], np.arange(count + 1))
    return [order[start:end] for start, end in pairwise(borders)]


def _rounds(rows: NDArray[np.int64], group: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The first row of every group, then the second of every group that has one, and so on."""
    turn = np.zeros(len(rows), np.int64)
    for members in _groups(group):
        turn[members] = np.arange(len(members))
    return [rows[members] for members in _groups(turn)]


def _truth_of_rows(
    rows: Sequence[tuple[str, float, float, str]],
    where: str,
    videos: Iterable[str] | None = None,
    others: frozenset[str] = frozenset(),
) -> Truth:
    """From (video, start, end, class); `videos` also names those in which nothing happens."""
    if not rows:
        raise ValueError(f"{where} holds no annotated segment of the videos that are evaluated")
    names = tuple(dict.fromkeys(videos if videos is not None else (row[0] for row in rows)))
    classes = tuple(sorted({row[3] for row in rows}))
    numbers, labels = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(classes)}
    times = [row[1:3] for row in rows]
    segments = _segments([numbers[row[0]] for row in rows], times, [labels[row[3]] for row in rows], [1.0] * len(rows))
    return Truth(names, classes, segments, others)


def _segments(
    video: Sequence[int], times: Sequence[tuple[float, float]], label: Sequence[int], score: Sequence[float]
) -> Segments:
    return Segments(
        np.asarray(video, np.int64),
        np.asarray(times, np.float64).reshape(-1, 2),
        np.asarray(label, np.int64),
        np.asarray(score, np.float64),
    )


def _read_thumos(path: Path) -> list[tuple[str, float, float, str]]:
    """(video, start, end, class) of a text file named by its class, such as Diving_test.txt; none of the ambiguous."""
    label = path.stem.rpartition("_")[0] or path.stem
    if label == AMBIGUOUS:
        return []
    _require_size(path)
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            words = line.split()
            if len(words) != 3:
                raise ValueError(f"line {number} is {_shown(line)}; the form is `video start end`")
            start, end = (_number(_parsed(word), f"line {number}") for word in words[1:])
            _require_order(start, end, f"line {number}", may_be_empty=False)
            rows.append((words[0], start, end, label))
    except ValueError as error:  # of undecodable bytes too
        raise ValueError(f"{path}: {error}") from error
    return rows


def _parsed(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{_shown(word)} is no number") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """The object `name` of a file, by video."""
    _require_size(path)
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({type(error).__name__}: {error})") from error
    entries = document.get(name) if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise ValueError(f'{path} is not in ActivityNet\'s format: the form is {{"{name}": {{VIDEO: …}}}}')
    return entries


def _require_size(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file of segments")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; allowed are {MAX_FILE_BYTES}")


_NEEDED = object()


def _get(entry: Any, key: str, kind: type, where: str, default: Any = _NEEDED) -> Any:
    """entry[key], of this kind; whole numbers serve where fractions are allowed."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {_shown(entry)}; allowed is an object")
    value = entry.get(key, default)
    if value is _NEEDED:
        raise ValueError(f"{where} has no {key}")
    kinds = (int, float) if kind is float else kind
    if value is not default and (not isinstance(value, kinds) or isinstance(value, bool)):
        words = {str: "text", float: "a number", list: "a list"}
        raise ValueError(f"{where}: {key} = {_shown(value)}; allowed is {words[kind]}")
    return value


def _read_times(entry: Any, where: str, *, may_be_empty: bool = False) -> tuple[float, float]:
    given = _get(entry, "segment", list, where)
    if len(given) != 2 or not all(isinstance(t, int | float) and not isinstance(t, bool) for t in given):
        raise ValueError(f"{where}: segment = {_shown(given)}; allowed is [start, end] in seconds")
    start, end = (_number(t, f"{where}: segment") for t in given)
    _require_order(start, end, where, may_be_empty=may_be_empty)
    return start, end


def _require_order(start: float, end: float, where: str, *, may_be_empty: bool) -> None:
    if start < 0 or start > end or (start == end and not may_be_empty):
        raise ValueError(f"{where}: a segment from {start:g} to {end:g} s; allowed is 0 <= start < end")


def _number(value: float, where: str) -> float:
    if not -_MOST_SECONDS <= value <= _MOST_SECONDS:  # false for NaN too
        raise ValueError(f"{where} = {value}; allowed is a finite number, up to {_MOST_SECONDS:g}")
    return float(value)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
