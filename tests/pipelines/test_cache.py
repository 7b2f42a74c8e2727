"""The cache: bounded, shared by processes, never without what somebody still reads, ahead of the plan."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from pipelines import cache as cache_module
from pipelines.cache import (
    IN_FLIGHT,
    STRAYS,
    CachedShardSet,
    CacheSettings,
    ShardCache,
    Unavailable,
    default_cache_folder,
)
from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, Order, Turn, eval_turns, train_turns
from pipelines.read import ShardReader
from pipelines.remote import open_set
from pipelines.shards import Sample, ShardInfo, ShardSet
from tests.sets import make_set
from tests.web import Site, serve

ROOT = Path(__file__).resolve().parents[2]
SHARDS, A_SHARD = 12, 16


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # 40 ms


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of equal length."""
    return make_set(tmp_path_factory.mktemp("packed") / "set", [9] * SHARDS * A_SHARD, samples_a_shard=A_SHARD)


@pytest.fixture
def site(packed: Path) -> Iterator[Site]:
    with serve(packed) as site:
        yield site


def room_for(packed: Path, shards: int, folder: Path) -> CacheSettings:
    """A cache for so many shards with their indexes."""
    tar = packed / "train-000000.tar"
    return CacheSettings(folder, shards * (tar.stat().st_size + index_bytes(packed)) + 100)


def index_bytes(packed: Path) -> int:
    return max(path.stat().st_size for path in packed.glob("*.safetensors"))


def used_bytes(settings: CacheSettings) -> int:
    """On the disk, as `du` counts apparent sizes; manifest and locks left out."""
    used = 0
    for path in settings.folder.rglob("*"):
        if ".tar" in path.name or ".safetensors" in path.name:
            with contextlib.suppress(FileNotFoundError):  # evicted since it was listed
                used += path.stat().st_size
    return used


def tars(settings: CacheSettings) -> set[str]:
    return {path.name for path in settings.folder.rglob("*.tar")}


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(reader: ShardReader, sample: Sample) -> list[bytes]:
    """The frames of a sample, each checked against its checksum."""
    rows = zip(sample.frames.offset, sample.frames.num_bytes, sample.frames.checksum, strict=True)
    ranges = [(sample.video_offset + int(offset), int(size), int(digest)) for offset, size, digest in rows]
    return [bytes(packet) for packet in reader.packets(sample.shard, ranges)]


def batches(shards: ShardSet, window: int, epochs: int = 2, batch: int = 2) -> Iterator[list[Turn]]:
    order = Order([shard.samples for shard in shards.shards], 1, window=window)
    steps = epochs * len(shards) // batch
    return train_turns(order, global_batch=batch, micro_batch=batch, rank=0, world=1, start_step=0, num_steps=steps)


def test_a_set_larger_than_the_cache(site: Site, packed: Path, tmp_path: Path) -> None:
    """Every sample of two epochs is read; the cache never grows over its bound; shards come before they are touched."""
    settings = room_for(packed, 2 * 2 + STRAYS, tmp_path / "cache")
    shards, local = open_set(site.url, "train", cache=settings, window=2), ShardSet.open(packed, "train")
    assert shards.check_files() == []
    reader, seen, largest, waited = ShardReader(), [], 0, 0
    for batch in shards.follow(batches(shards, window=2)):
        for turn in batch:
            waited += local[turn.sample_id].shard.name not in tars(settings)
            sample = shards[turn.sample_id]
            assert read(reader, sample) == read(reader, local[turn.sample_id])
            largest = max(largest, used_bytes(settings))
            seen.append(turn.sample_id)
        time.sleep(0.005)  # what a step takes
    assert sorted(seen) == sorted(2 * list(range(len(shards))))
    assert settings.max_bytes / 2 < largest <= settings.max_bytes + index_bytes(packed)  # while an index arrives
    assert waited <= 2 * SHARDS / 2  # without fetching ahead it would be all
    fetched = site.files_requested
    assert len(fetched) == 2 * SHARDS and 1 <= min(fetched.values()) <= max(fetched.values()) <= 3


def test_follow_changes_nothing_and_asks_in_the_order_of_need(site: Site, packed: Path, tmp_path: Path) -> None:
    settings = room_for(packed, 100, tmp_path / "cache")
    shards = open_set(site.url, "train", cache=settings)
    expected = list(eval_turns(len(shards), micro_batch=5, rank=0, world=1))
    followed = shards.follow(iter(expected))
    first = [next(followed) for _ in range(5)]
    eventually(lambda: len(tars(settings)) == SHARDS)  # all of it fits
    assert first + list(followed) == expected
    names = [name for name in site.requests if name.endswith(".tar")]
    assert {int(name[6:12]) for name in names[:4]} <= set(range(8))  # four are fetched at a time


