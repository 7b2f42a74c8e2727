"""Make labelled mp4 clips in which only the order of frames tells the class.

How: classes come in pairs, and a clip of a pair's second class is a clip of its first
with the frames in reverse, encoded afresh. Shape, colour, texture, background, size, place, speed and phase
are random and the same for both, so a model that ignores the order of frames gives both the same
answer and cannot pass 50 % on the val set, however good it is.
Three things make that bound exact. Every drawing is written in both directions. Every frame is
encoded on its own (all keyframes, constant quantiser), so both directions decode to the same
pictures, bit for bit. And with 16, 32 or 48 frames the uniform test rule for T = 8 picks mirrored
frames. Train and val share no random key; bytes do not depend on the number of workers.
Cost: about 20 ms of one core and 14 kB of disk per clip of 16 frames, 64 x 64.

    python tools/make_motion_videos.py --out data/motion
    data/motion/annotations.tsv                     header: path, label, split
    data/motion/val/moves_left/00012.mp4            its reversal has the same number:
    data/motion/val/moves_right/00012.mp4
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.cli import run_cli
from tools.parts.shapes import SHAPES, Floats, Scenes, draw, generator, random_looks

PAIRS = (
    ("moves_right", "moves_left"),
    ("moves_down", "moves_up"),
    ("grows", "shrinks"),
    ("turns_clockwise", "turns_anticlockwise"),
)
"""Each second class is the first one's frames in reverse."""
CLASSES = tuple(name for pair in PAIRS for name in pair)
SPLITS = ("train", "val")
ALLOWED_FRAMES = (16, 32, 48)  # for these the test rule picks mirrored frames
SAMPLED_FRAMES = 8

_FRAMES_PER_SECOND = 16
_QUANTISER = 14  # of 51: 35 to 44 dB against the drawing, 4:2:0 included


@dataclass(frozen=True)
class Drawing:
    """One drawing, from which two clips are written: forwards and backwards."""

    split: str
    pair: int
    """Index into PAIRS."""
    number: int
    """Within split and pair: the name of both files."""
    key: tuple[int, ...]
    """Of its random generator; no two drawings share one."""
    frames: int
    size: int
    """Side in pixels."""

    def path(self, label: str) -> str:
        """Where the clip of class `label` lies, relative to the output folder."""
        return f"{self.split}/{label}/{self.number:05d}.mp4"


