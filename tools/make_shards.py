"""Packs a folder of videos into shards that are cheap to train from.

    python tools/make_shards.py VIDEOS --out SHARDS --fps source/4 --short-side 256
    python tools/make_shards.py k400 --annotations k400/annotations --max-missing 5% --out SHARDS --fps source/4

VIDEOS holds one folder per class, or <split>/<class>, or anything plus annotation files, whose formats are listed in
pipelines/annotation_formats.py; what they were recognised as is printed first. Every video is decoded once and checked;
what cannot be used is listed with its reason in SHARDS/rejects.tsv, and the rest is packed. A run that was interrupted
or killed is continued by the same command, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.annotations import FORMATS, Listing, list_videos
from pipelines.cli import run_cli
from pipelines.encode import DEFAULT_QUALITY, SHRUNK_QUALITY
from pipelines.pack import PackReport, PackSettings, pack_videos, unfinished_folder
from pipelines.shards import PROFILES
from tools.parts.progress import Progress

_QUALITY = f"1 (smallest) to 100 (best) (default: {DEFAULT_QUALITY}, or {SHRUNK_QUALITY} if scaled to half or less)"
SHORT_SIDE = 256  # pixels: what the published recipes train from


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what schedulers send: end as after Ctrl-C
    args = _parse_args()
    settings = PackSettings(
        profile=args.profile,
        fps=args.fps,
        short_side=_short_side(args.short_side, args.profile),
        quality=args.quality,
        verify=not args.no_verify,
        max_shard_bytes=round(args.max_shard_mb * 1e6),
        seed=args.seed,
        timeout_seconds=args.timeout,
    )
    listing = list_videos(
        args.source,
        annotations=args.annotations,
        annotation_format=args.format,
        fold=args.fold,
        max_missing=args.max_missing,
        val_fraction=args.val_fraction,
        seed=args.seed,
    )
    for note in listing.notes:
        print(note, flush=True)
    if all(video.split == "train" for video in listing.videos):
        print("warning: no val split, so training has nothing to evaluate on; add --val-fraction 0.2", flush=True)
    started = time.perf_counter()
    with Progress(len(listing.videos), "video") as progress:

        def advance(report: PackReport) -> None:
            progress.advance(note=f"{len(report.rejects)} rejected")

        try:
            report = pack_videos(
                args.source,
                listing,
                args.out,
                settings,
                workers=args.workers,
                restart=args.restart,
                on_video=advance,
            )
        except (KeyboardInterrupt, SystemExit):
            progress.close()
            if unfinished_folder(args.out).exists():
                print(
                    f"stopped; finished shards are kept in {unfinished_folder(args.out)}: the same command goes on "
                    "from them",
                    file=sys.stderr,
                )
            raise
    _print_summary(args.out, listing, report, time.perf_counter() - started, verified=settings.verify)
    return 0


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of videos: <class>/… or <split>/<class>/…")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    add(
        "--annotations",
        action="append",
        default=[],
        metavar="[SPLIT=]PATH",
        help="a list, or a folder of official files; once for each file, its split before it where its name does not "
        "say it (val=b.csv); classes=FILE names the classes of a list of numbers (default: folders are classes)",
    )
    add(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="of the annotations, where it cannot be recognised: "
        + "; ".join(f"{k}: {f.about}" for k, f in FORMATS.items()),
    )
    add(
        "--fold", type=int, default=1, metavar="N", help="official division of UCF-101 or HMDB-51: 1, 2, 3 (default: 1)"
    )
    add("--profile", choices=PROFILES, default="jpeg", help="how videos are stored (default: %(default)s)")
    add(
        "--fps",
        default="source",
        metavar="source|source/K|N",
        help="frames to store: all, every K-th, or N per second by time (default: %(default)s)",
    )
    add(
        "--short-side",
        metavar="S|source",
        help=f"scale down to S pixels on the shorter side, or keep the source; never enlarges (default: {SHORT_SIDE})",
    )
    add("--quality", type=int, metavar="Q", help=_QUALITY)
    add(
        "--no-verify",
        action="store_true",
        help="with --profile copy: decode no more than the first frame of each video; the set counts as unverified",
    )
    add(
        "--max-shard-mb",
        type=float,
        default=1000,
        metavar="MB",
        help="a shard ends before this; a larger video stands alone (default: %(default)s)",
    )
    add("--workers", type=int, default=_num_cpus(), metavar="N", help="processes (default: all cores, %(default)s)")
    add("--seed", type=int, default=0, help="of the order in the shards and of --val-fraction (default: %(default)s)")
    add("--val-fraction", type=float, default=0.0, metavar="F", help="part of each class to set apart as split val")
    add(
        "--max-missing",
        default="0",
        metavar="N|P%",
        help="listed files that may be missing, such as 12 or 5%% (default: 0)",
    )
    add(
        "--timeout", type=float, default=300, metavar="S", help="seconds after which a video is given up (default: 300)"
    )
    add("--restart", action="store_true", help="begin again instead of going on where an earlier run ended")
    return parser.parse_args()


def _short_side(text: str | None, profile: str) -> int | None:
    """Pixels, or None for the source's own size; the copy profile has no default, for it changes nothing."""
    if text is None:
        return None if profile == "copy" else SHORT_SIDE
    if text == "source":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--short-side {text!r}: allowed are pixels, such as {SHORT_SIDE}, or 'source'") from None


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _print_summary(out: Path, listing: Listing, report: PackReport, wall_seconds: float, *, verified: bool) -> None:
    samples = sum(report.samples.values())
    seconds = sum(report.seconds.values())
    ratio = report.bytes_out / report.bytes_in
    unverified = "" if verified else ", not verified"
    print(f"{out}: {samples} videos{unverified}, {seconds:,.0f} s of video, in {wall_seconds:,.1f} s")
    print(f"  bytes: {_size(report.bytes_in)} in, {_size(report.bytes_out)} out ({ratio:.2f}×)")
    few, many = min(report.stored_frames), max(report.stored_frames)
    print(f"  stored frames a video: {few} to {many}, median {statistics.median(report.stored_frames):.0f}")
    for split, shards in report.shards.items():
        counts = ", ".join(str(shard.samples) for shard in shards)
        print(f"  {split}: {report.samples[split]} samples in {len(shards)} shards ({counts})")
    if report.rejects:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.most_common())
        print(f"  rejected: {len(report.rejects)} ({reasons}); listed in {out / 'rejects.tsv'}")
    if listing.other_files:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in listing.other_files.most_common(5))
        print(f"  left alone, no videos or not in a class folder: {sum(listing.other_files.values())} files ({kinds})")
    empty = [name for name in listing.classes if not report.packed_of_class[name]]
    if empty:
        print(f"  warning: no video of these classes could be packed: {', '.join(empty)}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_cli(main)
