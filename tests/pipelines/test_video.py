"""Reading videos: the frames a player shows, and a reason for everything that cannot be used."""

import pickle
import resource
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.encode import FrameChoice, encode_video
from pipelines.video import Orientation, VideoError, decode_file, open_video
from tests.sets import decode_packets, numbers, packets, whole
from tests.videos import draw_number, write_noise, write_video

ALL = FrameChoice()
PROFILES = ("jpeg", "h264", "hevc", "copy")


def test_mirrored_frames_are_shown_as_a_player_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "mirrored.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height = 64, 96
        stream.set_display_rotation(90, hflip=True)
        stored = np.rot90(draw_number(5)[:, ::-1], -1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), "rgb24")))
        container.mux(stream.encode())
    with open_video(path) as reader:
        frames = list(reader.frames())
        assert reader.orientation.mirrored
        assert reader.orientation.upright_size(64, 96) == (96, 64)
    for profile in PROFILES:
        assert numbers(whole(encode_video(path, profile, choice=ALL))) == [5]
    assert len(frames) == 1


def test_orientation_turns_counter_clockwise() -> None:
    corner = np.array([[1, 0], [0, 0]])
    assert Orientation(1).apply(corner).tolist() == [[0, 0], [1, 0]]
    assert Orientation(0, mirrored=True).apply(corner).tolist() == [[0, 1], [0, 0]]


def test_decoders_refuse_damage_and_wrong_numbers(tmp_path: Path) -> None:
    video = encode_video(write_video(tmp_path / "clip.mp4", 10), "h264", choice=ALL)
    data = packets(video)
    for wanted in ([], [-1], [3, 2], [1, 1]):
        with pytest.raises(ValueError, match="sorted, each once"):
            decode_file(video.data, wanted)
        with pytest.raises(ValueError, match="sorted, each once"):
            decode_packets(data, video.extradata, wanted)
    with pytest.raises(ValueError, match="of 10 packets"):
        decode_packets(data, video.extradata, [10])
    with pytest.raises(VideoError, match=r"truncated: frame 10 is wanted, the video has 10"):
        decode_file(video.data, [9, 10])
    with pytest.raises(VideoError, match="decode_error"):
        decode_packets([b"\0\0\0\1garbage", *data[1:]], video.extradata, [0])
    with pytest.raises(VideoError, match="decode_error"):
        decode_packets(data[1:], video.extradata, [0])  # does not begin at a keyframe
    with pytest.raises(VideoError, match="decode_error"):
        decode_packets(data, b"", [0])


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(VideoError("truncated", "half of it")))
    assert (error.reason, error.detail, str(error)) == ("truncated", "half of it", "truncated: half of it")


