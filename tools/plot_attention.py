"""Draws where a trained model looks in a video, beside where the image model looks that it was made from.

    python tools/plot_attention.py runs/k400 VIDEO --out attention.png --mp4 attention.mp4

Three rows: the frames of the middle clip as evaluation cuts it; the class token's attention in one block of the image
model, frame by frame, without adapters; the same of the trained model. Mean over heads, scaled from the least to the
largest of the clip. CHECKPOINT is a run's folder, one of its checkpoints, or what tools/convert_checkpoint.py made, of
any method on an image transformer with a class token.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.cli import run_cli
from pipelines.decode import ClipDecoder
from pipelines.files import file_sample, probe
from pipelines.plan import EVAL_EPOCH, ClipOptions, ClipPlan, Turn, plan_clip
from pipelines.read import FILE, request_clip
from tools.make_motion_videos import encode_mp4
from train.looks import looks_of
from train.pictures import filmstrips
from train.trained import Trained, open_trained

_PICTURES_A_FRAME = 15  # of the mp4, which has 30 a second


def main(argv: Sequence[str] | None = None) -> None:
    """One drawing. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    if not arguments.video.is_file():
        raise FileNotFoundError(f"no such video file: {arguments.video}")
    trained = open_trained(arguments.checkpoint, arguments.set)
    size = trained.model.geometry.image_size
    frames, plan = read_clip(arguments.video, trained.config.data, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (looks,) = looks_of(trained, frames[None], block=arguments.block, device=device)
    rows = [looks.frames, looks.image_model, looks.trained]
    last = trained.model.geometry.layers - 1
    block = f"block {arguments.block % (last + 1)} of 0 to {last}"
    captions = [
        f"{arguments.video.name}, frames {' '.join(map(str, plan.frames))}",
        f"image model, {block}",
        f"trained model, {block}{said(trained, torch.from_numpy(frames)[None].to(device))}",
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    filmstrips(rows, captions).save(arguments.out)
    print(arguments.out)
    if arguments.mp4 is not None:
        arguments.mp4.parent.mkdir(parents=True, exist_ok=True)
        encode_mp4(arguments.mp4, side_by_side(rows).repeat(_PICTURES_A_FRAME, 0))
        print(arguments.mp4)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint, or a converted one")
    parser.add_argument("video", type=Path, metavar="VIDEO", help="a video file")
    parser.add_argument("--block", type=int, default=-1, metavar="N", help="from 0, or -1 for the last (default)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), metavar="FILE", help="picture (PNG)")
    parser.add_argument("--mp4", type=Path, metavar="FILE", help="also write a video, the three side by side")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change one key of the run's recipe; of a converted checkpoint data.…, ds.… and model.…",
    )
    arguments = parser.parse_args(argv)
    for option, suffix in (("out", ".png"), ("mp4", ".mp4")):
        path = getattr(arguments, option)
        if path is not None and path.suffix.lower() != suffix:
            parser.error(f"--{option} {path}: it is a {suffix} file")
    return arguments


def read_clip(video: Path, options: ClipOptions, size: int) -> tuple[NDArray[np.uint8], ClipPlan]:
    """The middle clip of a video file as evaluation cuts and decodes it: uint8 RGB [T, size, size, 3], and its plan.

    Raises ValueError or OSError where it cannot be decoded.
    """
    try:
        sample = file_sample(video, probe(video))
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from error
    plan = plan_clip(sample, Turn(0, EVAL_EPOCH), 0, dataclasses.replace(options, test_clips=1, test_crops=1))
    frames = np.empty((options.num_frames, size, size, 3), np.uint8)
    for _, reason in ClipDecoder(size, options.num_frames).decode_into([request_clip(sample, plan, FILE)], [frames]):
        raise ValueError(f"{video}: {reason}")
    return frames, plan


def side_by_side(rows: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Rows of T frames each → T pictures [T, H, W, 3], the rows from left to right, of even sides for H.264."""
    pictures = np.concatenate(rows, axis=2)
    return np.pad(pictures, ((0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)))


@torch.no_grad()
def said(trained: Trained, clip: Tensor) -> str:
    """What the trained model takes the clip for; nothing where it has no names for it."""
    if trained.classes is None:
        return ""
    shares = trained.model(clip)[0].softmax(0)
    best = int(shares.argmax())
    return f", which sees {trained.classes[best]} ({100 * shares[best]:.0f} %)"


if __name__ == "__main__":
    run_cli(main)
