"""Prints what the plan takes from a video, and the learning rate of a step, each as one line of JSON: to compare with
another implementation.

    python tools/show_plan.py dense --frames 300 --clip-len 8 --interval 16 --clips 3
    python tools/show_plan.py uniform --frames 45 --clip-len 8
    python tools/show_plan.py crops --size 256x340
    python tools/show_plan.py lr --recipe aim_b16_k400 --iters-per-epoch 269 --at 19

They come from the functions that training and evaluation use.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.cli import run_cli
from pipelines.plan import ClipOptions, eval_box, eval_frames


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.what == "dense":
        shown: list[object] = dense_clips(arguments.frames, arguments.clip_len, arguments.interval, arguments.clips)
    elif arguments.what == "uniform":
        shown = uniform_clip(arguments.frames, arguments.clip_len)
    elif arguments.what == "crops":
        shown = three_crops(arguments.size, arguments.crop)
    else:
        shown = [parity_rate(arguments.recipe, arguments.iters_per_epoch, arguments.at)]
    print(json.dumps(shown))


def dense_clips(num: int, clip_len: int, interval: int, clips: int) -> list[object]:
    """Source frames [clips · clip_len] of the test clips of a video of `num` frames (Kinetics), clip after clip, as the
    official `SampleFrames` lists them."""
    options = ClipOptions(num_frames=clip_len, interval=interval, test_clips=clips)
    return [frame for clip in range(clips) for frame in eval_frames(num, options, clip).tolist()]


def uniform_clip(num: int, clip_len: int) -> list[object]:
    """Source frames [clip_len] of the test clip of a video of `num` frames (Something-Something V2, Diving-48)."""
    frames: list[object] = eval_frames(num, ClipOptions(num_frames=clip_len, sampling="uniform")).tolist()
    return frames


def three_crops(size: tuple[int, int], crop: int) -> list[object]:
    """[x, y] of the upper left corner of the left, right and middle (top, bottom, middle) square of `crop` pixels in a
    frame of `size`, height and width, that has been resized to that short side."""
    height, width = (int(side * (crop / min(size)) + 0.5) for side in size)  # as MMCV rounds
    options = ClipOptions(test_crops=3)
    return [list(eval_box(width, height, options, place)[:2]) for place in range(3)]


def parity_rate(recipe: str, iters_per_epoch: int, at: int) -> float:
    """The learning rate of iteration `at` of a recipe's run, 0-based, with the official schedule's cosine."""
    from train.resolve import load_config  # loads torch, which takes seconds and only this needs
    from train.schedule import learning_rate

    config = load_config(recipe, ["data.shards=unused"])
    schedule = replace(config.schedule, cosine="epoch")
    num_steps = ceil(schedule.epochs * iters_per_epoch)
    if at >= num_steps:
        raise ValueError(f"--at {at}: the run of {recipe} has iterations 0 to {num_steps - 1}")
    return learning_rate(at, num_steps, config.optimizer.peak(config.deepspeed["train_batch_size"]), schedule)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    dense = kinds.add_parser("dense", help="source frames of the test clips, one after another")
    uniform = kinds.add_parser("uniform", help="source frames of the test clip, one from each of equal segments")
    for parser_of in (dense, uniform):
        parser_of.add_argument("--frames", type=_positive, required=True, metavar="N", help="frames of the video")
        parser_of.add_argument("--clip-len", type=_positive, required=True, metavar="T", help="frames of a clip")
    dense.add_argument("--interval", type=_positive, required=True, metavar="K", help="source frames between two")
    dense.add_argument("--clips", type=_positive, default=1, metavar="C", help="test clips a video (default: 1)")
    crops = kinds.add_parser("crops", help="[x, y] of the left, right and middle crop, once the short side is resized")
    crops.add_argument("--size", type=_size, required=True, metavar="HxW", help="height and width of the frame")
    crops.add_argument(
        "--crop", type=_positive, default=224, metavar="PIXELS", help="side of a crop and short side (default: 224)"
    )
    rate = kinds.add_parser("lr", help="learning rate of an iteration, with the official schedule (cosine per epoch)")
    rate.add_argument("--recipe", required=True, help="a TOML file, or the name of one in train/recipes")
    rate.add_argument("--iters-per-epoch", type=_positive, required=True, metavar="N", help="steps of an epoch")
    rate.add_argument("--at", type=_count, required=True, metavar="I", help="iteration of the run, from 0")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, 0 to 999999999, is allowed")
    return int(text)


def _positive(text: str) -> int:
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is allowed")
    return number


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: HEIGHTxWIDTH in pixels is allowed, such as 256x340")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run_cli(main)