def two_streams(path: Path) -> Path:
    """A small stream of 5 frames first, then a larger one of 8 frames that starts at number 100."""
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((48, 32), (96, 64)):
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height = size
            streams.append(stream)
        for stream, first, count in zip(streams, (0, 100), (5, 8), strict=True):
            for number in range(first, first + count):
                frame = av.VideoFrame.from_ndarray(draw_number(number, (stream.width, stream.height)), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def test_of_two_streams_the_larger_is_shown(tmp_path: Path) -> None:
    path = two_streams(tmp_path / "two.mkv")
    for profile in PROFILES:
        video = encode_video(path, profile, choice=ALL)
        assert (video.width, video.height) == (96, 64)
        assert numbers(whole(video)) == list(range(100, 108))


def test_change_of_size_is_scaled_to_the_first(tmp_path: Path) -> None:
    small = write_video(tmp_path / "small.ts", 6, (96, 64)).read_bytes()
    large = write_video(tmp_path / "large.ts", 5, (192, 128)).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(small + large)
    for profile in PROFILES:
        video = encode_video(path, profile, choice=ALL)
        assert (video.width, video.height, video.source_frames) == (96, 64, 11)
        assert numbers(whole(video)) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
        assert video.fps == pytest.approx(30, rel=0.05)  # although the clock starts again in the middle


def reason_of(path: Path, profile: str = "jpeg") -> str:
    with pytest.raises(VideoError) as caught:
        encode_video(path, profile, choice=ALL)
    return caught.value.reason


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\0",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        bytes(range(256)) * 64,
        b"RIFF",
        b"\x1aE\xdf\xa3",
        b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff",
        b"\0\0\0\x01moov" + b"\xff" * 8,
    ],
)
def test_what_is_no_video(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(contents)
    for profile in PROFILES:
        assert reason_of(path, profile) == "unreadable"


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{secret}'\n",
        "ffconcat version 1.0\nfile 'secret.mp4'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{secret}</BaseURL></MPD>",
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.ffconcat", "clip.sdp"])
def test_playlists_open_nothing(tmp_path: Path, playlist: str, name: str) -> None:
    secret = write_video(tmp_path / "secret.mp4", 3)
    path = tmp_path / name
    path.write_text(playlist.format(secret=secret))
    assert reason_of(path) == "unreadable"
    with pytest.raises(VideoError, match="unreadable"):
        decode_file(path.read_bytes(), [0])


@pytest.mark.parametrize("reference", ["file", "absolute", "http"])
def test_a_movie_that_refers_to_another_file_opens_nothing(tmp_path: Path, reference: str) -> None:
    """QuickTime may keep its media in another file; here that file holds what is missing."""
    secret = write_video(tmp_path / "secret.mp4", 3)
    data = secret.read_bytes()
    place = {"file": "secret.mp4", "absolute": str(secret), "http": "http://127.0.0.1:9/secret.mp4"}[reference]
    url = b"url \0\0\0\0" + place.encode() + b"\0"  # the flag that says "in this file" is gone
    start = data.index(b"url \0\0\0\x01") - 4
    added = len(url) + 4 - 12
    changed = bytearray(data[:start] + struct.pack(">I", len(url) + 4) + url + data[start + 12 :])
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = changed.index(box) - 4
        struct.pack_into(">I", changed, at, struct.unpack_from(">I", changed, at)[0] + added)
    media = changed.index(b"mdat") + 4
    changed[media : changed.index(b"moov") - 4] = bytes(changed.index(b"moov") - 4 - media)
    path = tmp_path / "movie.mov"
    path.write_bytes(changed)
    assert reason_of(path) in ("decode_error", "no_frames")


def test_pictures_and_streams_without_a_container_are_no_videos(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.fromarray(draw_number(number)).save(tmp_path / f"frame_{number:03d}.png")
    (tmp_path / "frame_%03d.mp4").write_bytes((tmp_path / "frame_001.png").read_bytes())
    raw = tmp_path / "raw.mp4"
    with av.open(str(raw), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height = 96, 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(1), "rgb24")))
        container.mux(stream.encode())
    y4m = tmp_path / "raw.avi"
    y4m.write_bytes(b"YUV4MPEG2 W96 H64 F30:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(96 * 64 * 3 // 2))
    for path in (tmp_path / "frame_%03d.mp4", tmp_path / "frame_001.png", raw, y4m):
        assert reason_of(path) == "unreadable"


@pytest.mark.parametrize(("side", "reason"), [(10_240, "too_large"), (16_384, "decode_error")])
def test_frames_larger_than_life(tmp_path: Path, side: int, reason: str) -> None:
    path = write_video(tmp_path / "clip.mkv", 2, (320, 320), codec="ffv1", pix_fmt="bgr0")
    data = path.read_bytes()
    for element in (b"\xb0\x82", b"\xba\x82"):  # width, height
        assert data.count(element + struct.pack(">H", 320)) == 1
        data = data.replace(element + struct.pack(">H", 320), element + struct.pack(">H", side))
    path.write_bytes(data)
    for profile in PROFILES:
        with pytest.raises(VideoError, match=rf"{reason}: .*(10240 x 10240|is unknown or above \d+) pixels"):
            encode_video(path, profile, choice=ALL)


def test_a_frame_that_outgrows_its_header_takes_no_memory(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 3, codec="mjpeg", pix_fmt="yuvj420p")
    data = path.read_bytes()
    size = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 64, 96)
    assert data.count(size) == 3
    path.write_bytes(data.replace(size, size[:-4] + struct.pack(">HH", 16000, 16000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_of(path) in ("decode_error", "no_frames", "unknown_codec")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; a frame would take 384 MB


def test_an_index_of_millions_of_frames_in_a_few_bytes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 12)
    data = bytearray(path.read_bytes())
    count = 2_000_000
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, count)  # all of one byte
    struct.pack_into(">I", data, data.index(b"stsc") + 16, count)  # all in one chunk
    struct.pack_into(">I", data, data.index(b"stts") + 12, count)
    path.write_bytes(data)
    for profile in PROFILES:
        assert reason_of(path, profile) == "too_large"


def test_too_many_frames_and_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = write_video(tmp_path / "frames.mkv", 12)
    years = write_video(tmp_path / "years.mkv", 3, times=[0, 0.1, 40_000_000])
    for verify in (True, False):
        with pytest.raises(VideoError, match=r"too_large: .* in 40000000 s; allowed are 1048576 in 43200 s: cut it"):
            encode_video(years, "copy", choice=ALL, verify=verify)
    assert reason_of(years) == "too_large"
    monkeypatch.setattr("pipelines.video.MAX_FRAMES", 11)
    assert {reason_of(frames, profile) for profile in PROFILES} == {"too_large"}
    with pytest.raises(VideoError, match="too_large"):
        encode_video(frames, "copy", choice=ALL, verify=False)


def test_absurd_rates_are_packed_as_they_are(tmp_path: Path) -> None:
    fast = write_video(tmp_path / "fast.mp4", 12, fps=50_000)
    slow = write_video(tmp_path / "slow.mkv", 3, times=[0, 10_000, 20_000])
    for path, fps in ((fast, 10_000), (slow, 1e-4)):
        for profile in PROFILES:
            video = encode_video(path, profile, choice=ALL)
            assert numbers(whole(video)) == list(range(video.source_frames))
            assert video.fps == pytest.approx(fps, rel=0.1)


def test_attachments_and_a_crowd_of_streams(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height = 96, 64
        for number in range(60):
            container.add_attachment(f"font{number}.ttf", "application/x-truetype-font", bytes(1000))
        for number in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(number), "rgb24")))
        container.mux(stream.encode())
    for profile in PROFILES:
        assert numbers(whole(encode_video(path, profile, choice=ALL))) == [0, 1, 2]
    with av.open(str(path), "w") as container:  # the last one is shown, but that many are not looked at
        for _ in range(250):
            stream = container.add_stream("mjpeg", rate=30)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuvj420p")))
        container.mux(stream.encode())
    assert reason_of(path) in ("unreadable", "no_frames")


