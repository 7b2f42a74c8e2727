"""Sets on object stores and web servers: what is at an address, and fetching it whatever the line and the server do.

`open_set` takes a folder, or `s3://bucket/set`, `gs://bucket/set`, `https://host/set` (`http://` too, with a warning
unless the host is this machine: on the way anybody can change the set). Credentials come from the environment and the
files of the store's own client (AWS_*, gcloud's, ~/.netrc), never from the address, so that none can reach a log or a
checkpoint. No other protocol is opened, no redirect is followed out of https, and nothing is written but what
`cache.py` asks for.

Everything but the manifest is checked against the length and SHA-256 that the manifest says; the manifest against its
own fingerprint, which a resumed run compares with the one it began with. A broken connection is taken up where it
broke.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pipelines.cache import CachedShardSet, CacheSettings, ShardCache, Unavailable
from pipelines.shards import ShardInfo, ShardSet, read_manifest

logger = logging.getLogger(__name__)

PROTOCOLS = ("s3", "gs", "https", "http")
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5  # before the second attempt; doubled before each further one
CONNECT_SECONDS = 20.0
STALL_SECONDS = 60.0  # without a byte; and in which at least STALL_BYTES must arrive
STALL_BYTES = 500_000
MAX_MANIFEST_BYTES = 100_000_000  # 10,000 shards take 3 MB
MAX_INDEX_BYTES = 100_000_000  # more than the bytes of the shard
_CHUNK = 2**22
_FOR_GOOD = (401, 403, 404, 410)  # HTTP: asking again does not help


def open_set(location: str | Path, split: str, *, cache: CacheSettings | None = None, window: int = 0) -> ShardSet:
    """Opens a split of a set in a folder or at an address.

    `window` is how many shards its order reads at a time (see `Order`); 0: all. Raises ValueError or OSError, naming
    what is wrong: the address, the manifest (missing, damaged, edited, of another version), or the split.
    """
    if "://" not in str(location):
        return ShardSet.open(location, split)
    store = _Store(str(location))
    cache = cache or CacheSettings()
    cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".manifest-", dir=cache.folder) as incoming:
        path = Path(incoming, "manifest.json")
        with path.open("wb") as sink:
            store.download("manifest.json", sink, max_bytes=MAX_MANIFEST_BYTES)
        try:
            folder = cache.folder / read_manifest(path.parent)["fingerprint"][:16]
        except ValueError as error:
            raise ValueError(str(error).replace(incoming, store.location)) from None
        folder.mkdir(exist_ok=True, mode=0o700)
        path.replace(folder / path.name)
    shards = CachedShardSet.open(folder, split)
    assert isinstance(shards, CachedShardSet)
    shards.connect(ShardCache(folder, cache, store.location, store.fetch), window)
    return shards


class _Broken(Exception):
    """A download that ended early; the text holds no address and no secret, as the libraries' own may."""

    def __init__(self, problem: str, *, for_good: bool = False) -> None:
        super().__init__(problem)
        self.for_good = for_good
        """Whether asking again is useless."""

    @classmethod
    def by(cls, error: Exception) -> _Broken:
        """From whatever fsspec or the client under it raised: their errors have no common base."""
        status = getattr(error, "status", None)
        for_good = status in _FOR_GOOD or isinstance(error, (FileNotFoundError, PermissionError))
        return cls(type(error).__name__ + (f", HTTP status {status}" if status else ""), for_good=for_good)


