"""Names what videos show: the likeliest classes of each, with probabilities.

    python tools/predict.py runs/skate new_clips/ one_more.mov
    python tools/predict.py runs/skate clip.mp4 --annotate shown.mp4
    python tools/predict.py runs/skate evening.mp4 --window 2s --stride 1s --annotate shown.mp4
    python tools/predict.py zero_shot.toml clips/ --classes "ollie,kickflip,heelflip"
    python tools/predict.py runs/k400 --shards SHARDS --json

CHECKPOINT is a run's folder (its newest checkpoint), one of its checkpoints, or what tools/convert_checkpoint.py made;
of a method that trains nothing (zero_shot) its recipe. VIDEO is a file, or a folder of which every video is taken. They
are cut, decoded and averaged as tools/evaluate.py does with a packed set: in as many views as the run's final test, or
--views. A video that cannot be decoded is named with the reason, the others go on, and the exit status is 1; it is 2
where none can be, or something else is wrong. Probabilities add up to 1, but where a video may have several labels.

--json FILE (alone or with - for standard output, which then holds nothing else) writes one object: checkpoint, step,
classes (their number), multi_label, views (CLIPSxCROPS), averaging, num_frames, sampling, interval, precision, device,
packages; videos, one a line: key (path or sample), labels and probabilities of the likeliest --top classes, views (how
many of them could be decoded), error (null, or what is wrong); failed, the number of videos with an error.
--csv FILE holds the same labels as a table.

--window SECONDS (2 or 2s) cuts every video into windows of that length, one every --stride (default: as long), and
writes into --out NAME.csv (start_seconds, end_seconds, label, probability, …) and NAME.png (the leading classes over
time, pictures of the video, the best class as a coloured bar). Each window is cut as a video of its own, in one view
unless --views says otherwise; the last one ends with the video, and is left out where it would start less than a
tenth of the stride after the one before. Times are the file's own, from its first picture on. A video is decoded from
end to end once, and held in memory only as far as windows overlap.

--annotate OUT.mp4 writes the video with the labels on every picture: H.264 of the same size (made even), upright, with
the same times, without sound; with --window the labels of the nearest window. Of several videos OUT is a folder.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; train/main.py says why

from pipelines.cli import run_cli, writable
from pipelines.source_files import is_video
from pipelines.windows import check_windows


def main(argv: Sequence[str] | None = None) -> int:
    """One round of predictions. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    for option in ("json", "csv"):
        path = getattr(arguments, option)
        if path is not None and str(path) != "-":
            writable(path, f"--{option}")
    # Not above: every process that looks at a video imports this file, and torch takes seconds.
    from tools.parts.predicting import predict_all

    return predict_all(arguments)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = "a run, a checkpoint, a converted one, or the .toml recipe of a method without training"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=what)
    add("videos", type=Path, nargs="*", metavar="VIDEO", help="a video file, or a folder of them")
    add("--shards", metavar="SET", help="instead of videos a packed set: a folder, or its address")
    add("--split", help="of that set (default: the run's validation split, or val)")
    add("--classes", metavar="A,B,…|FILE", help="for models that read class names; in a file one a line")
    add("--multi-label", action="store_true", help="a video may have several labels (default: as the run's set says)")
    add("--views", metavar="CLIPSxCROPS", help="such as 3x1 (default: the run's; with --window 1x1)")
    add("--top", type=int, default=3, metavar="K", help="classes a video (default: %(default)s; 0: all)")
    what = "write the predictions for programs; alone, behind the videos, or with -: on standard output"
    add("--json", type=Path, nargs="?", const=Path("-"), metavar="FILE", help=what)
    add("--csv", type=Path, metavar="FILE", help="write the predictions as a table")
    add("--window", type=_seconds, metavar="SECONDS", help="a timeline of windows of this length, such as 2s")
    add("--stride", type=_seconds, metavar="SECONDS", help="from one window to the next (default: as --window)")
    add("--out", type=Path, metavar="FOLDER", help="for timelines (default: timelines beside the checkpoint)")
    add("--annotate", type=Path, metavar="OUT.mp4", help="write the video with its labels; of several into a folder")
    add("--batch", type=int, metavar="N", help="clips at once (default: as in training)")
    text = "seconds after which a file that does not say what it is, is given up (default: %(default)s)"
    add("--timeout", type=_seconds, default=300.0, metavar="S", help=text)
    add("--set", action="append", default=[], metavar="A.B=C", help="change one key of the run's recipe (repeatable)")
    add("--precision", choices=("bf16", "fp32"), help="default: as trained")
    arguments = parser.parse_args(argv)
    if arguments.json is not None and is_video(arguments.json.name):
        parser.error(f"--json {arguments.json}: that names a video; put --json behind the videos, or take --json -")
    if bool(arguments.videos) == bool(arguments.shards):
        parser.error("give videos (files or folders) or --shards SET, one of the two")
    if arguments.shards and (arguments.window or arguments.annotate):
        parser.error("--window and --annotate need the videos themselves, not --shards")
    if arguments.split and not arguments.shards:
        parser.error("--split names a part of a packed set; it goes with --shards")
    if arguments.window is None and (arguments.stride is not None or arguments.out is not None):
        parser.error("--stride and --out go with --window")
    if arguments.window is not None:
        if arguments.json or arguments.csv:
            parser.error("--window writes a csv of its own into --out; --json and --csv are for whole videos")
        arguments.stride = arguments.stride or arguments.window
        try:
            check_windows(arguments.window, arguments.stride)
        except ValueError as error:
            parser.error(str(error))
    if arguments.csv is not None and str(arguments.csv) == "-":
        parser.error("--csv -: name a file; for standard output there is --json -")
    if arguments.views is not None and not re.fullmatch(r"[1-9][0-9]{0,2}x[13]", arguments.views):
        parser.error(f"--views {arguments.views}: the form is CLIPSxCROPS, such as 3x1; crops are 1 or 3")
    for option, low, high in (("top", 0, 10**6), ("batch", 1, 4096)):
        value = getattr(arguments, option)
        if value is not None and not low <= value <= high:
            parser.error(f"--{option} {value}: allowed are {low} to {high}")
    return arguments


def _seconds(text: str) -> float:
    """`2`, `2s` or `0.5s`."""
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: the form is a number of seconds above 0, such as 2s or 0.5")
    return seconds


if __name__ == "__main__":
    run_cli(main)
