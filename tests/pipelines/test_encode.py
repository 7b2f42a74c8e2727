"""Storing videos: the right frames, true colours, honest quality, in every profile."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.encode import FrameChoice, encode_video
from pipelines.shards import EncodedVideo, checksum
from pipelines.video import VideoError, decode_file, open_video
from tests.sets import decode_packets, numbers, packets, whole
from tests.videos import write_noise, write_video

ALL = FrameChoice()
ENCODED = ("jpeg", "h264", "hevc")
PROFILES = (*ENCODED, "copy")
NATURAL = (  # folder of shared clips, what is awkward about it
    "zoo/imageio-binaries__cockatoo.mp4",  # 4:4:4
    "zoo/torchcodec__nasa_13013_hdr.mp4",  # BT.2020, 10 bit
    "skate/kickflip/Kickflip54.mov",  # BT.709, HEVC
    "skate/ollie/Ollie38.mov",  # turned
)


def jpegs(video: EncodedVideo) -> list[NDArray[np.uint8]]:
    """Every stored frame, decoded by PIL from its own byte range alone."""
    table = video.frames
    images = []
    for start, size, expected in zip(table.offset, table.num_bytes, table.checksum, strict=True):
        data = video.data[start : start + size]
        assert checksum(data) == expected
        assert data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")
        images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return images


def stored_images(video: EncodedVideo) -> list[NDArray[np.uint8]]:
    return jpegs(video) if video.frames.keyframe.all() and video.frames.num_bytes.any() else whole(video)


@pytest.mark.parametrize("profile", ENCODED)
def test_bytes_do_not_depend_on_what_lay_in_memory(tmp_path: Path, profile: str) -> None:
    """24 macroblocks: where their number is no multiple of 16, x264's mbtree reads past its tables."""
    path, random = write_video(tmp_path / "clip.mp4", 14), np.random.default_rng(0)
    stored = set()
    for _ in range(30):
        junk = [bytearray(b"\xff" * size) for size in random.integers(1, 200_000, random.integers(50))]
        del junk  # what is allocated next finds it
        stored.add(encode_video(path, profile, choice=FrameChoice.parse("source/2")).data)
    assert len(stored) == 1


SOURCES = {
    "b-frames": ({}, "mp4"),
    "turned by 90": ({"rotation": 90}, "mp4"),
    "turned by 180": ({"rotation": 180}, "mov"),
    "turned by 270": ({"rotation": 270}, "mp4"),
    "edit list": ({"skipped": 5}, "mp4"),
    "turned, edit list": ({"rotation": 90, "skipped": 3}, "mov"),
    "variable rate": ({"times": [0, 0.04, 0.05, 0.3, 0.31, 0.5, 0.9, 1.0, 1.1, 1.5, 1.6, 1.65]}, "mp4"),
    "mkv": ({}, "mkv"),
    "mpeg-ts": ({}, "ts"),
    "mpeg4 avi": ({"codec": "mpeg4", "bf": "0"}, "avi"),
    "h264 avi": ({}, "avi"),
    "vp9 webm": ({"codec": "libvpx-vp9", "cpu-used": "8"}, "webm"),
    "hevc 10 bit": ({"codec": "libx265", "pix_fmt": "yuv420p10le", "x265-params": "log-level=none"}, "mp4"),
    "h264 10 bit": ({"pix_fmt": "yuv420p10le"}, "mp4"),
    "4:4:4": ({"pix_fmt": "yuv444p"}, "mp4"),
    "rgb": ({"codec": "ffv1", "pix_fmt": "bgr0"}, "mkv"),
    "gray": ({"codec": "ffv1", "pix_fmt": "gray"}, "mkv"),
    "odd size": ({"size": (101, 67), "pix_fmt": "yuv444p"}, "mp4"),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", SOURCES)
def test_right_frames_upright(tmp_path: Path, kind: str, profile: str) -> None:
    options, suffix = SOURCES[kind]
    count, skipped = 12, options.get("skipped", 0)
    path = write_video(tmp_path / f"clip.{suffix}", count, **options)
    video = encode_video(path, profile, choice=ALL)
    images = stored_images(video)
    assert numbers(images) == numbers(whole(video)) == list(range(skipped, count))
    assert video.frames.source_frame.tolist() == list(range(count - skipped))
    assert video.source_frames == count - skipped
    assert {image.shape for image in images} == {(video.height, video.width, 3)}
    multiple = {"jpeg": 2, "h264": 16, "hevc": 16, "copy": 1}[profile]
    width, height = options.get("size", (96, 64))
    assert (video.width, video.height) == (width // multiple * multiple, height // multiple * multiple)
    if kind != "variable rate":
        assert video.fps == pytest.approx(30, rel=0.002)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        ("source", list(range(30))),
        ("source/4", [0, 4, 8, 12, 16, 20, 24, 28]),
        ("source/100", [0]),
        ("7.5", [0, 4, 8, 12, 16, 20, 24, 28]),
        ("10", [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]),
        ("30", list(range(30))),
        ("60", list(range(30))),
    ],
)
def test_choice_of_frames(tmp_path: Path, fps: str, expected: list[int], suffix: str) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", 30)
    video = encode_video(path, "jpeg", choice=FrameChoice.parse(fps))
    assert video.frames.source_frame.tolist() == numbers(jpegs(video)) == expected
    assert video.source_frames == 30


