"""Containers that were cut short are told by their own bytes; whole ones pass."""

import io
from pathlib import Path

import pytest

from pipelines.containers import cut_short, last_box_is_cut, mp4_is_encrypted, no_video_at_all
from tests.videos import write_video

CONTAINERS = {
    "avi": {"codec": "mpeg4"},
    "mkv": {},
    "webm": {"codec": "libvpx-vp9", "cpu-used": "8"},
    "flv": {},
    "wmv": {"codec": "wmv2"},
    "ogv": {"codec": "libvpx"},
    "ts": {},
    "m2ts": {},
}


def verdict(data: bytes) -> str | None:
    return cut_short(io.BytesIO(data), len(data))


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_cut_shows(tmp_path: Path, suffix: str) -> None:
    options: dict[str, str] = CONTAINERS[suffix]
    data = write_video(tmp_path / f"clip.{suffix}", 60, **options).read_bytes()
    assert verdict(data) is None
    packet = {"ts": 188, "m2ts": 192}.get(suffix)
    for kept in (0.3, 0.5, 0.77, 0.9):
        end = int(len(data) * kept)
        if packet is not None:
            end += 1 if end % packet == 0 else 0  # a cut between two packets is one that does not show
        assert verdict(data[:end]) is not None, kept


@pytest.mark.parametrize("suffix", ["flv", "ogv", "ts"])
def test_what_follows_the_last_part_is_nothing_to_us(tmp_path: Path, suffix: str) -> None:
    options: dict[str, str] = CONTAINERS[suffix]
    data = write_video(tmp_path / f"clip.{suffix}", 5, **options).read_bytes()
    assert verdict(data + bytes(188 * 40)) is None


def test_a_recording_that_was_not_closed_passes(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "clip.avi", 5, codec="mpeg4").read_bytes())
    data[4:8] = b"\xff\xff\xff\xff"
    assert verdict(bytes(data)) is None
    data = bytearray(write_video(tmp_path / "clip.mkv", 5).read_bytes())
    segment = data.index(b"\x18S\x80g") + 4
    data[segment : segment + 8] = b"\x01" + b"\xff" * 7
    assert verdict(bytes(data[:-100])) is None


def test_the_boxes_of_an_mp4(tmp_path: Path) -> None:
    data = write_video(tmp_path / "clip.mp4", 5).read_bytes()
    assert not last_box_is_cut(io.BytesIO(data), len(data))
    assert last_box_is_cut(io.BytesIO(data[:-1]), len(data) - 1)
    assert not last_box_is_cut(io.BytesIO(b"<html>" * 20), 120)
    assert not mp4_is_encrypted(io.BytesIO(data), len(data))
    disguised = data.replace(b"avc1\0\0\0\0", b"encv\0\0\0\0")
    assert mp4_is_encrypted(io.BytesIO(disguised), len(data))


def test_what_downloads_leave_in_place_of_a_video() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    page = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
    found = [no_video_at_all(io.BytesIO(data)) for data in (pointer, page, page[20:], b"ftyp", b"")]
    assert found == ["a Git LFS pointer: run git lfs pull", *["an HTML page, not a video"] * 2, None, None]


@pytest.mark.parametrize(
    "head", [b"RIFF", b"\x1aE\xdf\xa3", b"FLV\1\5\0\0\0\x09", b"OggS", b"G", b"0&\xb2u\x8ef\xcf\x11"]
)
@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"G"])
@pytest.mark.parametrize("length", [0, 1, 30, 5000])
def test_garbage_behind_a_known_beginning(head: bytes, filling: bytes, length: int) -> None:
    data = head + filling * length
    verdict(data)
    last_box_is_cut(io.BytesIO(data), len(data))
    mp4_is_encrypted(io.BytesIO(data), len(data))
