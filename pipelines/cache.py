"""Sets whose files are elsewhere: fetched shard by shard, ahead of the plan, into a bounded folder of this machine.

    CACHE/0123456789abcdef/          one folder a set, named by its fingerprint
        manifest.json
        train-000000.tar             there whole, of the length and SHA-256 that the manifest says, or not at all
        train-000000.index.safetensors
        .train-000000.lock           flock: shared by who reads the shard, exclusive by who fetches or evicts it

All processes of a machine share it. One fetches a shard while the others wait for it; no shard is evicted while
somebody holds it; locks end with the process that took them, however it ends. Evicted first is what was used longest
ago, whichever set it is of; who has an evicted file open or mapped can go on reading it. The folder must be on a file
system with flock: a local disk.

The loader's batches are read ahead (`CachedShardSet.follow`), so that what comes next is fetched while the present is
decoded; with an `Order` of window W that is the next W shards.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import queue
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from pipelines.plan import Turn
from pipelines.shards import Sample, ShardInfo, ShardSet, index_path_of

logger = logging.getLogger(__name__)

GIVEN_UP_SECONDS = 300.0  # for which a shard that could not be had is not asked for again
IN_FLIGHT = 6  # batches handed out before a batch is surely decoded: what the loader holds at most, and one more
STRAYS = 4  # shards held although no batch to come names them: those of substitutes
_MAX_AHEAD = 10_000  # batches: some MB
_THREADS = 4  # shards that a process fetches ahead at the same time
_FILES = re.compile(r"\.?(.+?)\.(?:tar|index\.safetensors)(?:\.part)?")

Batch = TypeVar("Batch")
Fetch = Callable[[Path, BinaryIO, ShardInfo], None]
"""Writes the tar or the index of this path to an empty file and checks it; raises OSError, Unavailable if for good."""


class Unavailable(OSError):
    """A file that cannot be had, whatever was tried."""


def default_cache_folder() -> Path:
    """`image-to-video/shards` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image-to-video" / "shards"


@dataclass(frozen=True)
class CacheSettings:
    """Where fetched shards are kept, and how many bytes of them: all sets in `folder` together."""

    folder: Path = field(default_factory=default_cache_folder)
    max_bytes: int = 100_000_000_000


