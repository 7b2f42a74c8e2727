"""What packing has finished so far, kept so that a run that was killed at any moment goes on where it was.

    .NAME.packing/journal.jsonl    first line: what is packed, and how; then one line for each finished shard
    .NAME.packing/shards/          becomes the folder NAME when all is done
    .NAME.packing/rejects.tsv      where the run ended because nothing of a split could be used: why

A line is written, durably, after its shard and the index beside it have their final names: what the journal lists is
whole, and everything else is made again. A line says all that the report and the manifest need of the shard's videos
and of the rejects between them. The journal is also the lock that tells a packer at work from the leftovers of a dead
one; on a file system without locks that is not told.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.shards import ShardInfo, index_path_of, write_rejects

_VERSION = 1
_NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Packed:
    """A video that was packed: what is left of it after its bytes were written."""

    seconds: float
    frames: int
    """Stored ones."""
    source_bytes: int


@dataclass(frozen=True, slots=True)
class Reject:
    """A video that was not packed."""

    reason: str
    """One of `VideoError.REASONS`, or missing, read_error, decoder_crash, timeout, out_of_memory, internal_error."""
    detail: str


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard under its final name, and what became of the videos since the shard before it."""

    split: str
    info: ShardInfo
    outcomes: list[Packed | Reject]
    """In plan order."""

    def is_whole(self, folder: Path) -> bool:
        """Whether tar and index hold the bytes that were written."""
        tar = folder / self.info.name
        try:
            return (
                tar.stat().st_size == self.info.bytes
                and _digest(index_path_of(tar)) == self.info.index_sha256
                and _digest(tar) == self.info.sha256
            )
        except FileNotFoundError:
            return False


class Journal:
    """The journal in `folder`, held by this process alone; see the module."""

    def __init__(self, folder: Path, header: Mapping[str, Any], *, restart: bool = False) -> None:
        """Opens the journal of the run that `header` describes (flat, plain values), or begins one.

        `restart` throws away what was there. Raises FileExistsError when another program is packing there or the
        folder is not ours, ValueError, naming the difference, when it holds finished shards of another run.
        """
        self.folder = folder
        self.shards = folder / "shards"
        self.rejects = folder / "rejects.tsv"
        """There once `write_rejects` was called."""
        self._entries: list[tuple[FinishedShard, int]] = []
        self._end = 0
        self._file = _open_locked(folder)
        try:
            self.rejects.unlink(missing_ok=True)  # of the run before
            found = None if restart else self._read()
            if found is not None and self._entries:
                _check_same_run(folder, found, header)
            else:
                self._begin(header)
        except BaseException:
            self._file.close()
            raise
        self.num_finished = len(self._entries)

    def replay(self, folder: Path | None = None) -> Iterator[FinishedShard]:
        """The finished shards in order, up to the first that is no longer whole; what lies behind that is removed.

        `folder` is where they lie once they were given their final place; nothing is removed there.
        """
        kept = []
        end = self._first_line_bytes
        for shard, end_of_line in self._entries:
            if not shard.is_whole(folder or self.shards):
                break
            kept += [shard.info.name, index_path_of(Path(shard.info.name)).name]
            end = end_of_line
            yield shard
        self.num_finished = len(kept) // 2
        self._end = end
        if folder is None:
            self._file.truncate(end)
            self.shards.mkdir(exist_ok=True)
            for path in self.shards.iterdir():
                if path.name not in kept:
                    path.unlink()

    def append(self, shard: FinishedShard) -> None:
        """Notes a finished shard durably."""
        self._write({"split": shard.split, "info": asdict(shard.info), "outcomes": [asdict(o) for o in shard.outcomes]})
        self.num_finished += 1

    def write_rejects(self, columns: Sequence[str], entries: Iterable[Sequence[str]]) -> None:
        """Leaves a list of what could not be used, for a run that ends without a set."""
        write_rejects(self.folder, columns, entries)

    def what_is_kept(self) -> str:
        """For the end of an error's text."""
        if not self.num_finished:
            return ""
        return f"; {self.num_finished} finished shards are kept in {self.folder}: the same command goes on from them"

    def close(self) -> None:
        """Lets go of the lock."""
        self._file.close()

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, header: Mapping[str, Any]) -> None:
        shutil.rmtree(self.shards, ignore_errors=True)
        self.shards.mkdir()
        self._file.truncate(0)
        self._entries, self._end = [], 0
        self._write({"journal": _VERSION, **header})
        self._first_line_bytes = self._end

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        self._file.seek(self._end)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._end += len(line)

    def _read(self) -> dict[str, Any] | None:
        """The header; None where not even that is whole. A line that was torn ends the journal."""
        whole = self._file.read().rpartition(b"\n")[0]
        lines = [line + b"\n" for line in whole.split(b"\n")]
        try:
            header = dict(json.loads(lines[0]))
        except (ValueError, TypeError):
            return None
        self._first_line_bytes = self._end = len(lines[0])
        for line in lines[1:]:
            try:
                shard = _shard_from(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            self._end += len(line)
            self._entries.append((shard, self._end))
        return header


def remove_leftover(folder: Path) -> None:
    """Removes what a run leaves that was killed when its shards already had their final place."""
    if not folder.is_dir() or not set(os.listdir(folder)) <= {_NAME}:
        return
    with contextlib.suppress(FileExistsError), _open_locked(folder):
        shutil.rmtree(folder)


def _open_locked(folder: Path) -> BinaryIO:
    """The journal's file, made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    names = os.listdir(folder)
    if names and _NAME not in names:
        raise FileExistsError(f"{folder} exists and is not from packing: remove it or choose another name")
    path = folder / _NAME
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_still_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_still_there = False
    except OSError:  # no locks on this file system
        return file
    if not is_still_there:
        file.close()
        raise FileExistsError(f"another program is packing in {folder}; wait for it or choose another name")
    return file


def _check_same_run(folder: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    for name, value in {"journal": _VERSION, **header}.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds an unfinished run of another kind: {name} is {found.get(name)} there and {value} now; "
                "give the same command to continue it, or add --restart to begin again"
            )


def _shard_from(entry: Mapping[str, Any]) -> FinishedShard:
    outcomes = [Packed(**o) if "seconds" in o else Reject(**o) for o in entry["outcomes"]]
    return FinishedShard(entry["split"], ShardInfo(**entry["info"]), outcomes)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
