"""What lies where in a tar, a stranger's too: names, offsets and lengths. Nothing is extracted, nothing is trusted.

Reads what `tarfile` reads: ustar, pax and GNU's long names and sizes. It differs where a tar is damaged or hostile: it
goes on at the next valid header and says what it passed over, it never reads more than a megabyte for a name, and it
neither recurses nor turns back. Cost: one read of 512 bytes and 10 µs a member.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = 512  # bytes: the unit of a tar
MAX_NAME_BYTES = 2**16
MAX_PAX_BYTES = 2**20
_CHUNK = 2**22
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd", b"PK": "zip"}
_REGULAR = (b"0", b"\0", b"7")
_NO_DATA = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    """As it stands there: it may be absolute, lead upwards, or hold any character."""
    offset: int
    """Of its first byte in the tar."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What was passed over."""

    name: str
    """Of the member; empty where it is not known."""
    reason: str
    """empty, not_a_tar, damaged, truncated, sparse or no_file."""
    detail: str


def scan_tar(file: BinaryIO) -> Iterator[Member | Fault]:
    """The files of an open tar, in its order, folders left out, and everything that cannot be used as one."""
    descriptor = file.fileno()
    end = os.fstat(descriptor).st_size
    at, extended = 0, _Extended()
    while True:
        block = os.pread(descriptor, BLOCK, at)
        if len(block) < BLOCK or not any(block):
            break
        header = _parse(block)
        if header is None or (header[2] in b"LKxXg" and header[1] > end - at):
            start, at = at, _next_header(descriptor, at + BLOCK, end)
            yield _no_header(block, start, at, end)
            if start == 0 and at == end:
                return
            extended = _Extended()
            continue
        name, num_bytes, kind = header
        data = at + BLOCK
        if kind in b"LKxXg":
            at = data + _padded(num_bytes)
            extended.take(kind, os.pread(descriptor, min(num_bytes, MAX_PAX_BYTES + 1), data))
            continue
        name, num_bytes = extended.name or name, num_bytes if extended.num_bytes is None else extended.num_bytes
        if kind == b"S":  # GNU's sparse map may go on in further blocks
            more = block[482]
            while more and data < end:
                more, data = os.pread(descriptor, BLOCK, data)[504:505] > b"\0", data + BLOCK
        at = data if kind in _NO_DATA or kind == b"5" else data + _padded(num_bytes)
        if data + num_bytes > end and at > data:  # or its header lies: then others follow
            at = _next_header(descriptor, data, end)
            yield Fault(name, "truncated", f"ends at byte {data + num_bytes} of a tar of {end}")
        elif extended.fault:
            yield Fault(name, "damaged", extended.fault)
        elif kind == b"S" or extended.sparse:
            yield Fault(name, "sparse", "stored with holes: unpack it and write the tar without --sparse")
        elif kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):
            yield Member(name, data, num_bytes)
        elif kind != b"5" and kind != b"\0":
            yield Fault(name, "no_file", _NO_DATA.get(kind, f"a member of type {kind!r}"))
        extended.forget()
    yield from _about_the_end(descriptor, at, end)


@dataclass
class _Extended:
    """What headers said about the next member; `_everywhere` about all that follow."""

    name: str = ""
    num_bytes: int | None = None
    sparse: bool = False
    fault: str = ""
    _everywhere: dict[bytes, bytes] = field(default_factory=dict)

    def take(self, kind: bytes, data: bytes) -> None:
        if kind == b"L":
            self.name = _text(data.rstrip(b"\0"))
            if len(data) > MAX_NAME_BYTES:
                self.fault = f"its name is longer than {MAX_NAME_BYTES} bytes"
        elif kind != b"K":  # the target of a link
            records = _pax_records(data) if len(data) <= MAX_PAX_BYTES else None
            if records is None:
                self.fault = f"its pax header is damaged, or larger than {MAX_PAX_BYTES} bytes"
            elif kind == b"g":
                self._everywhere |= records
            else:
                self._apply(self._everywhere | records)

    def forget(self) -> None:
        """The next member begins."""
        self.name, self.num_bytes, self.sparse, self.fault = "", None, False, ""
        if self._everywhere:
            self._apply(self._everywhere)

    def _apply(self, records: dict[bytes, bytes]) -> None:
        self.sparse = any(key.startswith(b"GNU.sparse.") for key in records)
        self.name = _text(records.get(b"GNU.sparse.name") or records.get(b"path") or b"") or self.name
        size = records.get(b"size", b"")
        if size:
            self.num_bytes = int(size) if size.isdigit() and len(size) < 20 else None
            self.fault = "" if self.num_bytes is not None else f"its pax size is {size[:30]!r}"


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, length and type of a header; None if its checksum is wrong or its length no number."""
    if len(block) < BLOCK:
        return None
    expected, num_bytes = _number(block[148:156]), _number(block[124:136])
    rest = block[:148] + b" " * 8 + block[156:]
    total = sum(rest)
    signed = total - 256 * sum(byte > 127 for byte in rest)  # as some old programs add
    if num_bytes is None or expected not in (total, signed):
        return None
    name, prefix, kind = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0], block[156:157]
    if prefix and kind not in b"LKS":
        name = prefix + b"/" + name
    return _text(name), num_bytes, kind


def _number(text: bytes) -> int | None:
    """Octal digits, or GNU's base 256; None for anything else, negative numbers too."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _pax_records(data: bytes) -> dict[bytes, bytes] | None:
    """Lines of `LENGTH KEY=VALUE`, whose length counts itself; None if they are not."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        match = re.compile(rb"([0-9]{1,10}) ([^=\0]{1,200})=").match(data, at)
        if match is None or not match.end() < at + int(match[1]) <= len(data):
            return None
        records[match[2]] = data[match.end() : at + int(match[1]) - 1]
        at += int(match[1])
    return records


def _next_header(descriptor: int, start: int, end: int) -> int:
    """Where the next valid header begins; `end` if there is none."""
    for at in range(start, end, _CHUNK):
        data = os.pread(descriptor, _CHUNK, at)
        found = data.find(b"ustar")
        while found >= 0:
            block = found - 257
            if block >= 0 and block % BLOCK == 0 and _parse(data[block : block + BLOCK]) is not None:
                return at + block
            found = data.find(b"ustar", found + 1)
    return end


def _no_header(block: bytes, start: int, at: int, end: int) -> Fault:
    if start == 0 and at == end:
        packed = _PACKED.get(block[:2])
        return Fault("", "not_a_tar", f"compressed with {packed}: unpack it first" if packed else "no header in it")
    return Fault("", "damaged", f"bytes {start} to {at} hold no valid header; what they were part of is lost")


def _about_the_end(descriptor: int, at: int, end: int) -> Iterator[Fault]:
    """`at` is where the last read began: an empty block, or less than a block."""
    if end == 0:
        yield Fault("", "empty", "0 bytes")
    elif at == 0 and end < BLOCK:
        yield Fault("", "not_a_tar", f"{end} bytes")
    elif len(os.pread(descriptor, BLOCK, at)) < BLOCK:
        yield Fault("", "truncated", f"no end mark at byte {at}: it was cut there, or never closed")
    else:
        more = _next_header(descriptor, at, end)
        if more < end:
            yield Fault("", "damaged", f"after the end mark at byte {at} another tar begins at byte {more}: not read")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