class CachedShardSet(ShardSet):
    """A split whose shards are fetched on first touch, or ahead of it. For one thread."""

    def connect(self, cache: ShardCache, window: int) -> None:
        """Says where the shards come from, and how many the order reads at a time (see `Order`; 0: all)."""
        self._cache, self._window = cache, window
        self._held: dict[int, BinaryIO] = {}  # shard → its lock in the cache
        self._needed: Counter[int] = Counter()  # shard → batches ahead or in flight that name it, in order of need
        self._queued: set[int] = set()
        self._given_up: dict[int, tuple[float, str]] = {}
        self._mutex = threading.RLock()  # a follower may be collected, and drop its shards, at any moment
        splits = self.manifest["splits"].values()
        self._bytes = sum(shard["bytes"] for split in splits for shard in split["shards"])
        self._fits = self._bytes <= 0.98 * cache.settings.max_bytes  # the indexes need some room too

    def __del__(self) -> None:
        for lock in getattr(self, "_held", {}).values():
            lock.close()

    def __getitem__(self, sample_id: int) -> Sample:
        if 0 <= sample_id < len(self):
            self._hold(self.shard_of(sample_id), wait=True)
            self._let_go()
        return super().__getitem__(sample_id)

    def follow(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the shards of those to come are fetched in the background."""
        return _Follower(self, batches)

    def check_files(self) -> list[tuple[ShardInfo, str]]:
        """ValueError, saying what to set, unless the cache can hold what is read at a time. Asks for no file."""
        limit, largest = self._cache.settings.max_bytes, max(shard.bytes for shard in self.shards)
        if self._fits:
            return []
        what = f"{self._cache.location} of {_gb(self._bytes)}"
        if not self._window:
            window = max(1, (limit // largest - STRAYS) // 2)
            raise ValueError(
                f"{what} does not fit into data.cache_gb = {limit / 1e9:g}, and without a window every step reads from "
                f"all of it; set data.shuffle_shards={window}, or data.cache_gb to {_gb(1.05 * self._bytes)} or more"
            )
        needed = (2 * self._window + STRAYS) * largest
        if needed > limit:
            raise ValueError(
                f"{what}: data.cache_gb = {limit / 1e9:g} is too little for data.shuffle_shards = {self._window}; the "
                f"shards being read and the next ones take up to {_gb(needed)}: raise the one or lower the other"
            )
        return []

    def need(self, shards: Iterable[int]) -> None:
        """Has these fetched in the background and kept until `drop`; asks again for those that had to wait."""
        self._needed.update(shards)
        for shard in list(self._needed):
            if shard not in self._held and shard not in self._queued and shard not in self._given_up:
                self._queued.add(shard)
                _BACKGROUND.submit(partial(self._fetch_ahead, shard))

    def drop(self, shards: Iterable[int]) -> None:
        """The opposite of `need`."""
        self._needed.subtract(shards)
        self._needed += Counter()  # forgets those at 0
        self._let_go()

    def span(self, in_a_batch: int) -> int:
        """How many shards to need at a time, of batches that name so many each."""
        return len(self.shards) if self._fits else 2 * max(1, self._window, in_a_batch)

    def _fetch_ahead(self, shard: int) -> None:
        try:
            if shard in self._needed:
                self._hold(shard, wait=False)
        except OSError:
            pass  # busy, no room now, or given up: raised again where the shard is touched
        finally:
            self._queued.discard(shard)

    def _hold(self, shard: int, *, wait: bool) -> None:
        with self._mutex:
            if shard in self._held:
                self._held[shard] = self._held.pop(shard)  # the last one to be let go
                return
        since, reason = self._given_up.get(shard, (0.0, ""))
        if reason and time.monotonic() - since < GIVEN_UP_SECONDS:
            raise OSError(reason)
        try:
            lock = self._cache.hold(self.shards[shard], wait=wait)
        except Unavailable as error:
            self._given_up[shard] = time.monotonic(), str(error)
            raise
        self._given_up.pop(shard, None)
        with self._mutex:
            if self._held.setdefault(shard, lock) is not lock:
                lock.close()

    def _let_go(self) -> None:
        """Of the shards that nobody needs, only the last few stay held; the others' indexes are unmapped."""
        with self._mutex:
            strays = [shard for shard in self._held if shard not in self._needed]
            for shard in strays[:-STRAYS]:
                self._held.pop(shard).close()
                self._indexes.pop(shard, None)


class _Follower(Iterator[Batch]):
    """Reads batches ahead until they name as many shards as fit; needs those, and the ones of batches in flight."""

    def __init__(self, shards: CachedShardSet, batches: Iterator[Batch]) -> None:
        self._shards, self._batches = shards, batches
        self._next: tuple[Batch, list[int]] | None = None  # taken from `batches`; its shards are not needed yet
        self._ahead: deque[tuple[Batch, list[int]]] = deque()
        self._in_flight: deque[list[int]] = deque()
        self._named: Counter[int] = Counter()

    def __next__(self) -> Batch:
        if len(self._in_flight) == IN_FLIGHT:
            self._forget(self._in_flight.popleft())
        for _ in range(8):  # several, so that the distance grows; not all at once, so that the first batch comes soon
            if not self._look_further():
                break
        self._shards.need(())
        if not self._ahead:
            raise StopIteration
        batch, shards = self._ahead.popleft()
        self._in_flight.append(shards)
        return batch

    def __del__(self) -> None:
        for shards in (*self._in_flight, *(shards for _, shards in self._ahead)):
            self._shards.drop(shards)

    def _look_further(self) -> bool:
        """Whether a batch was read ahead."""
        if self._next is None and (batch := next(self._batches, None)) is not None:
            ids = [turn.sample_id for turn in cast("Sequence[Turn | None]", batch) if turn is not None]
            self._next = batch, list(dict.fromkeys(map(self._shards.shard_of, ids)))
        if self._next is None:
            return False
        batch, shards = self._next
        named = len(self._named.keys() | shards)
        if self._ahead and (len(self._ahead) >= _MAX_AHEAD or named > self._shards.span(len(shards))):
            return False
        self._next = None
        self._ahead.append((batch, shards))
        self._named.update(shards)
        self._shards.need(shards)
        return True

    def _forget(self, shards: list[int]) -> None:
        self._named.subtract(shards)
        self._named += Counter()
        self._shards.drop(shards)


class ShardCache:
    """The shards of one set in the cache; `location` is where they come from, for messages."""

    def __init__(self, folder: Path, settings: CacheSettings, location: str, fetch: Fetch) -> None:
        self.settings, self.location = settings, location
        self._folder, self._fetch = folder, fetch
        self._told = self._warned = False

    def hold(self, info: ShardInfo, *, wait: bool) -> BinaryIO:
        """The lock of a shard that is there, fetched if need be: nobody evicts it until the lock is closed.

        Raises OSError; without `wait` also where another process has the shard in its hands, or room is short.
        """
        nowait = 0 if wait else fcntl.LOCK_NB
        since = time.time()
        tar = self._folder / info.name
        lock = _lock_path(tar).open("a+b", buffering=0)
        try:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH | nowait)  # waits while somebody fetches or evicts it
                if _is_there(tar, info):
                    os.utime(tar)  # evicted last
                    return lock
                if not _try_exclusive(lock):  # never waits for this: who came first keeps it for reading
                    if not wait:
                        raise BlockingIOError(f"{info.name} is being fetched")
                    time.sleep(random.uniform(0.001, 0.01))
                elif not _is_there(tar, info):
                    _raise_failure(lock, since)
                    if wait and not self._told:
                        self._told = True
                        logger.warning("waiting for shards of %.0f MB from %s", info.bytes / 1e6, self.location)
                    try:
                        self._bring(tar, info, wait)
                    except Unavailable as error:
                        _note_failure(lock, str(error))
                        raise
        except BaseException:
            lock.close()
            raise

    def _bring(self, tar: Path, info: ShardInfo, wait: bool) -> None:
        index = index_path_of(tar)
        self._reserve(_part(tar), info.bytes, wait)
        try:
            _make_empty(_part(index), 0)  # its length is not known before; the next shard makes room for it
            for path in (index, tar):
                with _part(path).open("r+b") as sink:
                    self._fetch(path, sink, info)
                    sink.flush()
                    os.fsync(sink.fileno())
            for path in (index, tar):
                _part(path).replace(path)
        except BaseException as error:
            for path in (index, tar):
                _part(path).unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Unavailable(
                    f"no space left in {self.settings.folder} for {tar.name}: lower data.cache_gb = "
                    f"{self.settings.max_bytes / 1e9:g}, or set data.cache_dir to a folder on a larger disk"
                ) from error
            raise

    def _reserve(self, part: Path, num_bytes: int, wait: bool) -> None:
        """Makes an empty file of this length, evicting first, oldest first, shards that nobody holds.

        Where that is not enough, who only fetches ahead gets an OSError; who must have the shard goes over the limit,
        for waiting could last for ever.
        """
        with (self.settings.folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shards = _cached_shards(self.settings.folder)
            excess = sum(size for size, _ in shards.values()) + num_bytes - self.settings.max_bytes
            for stem in sorted(shards, key=lambda stem: shards[stem][1]):
                if excess > 0 and _evict(stem):
                    excess -= shards[stem][0]
            if excess > 0 and not wait:
                raise BlockingIOError(f"no room in {self.settings.folder} now")
            if excess > 0 and not self._warned:
                self._warned = True
                limit = self.settings.max_bytes / 1e9
                logger.warning("%s: more than data.cache_gb = %g, all of it in use", self.settings.folder, limit)
            _make_empty(part, num_bytes)  # counted from now on; the disk fills when it is written


def _make_empty(part: Path, num_bytes: int) -> None:
    descriptor = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    os.truncate(descriptor, num_bytes)
    os.close(descriptor)


def _part(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f".{path.name}.part")


def _lock_path(tar: Path) -> Path:
    return tar.with_name(f".{tar.name.removesuffix('.tar')}.lock")


def _try_exclusive(lock: BinaryIO) -> bool:
    """Turns a shared lock into an exclusive one, or gives it up."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_UN)
        return False
    return True


def _note_failure(lock: BinaryIO, reason: str) -> None:
    """For those who have been waiting for it in vain: one after the other they would try for minutes too."""
    lock.truncate(0)
    lock.write(f"{time.time()} {reason}".encode())


def _raise_failure(lock: BinaryIO, since: float) -> None:
    """Raises Unavailable if somebody's attempt has failed since then."""
    lock.seek(0)
    noted, _, reason = lock.read().decode().partition(" ")
    if noted and float(noted) >= since:
        raise Unavailable(reason)


def _is_there(tar: Path, info: ShardInfo) -> bool:
    try:
        return tar.stat().st_size == info.bytes and index_path_of(tar).is_file()
    except FileNotFoundError:
        return False


def _cached_shards(root: Path) -> dict[Path, tuple[int, float]]:
    """Path without suffixes → bytes of all its files, half fetched ones too, and when it was last used."""
    shards: dict[Path, tuple[int, float]] = {}
    for folder in (entry for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile: where a manifest arrived
            for entry in os.scandir(folder):
                match = _FILES.fullmatch(entry.name)
                if match is None:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    size, used = shards.get(stem := Path(folder, match[1]), (0, 0.0))
                    shards[stem] = size + status.st_size, max(used, status.st_mtime)
    return shards


def _evict(stem: Path) -> bool:
    """Removes a shard, and what a killed process left of one, unless somebody holds or fetches it."""
    tar = stem.with_name(f"{stem.name}.tar")
    with _lock_path(tar).open("ab") as lock:
        if not _try_exclusive(lock):
            return False
        for path in (tar, index_path_of(tar)):
            path.unlink(missing_ok=True)
            _part(path).unlink(missing_ok=True)
    return True


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


class _Background:
    """Daemon threads, started with the first jobs; what they leave half done when the process ends is begun again."""

    def __init__(self, threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._to_start = threads

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)
        if self._to_start:
            self._to_start -= 1
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()


_BACKGROUND = _Background(_THREADS)