def test_choice_by_time_follows_the_clock_of_a_variable_rate(tmp_path: Path) -> None:
    times = [0, 0.1, 0.5, 0.55, 0.9, 1.0, 2.0]
    path = write_video(tmp_path / "clip.mp4", 7, times=times)
    by_time = encode_video(path, "jpeg", choice=FrameChoice.parse("4"))  # 0, .25, .5, .75, 1, 1.25 …
    assert by_time.frames.source_frame.tolist() == [0, 1, 2, 3, 5, 6]
    assert seconds_of(by_time.data) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 2.0], abs=1e-4)
    every_second = encode_video(path, "jpeg", choice=FrameChoice.parse("source/2"))
    assert seconds_of(every_second.data) == pytest.approx(times[::2], abs=1e-4)


def seconds_of(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.time for frame in container.decode(video=0)]


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "source/0", "source/x", "Source", "1e9", "30fps"])
def test_choice_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed are 'source'"):
        FrameChoice.parse(text)


def test_h264_packets_decode_from_any_keyframe_as_the_whole_file_does(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 21, (176, 144), colorspace="bt709")
    video = encode_video(path, "h264", choice=ALL)
    table, data, images = video.frames, packets(video), whole(video)
    assert np.flatnonzero(table.keyframe).tolist() == [0, 8, 16]
    assert [checksum(packet) for packet in data] == table.checksum.tolist()
    for start in (0, 8, 16):
        wanted = [i for i in (0, 2, 7) if start + i < 21]
        decoded = decode_packets(data[start : start + 8], video.extradata, wanted)
        np.testing.assert_array_equal(decoded, [images[start + i] for i in wanted])
    across = decode_packets(data, video.extradata, [3, 20])
    np.testing.assert_array_equal(across, [images[3], images[20]])
    with av.open(io.BytesIO(video.data)) as container:
        assert all(frame.pict_type != av.video.frame.PictureType.B for frame in container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace, context.color_range) == ("yuvj420p", 6, 2)


MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}


