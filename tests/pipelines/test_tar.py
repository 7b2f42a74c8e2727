"""The scanner sees what tarfile sees in whole tars, and the rest of those that are not; it never trusts a length."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.tar import MAX_PAX_BYTES, Fault, Member, scan_tar


def scan(path: Path) -> list[Member | Fault]:
    with path.open("rb") as file:
        return list(scan_tar(file))


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.sparse]


def write_tar(path: Path, names: list[str], format: int = tarfile.USTAR_FORMAT, size: int = 1000) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = size + i
            tar.addfile(info, io.BytesIO(bytes([i % 256]) * info.size))
    return path


NAMES = ["a.mp4", "a.cls", "dir/b.mp4", "../c.mp4", "/d.mp4", "e f\n.mp4", "ü" * 40 + ".mp4", "x" * 90 + "/y.mp4"]
LONG = [*NAMES, "z" * 300 + ".mp4", "dir/" * 60 + "w.mp4", "ü" * 120 + ".cls"]


@pytest.mark.parametrize(
    ("format", "names"),
    [(tarfile.USTAR_FORMAT, NAMES), (tarfile.GNU_FORMAT, LONG), (tarfile.PAX_FORMAT, LONG)],
    ids=["ustar", "gnu", "pax"],
)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 100_000])
def test_like_tarfile(tmp_path: Path, format: int, names: list[str], size: int) -> None:
    path = write_tar(tmp_path / "a.tar", names, format, size)
    assert scan(path) == by_tarfile(path)
    assert len(by_tarfile(path)) == len(names)


@pytest.mark.parametrize("options", [["--format=v7"], ["--format=gnu"], ["--format=posix"], ["--format=posix", "-S"]])
def test_like_gnu_tar(tmp_path: Path, options: list[str]) -> None:
    """Folders, links, a file with holes, and whatever headers the program writes for them."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.mp4").write_bytes(b"a" * 700)
    (folder / "link.mp4").symlink_to("sub/a.mp4")
    (folder / "hard.mp4").hardlink_to(folder / "sub/a.mp4")
    with (folder / "holes.mp4").open("wb") as file:
        for gap in range(30):  # more pieces than the first header has room for
            file.seek(gap * 65536)
            file.write(b"data" * 1024)
    (folder / "z.cls").write_text("1")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-c", *options, "-f", path, "--sort=name", "-C", folder, "."], check=True)
    found = scan(path)
    assert [entry for entry in found if isinstance(entry, Member)] == by_tarfile(path)
    assert {Path(entry.name).name: entry.reason for entry in found if isinstance(entry, Fault)} == (
        {"link.mp4": "no_file"} | {"a.mp4": "no_file"} | ({"holes.mp4": "sparse"} if "-S" in options else {})
    )