def test_only_two_windows_are_fetched_ahead(site: Site, packed: Path, tmp_path: Path) -> None:
    settings = room_for(packed, 2 * 2 + STRAYS, tmp_path / "cache")
    shards = open_set(site.url, "train", cache=settings, window=2)
    followed = shards.follow(batches(shards, window=2))
    for _ in range(8):  # of the 16 of the first window
        first = next(followed)
    eventually(lambda: len(tars(settings)) == 2 * 2)
    time.sleep(0.2)
    assert len(tars(settings)) == 2 * 2 and site.requests[shards[first[0].sample_id].shard.name] == 1


def test_what_is_in_flight_stays(site: Site, packed: Path, tmp_path: Path) -> None:
    """As long as the loader may still hold a batch, its shards are there, even in a cache that is too small for that;
    not much longer."""
    settings = room_for(packed, 1, tmp_path / "cache")
    shards = open_set(site.url, "train", cache=settings, window=1)
    followed = shards.follow(eval_turns(len(shards), micro_batch=A_SHARD, rank=0, world=1))
    handed_out: list[Path] = []
    for batch in followed:
        handed_out += [shards[turn.sample_id].shard for turn in batch if turn is not None][:1]
        assert all(path.exists() for path in handed_out[-IN_FLIGHT:])
    assert not handed_out[0].exists()


def test_touched_at_random(site: Site, packed: Path, tmp_path: Path) -> None:
    """As substitutes are: however old its hold, a shard is there as long as its sample is looked at."""
    settings = room_for(packed, 1, tmp_path / "cache")
    shards = open_set(site.url, "train", cache=settings, window=1)
    generator = np.random.default_rng(0)
    for sample_id in generator.integers(len(shards), size=60).tolist():
        assert shards[sample_id].shard.exists()


def test_given_up_with_the_loader(site: Site, packed: Path, tmp_path: Path) -> None:
    """An iterator that is dropped half way holds nothing any more."""
    settings = room_for(packed, 100, tmp_path / "cache")
    shards = open_set(site.url, "train", cache=settings)
    assert isinstance(shards, CachedShardSet)
    followed = shards.follow(eval_turns(len(shards), micro_batch=2, rank=0, world=1))
    next(followed)
    assert shards._needed
    del followed
    assert not shards._needed
    eventually(lambda: not shards._queued)
    shards[0]
    assert len(shards._held) <= STRAYS + 1


@pytest.mark.parametrize(
    ("room", "window", "message"),
    [
        (7, 0, r"set data\.shuffle_shards=1, or data\.cache_gb to .* GB or more"),
        (11, 0, r"set data\.shuffle_shards=3"),
        (11, 4, r"is too little for data\.shuffle_shards = 4; .* take up to"),
        (2, 1, r"is too little for data\.shuffle_shards = 1"),
    ],
)
def test_a_cache_that_would_thrash_is_refused(
    site: Site, packed: Path, tmp_path: Path, room: int, window: int, message: str
) -> None:
    tar_bytes = (packed / "train-000000.tar").stat().st_size
    settings = CacheSettings(tmp_path / "cache", room * tar_bytes)
    shards = open_set(site.url, "train", cache=settings, window=window)
    with pytest.raises(ValueError, match=message):
        shards.check_files()
    assert shards[0].key  # to look at a few samples, any cache will do


@pytest.mark.parametrize(("room", "window"), [(13, 0), (11, 3), (6, 1)])
def test_a_cache_that_suffices(site: Site, packed: Path, tmp_path: Path, room: int, window: int) -> None:
    assert open_set(site.url, "train", cache=room_for(packed, room, tmp_path / "c"), window=window).check_files() == []


CLIENT = """
import sys, time
from pathlib import Path
from pipelines.cache import CacheSettings
from pipelines.plan import eval_turns
from pipelines.remote import open_set

shards = open_set(sys.argv[1], "train", cache=CacheSettings(Path(sys.argv[2])))
sys.stdin.readline()  # all start at once
turns = shards.follow(eval_turns(len(shards), micro_batch=4, rank=0, world=1))
found = [shards[turn.sample_id].shard.stat().st_size for batch in turns for turn in batch]
print(len(found), sum(found))
"""


