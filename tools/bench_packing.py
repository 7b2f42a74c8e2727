"""How fast packing is, beside the same work written bare in PyAV: decode, scale every K-th frame, encode, mux.

    python tools/bench_packing.py VIDEOS --json FILE

The bare loop verifies nothing, converts colour as swscale does, and throws its bytes away. Both use the same videos,
the same encoder settings and the same number of processes, which are started anew each time. Rounds are interleaved;
what is printed is the median over the rounds of videos per wall second, CPU seconds a video (user and system, all
processes) and the ratio to the bare loop of the round. `copy` is set beside `jpeg`.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import av
from av.video.reformatter import ColorRange, Colorspace
from tqdm import tqdm

from pipelines.annotations import VIDEO_SUFFIXES, Listing, Video
from pipelines.cli import run_cli
from pipelines.encode import DEFAULT_QUALITY, SIDE_MULTIPLE, FrameChoice, encoder_settings, library_versions
from pipelines.machine import installed_versions, processor_name
from pipelines.pack import PackSettings, pack_videos
from pipelines.shards import write_durably

RUNS = ("bare jpeg", "jpeg", "bare h264", "h264", "copy", "copy --no-verify")


def main() -> None:
    args = _parse_args()
    videos = sorted(path for path in args.source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    videos = videos[:: max(1, len(videos) // args.videos)][: args.videos]
    if not videos:
        raise ValueError(f"{args.source} holds no videos")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
    with tqdm(total=args.rounds * len(RUNS), unit="run", disable=None) as bar:
        for _ in range(args.rounds):
            for name in RUNS:
                results[name].append(_time(partial(_run, name, args, videos)))
                bar.update()
    table = _summarise(results, len(videos))
    print(f"{len(videos)} videos of {args.source}, {args.workers} processes, median of {args.rounds} rounds")
    for name, row in table.items():
        print(f"  {name:18}" + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    if args.json:
        document = {
            "runs": table,
            "videos": len(videos),
            "rounds": args.rounds,
            "processes": args.workers,
            "hardware": {"processor": processor_name(), "cores": len(os.sched_getaffinity(0))},
            "versions": library_versions() | installed_versions(["numpy"]),
            "command": shlex.join(["python", "tools/bench_packing.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_durably(args.json, (json.dumps(document, indent=1) + "\n").encode())


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="folder with videos, at any depth; they must be whole")
    add("--videos", type=int, default=40, metavar="N", help="take N, evenly from the sorted list (default: 40)")
    add("--fps", default="source/4", metavar="source/K", help="frames to store (default: %(default)s)")
    add("--short-side", type=int, default=256, metavar="S", help="pixels (default: %(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)")
    add("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def _run(name: str, args: argparse.Namespace, videos: list[Path]) -> None:
    profile = name.split()[-1] if name.startswith("bare") else name.split()[0]
    if name.startswith("bare"):
        every = FrameChoice.parse(args.fps).every
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            list(pool.imap_unordered(partial(_pack_bare, profile, every, args.short_side), videos))
            pool.close()
            pool.join()
        return
    settings = PackSettings(profile=profile, verify=name != "copy --no-verify")
    if profile != "copy":
        settings = PackSettings(profile=profile, fps=args.fps, short_side=args.short_side, quality=DEFAULT_QUALITY)
    folder = Path(tempfile.mkdtemp(prefix="bench_packing_"))
    try:
        listing = Listing(tuple(Video(path.relative_to(args.source), ("a",), "train") for path in videos), ("a", "b"))
        report = pack_videos(args.source, listing, folder / "out", settings, workers=args.workers)
    finally:
        shutil.rmtree(folder)
    if report.rejects:
        raise ValueError(f"{report.rejects[0][0]} was rejected ({report.rejects[0][1].reason}): give whole videos")


def _pack_bare(profile: str, every: int, short_side: int, path: Path) -> int:
    """The loop that anyone would write; returns the number of bytes."""
    settings, multiple = encoder_settings(profile, DEFAULT_QUALITY), SIDE_MULTIPLE[profile]
    sink = io.BytesIO()
    with av.open(str(path)) as source, av.open(sink, "w", format="mp4") as target:
        pictures = source.streams.video[0]
        pictures.thread_count = 1
        stream: Any = None
        for number, frame in enumerate(source.decode(pictures)):
            if number % every:
                continue
            if stream is None:
                scale = min(1.0, short_side / min(frame.width, frame.height))
                width, height = (round(side * scale / multiple) * multiple for side in (frame.width, frame.height))
                stream = target.add_stream(settings.codec, rate=30, options=settings.options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
                stream.codec_context.thread_count = 1
            stored = frame.reformat(
                width, height, "yuvj420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG, threads=1
            )
            target.mux(stream.encode(stored))
        target.mux(stream.encode())
    return len(sink.getvalue())


def _time(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds; the processes that `run` starts have ended when it returns."""
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    run()
    return time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def _summarise(results: dict[str, list[tuple[float, float]]], videos: int) -> dict[str, dict[str, float]]:
    table = {}
    for name, runs in results.items():
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        table[name] = {"videos a second": round(videos / wall, 3), "CPU seconds a video": round(cpu / videos, 4)}
        other = {"jpeg": "bare jpeg", "h264": "bare h264", "copy": "jpeg", "copy --no-verify": "jpeg"}.get(name)
        if other is not None:
            pairs = list(zip(results[other], runs, strict=True))
            for i, what in enumerate(("wall", "CPU")):
                ratio = statistics.median(there[i] / here[i] for there, here in pairs)
                table[name][f"{what} speed / {other}"] = round(ratio, 3)
    return table


if __name__ == "__main__":
    run_cli(main)
