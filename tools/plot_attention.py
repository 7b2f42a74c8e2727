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

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.attention_maps import class_attention, image_model, image_model_trains
from model.video import VideoModel
from pipelines.cli import run_cli
from pipelines.decode import ClipDecoder
from pipelines.encode import copy_video
from pipelines.plan import EVAL_EPOCH, ClipOptions, ClipPlan, Turn, plan_clip
from pipelines.read import request_clip
from pipelines.shards import Sample, checksum
from tools.make_motion_videos import encode_mp4
from tools.view_clips import filmstrips
from train.trained import Trained, open_trained

_HEAT = 0.55  # weight of the colours over the picture
_PICTURES_A_FRAME = 15  # of the mp4, which has 30 a second


def main(argv: Sequence[str] | None = None) -> None:
    """One drawing. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    if not arguments.video.is_file():
        raise FileNotFoundError(f"no such video file: {arguments.video}")
    trained = open_trained(arguments.checkpoint, arguments.set)
    frozen = frozen_model(trained)
    size = trained.model.geometry.image_size
    frames, plan = read_clip(arguments.video, trained.config.data, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip = torch.from_numpy(frames)[None].to(device)
    maps = [patch_maps(class_attention(model.to(device), clip, arguments.block)) for model in (frozen, trained.model)]
    rows = [frames, *(overlay(frames, heat[0].cpu().numpy()) for heat in maps)]
    last = trained.model.geometry.layers - 1
    block = f"block {arguments.block % (last + 1)} of 0 to {last}"
    captions = [
        f"{arguments.video.name}, frames {' '.join(map(str, plan.frames))}",
        f"image model, {block}",
        f"trained model, {block}{said(trained, clip)}",
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


def frozen_model(trained: Trained) -> VideoModel:
    """The image model that a trained one was made from: the frozen part of it or, where all of it was trained, what the
    run started from."""
    source = trained.before_training() if image_model_trains(trained.model) else trained.model
    if source is None:
        raise ValueError(
            f"all of {trained.folder} was trained, and a converted checkpoint does not say what it started from; give "
            "the run, or a model with adapters"
        )
    return image_model(source)


def read_clip(video: Path, options: ClipOptions, size: int) -> tuple[NDArray[np.uint8], ClipPlan]:
    """The middle clip of a video file as evaluation cuts and decodes it: uint8 RGB [T, size, size, 3], and its plan.

    Raises ValueError or OSError where it cannot be decoded.
    """
    try:
        stored = copy_video(video)
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from error
    sample = Sample(
        sample_id=0,
        key=video.stem,
        labels=(),
        shard=video,
        video_offset=0,
        video_bytes=len(stored.data),
        checksum=checksum(stored.data),
        width=stored.width,
        height=stored.height,
        source_frames=stored.source_frames,
        fps=stored.fps,
        frames=stored.frames,
        extradata=stored.extradata,
    )
    plan = plan_clip(sample, Turn(0, EVAL_EPOCH), 0, dataclasses.replace(options, test_clips=1, test_crops=1))
    frames = np.empty((options.num_frames, size, size, 3), np.uint8)
    for _, reason in ClipDecoder(size, options.num_frames).decode_into([request_clip(sample, plan, "copy")], [frames]):
        raise ValueError(f"{video}: {reason}")
    return frames, plan


def patch_maps(attention_BTN: Tensor) -> Tensor:
    """The class token's shares → the patches' alone, in their grid [B, T, G, G], from 0 to 1 over each clip."""
    patches = attention_BTN[..., 1:]
    side = round(patches.shape[-1] ** 0.5)
    low, high = patches.amin((1, 2), keepdim=True), patches.amax((1, 2), keepdim=True)
    scaled = (patches - low) / (high - low).clamp_min(torch.finfo(patches.dtype).tiny)
    return scaled.unflatten(-1, (side, side))


def overlay(frames: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames [T, S, S, 3] under the colours of maps [T, G, G] of values from 0 to 1, enlarged bilinearly."""
    enlarged = F.interpolate(torch.from_numpy(heat)[:, None], frames.shape[1:3], mode="bilinear", align_corners=False)
    colours = matplotlib.colormaps["turbo"](enlarged[:, 0].numpy())[..., :3]
    mixed: NDArray[np.uint8] = np.round((1 - _HEAT) * frames + _HEAT * 255 * colours).astype(np.uint8)
    return mixed


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