def test_gnu_sparse_of_the_old_kind(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        for gap in range(30):
            file.seek(gap * 65536)
            file.write(b"data" * 1024)
    (tmp_path / "z.cls").write_text("1")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-cS", "--format=gnu", "-f", path, "-C", tmp_path, "holes", "z.cls"], check=True)
    sparse, after = scan(path)
    assert isinstance(sparse, Fault) and sparse.reason == "sparse"
    assert [after] == by_tarfile(path)


def reasons(found: list[Member | Fault]) -> list[str]:
    return [entry.reason for entry in found if isinstance(entry, Fault)]


def names(found: list[Member | Fault]) -> list[str]:
    return [entry.name for entry in found if isinstance(entry, Member)]


@pytest.mark.parametrize(
    ("contents", "reason", "detail"),
    [
        (b"", "empty", "0 bytes"),
        (b"x", "not_a_tar", "1 bytes"),
        (b"\0" * 511, "not_a_tar", "511 bytes"),
        (random.Random(0).randbytes(100_000), "not_a_tar", "no header"),
        (b"\x1f\x8b" + random.Random(0).randbytes(100_000), "not_a_tar", "compressed with gzip"),
    ],
)
def test_no_tar_at_all(tmp_path: Path, contents: bytes, reason: str, detail: str) -> None:
    (tmp_path / "a.tar").write_bytes(contents)
    (fault,) = scan(tmp_path / "a.tar")
    assert isinstance(fault, Fault) and fault.reason == reason and detail in fault.detail


@pytest.mark.parametrize("cut", [512 * k + extra for k in range(13) for extra in (0, 1, 300)])
def test_cut_anywhere(tmp_path: Path, cut: int) -> None:
    """Whole members are found; the one that was cut, or the missing end, is named."""
    path = write_tar(tmp_path / "a.tar", ["a.mp4", "a.cls", "b.mp4", "b.cls"])
    whole = [member for member in by_tarfile(path) if member.offset + member.num_bytes <= cut]
    path.write_bytes(path.read_bytes()[:cut])
    found = scan(path)
    assert [entry for entry in found if isinstance(entry, Member)] == whole
    has_end_mark = cut >= 4 * (512 + 1024) + 512
    assert (reasons(found) == []) == has_end_mark


def test_an_empty_tar_is_whole(tmp_path: Path) -> None:
    assert scan(write_tar(tmp_path / "a.tar", [])) == []


@pytest.mark.parametrize("where", [0, 60, 124, 130, 148, 156, 257])
def test_a_damaged_header_costs_its_member(tmp_path: Path, where: int) -> None:
    path = write_tar(tmp_path / "a.tar", ["a.mp4", "a.cls", "b.mp4", "b.cls"])
    data = bytearray(path.read_bytes())
    data[1536 + where] ^= 0x11
    path.write_bytes(data)
    found = scan(path)
    assert names(found) == ["a.mp4", "b.mp4", "b.cls"]
    assert reasons(found) == ["damaged"]


def header(name: str, size: int, kind: bytes = b"0", length: bytes = b"") -> bytes:
    """A valid header that may say anything."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + size.to_bytes(11, "big", signed=size < 0)
    block[124 : 124 + len(length)] = length
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = b"\0" * 1024
GOOD = header("good.cls", 1) + b"1".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("contents", "found_names", "found_reasons"),
    [
        (header("a.mp4", 2**60) + GOOD + END, ["good.cls"], ["truncated"]),
        (header("a.mp4", 2**87) + GOOD + END, ["good.cls"], ["truncated"]),
        (header("a.mp4", 0, length=b"\xff" * 12) + GOOD + END, ["good.cls"], ["damaged"]),
        (header("a.mp4", 0, length=b"-7") + GOOD + END, ["good.cls"], ["damaged"]),
        (header("a.mp4", 0, length=b"1_0") + GOOD + END, ["good.cls"], ["damaged"]),
        (header("a.mp4", 5, b"L") + GOOD + END, [], ["damaged", "truncated"]),  # the good header is no name
        (header("a.mp4", 2**60, b"L") + GOOD + END, ["good.cls"], ["damaged"]),
        (header("a.mp4", 2**60, b"x") + GOOD + END, ["good.cls"], ["damaged"]),
        (header("a.mp4", 512, b"x") + b"9999999999 path=x".ljust(512, b"\0") + GOOD + END, [], ["damaged"]),
        (header("a.mp4", 512, b"x") + b"0 path=x\n".ljust(512, b"\0") + GOOD + END, [], ["damaged"]),
        (header("a.mp4", 512, b"x") + b"11 size=-1\n".ljust(512, b"\0") + GOOD + END, [], ["damaged"]),
        (header("a.mp4", 512, b"x") + b"30 size=99999999999999999999\n".ljust(512) + GOOD + END, [], ["damaged"]),
        (
            header("a.mp4", 512, b"x") + b"18 path=new\xff\xfe.cls\n".ljust(512, b"\0") + GOOD + END,
            ["new\udcff\udcfe.cls"],
            [],
        ),
        (header("a.mp4", 512, b"g") + b"10 size=1\n".ljust(512, b"\0") + GOOD + GOOD + END, ["good.cls"] * 2, []),
        (header("dev", 0, b"3") + header("pipe", 0, b"6") + GOOD + END, ["good.cls"], ["no_file"] * 2),
        (header("new", 512, b"Q") + END[:512] + GOOD + END, ["good.cls"], ["no_file"]),
        (header("link", 700, b"2") + GOOD + END, ["good.cls"], []),
        (header("dir/", 0, b"5") + header("old/", 0, b"\0") + GOOD + END, ["good.cls"], []),
        (GOOD + END + GOOD + END, ["good.cls"], ["damaged"]),  # two tars one after another
        (GOOD + END + random.Random(1).randbytes(4096), ["good.cls"], []),
    ],
)
def test_hostile(tmp_path: Path, contents: bytes, found_names: list[str], found_reasons: list[str]) -> None:
    (tmp_path / "a.tar").write_bytes(contents)
    found = scan(tmp_path / "a.tar")
    assert (
        names(found) == found_names
        and [r for r in reasons(found) if r != "no_file" or "no_file" in found_reasons] == found_reasons
    )


@pytest.mark.parametrize(
    "contents",
    [
        lambda: b"".join(header("a", 512, b"x") + b"9 path=x\n".ljust(512, b"\0") for _ in range(5000)),  # recursion
        lambda: header("a", 2 * MAX_PAX_BYTES, b"x") + b"9 path=x\n" * (2 * MAX_PAX_BYTES // 9 + 1),
        lambda: header("a", MAX_PAX_BYTES, b"x") + b"1" * MAX_PAX_BYTES,  # slow patterns
        lambda: (b"ustar" * 200_000)[: 512 * 1900],
        lambda: header("a", 0) * 5000,
    ],
    ids=["chain", "large", "digits", "magic", "many"],
)
def test_work_is_bounded(tmp_path: Path, contents: Callable[[], bytes]) -> None:
    data = contents()
    (tmp_path / "a.tar").write_bytes(data.ljust(-(-len(data) // 512) * 512, b"\0") + GOOD + END)
    started = time.process_time()
    scan(tmp_path / "a.tar")
    assert time.process_time() - started < 1


def test_any_damage_is_survived(tmp_path: Path) -> None:
    """What lies before the damage is found as before."""
    original = write_tar(tmp_path / "a.tar", LONG, tarfile.PAX_FORMAT)
    whole, data = by_tarfile(original), original.read_bytes()
    generator = random.Random(0)
    path = tmp_path / "b.tar"
    for _ in range(300):
        mutant = bytearray(data)
        first = len(data)
        for _ in range(generator.randrange(1, 6)):
            place = generator.randrange(len(data))
            mutant[place] ^= 1 << generator.randrange(8)
            first = min(first, place)
        path.write_bytes(mutant[: generator.choice([len(data), generator.randrange(first + 1, len(data) + 1)])])
        found = [entry for entry in scan(path) if isinstance(entry, Member)]
        before = [member for member in whole if member.offset + member.num_bytes <= first]
        assert found[: len(before)] == before
        assert all(entry.offset + entry.num_bytes <= path.stat().st_size for entry in found)
