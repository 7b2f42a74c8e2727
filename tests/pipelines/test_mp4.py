"""The file around cut-out packets, box by box and by FFmpeg's demuxer; that it decodes, `test_decode.py` checks."""

from __future__ import annotations

import io
import struct

import av
import pytest

from pipelines.mp4 import wrap_packets

NESTING = {b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl"}
EXTRADATA = b"\x01parameter sets"
PACKETS = [b"key frame", b"x", b"a longer frame" * 100]


def boxes(data: bytes) -> dict[str, bytes]:
    """Content by path, `moov/trak/tkhd`; every byte must belong to a box."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        assert 8 <= size <= len(data) - at, (kind, size)
        name, content = kind.decode(), data[at + 8 : at + size]
        assert name not in found, name
        if kind in NESTING:
            found |= {f"{name}/{path}": inner for path, inner in boxes(content).items()}
        else:
            found[name] = content
        at += size
    return found


def numbers(content: bytes, start: int = 0) -> tuple[int, ...]:
    """32-bit numbers of a box."""
    return struct.unpack_from(f">{(len(content) - start) // 4}I", content, start)


@pytest.mark.parametrize(("codec", "entry", "parameters"), [("h264", b"avc1", b"avcC"), ("hevc", b"hvc1", b"hvcC")])
@pytest.mark.parametrize("packets", [PACKETS, PACKETS[:1]])
def test_the_tables_point_at_the_packets(codec: str, entry: bytes, parameters: bytes, packets: list[bytes]) -> None:
    file = wrap_packets(packets, EXTRADATA, codec, (160, 144))
    found = boxes(file)
    table = {path.rpartition("/")[2]: content for path, content in found.items() if "/stbl/" in path}
    (first,) = numbers(table["stco"], 8)
    sizes = numbers(table["stsz"], 12)
    assert sizes == tuple(map(len, packets)) and numbers(table["stsz"])[1:3] == (0, len(packets))
    for packet, size in zip(packets, sizes, strict=True):
        assert file[first : first + size] == packet
        first += size
    assert first == len(file) and found["mdat"] == b"".join(packets)
    assert numbers(table["stts"]) == (0, 1, len(packets), 1)  # one tick each
    assert numbers(table["stss"]) == (0, 1, 1)
    assert numbers(table["stsc"]) == (0, 1, 1, len(packets), 1)  # all in one chunk
    picture = table["stsd"][8:]
    assert picture[4:8] == entry and len(picture) == struct.unpack_from(">I", picture)[0]
    assert struct.unpack_from(">HH", picture, 32) == (160, 144)
    assert boxes(picture[86:]) == {parameters.decode(): EXTRADATA}  # after the fixed part of 14496-12
    track = found["moov/trak/tkhd"]
    assert numbers(track)[-2:] == (160 << 16, 144 << 16) and numbers(track)[5] == len(packets)


def test_memory_and_bytes_make_the_same_file() -> None:
    views = [memoryview(packet) for packet in PACKETS]
    assert wrap_packets(views, EXTRADATA, "h264", (64, 48)) == wrap_packets(PACKETS, EXTRADATA, "h264", (64, 48))


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("size", [(2, 2), (1920, 1080), (4098, 16384)])
def test_ffmpeg_gives_the_packets_back(codec: str, size: tuple[int, int]) -> None:
    file = wrap_packets(PACKETS, EXTRADATA, codec, size)
    with av.open(io.BytesIO(file)) as container:
        assert container.format.name.startswith("mov")
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.name, context.width, context.height, stream.frames) == (codec, *size, len(PACKETS))
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [bytes(packet) for packet in packets] == PACKETS
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets] == [0, 1, 2]
        assert context.extradata == EXTRADATA
