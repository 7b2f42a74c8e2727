"""Computes the frame features of a packed set once, into a set of its own that methods with a frozen image model train
from at thousands of clips a second.

    python tools/extract_features.py SHARDS FEATURES --name ViT-B-16-quickgelu --pretrained openai
    python tools/extract_features.py SHARDS FEATURES --every 2 --channels bgr

Every stored frame goes through the image model as evaluation cuts it: the centre crop, neither mirrored nor augmented,
in float32. Keys, splits, labels and frame numbers stay: FEATURES takes the place of SHARDS in a recipe (data.shards).
What does not decode is listed in FEATURES/rejects.tsv. A run that was interrupted or killed is continued by the same
command.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from model.backbone import NORMALISATIONS
from model.image_text import load_frame_encoder
from pipelines.cli import run_cli
from pipelines.extract import ExtractReport, ExtractSettings, extract_features
from pipelines.loader import default_workers
from pipelines.pack import unfinished_folder
from pipelines.shards import CHANNELS


def main(argv: Sequence[str] | None = None) -> None:
    """One extraction. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    settings = ExtractSettings(
        every=arguments.every, channels=arguments.channels, crop=arguments.crop, batch=arguments.batch
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_frame_encoder(arguments.name, arguments.pretrained, normalisation=arguments.normalisation).to(device)
    workers = arguments.workers or default_workers(1, device.type)
    started = time.perf_counter()
    with tqdm(unit="video", disable=None) as bar:

        def advance(report: ExtractReport) -> None:
            bar.total = report.total
            bar.set_postfix(frames=report.frames, rejected=len(report.rejects), refresh=False)
            bar.update()

        try:
            report = extract_features(
                arguments.shards,
                arguments.out,
                encoder,
                settings,
                workers=workers,
                restart=arguments.restart,
                on_video=advance,
            )
        except (KeyboardInterrupt, SystemExit):
            bar.close()
            if (kept := unfinished_folder(arguments.out)).exists():
                print(
                    f"stopped; finished shards are kept in {kept}: the same command goes on from them", file=sys.stderr
                )
            raise
    _print_summary(arguments.out, report, time.perf_counter() - started)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="a packed set of videos: a folder")
    add("out", type=Path, metavar="FEATURES", help="new folder for the features")
    add("--name", default="ViT-B-16-quickgelu", help="image model, as model.name in a recipe (default: %(default)s)")
    add("--pretrained", default="openai", help="its weights, as model.pretrained (default: %(default)s)")
    add("--normalisation", choices=("", *NORMALISATIONS), default="", help="as model.normalisation (default: its own)")
    add("--every", type=int, default=1, metavar="N", help="take every N-th stored frame (default: all)")
    add("--channels", choices=CHANNELS, default="rgb", help="bgr: red and blue swapped, as published (default: rgb)")
    add("--crop", type=float, default=0.875, help="centre crop, a share of the short side (default: %(default)s)")
    add("--batch", type=int, default=256, metavar="N", help="frames at once (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="decode processes (default: as many as suit the machine)")
    add("--restart", action="store_true", help="begin again instead of going on where an earlier run ended")
    return parser.parse_args(argv)


def _print_summary(out: Path, report: ExtractReport, wall_seconds: float) -> None:
    counts = ", ".join(f"{split} {count}" for split, count in report.samples.items())
    num_bytes = sum(shard.bytes for shards in report.shards.values() for shard in shards)
    print(
        f"{out}: {report.frames} frames of {report.samples.total()} videos ({counts}), {num_bytes / 1e6:,.1f} MB, in "
        f"{wall_seconds:,.1f} s"
    )
    if report.rejects:
        print(f"  rejected: {len(report.rejects)}; listed in {out / 'rejects.tsv'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what schedulers send: end as after Ctrl-C
    run_cli(main)