class _Store:
    """The files of a set at an address."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._protocol, host = parts.scheme, parts.hostname or ""
        self.location = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
        """The address, safe to print."""
        if self._protocol not in PROTOCOLS or not host:
            allowed = ", ".join(f"{name}://" for name in PROTOCOLS)
            raise ValueError(f"data.shards = {self.location}: allowed are a folder and addresses by {allowed}")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"data.shards = {self.location}, given with a password, token or query: that would be written to logs "
                "and checkpoints; leave it out and put credentials into the environment or ~/.netrc"
            )
        if self._protocol == "http" and not _is_this_machine(host):
            logger.warning("%s: anybody on the way can change what comes over http; prefer https", self.location)
        self._files = self._connect()

    def fetch(self, path: Path, sink: BinaryIO, info: ShardInfo) -> None:
        """The tar or the index of a shard, into an empty file. Raises Unavailable."""
        if path.name == info.name:
            self.download(path.name, sink, num_bytes=info.bytes, max_bytes=info.bytes, sha256=info.sha256)
        else:
            self.download(path.name, sink, max_bytes=info.bytes + MAX_INDEX_BYTES, sha256=info.index_sha256)

    def download(
        self, name: str, sink: BinaryIO, *, num_bytes: int | None = None, max_bytes: int, sha256: str | None = None
    ) -> None:
        """Copies a file of the set into an empty one and checks it. Raises Unavailable when all attempts failed."""
        got, digest, wrong, problem = 0, hashlib.sha256(), 0, ""
        for attempt in range(ATTEMPTS):
            if attempt:  # at different moments in different processes
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                start, chunks = self._open(name, before := got)
                if start != got:
                    got, digest = start, hashlib.sha256()
                sink.seek(got)
                for chunk in chunks:
                    got += len(chunk)
                    if got > max_bytes:
                        break
                    sink.write(chunk)
                    digest.update(chunk)
            except _Broken as error:
                problem = str(error)
                if error.for_good:
                    break
                if got <= before:  # no progress: it may be our wish to continue that is not understood
                    got, digest = 0, hashlib.sha256()
                continue
            if got > max_bytes or (num_bytes is not None and got != num_bytes):
                problem = f"it is not {max_bytes if num_bytes is None else num_bytes} bytes long"
            elif sha256 is not None and digest.hexdigest() != sha256:
                problem = "its SHA-256 is not the manifest's"
            else:
                sink.truncate(got)
                return
            got, digest, wrong = 0, hashlib.sha256(), wrong + 1
            if wrong == 2:  # no accident on the way
                break
        raise Unavailable(f"{self.location}/{name} cannot be had: {problem}; attempts: {attempt + 1}")

    def _open(self, name: str, position: int) -> tuple[int, Iterator[bytes]]:
        """Where the bytes begin, which is `position` or 0, and the bytes from there on. Both raise _Broken."""
        path = f"{self.location}/{name}"
        try:
            if self._protocol not in ("http", "https"):
                file = self._files.open(path, "rb", block_size=_CHUNK, cache_type="none")
                file.seek(position)
                return position, _chunks(file)
            # As a stream of unknown size: one request a file, and never more than a chunk of it in memory.
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={position}-"} if position else {})
            file = self._files.open(path, "rb", block_size=0, size=1, headers=headers)
        except Exception as error:
            raise _Broken.by(error) from None
        answer = file.r
        if self._protocol == "https" and answer.url.scheme != "https":
            file.close()
            raise _Broken("redirected out of https", for_good=True)
        continues = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {position}-")
        return position if continues else 0, _chunks(file)

    def _connect(self) -> Any:
        """The file system. Imported here: most sets are local."""
        options: dict[str, Any] = {}
        try:
            import fsspec

            if self._protocol in ("http", "https"):
                from aiohttp import ClientTimeout

                timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
                options = {"client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False}}
            return fsspec.filesystem(self._protocol, skip_instance_cache=True, use_listings_cache=False, **options)
        except ImportError:
            raise ValueError(
                f'{self.location}: {self._protocol}:// needs further packages: pip install "image-to-video[remote]"'
            ) from None


def _chunks(file: Any) -> Iterator[bytes]:
    """The rest of an open file, which is then closed. Raises _Broken, also where it hardly flows any more."""
    since, arrived = time.monotonic(), 0
    try:
        while chunk := file.read(_CHUNK):
            yield chunk
            arrived += len(chunk)
            if time.monotonic() > since + STALL_SECONDS:
                if arrived < STALL_BYTES:
                    raise TimeoutError
                since, arrived = time.monotonic(), 0
    except Exception as error:
        raise _Broken.by(error) from None
    finally:
        file.close()


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
