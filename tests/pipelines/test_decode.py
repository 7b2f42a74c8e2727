"""Requests to pixels: right frames in the right order, right box, right flip, and a reason for what cannot be used."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines import decode
from pipelines.decode import ClipDecoder, crop_to_rgb, jpeg_size, resize_into
from pipelines.encode import FrameChoice, encode_video
from pipelines.mp4 import wrap_packets
from pipelines.plan import ClipPlan
from pipelines.read import ClipRequest, request_clip
from pipelines.shards import Sample, checksum
from pipelines.video import VideoError, Yuv420, decode_file, open_video, packet_frames, stored_planes, to_rgb
from tests.sets import open_set, packets
from tests.videos import read_number, write_noise, write_video

PROFILES = ("jpeg", "h264", "hevc", "copy")
WHOLE = (0, 0, 96, 64)


def request(
    sample: Sample, profile: str, stored: Sequence[int], box: tuple[int, int, int, int] = WHOLE, flip: bool = False
) -> ClipRequest:
    return request_clip(sample, ClipPlan(sample.sample_id, 0, tuple(stored), tuple(stored), box, flip), profile)


def clips(requests: Sequence[ClipRequest], size: int = 48, **options: Callable[[], None]) -> NDArray[np.uint8]:
    """What the decoder makes of good requests."""
    num_frames = len(requests[0].order)
    rows = np.zeros((len(requests), num_frames, size, size, 3), np.uint8)
    assert ClipDecoder(size, num_frames, **options).decode_into(requests, rows) == []
    return rows


def numbers(clip: NDArray[np.uint8], flip: bool = False) -> list[int]:
    return [read_number(frame[:, ::-1] if flip else frame) for frame in clip]


def bilinear(image: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """[h, w, 3] at [size, size]: pixels are squares, the borders repeat."""
    out = image.astype(np.float64)
    for axis in (0, 1):
        length = image.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.minimum(at.astype(int), length - 1)
        high = np.minimum(low + 1, length - 1)
        share = np.expand_dims(at - low, (1, 2) if axis == 0 else (0, 2))
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return out


@pytest.mark.parametrize("profile", PROFILES)
def test_frames_come_in_the_clips_order_each_decoded_once(tmp_path: Path, profile: str) -> None:
    shards = open_set(tmp_path / "set", [31, 40], profile=profile)
    orders = [(9, 8, 9, 30, 0, 30), (39, 39, 39, 39, 39, 39), (0, 1, 2, 3, 4, 5), (28, 29, 30, 0, 1, 2)]
    wanted = [request(shards[i % 2], profile, stored, flip=i > 1) for i, stored in enumerate(orders)]
    for clip, order, asked in zip(clips(wanted), orders, wanted, strict=True):
        assert numbers(clip, asked.flip) == list(order)


@pytest.mark.parametrize("profile", PROFILES)
def test_box_and_flip_are_those_of_the_plan(tmp_path: Path, profile: str) -> None:
    """Against the whole decoded frame, cropped, resized by NumPy and flipped."""
    sample = open_set(tmp_path / "set", [20], profile=profile)[0]
    video = encode_video(write_video(tmp_path / "again.mp4", 20), profile, choice=FrameChoice())
    if profile == "jpeg":
        whole = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in packets(video)]
    else:
        whole = list(decode_file(video.data, range(20)))
    boxes = [(0, 0, 96, 64), (3, 5, 50, 40), (10, 7, 33, 57), (61, 32, 35, 32), (17, 0, 1, 1), (40, 10, 48, 48)]
    for box in boxes:
        left, top, width, height = box
        for flip in (False, True):
            (clip,) = clips([request(sample, profile, (4, 17), box, flip)])
            for frame, number in zip(clip, (4, 17), strict=True):
                image = whole[number]
                assert isinstance(image, np.ndarray)
                expected = bilinear(image[top : top + height, left : left + width], len(frame))
                difference = frame - (expected[:, ::-1] if flip else expected)
                assert np.abs(difference).max() < (3.5 if profile in ("h264", "hevc") else 1.0)
                assert abs(difference.mean()) < 0.5


def test_rotated_copies_are_cropped_upright(tmp_path: Path) -> None:
    sample = open_set(tmp_path / "set", [12], profile="copy", rotation=90)[0]
    assert (sample.width, sample.height) == (96, 64)
    (clip,) = clips([request(sample, "copy", (3, 11, 3))])
    assert numbers(clip) == [3, 11, 3]
    (corner,) = clips([request(sample, "copy", (3, 11, 3), (0, 0, 24, 16))])
    assert corner.min() > 200  # of the corners only the top left one is bright


def test_what_shrinks_to_less_than_half_is_averaged() -> None:
    """Stripes one pixel wide alias under linear interpolation; an average is grey."""
    stripes = np.zeros((200, 210, 3), np.uint8)
    stripes[:, ::2] = 200
    target = np.empty((64, 64, 3), np.uint8)
    resize_into(stripes, target)
    assert target.min() > 70 and target.max() < 130
    resize_into(np.ascontiguousarray(stripes[:50]), target)  # enlarged the other way
    assert target.min() > 70 and target.max() < 130
    resize_into(np.ascontiguousarray(stripes[:128, :128]), target)
    assert np.abs(target - bilinear(stripes[:128, :128], 64)).max() <= 1


@pytest.mark.parametrize("profile", PROFILES)
def test_bytes_that_cannot_be_used_cost_one_clip(tmp_path: Path, profile: str) -> None:
    shards = open_set(tmp_path / "set", [20, 20, 20], profile=profile)
    good = [request(shards[i], profile, (3, 15, 15, 9)) for i in range(3)]
    expected = clips(good)
    start, length, _ = good[1].packets[-1]
    tar = bytearray(good[1].shard.read_bytes())
    tar[start + length // 2 : start + length // 2 + 40] = bytes(40)
    (tmp_path / "damaged.tar").write_bytes(tar)
    damaged = replace(good[1], shard=tmp_path / "damaged.tar")
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(length))
    noise = (0, length, checksum((tmp_path / "noise.tar").read_bytes()))
    bad = {
        "checksum differs": damaged,
        "ends at byte": replace(good[1], packets=((len(tar) - 9, 10, 0),) * len(good[1].packets)),
        "cannot be read": replace(good[1], shard=tmp_path / "gone.tar"),
        "frames are 96x64, the index says 96x48": replace(good[1], height=48, box=(0, 0, 96, 48)),
        "": replace(good[1], shard=tmp_path / "noise.tar", packets=(noise,) * len(good[1].packets)),
    }
    decoder = ClipDecoder(48, 4)
    for text, request_ in bad.items():
        rows = np.zeros_like(expected)
        ((i, reason),) = decoder.decode_into([good[0], request_, good[2]], rows)
        assert i == 1 and text in reason and "\n" not in reason
        assert np.array_equal(rows[0], expected[0]) and np.array_equal(rows[2], expected[2])
    assert len(decoder.decode_into([damaged] * 3, np.zeros_like(expected))) == 3


@pytest.mark.parametrize("profile", PROFILES)
def test_a_step_is_reported_for_every_frame_decoded(tmp_path: Path, profile: str) -> None:
    sample = open_set(tmp_path / "set", [31], profile=profile)[0]
    steps: list[None] = []
    clips([request(sample, profile, (9, 12, 12, 29))], on_progress=lambda: steps.append(None))
    assert len(steps) == {"jpeg": 3, "h264": 11, "hevc": 11, "copy": 30}[profile]


def test_images_are_decoded_in_runs_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = open_set(tmp_path / "set", [20])[0]
    wanted = [request(sample, "jpeg", tuple(range(i, i + 7))) for i in range(6)]
    expected = clips(wanted)
    for images, pixels, longest in ((16, 2**24, 16), (64, 96 * 64 * 5, 5), (64, 1, 1)):
        monkeypatch.setattr(decode, "IMAGES_A_RUN", images)
        monkeypatch.setattr(decode, "PIXELS_A_RUN", pixels)
        decoder = ClipDecoder(48, 7)
        runs: list[int] = []
        slice_ = decoder._slicer.slice
        monkeypatch.setattr(decoder._slicer, "slice", lambda *a, f=slice_, r=runs: (r.append(len(a[0])), f(*a))[1])
        rows = np.zeros_like(expected)
        assert decoder.decode_into(wanted, rows) == []
        assert max(runs) == longest and sum(runs) == 42 and np.array_equal(rows, expected)


def test_the_header_of_a_jpeg_is_believed_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = open_set(tmp_path / "set", [5])[0]
    asked = request(sample, "jpeg", (2,))
    start, length, _ = asked.packets[0]
    jpeg = bytearray(sample.shard.read_bytes()[start : start + length])
    at = jpeg.index(b"\xff\xc0")
    assert jpeg_size(jpeg) == (96, 64) == struct.unpack_from(">HH", jpeg, at + 5)[::-1]
    struct.pack_into(">HH", jpeg, at + 5, 60000, 60001)
    (tmp_path / "bomb.tar").write_bytes(jpeg)
    bomb = replace(asked, shard=tmp_path / "bomb.tar", packets=((0, length, checksum(bytes(jpeg))),))
    monkeypatch.setattr(decode.JpegSlicer, "slice", lambda *arguments: pytest.fail("it was decoded"))
    failures = ClipDecoder(48, 1).decode_into([bomb], np.zeros((1, 1, 48, 48, 3), np.uint8))
    assert failures == [(0, "ValueError: frames are 60001x60000, the index says 96x64")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xc0\0\x11\x08\0",
        b"\xff\xd8\0\0\0\0\0\0\0\0\0\0",
        b"\xff\xd8" + b"\xff\xe0\0\2" * 1000,
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ],
)
def test_what_is_no_jpeg(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a JPEG"):
        jpeg_size(data)


def colourful(tmp_path: Path) -> list[Yuv420]:
    """Frames of 64 × 64 pixels of noise in every plane, as the h264 profile stores them."""
    path = tmp_path / "noise.mp4"
    path.write_bytes(write_noise(tmp_path, "mp4"))
    video = encode_video(path, "h264", choice=FrameChoice())
    with open_video(video.data) as reader:
        planes = [stored_planes(frame.picture) for frame in reader.frames()]
    assert all(planes), "not stored as its profile says"
    return [Yuv420(*(plane.copy() for plane in frame)) for frame in planes if frame]


def test_planes_become_the_rgb_that_ffmpeg_gives_wherever_the_box_lies(tmp_path: Path) -> None:
    """Odd and even corners and sizes, at the borders and within."""
    frame = colourful(tmp_path)[5]
    stored = np.concatenate([frame.y, frame.cb.reshape(16, 64), frame.cr.reshape(16, 64)])
    reference = to_rgb(av.VideoFrame.from_ndarray(stored, "yuvj420p"))
    assert np.array_equal(reference, to_rgb(av.VideoFrame.from_ndarray(stored, "yuvj420p")))
    differences = []
    for left in (0, 1, 2, 31, 32):
        for top in (0, 1, 6, 7, 33):
            for width in (1, 2, 17, 18, 64 - left):
                for height in (1, 16, 19, 64 - top):
                    width_, height_ = min(width, 64 - left), min(height, 64 - top)
                    crop = crop_to_rgb(frame, (left, top, width_, height_)).astype(np.int16)
                    differences.append(crop - reference[top : top + height_, left : left + width_])
    assert max(np.abs(d).max() for d in differences) <= 3
    flat = np.concatenate([d.reshape(-1, 3) for d in differences])
    assert np.abs(flat).mean() < 0.6 and np.abs(flat.mean(0)).max() < 0.3


def test_resized_planes_equal_the_resized_rgb_of_the_whole_frame(tmp_path: Path) -> None:
    frame = colourful(tmp_path)[9]
    stored = np.concatenate([frame.y, frame.cb.reshape(16, 64), frame.cr.reshape(16, 64)])
    reference = to_rgb(av.VideoFrame.from_ndarray(stored, "yuvj420p"))
    random = np.random.default_rng(0)
    for _ in range(40):
        width, height = random.integers(1, 65, 2)
        left, top = random.integers(0, 65 - width), random.integers(0, 65 - height)
        ours, expected = np.empty((2, 40, 40, 3), np.uint8)
        resize_into(crop_to_rgb(frame, (int(left), int(top), int(width), int(height))), ours)
        cv2.resize(reference[top : top + height, left : left + width], (40, 40), dst=expected)
        difference = ours.astype(np.int16) - expected
        assert np.abs(difference).mean() < 1 and np.abs(difference).max() <= 3 and abs(difference.mean()) < 0.3


def group_stream(tmp_path: Path, codec: str) -> tuple[bytes, bytes, list[bytes]]:
    """A numbered video of 27 frames in closed groups of 8: the file, extradata, packets."""
    size, options = (160, 144), {"bf": "0", "g": "8", "keyint_min": "8", "sc_threshold": "0", "crf": "20"}
    if codec == "libx265":
        options = {
            "x265-params": "bframes=0:keyint=8:min-keyint=8:scenecut=0:open-gop=0:frame-threads=1:log-level=none"
        }
    path = write_video(
        tmp_path / f"{codec}.mp4",
        27,
        size,
        codec=codec,
        colorspace="bt601",
        full_range=True,
        dark=(90, 20, 30),
        **options,
    )
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [(bytes(packet), packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        extradata = bytes(stream.codec_context.extradata or b"")
    assert [key for _, key in found] == [i % 8 == 0 for i in range(27)]
    return path.read_bytes(), extradata, [data for data, _ in found]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_cut_out_frames_are_those_of_the_whole_file_bit_for_bit(tmp_path: Path, codec: str) -> None:
    data, extradata, stored = group_stream(tmp_path, codec)
    with open_video(data) as reader:
        whole = [Yuv420(*(p.copy() for p in planes)) for f in reader.frames() if (planes := stored_planes(f.picture))]
    assert len(whole) == 27
    name = {"libx264": "h264", "libx265": "hevc"}[codec]
    for frames in ([0], [7], [8], [15], [26], [9, 12], [3, 20], [0, 7, 8, 15, 16, 24], list(range(27))):
        rows = sorted({row for frame in frames for row in range(frame - frame % 8, frame + 1)})
        cut = packet_frames([stored[row] for row in rows], extradata, [rows.index(f) for f in frames], codec=name)
        for frame, picture in zip(frames, cut, strict=True):
            planes = stored_planes(picture)
            assert planes is not None and read_number(to_rgb(picture)) == frame
            assert all(np.array_equal(a, b) for a, b in zip(planes, whole[frame], strict=True))


def test_other_pictures_than_ours_are_converted_by_ffmpeg(tmp_path: Path) -> None:
    """Limited range, as a stranger's packer may have stored: right colours, if slower."""
    sample = open_set(tmp_path / "set", [12], profile="h264")[0]
    path = write_video(tmp_path / "other.mp4", 12, bf="0", g="4", bright=(240, 200, 40))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        data = [bytes(packet) for packet in container.demux(stream) if packet.size]
        extradata = bytes(stream.codec_context.extradata or b"")
    (tmp_path / "other.tar").write_bytes(b"".join(data))
    ends = np.cumsum([0] + [len(packet) for packet in data]).tolist()
    found = tuple((start, len(packet), checksum(packet)) for start, packet in zip(ends, data, strict=False))
    asked = replace(request(sample, "h264", (3, 6)), shard=tmp_path / "other.tar", extradata=extradata)
    (clip,) = clips([replace(asked, packets=found[:7], wanted=(3, 6))])
    assert numbers(clip) == [3, 6]
    assert np.abs(clip[0, 5, 5].astype(int) - (240, 200, 40)).max() <= 4


