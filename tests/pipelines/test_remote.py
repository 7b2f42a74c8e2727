"""Sets at an address: what arrives is what was packed, or an error says why, whatever the server does."""

from __future__ import annotations

import gzip
import io
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from pipelines import remote
from pipelines.cache import CacheSettings, Unavailable
from pipelines.remote import open_set
from pipelines.shards import ShardSet, index_path_of
from tests.sets import make_set
from tests.web import Request, Site, serve

TAR = "train-000000.tar"
INDEX = "train-000000.index.safetensors"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # 40 ms


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two samples."""
    return make_set(tmp_path_factory.mktemp("packed") / "set", [9, 12, 20] * 2, samples_a_shard=2)


@pytest.fixture
def site(packed: Path) -> Iterator[Site]:
    with serve(packed) as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(tmp_path / "cache")


def bytes_of(shards: ShardSet, sample_id: int) -> tuple[str, bytes]:
    sample = shards[sample_id]
    return sample.key, sample.shard.read_bytes()[sample.video_offset :][: sample.video_bytes]


def contents(shards: ShardSet) -> list[tuple[str, bytes]]:
    return [bytes_of(shards, i) for i in range(len(shards))]


def is_unharmed(cache: CacheSettings) -> bool:
    """Nothing that is half there."""
    return not [path for path in cache.folder.rglob("*") if path.suffix == ".part" or ".manifest-" in path.name]


def test_cold_and_warm(site: Site, packed: Path, cache: CacheSettings) -> None:
    shards = open_set(site.url, "train", cache=cache)
    assert sum(site.requests.values()) == 1  # the manifest; nothing else before it is touched
    assert contents(shards) == contents(ShardSet.open(packed, "train"))
    sizes = [path.stat().st_size for path in packed.iterdir()]
    assert site.num_bytes.total() == sum(sizes) and set(site.requests.values()) == {1}
    assert contents(open_set(site.url + "/", "train", cache=cache)) == contents(shards)
    assert site.requests.pop("manifest.json") == 2 and set(site.requests.values()) == {1}
    assert is_unharmed(cache)


def test_a_folder_is_opened_where_it_lies(packed: Path, cache: CacheSettings) -> None:
    for location in (packed, str(packed)):
        shards = open_set(location, "train", cache=cache)
        assert type(shards) is ShardSet and shards.folder == packed
    assert not cache.folder.exists()


def test_another_set_at_the_same_address_is_another_set(packed: Path, tmp_path: Path, cache: CacheSettings) -> None:
    other = make_set(tmp_path / "set", [31, 7], samples_a_shard=2)
    with serve(packed) as site:
        first = contents(open_set(site.url, "train", cache=cache))
        site.folder = other
        assert contents(open_set(site.url, "train", cache=cache)) == contents(ShardSet.open(other, "train"))
        site.folder = packed
        assert contents(open_set(site.url, "train", cache=cache)) == first


def flipped(request: Request) -> None:
    data = bytearray(request.body())
    data[len(data) // 2] ^= 1
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.send(data)


def dies(request: Request) -> None:
    request.send_file(at_most=1000)
    time.sleep(0.05)  # what the other side has not taken when the connection ends is lost


def busy(request: Request) -> None:
    request.send_error(503)


def good(request: Request) -> None:
    request.send_file()


def longer(request: Request) -> None:
    data = request.body() + b"more"
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.send(data)


def endless(request: Request) -> None:
    """Until the other side hangs up."""
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.send(b"\0" * 65536)
    except OSError:
        request.close_connection = True


def bomb(request: Request) -> None:
    """10 MB in 10 kB, for who unpacks what he did not ask to be packed."""
    data = gzip.compress(b"\0" * 10_000_000)
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.send(data)


def redirect_to_file(request: Request) -> None:
    request.send_response(302)
    request.send_header("Location", "file:///etc/passwd")
    request.send_header("Content-Length", "0")
    request.end_headers()


def redirect_in_circles(request: Request) -> None:
    request.send_response(302)
    request.send_header("Location", request.path)
    request.send_header("Content-Length", "0")
    request.end_headers()


def forbidden(request: Request) -> None:
    request.send_error(403)


def continues_elsewhere(request: Request) -> None:
    """Sends a part that was not asked for."""
    data = request.body()
    request.send_response(206)
    request.send_header("Content-Range", f"bytes 7-{len(data) - 1}/{len(data)}")
    request.send_header("Content-Length", str(len(data) - 7))
    request.end_headers()
    request.send(data[7:])


@pytest.mark.parametrize(
    ("faults", "ranges", "times_sent"),
    [
        ([flipped, good], True, 2),
        ([busy, busy, busy, busy, good], True, 1),
        ([dies, good], True, 1),  # what had arrived is not sent again
        ([dies, good], False, 1.1),
        ([dies, dies, good], True, 1),
        ([endless, good], True, 10_000),
        ([dies, continues_elsewhere, good], True, 2.1),
    ],
)
def test_mended(site: Site, packed: Path, cache: CacheSettings, faults: list, ranges: bool, times_sent: float) -> None:
    site.faults[TAR], site.ranges = faults, ranges
    shards = open_set(site.url, "train", cache=cache)
    assert bytes_of(shards, 0) == bytes_of(ShardSet.open(packed, "train"), 0)
    sent = site.num_bytes[TAR] / (packed / TAR).stat().st_size
    assert sent <= times_sent
    assert is_unharmed(cache)


@pytest.mark.parametrize(
    ("name", "fault", "message", "requests"),
    [
        (TAR, flipped, "its SHA-256 is not the manifest's; attempts: 2", 2),
        (TAR, dies, "ClientPayloadError; attempts: 5", 5),
        (TAR, busy, "HTTP status 503; attempts: 5", 5),
        (TAR, longer, "bytes long; attempts: 2", 2),
        (TAR, endless, "bytes long; attempts: 2", 2),
        (TAR, bomb, "bytes long; attempts: 2", 2),
        (TAR, redirect_to_file, "NonHttpUrlRedirectClientError; attempts: 5", 5),
        (TAR, redirect_in_circles, "TooManyRedirects", 50),
        (TAR, forbidden, "HTTP status 403; attempts: 1", 1),
        (INDEX, flipped, "its SHA-256 is not the manifest's; attempts: 2", 2),
        (INDEX, longer, "its SHA-256 is not the manifest's; attempts: 2", 2),
        (INDEX, endless, "bytes long; attempts: 2", 2),
        (INDEX, bomb, "its SHA-256 is not the manifest's; attempts: 2", 2),
        (INDEX, forbidden, "HTTP status 403; attempts: 1", 1),
    ],
)
def test_given_up(
    site: Site,
    packed: Path,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: object,
    message: str,
    requests: int,
) -> None:
    monkeypatch.setattr(remote, "MAX_INDEX_BYTES", 100_000)
    site.faults[name] = [fault]  # type: ignore[list-item]
    shards = open_set(site.url, "train", cache=cache)
    with pytest.raises(Unavailable, match=rf"{site.url}/{name} cannot be had: .*{message}"):
        shards[0]
    assert site.requests[name] == requests
    with pytest.raises(OSError, match="cannot be had"):  # known by now
        shards[1]
    assert site.requests[name] == requests
    assert bytes_of(shards, 2) == bytes_of(ShardSet.open(packed, "train"), 2)  # the others are there
    assert is_unharmed(cache) and not list(cache.folder.rglob(TAR))


def test_missing_shard(site: Site, packed: Path, cache: CacheSettings, tmp_path: Path) -> None:
    site.folder = tmp_path / "partial"
    site.folder.mkdir()
    (site.folder / "manifest.json").write_bytes((packed / "manifest.json").read_bytes())
    with pytest.raises(Unavailable, match="FileNotFoundError; attempts: 1"):
        open_set(site.url, "train", cache=cache)[0]


def test_a_line_that_hardly_flows(
    site: Site, packed: Path, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drips(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(request.body())))
        request.end_headers()
        for byte in request.body()[:3000]:
            request.wfile.write(bytes([byte]))
            time.sleep(0.01)
        request.close_connection = True

    monkeypatch.setattr(remote, "STALL_SECONDS", 0.05)
    site.faults[TAR] = [drips, good]
    started = time.monotonic()
    assert bytes_of(open_set(site.url, "train", cache=cache), 0) == bytes_of(ShardSet.open(packed, "train"), 0)
    assert time.monotonic() - started < 15  # to the end it would be half a minute


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda request: request.send_error(404), "manifest.json cannot be had: FileNotFoundError"),
        (endless, "manifest.json cannot be had: it is not"),
        (redirect_to_file, "NonHttpUrlRedirectClientError"),
    ],
)
def test_manifest_cannot_be_had(
    site: Site, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch, fault: object, message: str
) -> None:
    monkeypatch.setattr(remote, "MAX_MANIFEST_BYTES", 1_000_000)
    site.faults["manifest.json"] = [fault]  # type: ignore[list-item]
    with pytest.raises(OSError, match=f"{site.url}/{message}" if message.startswith("m") else message):
        open_set(site.url, "train", cache=cache)
    assert list(cache.folder.iterdir()) == []


def test_manifest_is_checked_like_a_local_one(site: Site, packed: Path, cache: CacheSettings, tmp_path: Path) -> None:
    site.folder = tmp_path
    text = (packed / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"class0"', '"other"'))
    with pytest.raises(ValueError, match=f"{site.url}/manifest.json was edited"):
        open_set(site.url, "train", cache=cache)
    (tmp_path / "manifest.json").write_text(text[:100])
    with pytest.raises(ValueError, match=f"{site.url}/manifest.json is damaged"):
        open_set(site.url, "train", cache=cache)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="no split 'val'; it has: train"):
        open_set(site.url, "val", cache=cache)


@pytest.mark.parametrize(
    "address",
    ["file:///etc", "ftp://host/set", "simplecache::https://host/set", "https://", "https::s3://x/y", "memory://x/y"],
)
def test_other_protocols_are_refused(address: str, cache: CacheSettings) -> None:
    with pytest.raises(ValueError, match=r"allowed are a folder and addresses by s3://, gs://, https://, http://"):
        open_set(address, "train", cache=cache)


@pytest.mark.parametrize(
    "address",
    [
        "https://user:hunter2@host/set",
        "https://hunter2@host/set",
        "https://host/set?signature=hunter2",
        "https://host/set#hunter2",
        "s3://key:hunter2@bucket/set",
        "ftp://user:hunter2@host/set?token=hunter2",
    ],
)
def test_secrets_in_the_address_are_refused_and_not_repeated(
    address: str, cache: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"data\.shards = ") as error:
        open_set(address, "train", cache=cache)
    assert "hunter2" not in str(error.value) + caplog.text


def test_secrets_of_a_redirect_are_not_repeated(
    site: Site, cache: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """As object stores answer: with a signed address, which then fails."""

    def redirect(request: Request) -> None:
        request.send_response(302)
        request.send_header("Location", "/elsewhere/none.tar?signature=hunter2")
        request.send_header("Content-Length", "0")
        request.end_headers()

    site.faults[TAR] = [redirect]
    with pytest.raises(OSError, match="FileNotFoundError") as error:
        open_set(site.url, "train", cache=cache)[0]
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert "hunter2" not in str(error.value) + caplog.text


def test_no_way_out_of_https(monkeypatch: pytest.MonkeyPatch, cache: CacheSettings) -> None:
    class Redirected(io.BytesIO):
        r = SimpleNamespace(url=SimpleNamespace(scheme="http"), status=200, headers={})

    files = SimpleNamespace(open=lambda *_, **__: Redirected(b"{}"))
    monkeypatch.setattr(remote._Store, "_connect", lambda _: files)
    with pytest.raises(OSError, match="redirected out of https; attempts: 1"):
        open_set("https://host/set", "train", cache=cache)


@pytest.mark.parametrize(("host", "warns"), [("localhost", False), ("[::1]", False), ("example.invalid", True)])
def test_plain_http_is_warned_about(
    host: str, warns: bool, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(remote._Store, "_connect", lambda _: SimpleNamespace(open=refuses))
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="PermissionError; attempts: 1"):
        open_set(f"http://{host}/set", "train", cache=cache)
    assert ("prefer https" in caplog.text) == warns


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_missing_package_is_named(protocol: str, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(ValueError, match=r'pip install "image-to-video\[remote\]"'):
        open_set(f"{protocol}://bucket/set", "train", cache=cache)


class Flaky(io.BytesIO):
    """A file of an object store whose connection breaks once, after a thousand bytes."""

    broken = False

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 1000 and not Flaky.broken:
            Flaky.broken = True
            raise ConnectionResetError
        return super().read(min(size or 0, 1000))


def test_object_store(packed: Path, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ranges of a file that can be sought, as S3 and Google's store are read; taken up where it broke."""
    sought = []

    class Store:
        def open(self, path: str, *_: object, **__: object) -> io.BytesIO:
            file = Flaky((packed / path.removeprefix("s3://bucket/set/")).read_bytes())
            seek = file.seek
            file.seek = lambda position: sought.append(position) or seek(position)  # type: ignore[assignment, func-returns-value, method-assign]
            return file

    monkeypatch.setattr(remote._Store, "_connect", lambda _: Store())
    assert contents(open_set("s3://bucket/set", "train", cache=cache)) == contents(ShardSet.open(packed, "train"))
    assert Flaky.broken and any(sought)


def test_index_of_another_shard_is_refused(site: Site, packed: Path, cache: CacheSettings) -> None:
    def other(request: Request) -> None:
        data = index_path_of(packed / "train-000001.tar").read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.send(data)

    site.faults[INDEX] = [other]
    with pytest.raises(OSError, match="its SHA-256 is not the manifest's"):
        open_set(site.url, "train", cache=cache)[0]
