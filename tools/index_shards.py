"""Makes WebDataset tars that others wrote trainable here, as they lie: no byte of them is copied or changed.

    python tools/index_shards.py TARS… [--out DIR]

TARS are files, or folders of them, as webdataset.ShardWriter writes: per sample KEY.mp4 (webm, avi, mov, mkv …) and a
label in KEY.cls, KEY.json or KEY.txt. The index files, manifest.json and rejects.tsv are written beside the tars, which
then are a packed set: train with --set data.shards=FOLDER. With --out the tars get hard links in a new folder instead
(same disk, no further space), where tars from several folders come together.

Every video is demuxed once: frames are counted, the first one is decoded; --verify decodes all. What cannot be used is
listed with its reason in rejects.tsv. Names of splits are taken from --split, else from the beginning of a tar's name
(train, val, validation, test), else from its folder's; without any, all are train. Other names than letters, digits,
'.', '_' and '-' need --out.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from pipelines.annotations import SPLITS
from pipelines.cli import run_cli
from pipelines.foreign import ForeignOptions, IndexReport, Survey, index_tars, survey_tars
from pipelines.shards import SAFE_NAME, write_durably

_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def main() -> None:
    args = _parse_args()
    options = ForeignOptions(args.label, args.video.removeprefix("."), args.verify, args.timeout)
    classes = _read_classes(args.classes) if args.classes else None
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: allowed is 1 or more")
    tars = split_tars(list_tars(args.tars), args.split)
    started = time.perf_counter()
    if args.out is None:
        folder = _one_folder(tars)
        survey, report = _index(tars, folder, options, classes, args.workers)
    else:
        folder = args.out
        part = folder.with_name(f".{folder.name}.indexing")
        if folder.exists() or part.exists():
            raise FileExistsError(f"{folder if folder.exists() else part} exists; remove it or choose another --out")
        try:
            survey, report = _index(_link(tars, part), part, options, classes, args.workers)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    _print_summary(folder, survey, report, options, time.perf_counter() - started)


def list_tars(paths: Sequence[Path]) -> list[Path]:
    """The tars among files and in folders, sorted in each. ValueError for none, or one that is given twice."""
    tars: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.tar"))
            if not found:
                raise ValueError(f"{path} holds no tar")
            tars += found
        elif path.is_file():
            tars.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    seen: set[Path] = set()
    for tar in tars:
        if tar.resolve() in seen:
            raise ValueError(f"{tar} is given twice")
        seen.add(tar.resolve())
    return tars


def split_tars(tars: Sequence[Path], rules: Sequence[str]) -> dict[str, list[Path]]:
    """Split → its tars, by rules such as `train=*/train/*.tar`, else by their names."""
    splits: dict[str, list[Path]] = defaultdict(list)
    patterns = [rule.partition("=")[::2] for rule in rules]
    for split, pattern in patterns:
        if split not in SPLITS or not pattern:
            raise ValueError(f"--split {split}={pattern}: expected SPLIT=GLOB, SPLIT one of {', '.join(SPLITS)}")
    named = [(tar, _split_in_name(tar)) for tar in tars]
    for tar, split_in_name in named:
        if patterns:
            found = {split for split, pattern in patterns if fnmatch.fnmatch(str(tar), pattern) or tar.match(pattern)}
        else:
            found = {split_in_name or ("" if any(split for _, split in named) else "train")}
        if len(found) != 1 or "" in found:
            problem = f"splits {' and '.join(sorted(found))}" if len(found) > 1 else "no split"
            raise ValueError(f"{tar} is of {problem}; say which is which with --split train=GLOB --split val=GLOB")
        splits[found.pop()].append(tar)
    return splits


def _split_in_name(tar: Path) -> str:
    """What its name begins with, or its folder is called; empty if neither is the name of a split."""
    word = re.match(r"[a-z]*", tar.name.lower())
    return _WORDS.get(word[0] if word else "", "") or _WORDS.get(tar.absolute().parent.name.lower(), "")


def _one_folder(tars: dict[str, list[Path]]) -> Path:
    """The folder that all tars lie in, if it can become a set."""
    paths = [tar for members in tars.values() for tar in members]
    folders = sorted({tar.parent for tar in paths})
    if len(folders) > 1:
        raise ValueError(f"the tars lie in {len(folders)} folders ({folders[0]}, {folders[1]} …): add --out DIR")
    if (folders[0] / "manifest.json").exists():
        raise FileExistsError(f"{folders[0]} has a manifest.json already: remove it to index again, or add --out DIR")
    bad = [tar for tar in paths if not SAFE_NAME.fullmatch(tar.name)]
    if bad:
        raise ValueError(
            f"{bad[0]}: names may have letters, digits and ._- and end in .tar; rename it, or add --out DIR"
        )
    linked = [tar for tar in paths if tar.is_symlink()]
    if linked:
        raise ValueError(f"{linked[0]} is a symbolic link: add --out DIR")
    return folders[0]


def _link(tars: dict[str, list[Path]], folder: Path) -> dict[str, list[Path]]:
    """Hard links `SPLIT-000000.tar` in a new folder, with a list of what they are."""
    folder.mkdir(parents=True)
    links: dict[str, list[Path]] = defaultdict(list)
    lines = ["name\tsource"]
    for split, members in tars.items():
        for number, tar in enumerate(members):
            link = folder / f"{split}-{number:06d}.tar"
            try:
                link.hardlink_to(tar.resolve())
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                raise ValueError(
                    f"{tar} cannot be linked into {folder.parent} ({error.strerror}): index in place, without --out, "
                    "or copy the tars to that disk first"
                ) from error
            links[split].append(link)
            lines.append(f"{link.name}\t{str(tar)!r}")
    write_durably(folder / "sources.tsv", ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    return links


def _index(
    tars: dict[str, list[Path]], folder: Path, options: ForeignOptions, listed: Sequence[str] | None, workers: int
) -> tuple[Survey, IndexReport]:
    survey = Survey()
    paths = [tar for members in tars.values() for tar in members]
    for found in tqdm(survey_tars(paths, options, workers=workers), "scan", len(paths), unit="tar", disable=None):
        survey.add(found)
    classes = survey.classes(listed)
    with tqdm(total=survey.samples, desc="index", unit="video", disable=None) as bar:

        def advance(report: IndexReport) -> None:
            bar.set_postfix(skipped=len(report.skipped), refresh=False)
            bar.update()

        several = survey.several
        return survey, index_tars(tars, folder, options, classes, several=several, workers=workers, on_sample=advance)


def _read_classes(path: Path) -> list[str]:
    """One name a line, in the order of the class numbers."""
    try:
        classes = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8") from error
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(
            f"{path} lists {len(classes)} classes, {len(set(classes))} different ones; two or more are needed"
        )
    return classes


def _print_summary(folder: Path, survey: Survey, report: IndexReport, options: ForeignOptions, seconds: float) -> None:
    print(f"{folder}: {sum(report.samples.values())} of {survey.samples} samples indexed in {seconds:,.1f} s")
    for split, samples in report.samples.items():
        print(f"  {split}: {samples} samples")
    if report.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.most_common())
        print(f"  skipped: {len(report.skipped)} ({reasons}); listed in {folder / 'rejects.tsv'}")
    if not options.verify:
        print("  not decoded: a frame that is damaged shows in training only (--verify decodes all)")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tars", type=Path, nargs="+", metavar="TARS", help="tars, or folders of them")
    add("--out", type=Path, metavar="DIR", help="new folder for hard links and indexes (default: where the tars are)")
    add(
        "--split",
        action="append",
        default=[],
        metavar="SPLIT=GLOB",
        help="which tars are train, val, test (repeatable)",
    )
    add("--label", default="", metavar="SUFFIX[:FIELD]", help="cls, txt, json:FIELD (default: the first there is)")
    add("--classes", type=Path, metavar="FILE", help="class names, one a line (default: class0 …, or the names found)")
    add("--video", default="", metavar="SUFFIX", help="suffix of the videos, where samples have several")
    add("--verify", action="store_true", help="decode every frame of every video")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: all cores, %(default)s)")
    add(
        "--timeout", type=float, default=300, metavar="S", help="seconds after which a video is left out (default: 300)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