def make_motion_videos(
    out: Path | str,
    *,
    train: int = 1600,
    val: int = 320,
    size: int = 64,
    frames: int = 16,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write `train` + `val` clips and annotations.tsv into the folder `out`; returns its path.

    `size` is the side in pixels. `out` appears whole or not at all.
    """
    out = Path(out)
    drawings = plan_drawings(train=train, val=val, size=size, frames=frames, seed=seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_clips(unfinished, drawings, workers=workers, progress=progress)
        _write_annotations(unfinished / "annotations.tsv", drawings)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def plan_drawings(*, train: int, val: int, size: int, frames: int, seed: int) -> list[Drawing]:
    """The drawings of both splits; every class gets the same number of clips."""
    for option, count in (("--train", train), ("--val", val)):
        if count < 0 or count % len(CLASSES):
            raise ValueError(f"{option} {count}: give a multiple of {len(CLASSES)}, one clip per class and round")
    if frames not in ALLOWED_FRAMES:
        raise ValueError(f"--frames {frames}: choose one of {', '.join(map(str, ALLOWED_FRAMES))}")
    if size < 16 or size % 2:
        raise ValueError(f"--size {size}: give an even number of pixels, 16 or more")
    return [
        Drawing(split, pair, number, (seed, stream, pair, number), frames, size)
        for stream, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True))
        for number in range(count // len(CLASSES))
        for pair in range(len(PAIRS))
    ]


def sampled_frames(frames: int, count: int = SAMPLED_FRAMES) -> list[int]:
    """Frame numbers that the uniform test rule picks from a clip of `frames` frames."""
    bounds = [round((frames - 1) / count * i) for i in range(count + 1)]
    return [(a + b) // 2 for a, b in itertools.pairwise(bounds)]


def scenes_of(drawing: Drawing) -> Scenes:
    """What every frame shows, forwards: the pair's first class. All fields have `frames` rows."""
    rng = generator(*drawing.key)
    shape = rng.integers(len(SHAPES), size=1)
    looks = random_looks(rng, 1)
    x, y, radius, angle = _MOTIONS[PAIRS[drawing.pair][0]](rng, drawing.frames)

    def every_frame(value: NDArray) -> NDArray:
        return np.repeat(value, drawing.frames, axis=0)

    return Scenes(
        shape=every_frame(shape),
        **{name: every_frame(value) for name, value in looks.items()},
        x=x,
        y=y,
        radius=radius,
        angle=angle,
    )


def _slide(rng: np.random.Generator, frames: int) -> tuple[Floats, Floats, Floats, Floats]:
    """A small or medium shape goes along at constant speed."""
    travel = rng.uniform(0.3, 0.6)
    start = rng.uniform(0.2, 0.8 - travel)
    along = np.linspace(start, start + travel, frames)
    return (
        along.astype(np.float32),
        _constant(rng.uniform(0.22, 0.78), frames),
        _constant(rng.uniform(0.14, 0.28), frames),
        _constant(rng.uniform(0, 360), frames),
    )


def _slide_down(rng: np.random.Generator, frames: int) -> tuple[Floats, Floats, Floats, Floats]:
    across, down, radius, angle = _slide(rng, frames)
    return down, across, radius, angle


def _grow(rng: np.random.Generator, frames: int) -> tuple[Floats, Floats, Floats, Floats]:
    """The radius grows by a constant factor per frame, in place."""
    smallest = rng.uniform(0.14, 0.18)
    largest = smallest * rng.uniform(1.7, 2.3)
    return (
        _constant(rng.uniform(0.35, 0.65), frames),
        _constant(rng.uniform(0.35, 0.65), frames),
        np.geomspace(smallest, largest, frames).astype(np.float32),
        _constant(rng.uniform(0, 360), frames),
    )


def _turn(rng: np.random.Generator, frames: int) -> tuple[Floats, Floats, Floats, Floats]:
    """A large shape sweeps in place through up, give or take 45 degrees.

    With any phase at all, 400 training steps left this pair at chance: its direction is then a product of two frames,
    while here, as in the other pairs, early and late frames differ on average.
    """
    middle, sweep = rng.uniform(-45, 45), rng.uniform(120, 200)
    return (
        _constant(rng.uniform(0.42, 0.58), frames),
        _constant(rng.uniform(0.42, 0.58), frames),
        _constant(rng.uniform(0.3, 0.4), frames),
        np.linspace(middle - sweep / 2, middle + sweep / 2, frames).astype(np.float32),
    )


def _constant(value: float, frames: int) -> Floats:
    return np.full(frames, value, np.float32)


_Motion = Callable[[np.random.Generator, int], tuple[Floats, Floats, Floats, Floats]]
_MOTIONS: dict[str, _Motion] = {
    "moves_right": _slide,
    "moves_down": _slide_down,
    "grows": _grow,
    "turns_clockwise": _turn,
}
"""x, y, radius, angle of every frame, for the first class of each pair."""


def write_drawing(folder: Path, drawing: Drawing) -> int:
    """Write both directions of a drawing below `folder`; returns the number of clips."""
    forwards, backwards = PAIRS[drawing.pair]
    pictures = draw(scenes_of(drawing), drawing.size)
    encode_mp4(folder / drawing.path(forwards), pictures)
    encode_mp4(folder / drawing.path(backwards), pictures[::-1])
    return 2


def encode_mp4(path: Path, pictures: NDArray[np.uint8]) -> None:
    """Write RGB pictures [frames, h, w, 3] as H.264, every frame a keyframe, one thread."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FRAMES_PER_SECOND)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = 1
        stream.codec_context.options = {"qp": str(_QUANTISER), "preset": "veryfast"}
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class _WriteBelow:
    """`write_drawing` with its folder bound, in a form that other processes can receive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, drawing: Drawing) -> int:
        return write_drawing(self.folder, drawing)


def _write_clips(folder: Path, drawings: list[Drawing], *, workers: int, progress: bool) -> None:
    for split in SPLITS:
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
    write = _WriteBelow(folder)
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
    with pool, tqdm(total=2 * len(drawings), unit="clip", disable=not progress) as bar:
        written: Iterable[int] = (
            pool.map(write, drawings, chunksize=16) if isinstance(pool, ProcessPoolExecutor) else map(write, drawings)
        )
        for clips in written:
            bar.update(clips)


def _write_annotations(path: Path, drawings: list[Drawing]) -> None:
    rows = [f"{drawing.path(label)}\t{label}\t{drawing.split}" for drawing in drawings for label in PAIRS[drawing.pair]]
    path.write_text("\n".join(["path\tlabel\tsplit", *rows]) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--train", type=int, default=1600, help="clips")
    parser.add_argument("--val", type=int, default=320, help="clips")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--frames", type=int, default=16, help="per clip: 16, 32 or 48")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    out = make_motion_videos(**vars(args))
    print(f"wrote {args.train} train and {args.val} val clips of {len(CLASSES)} classes to {out}")


if __name__ == "__main__":
    run_cli(main)