def true_rgb(path: Path, colorspace: str, full_range: bool, bits: int) -> NDArray[np.float64]:
    """The first frame in RGB by the textbook, from its planes; chroma repeated."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = frame.to_ndarray().astype(np.float64) / 2 ** (bits - 8)
    height, width = frame.height, frame.width
    luma = planes[:height]
    chroma = planes[height:].reshape(2, height // 2, width // 2).repeat(2, 1).repeat(2, 2)
    luma, chroma = (luma / 255, (chroma - 128) / 255) if full_range else ((luma - 16) / 219, (chroma - 128) / 224)
    weight_red, weight_blue = MATRICES[colorspace]
    red = luma + 2 * (1 - weight_red) * chroma[1]
    blue = luma + 2 * (1 - weight_blue) * chroma[0]
    green = (luma - weight_red * red - weight_blue * blue) / (1 - weight_red - weight_blue)
    return np.clip(np.stack([red, green, blue], -1), 0, 1) * 255


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("colorspace", MATRICES)
@pytest.mark.parametrize("colours", [((40, 90, 200), (220, 180, 60)), ((150, 20, 30), (60, 230, 120))])
def test_colours_are_true(
    tmp_path: Path, colorspace: str, full_range: bool, bits: int, colours: tuple[tuple[int, ...], ...]
) -> None:
    path = write_video(
        tmp_path / "clip.mp4",
        2,
        pix_fmt="yuv420p" if bits == 8 else "yuv420p10le",
        colorspace=colorspace,
        full_range=full_range,
        dark=colours[0],
        bright=colours[1],
    )
    expected = true_rgb(path, colorspace, full_range, bits).mean((0, 1))
    np.testing.assert_allclose(decode_file(path.read_bytes(), [0])[0].mean((0, 1)), expected, atol=1.0)
    for profile in ENCODED:  # one step of 8-bit chroma is 1.8 in blue
        means = stored_images(encode_video(path, profile, choice=ALL, quality=100))[0].mean((0, 1))
        np.testing.assert_allclose(means, expected, atol=1.5, err_msg=profile)


@pytest.mark.parametrize("place", ["left", "centre", "centre by codec"])
def test_chroma_keeps_its_place(tmp_path: Path, place: str) -> None:
    """A ramp of colour: chroma that moves by half a pixel is 1.5 off everywhere."""
    path = tmp_path / "ramp.mkv"
    with av.open(str(path), "w") as container:
        if place == "centre by codec":
            stream = container.add_stream("mjpeg", rate=30, options={"qmin": "1", "qmax": "1"})
            stream.pix_fmt = "yuvj420p"
        else:
            options = {"crf": "1", "x264-params": "chromaloc=1" if place == "centre" else "chromaloc=0"}
            stream = container.add_stream("libx264", rate=30, options=options)
            stream.pix_fmt = "yuv420p"
        stream.width, stream.height = 64, 48
        planes = np.full((72, 64), 128, np.uint8)
        planes[48:60].reshape(24, 32)[:] = 32 + 6 * np.arange(32)
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(planes, stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    ((expected,),) = scaled_frames(path, [(64, 48)], [0])
    for profile in ENCODED:
        image = stored_images(encode_video(path, profile, choice=ALL, quality=100))[0]
        off = (image.astype(np.float64) - expected)[:, 16:48, 2].mean()  # blue, away from where it saturates
        assert abs(off) < 0.8, profile


@pytest.mark.parametrize(
    ("size", "short_side", "jpeg", "h264"),
    [
        ((160, 120), None, (160, 120), (160, 112)),
        ((160, 120), 64, (86, 64), (80, 64)),
        ((120, 160), 64, (64, 86), (64, 80)),
        ((160, 120), 500, (160, 120), (160, 112)),
        ((34, 20), None, (34, 20), (32, 16)),
        ((10, 6), None, (10, 6), (16, 16)),  # nothing smaller is a multiple of 16
    ],
)
def test_sizes(
    tmp_path: Path,
    size: tuple[int, int],
    short_side: int | None,
    jpeg: tuple[int, int],
    h264: tuple[int, int],
) -> None:
    path = write_video(tmp_path / "clip.mp4", 2, size)
    for profile, expected in (("jpeg", jpeg), ("h264", h264), ("hevc", h264)):
        video = encode_video(path, profile, choice=ALL, short_side=short_side)
        assert (video.width, video.height) == expected
        assert stored_images(video)[0].shape == (*expected[::-1], 3)


def test_quality_is_a_scale(tmp_path: Path) -> None:
    path = tmp_path / "noise.mp4"
    path.write_bytes(write_noise(tmp_path, "mp4"))
    for profile in ENCODED:
        sizes = [len(encode_video(path, profile, choice=ALL, quality=q).data) for q in (1, 30, 60, 70, 90, 100)]
        assert sizes == sorted(set(sizes))
        for quality in (0, 101):
            with pytest.raises(ValueError, match="allowed are 1"):
                encode_video(path, profile, choice=ALL, quality=quality)


@pytest.mark.parametrize(("quality", "steps"), [(1, [104]), (70, [16, 20]), (75, [16]), (100, [3])])
def test_every_jpeg_is_quantised_as_the_quality_says(tmp_path: Path, quality: int, steps: list[int]) -> None:
    """Also the first, for which FFmpeg's rate control has a mind of its own; halves take turns."""
    video = encode_video(write_video(tmp_path / "clip.mp4", 6), "jpeg", choice=ALL, quality=quality)
    found = [Image.open(io.BytesIO(jpeg)).quantization[0][5] for jpeg in packets(video)]  # type: ignore[attr-defined]
    assert found == (steps * 6)[:6]