def test_a_video_much_larger_than_its_index_says_is_refused(tmp_path: Path) -> None:
    video = encode_video(write_video(tmp_path / "large.mp4", 2, (1024, 768)), "h264", choice=FrameChoice())
    with pytest.raises(VideoError, match="decode_error"):
        list(packet_frames(packets(video), video.extradata, [0], size=(96, 64)))
    assert len(list(packet_frames(packets(video), video.extradata, [0], size=(1024, 768)))) == 1


@pytest.mark.parametrize("profile", ["jpeg", *(pytest.param(p, marks=pytest.mark.gpu) for p in ("h264", "hevc"))])
def test_the_way_over_cuda_gives_the_same_clips(tmp_path: Path, profile: str) -> None:
    """Without a GPU the same graph runs on the CPU."""
    gpu = None if profile == "jpeg" else 0
    shards = open_set(tmp_path / "set", [20, 31, 20], profile=profile, size=(192, 160))  # NVDEC's least is 144
    boxes = [(0, 0, 96, 64), (3, 5, 50, 41), (131, 98, 40, 33)]
    asked = [request(shards[i], profile, (15, 3, 15, 9), boxes[i], flip=i == 1) for i in range(3)]
    expected = clips(asked)
    decoder = ClipDecoder(48, 4)
    decoder._croppers = decode._Croppers(48, 4, gpu)
    rows = np.zeros_like(expected) if gpu is None else on_gpu(expected)
    assert decoder.decode_into(asked, rows) == []
    difference = (rows if isinstance(rows, np.ndarray) else rows.cpu().numpy()).astype(int) - expected
    assert np.abs(difference).mean() < (0.3 if gpu is None else 2.0)
    bad = replace(asked[1], packets=((0, 10, 0),) * len(asked[1].packets))
    ((i, reason),) = decoder.decode_into([asked[0], bad, asked[2]], rows)
    assert i == 1 and "checksum differs" in reason


def on_gpu(like: NDArray[np.uint8]) -> Any:
    import torch  # seconds; only where there is a GPU

    return torch.zeros(like.shape, dtype=torch.uint8, device="cuda")


def test_dali_opens_what_is_cut_out_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its CPU decoder knows no H.264, but says so only after it has found the stream."""
    sample = open_set(tmp_path / "set", [20], profile="h264")[0]
    decoder = ClipDecoder(48, 2)
    decoder._croppers = decode._Croppers(48, 2, None)
    assert decoder.decode_into([request(sample, "h264", (9, 17))], np.zeros((1, 2, 48, 48, 3), np.uint8))
    assert "(h264) is not supported by the CPU variant" in capfd.readouterr().err


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_cut_out_packets_make_a_video_file(tmp_path: Path, codec: str) -> None:
    data, extradata, stored = group_stream(tmp_path, codec)
    name = {"libx264": "h264", "libx265": "hevc"}[codec]
    file = wrap_packets([memoryview(stored[row]) for row in (8, 9, 10, 16)], extradata, name, (160, 144))
    assert np.array_equal(decode_file(file, range(4)), decode_file(data, [8, 9, 10, 16]))