def test_boxes_without_end(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0\0\0\x08moov" * 100_000)
    assert reason_of(path) == "no_video_stream"


def test_codec_without_a_decoder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz9"))
    assert reason_of(path) == "unknown_codec"


def test_sound_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason_of(path) == "no_video_stream"


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_cut_short_with_the_index_in_front(tmp_path: Path, suffix: str, kept: float) -> None:
    data = write_noise(tmp_path, suffix, **({"movflags": "faststart"} if suffix == "mp4" else {}))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data)
    assert encode_video(path, "jpeg", choice=ALL).source_frames == 30
    path.write_bytes(data[: int(len(data) * kept)])
    for profile in PROFILES:
        assert reason_of(path, profile) == "truncated"


def test_cut_short_with_the_index_behind(tmp_path: Path) -> None:
    data = write_noise(tmp_path, "mp4")
    path = tmp_path / "cut.mp4"
    for kept in (0.3, 0.5, 0.98):
        path.write_bytes(data[: int(len(data) * kept)])
        assert reason_of(path) == "truncated"


def test_index_without_media(tmp_path: Path) -> None:
    data = write_noise(tmp_path, "mp4", movflags="faststart")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: data.index(b"mdat") + 4])
    assert reason_of(path) == "truncated"


def test_overwritten_middle(tmp_path: Path) -> None:
    data = bytearray(write_noise(tmp_path, "mp4", movflags="faststart"))
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(1).bytes(4000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    for profile in PROFILES:
        assert reason_of(path, profile) == "decode_error"


def test_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(
        str(path),
        "w",
        options={
            "encryption_scheme": "cenc-aes-ctr",
            "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
            "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
        },
    ) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height = 96, 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(1), "rgb24")))
        container.mux(stream.encode())
    assert reason_of(path) == "encrypted"