@pytest.mark.parametrize("profile", PROFILES)
def test_same_bytes_again(tmp_path: Path, profile: str) -> None:
    path = write_video(tmp_path / "clip.mp4", 20, rotation=90)
    first, second = (encode_video(path, profile, choice=ALL) for _ in range(2))
    assert first.data == second.data and first.extradata == second.extradata


def test_copy_keeps_the_bytes_and_a_harmless_suffix(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.MOV", 5)
    video = encode_video(path, "copy", choice=ALL)
    assert (video.data, video.suffix) == (path.read_bytes(), "mov")
    assert not video.frames.num_bytes.any() and not video.frames.checksum.any()
    disguised = path.rename(tmp_path / "clip.json")
    assert encode_video(disguised, "copy", choice=ALL).suffix == "mp4"


def test_an_unverified_copy_says_the_same_of_a_good_video(tmp_path: Path) -> None:
    for kind in ("b-frames", "turned, edit list", "variable rate", "mkv", "mpeg-ts", "mpeg4 avi", "vp9 webm"):
        options, suffix = SOURCES[kind]
        path = write_video(tmp_path / f"clip.{suffix}", 12, **options)
        verified, skimmed = (encode_video(path, "copy", choice=ALL, verify=verify) for verify in (True, False))
        for name in ("data", "suffix", "width", "height", "source_frames"):
            assert getattr(skimmed, name) == getattr(verified, name), (kind, name)
        assert len(skimmed.frames) == len(verified.frames)
        assert skimmed.fps == pytest.approx(verified.fps, rel=0.01)
        assert skimmed.facts["seconds"] == pytest.approx(verified.facts["seconds"], abs=0.01)


def test_an_unverified_copy_decodes_only_the_first_frame(tmp_path: Path) -> None:
    data = bytearray(write_noise(tmp_path, "mp4", movflags="faststart"))
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="decode_error"):
        encode_video(path, "copy", choice=ALL)
    assert encode_video(path, "copy", choice=ALL, verify=False).source_frames == 30
    path.write_bytes(data[:middle])
    with pytest.raises(VideoError, match="truncated"):
        encode_video(path, "copy", choice=ALL, verify=False)


def test_natural_video_keeps_its_quality_and_colour(shared_clips: Path) -> None:
    """Phone clips and television at a quarter of their size keep more detail than any test picture."""
    psnr: dict[str, list[float]] = {"jpeg": [], "h264": []}
    for name in NATURAL:
        choice = FrameChoice(every=20)
        videos = [encode_video(shared_clips / name, profile, choice=choice, short_side=256) for profile in psnr]
        wanted = videos[0].frames.source_frame.tolist()
        references = scaled_frames(shared_clips / name, [(video.width, video.height) for video in videos], wanted)
        for profile, video, expected in zip(psnr, videos, references, strict=True):
            stored = np.stack(stored_images(video)).astype(np.float64)
            error = ((stored - expected) ** 2).mean((1, 2, 3))
            psnr[profile].append(float(np.mean(10 * np.log10(255**2 / error))))
            assert np.abs((stored - expected).mean((1, 2))).max() < 1.5, (profile, name)
    for profile, values in psnr.items():
        assert np.mean(values) >= 38 and min(values) >= 35.5, (profile, values)


def scaled_frames(path: Path, sizes: list[tuple[int, int]], wanted: list[int]) -> list[NDArray[np.float64]]:
    """Frames of the source in RGB, scaled by swscale to each size."""
    flags = av.video.reformatter.Interpolation
    exact = flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT | flags.FULL_CHR_H_INP
    frames: list[list[NDArray[np.uint8]]] = [[] for _ in sizes]
    with open_video(path) as reader:
        for frame in reader.frames():
            if frame.number in wanted:
                for size, images in zip(sizes, frames, strict=True):
                    width, height = reader.orientation.upright_size(*size)
                    rgb = frame.picture.reformat(width, height, "rgb24", interpolation=exact, threads=1).to_ndarray()
                    images.append(reader.orientation.apply(rgb))
    return [np.stack(images).astype(np.float64) for images in frames]
