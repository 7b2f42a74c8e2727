"""Which files a folder of videos holds, and which of them an annotation means. Nothing is opened.

A folder is listed once, when it is first asked for; clips that may lie anywhere cost one walk. Links are followed, for
they are the user's own; a link to a folder that it lies in is not. Hidden files are no videos, hidden folders are not
entered.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipelines.annotation_formats import SPLIT_OF_WORD, VIDEO_SUFFIXES, split_words


class SourceFiles:
    """The files below a folder, by relative path with '/'."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._names: dict[str, set[str]] = {}
        self.found_in: Counter[str] = Counter()
        """Files that a list names relative to a folder of their split."""

    def names(self, folder: str) -> set[str]:
        """Names of the files that lie directly in a folder; none if there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(self._source / folder) as entries:
                    self._names[folder] = {entry.name for entry in entries if _is(entry.is_file)}
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                    raise
                self._names[folder] = set()
        return self._names[folder]

    def walk(self, folder: str) -> Iterator[str]:
        """Paths of all files below a folder, sorted in each; links are followed, hidden folders not entered."""
        above = tuple(self._identity(str(parent)) for parent in PurePosixPath(folder).parents)
        waiting = [(folder, above)]
        while waiting:
            folder, above = waiting.pop()
            here = self._identity(folder)
            if here in above:  # a link to a folder that it lies in
                continue
            with os.scandir(self._source / folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is(entry.is_file):
                        yield path
                    elif _is(entry.is_dir) and not entry.name.startswith("."):
                        waiting.append((path, (*above, here)))

    def find_file(self, names: Sequence[str], split: str, where: str) -> str | None:
        """The path that a list gives, or the one below a top folder that is named after the split; None if missing."""
        path = names[0]
        parts = path.split("/")
        if path.startswith("/") or ".." in parts:
            raise ValueError(
                f"{where}: path {path[:300]!r} leaves the source folder; paths must be relative and without '..'"
            )
        if "" in parts or "." in parts:
            path = str(PurePosixPath(path))
        if self._holds(path):
            return path
        found = [top for top in self._split_folders[split] if self._holds(f"{top}/{path}")]
        if len(found) > 1:
            raise ValueError(f"{where}: {path} is there more than once: in {found[0]} and {found[1]}; keep one")
        if not found:
            return None
        self.found_in[found[0]] += 1
        return f"{found[0]}/{path}"

    def find_clip(self, names: Sequence[str], split: str, where: str) -> str | None:
        """The one video whose path without suffix ends in the first of `names` that fits any; None if none does."""
        for name in names:
            ending = f"/{name}"
            clips = self._clips.get(name.rpartition("/")[2], ())
            found = [f"{clip}{suffix}"[1:] for clip, suffix in clips if clip.endswith(ending)]
            if len(found) > 1:
                ranks = [_rank(path, split) for path in found]
                found = [path for path, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
            if len(found) > 1:
                raise ValueError(f"{where}: {name} is there more than once: {found[0]} and {found[1]}; keep one")
            if found:
                return found[0]
        return None

    def _holds(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.names(folder)

    def _identity(self, folder: str) -> tuple[int, int]:
        status = (self._source / folder).stat()
        return status.st_dev, status.st_ino

    @property
    def num_clips(self) -> int:
        """Videos in all of SOURCE."""
        return sum(map(len, self._clips.values()))

    @cached_property
    def _clips(self) -> dict[str, list[tuple[str, str]]]:
        """By name without suffix: path with a '/' before it and without suffix, suffix."""
        clips: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for path in filter(is_video, self.walk("")):
            clip, suffix = os.path.splitext(f"/{path}")
            clips[clip.rpartition("/")[2]].append((clip, suffix))
        return dict(clips)

    @cached_property
    def _split_folders(self) -> dict[str, list[str]]:
        tops = [folder.name for folder in subfolders(self._source)]
        return {split: [top for top in tops if split_words(top) == {split}] for split in SPLIT_OF_WORD.values()}


def _rank(path: str, split: str) -> tuple[bool, bool]:
    """Kinetics-400 comes with whole files in a folder `replacement…` for those of the same name that are broken."""
    folders = path.split("/")[:-1]
    return any(f.startswith("replacement") for f in folders), any(split_words(f) == {split} for f in folders)


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself
        return False


def is_video(path: str) -> bool:
    """By its suffix; what macOS leaves beside a video (`._clip.mp4`) is none."""
    name = path.rpartition("/")[2]
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith(".")


def suffix_of(path: str) -> str:
    """In lower case with its dot; `hidden` for hidden files, the whole name where there is no suffix."""
    name = path.rpartition("/")[2]
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or name


def subfolders(folder: Path) -> list[Path]:
    """The folders, or links to folders, that lie directly in it and are not hidden; sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