ZOO_REJECTS = {
    "Curator__dev.tar.gz": "unreadable",
    "decord__corrupted.mp4": "decode_error",
    "made_bitflips_400.mp4": "decode_error",
    "made_empty.mp4": "unreadable",
    "made_html_error_page.mp4": "unreadable",
    "made_lfs_pointer.mp4": "unreadable",
    "made_random_bytes.mp4": "unreadable",
    "made_truncated_60pct_asis.mp4": "truncated",
    "made_truncated_60pct_moov_first.mp4": "truncated",
    "made_truncated_60pct_moov_last.mp4": "truncated",
    "mp4parse-rust__afconvert-aac-0.5s.mp4": "no_video_stream",
    "mp4parse-rust__av1-clearkey-cbcs-video.mp4": "encrypted",
    "mp4parse-rust__bipbop_480wp_1001kbps-cenc-video-key1-init.mp4": "encrypted",
    "mp4parse-rust__bipbop_nonfragment_header.mp4": "truncated",
    "mp4parse-rust__invalid_userdata.mp4": "truncated",
    "mp4parse-rust__no_timescale.mp4": "decode_error",
    "mp4parse-rust__short-cenc.mp4": "encrypted",
    "small__AudioVideoInterleave.avi": "no_frames",
    "small__FlashVideo.flv": "unreadable",
    "small__WindowsMediaVideo.wmv": "no_frames",
    "small__mp4-with-audio.mp4": "no_video_stream",
    "torchcodec__nasa_13013.mp4.audio.mp3": "unreadable",
}
ZOO_SHOWN = {  # frames and size as a player shows them, where the header or the first look says otherwise
    "SkateboardML__Kickflip110.mov": (217, 1792, 828),
    "Megatron-Energon__sync_test.avi": (1891, 192, 108),
    "decord__video_180.mov": (3, 568, 320),
    "decord__video_270.mov": (3, 320, 568),
    "made_h264_size_change.ts": (122, 320, 240),
    "mp4parse-rust__video_rotation_90.mp4": (1, 60, 100),
    "small__webm.webm": (1, 8, 8),
    "torchcodec__discard_first_keyframe.mp4": (25, 64, 64),
    "torchcodec__nasa_13013.mp4": (390, 480, 270),
    "torchcodec__test_non_zero_start.mp4": (12, 200, 112),
    "torchcodec__testsrc2_444_8bit_hevc.mp4": (25, 321, 241),
}


def test_zoo(shared_clips: Path) -> None:
    rejects, shown = {}, {}
    for path in sorted((shared_clips / "zoo").iterdir()):
        if path.name == "README.md":
            continue
        try:
            video = encode_video(path, "copy", choice=ALL)
        except VideoError as error:
            rejects[path.name] = error.reason
        else:
            shown[path.name] = (video.source_frames, video.width, video.height)
    assert rejects == ZOO_REJECTS
    assert len(shown) == 62
    assert {name: shown[name] for name in ZOO_SHOWN} == ZOO_SHOWN


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", 3)
    monkeypatch.setattr("pipelines.video.MAX_SIDE", 80)
    assert reason_of(path) == "too_large"
    monkeypatch.undo()
    monkeypatch.setattr("pipelines.encode.MAX_STORED_BYTES", 100)
    assert {reason_of(path, profile) for profile in PROFILES} == {"too_large"}