def client(site: Site, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, site.url, str(folder)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_two_processes_fetch_each_shard_once(site: Site, packed: Path, tmp_path: Path) -> None:
    processes = [client(site, tmp_path / "cache") for _ in range(2)]
    eventually(lambda: site.requests["manifest.json"] == 2)
    answers = {process.communicate("go\n", timeout=30)[0] for process in processes}
    size = sum(A_SHARD * path.stat().st_size for path in packed.glob("*.tar"))
    assert answers == {f"{SHARDS * A_SHARD} {size}\n"}
    assert len(site.files_requested) == 2 * SHARDS and set(site.files_requested.values()) == {1}


def test_a_killed_process_leaves_nothing_in_the_way(site: Site, packed: Path, tmp_path: Path) -> None:
    """Its locks end with it; what it had half fetched is fetched again, and its room is free."""
    name = "train-000000.tar"
    site.faults[name] = [lambda request: request.send_file(at_most=100) or time.sleep(60)]  # type: ignore[func-returns-value]
    process = client(site, tmp_path / "cache")
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    eventually(lambda: site.requests[name])
    eventually(lambda: list((tmp_path / "cache").rglob(f".{name}.part")))
    process.kill()
    process.wait()
    process.stdin.close()
    assert process.stdout is not None
    process.stdout.close()
    site.faults.clear()
    settings = room_for(packed, 1, tmp_path / "cache")
    shards = open_set(site.url, "train", cache=settings)
    assert shards[0].shard.stat().st_size == (packed / name).stat().st_size
    assert used_bytes(settings) <= settings.max_bytes and not list(settings.folder.rglob("*.part"))


def test_who_fetches_does_not_wait_for_who_reads(packed: Path, infos: tuple[ShardInfo, ...], tmp_path: Path) -> None:
    """Several come for a shard at once, one fetches it, all keep it: nobody waits until another lets it go."""
    cache = make_cache(packed, CacheSettings(tmp_path, 10**9))
    for info in infos:
        barrier, held = threading.Barrier(6), []

        def hold(info: ShardInfo = info, barrier: threading.Barrier = barrier, held: list[BinaryIO] = held) -> None:
            barrier.wait()
            held.append(cache.hold(info, wait=True))

        threads = [threading.Thread(target=hold, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        eventually(lambda held=held: len(held) == 6)  # type: ignore[misc]
        for lock in held:
            lock.close()


def write_from(packed: Path) -> Callable[[Path, BinaryIO, ShardInfo], None]:
    def fetch(path: Path, sink: BinaryIO, info: ShardInfo) -> None:
        sink.write((packed / path.name).read_bytes())

    return fetch


@pytest.fixture
def infos(packed: Path) -> tuple[ShardInfo, ...]:
    return ShardSet.open(packed, "train").shards


def make_cache(packed: Path, settings: CacheSettings, folder: str = "set") -> ShardCache:
    (settings.folder / folder).mkdir(parents=True, exist_ok=True)
    return ShardCache(settings.folder / folder, settings, "https://host/set", write_from(packed))


def test_longest_unused_goes_first_and_what_is_held_never(
    packed: Path, infos: tuple[ShardInfo, ...], tmp_path: Path
) -> None:
    settings = room_for(packed, 3, tmp_path)
    cache, other = make_cache(packed, settings), make_cache(packed, settings, "other")
    for number, folder in enumerate((cache, other, cache)):
        folder.hold(infos[number], wait=True).close()
        time.sleep(0.01)
    cache.hold(infos[0], wait=True).close()  # used again
    with other.hold(infos[1], wait=True):
        time.sleep(0.01)
        with cache.hold(infos[2], wait=True), cache.hold(infos[3], wait=False):
            assert tars(settings) == {infos[i].name for i in (1, 2, 3)}
            with pytest.raises(BlockingIOError):
                cache.hold(infos[4], wait=False)
    assert used_bytes(settings) <= settings.max_bytes


def test_who_must_have_a_shard_goes_over_the_limit_and_says_so(
    packed: Path, infos: tuple[ShardInfo, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes that wait for each other's room would wait for ever."""
    cache = make_cache(packed, room_for(packed, 1, tmp_path))
    with caplog.at_level(logging.WARNING), cache.hold(infos[0], wait=True), cache.hold(infos[1], wait=True):
        pass
    assert caplog.text.count("more than data.cache_gb") == 1
    cache.hold(infos[2], wait=True).close()
    assert tars(cache.settings) == {infos[2].name}


def test_who_reads_an_evicted_shard_goes_on(site: Site, packed: Path, tmp_path: Path) -> None:
    settings = room_for(packed, 2, tmp_path / "cache")
    shards, local = open_set(site.url, "train", cache=settings, window=1), ShardSet.open(packed, "train")
    reader = ShardReader()
    first = shards[0]
    assert read(reader, first) == read(reader, local[0])
    for i in range(len(shards)):
        shards[i]
    assert not first.shard.exists()
    assert read(reader, first) == read(reader, local[0])  # frame table and bytes of files that have no name any more
    assert read(reader, shards[1]) == read(reader, local[1])  # fetched again
    assert site.requests["train-000000.tar"] == 2


def test_who_waited_for_a_failure_does_not_try_again(
    packed: Path, infos: tuple[ShardInfo, ...], tmp_path: Path
) -> None:
    """Eight processes, each with minutes of attempts, one after the other, would be given up by the others."""
    attempts = []

    def fails(path: Path, sink: BinaryIO, info: ShardInfo) -> None:
        attempts.append(path)
        time.sleep(0.3)
        raise Unavailable("the server is gone")

    cache = make_cache(packed, CacheSettings(tmp_path, 10**9))
    cache._fetch = fails
    found: list[str] = []

    def hold() -> None:
        with pytest.raises(Unavailable) as error:
            cache.hold(infos[0], wait=True)
        found.append(str(error.value))

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attempts) == 1 and found == ["the server is gone"] * 4
    hold()
    assert len(attempts) == 2  # who comes later has not seen it


def test_full_disk(packed: Path, infos: tuple[ShardInfo, ...], tmp_path: Path) -> None:
    def fails(path: Path, sink: BinaryIO, info: ShardInfo) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "set").mkdir()
    cache = ShardCache(tmp_path / "set", CacheSettings(tmp_path, 10**9), "https://host/set", fails)
    with pytest.raises(OSError, match=r"no space left in .* lower data\.cache_gb = 1, or set data\.cache_dir"):
        cache.hold(infos[0], wait=True)
    assert not list(tmp_path.rglob("*.part"))


def test_a_link_in_the_cache_is_not_written_through(packed: Path, infos: tuple[ShardInfo, ...], tmp_path: Path) -> None:
    """In a folder that others may write to."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache = make_cache(packed, CacheSettings(tmp_path / "cache", 10**9))
    (tmp_path / "cache/set" / f".{infos[0].name}.part").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        cache.hold(infos[0], wait=True)
    assert victim.read_bytes() == b"precious"


def test_a_shard_that_cannot_be_had_is_tried_again_later(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.faults["train-000000.tar"] = [lambda request: request.send_error(404)]
    shards = open_set(site.url, "train", cache=CacheSettings(tmp_path / "cache"))
    for _ in range(3):
        with pytest.raises(OSError, match="cannot be had"):
            shards[0]
    assert site.requests["train-000000.tar"] == 1
    site.faults.clear()
    monkeypatch.setattr(cache_module, "GIVEN_UP_SECONDS", 0.0)
    assert shards[0].shard.exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_folder() == Path("/somewhere/image-to-video/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache/image-to-video/shards"


def test_the_loader_gets_the_same_clips(site: Site, packed: Path, tmp_path: Path) -> None:
    """From a cache that holds a part of the set, with a shard that cannot be had: its samples are bad ones."""
    local = ShardSet.open(packed, "train")
    options = ClipOptions(num_frames=2, sampling="uniform")

    def clips(shards: ShardSet) -> dict[int, bytes]:
        turns = eval_turns(len(shards), micro_batch=2, rank=0, world=1)
        found = {}
        with ClipLoader(shards, turns, micro_batch=2, size=32, options=options) as loader:
            for batch in loader:
                for row, turn in enumerate(batch.turns):
                    if batch.valid[row]:
                        found[turn.sample_id] = batch.frames[row].numpy().tobytes()
        return found

    expected = clips(local)
    site.faults["train-000003.tar"] = [lambda request: request.send_error(404)]
    settings = room_for(packed, 2 + STRAYS, tmp_path / "cache")
    found = clips(open_set(site.url, "train", cache=settings, window=1))
    missing = range(3 * A_SHARD, 4 * A_SHARD)
    assert found == {i: clip for i, clip in expected.items() if i not in missing}
    assert len(found) == (SHARDS - 1) * A_SHARD and used_bytes(settings) <= settings.max_bytes
