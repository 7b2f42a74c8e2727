"""How many clips a second each profile gives: decoded by a GPU (nvJPEG, NVDEC), and by worker processes on the CPU.

    python tools/bench_decode.py [--work DIR] [--json FILE]

Everybody decodes the same clips, 8 frames with 16 between, cropped as in training to 224 × 224, of videos that are
generated here (340 × 256, every fourth frame stored) and packed once for every profile. Ways to decode:

    nvJPEG, NVDEC  DALI's graph on the GPU, from bytes in memory, so many clips a run; in the end the clips lie on the
                   device and the host has waited for them
    loader         `ClipLoader` as training on CUDA has it: plan, index, reading, checksums and that graph (jpeg only)
    workers        `ClipLoader` with worker processes on the CPU

Several rounds, each beginning with another way; medians, lowest and highest. Beforehand the first clips of the graph
are compared with the CPU's. Without a GPU the graph for jpeg runs on the CPU, to see that this program works. The last
line of the output is one JSON object. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipelines.cli import run_cli, writable
from pipelines.dali import JpegCropper, VideoCropper
from pipelines.decode import ClipDecoder
from pipelines.encode import DEFAULT_QUALITY
from pipelines.loader import ClipLoader, decodes_on_gpu, default_workers
from pipelines.machine import installed_versions, processor_name, wait_for_rest
from pipelines.mp4 import wrap_packets
from pipelines.plan import ClipOptions, Order, plan_clip, train_turns
from pipelines.read import ClipRequest, ShardReader, request_clip
from pipelines.shards import ShardSet, write_durably
from tools.parts.bench_sources import make_sources, pack

PROFILES = ("jpeg", "h264", "hevc")
OPTIONS = ClipOptions(num_frames=8, sampling="dense", interval=16)
PACKAGES = ("torch", "numpy", "nvidia-dali-cuda130", "av", "opencv-python-headless")
PLANNED = 4  # batches that the graph decodes again and again
PREFETCH = 3


class Clip(NamedTuple):
    """What the graph is given."""

    request: ClipRequest
    packets: list[memoryview]


Graph = Callable[[Sequence[Clip]], list[Any]]
"""Clips → of each its distinct frames, uint8 [n, S, S, 3]."""


class Subject(NamedTuple):
    """A way to decode a profile."""

    way: str
    batch: int
    """Clips of a run."""
    run: Callable[[], object]
    """Decodes one batch."""
    drain: int = 0
    """Batches that lie ready before a measurement begins."""


def main() -> None:
    began = time.monotonic()
    args = _parse_args()
    gpu = 0 if torch.cuda.is_available() else None
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory(prefix="bench_decode-") as folder:
        work = Path(folder)
        make_sources(work / "sources", args.videos, args.frames, generated=True)
        rates: list[dict[str, Any]] = []
        equality: dict[str, dict[str, float]] = {}
        not_measured: dict[str, str] = {}
        for profile in args.profiles:
            pack(work, profile, DEFAULT_QUALITY)
            shards = ShardSet.open(work / profile, "train")
            rates += measure_profile(shards, args, gpu, equality, not_measured)
    document = {
        "on_gpu": gpu is not None,
        "rates": rates,
        "equality": equality,
        "not_measured": not_measured,
        "settings": {
            "videos": args.videos,
            "source_frames": args.frames,
            "clip_frames": OPTIONS.num_frames,
            "size": args.size,
            "workers": args.workers,
            "rounds": args.rounds,
            "seconds": args.seconds,
        },
        "hardware": {
            "gpu": None if gpu is None else torch.cuda.get_device_name(gpu),
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": installed_versions(PACKAGES),
        "command": shlex.join(["python", "tools/bench_decode.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_seconds": round(time.monotonic() - began),
    }
    print("\n".join(table(document)))
    if args.json:
        write_durably(args.json, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    print(json.dumps(document, ensure_ascii=False))


def measure_profile(
    shards: ShardSet,
    args: argparse.Namespace,
    gpu: int | None,
    equality: dict[str, dict[str, float]],
    not_measured: dict[str, str],
) -> list[dict[str, Any]]:
    """The rates of all ways; those that cannot be taken go to `not_measured` with the reason."""
    profile, subjects = shards.profile, []
    clips = planned_clips(shards, PLANNED * max(args.batches))
    with ExitStack() as stack:
        try:
            if profile != "jpeg" and gpu is None:
                raise ValueError("no CUDA device")
            graphs = {batch: make_graph(profile, args.size, batch, gpu) for batch in args.batches}
            equality[profile] = compare(clips[: min(args.batches)], graphs[min(args.batches)], args.size)
            for batch, graph in graphs.items():
                run = repeat_batches(clips, graph, batch, args.size, gpu)
                run()  # the graph is built
                subjects.append(Subject(way_of_graph(profile, gpu), batch, run))
        except (ValueError, RuntimeError) as error:  # DALI and CUDA have their own, all of them the latter
            not_measured[f"{profile} by {way_of_graph(profile, gpu or 0)}"] = " ".join(str(error).split())[:300]
        devices = {"workers": torch.device("cpu")}
        if gpu is not None and decodes_on_gpu(shards, torch.device("cuda", gpu)):
            devices["loader"] = torch.device("cuda", gpu)
        batch = max(args.batches)
        for way, device in devices.items():
            loader = stack.enter_context(open_loader(shards, batch, args.size, args.workers, device))
            subjects.append(Subject(way, batch, partial(next, loader), PREFETCH + 1))
        speeds = interleaved(subjects, args.rounds, args.seconds)
    bytes_a_clip = statistics.fmean(sum(map(len, clip.packets)) for clip in clips)
    return [describe(profile, subject, found, bytes_a_clip) for subject, found in zip(subjects, speeds, strict=True)]


def planned_clips(shards: ShardSet, count: int) -> list[Clip]:
    """The first clips of a training, with their bytes."""
    order, reader = Order([shard.samples for shard in shards.shards], 0), ShardReader()
    clips = []
    for turn in map(order.turn, range(count)):
        sample = shards[turn.sample_id]
        request = request_clip(sample, plan_clip(sample, turn, 0, OPTIONS), shards.profile)
        clips.append(Clip(request, reader.packets(request.shard, request.packets)))
    return clips


def way_of_graph(profile: str, gpu: int | None) -> str:
    """Who decodes."""
    if gpu is None:
        return "graph on the CPU"
    return "nvJPEG" if profile == "jpeg" else "NVDEC"


def make_graph(profile: str, size: int, batch: int, gpu: int | None) -> Graph:
    """What decodes up to `batch` clips in a run; it is built in its first run."""
    if profile == "jpeg":
        images = JpegCropper(size, batch * OPTIONS.num_frames, gpu=gpu)
        return partial(_crop_jpegs, images)
    return partial(_crop_videos, VideoCropper(size, batch, gpu=gpu))


def _crop_jpegs(cropper: JpegCropper, clips: Sequence[Clip]) -> list[Any]:
    each = [(clip.request, packet) for clip in clips for packet in clip.packets]
    boxes, flips = [request.box for request, _ in each], [request.flip for request, _ in each]
    crops = cropper.crop([packet for _, packet in each], boxes, flips)
    ends = np.cumsum([len(clip.packets) for clip in clips]).tolist()
    return [crops[end - len(clip.packets) : end] for clip, end in zip(clips, ends, strict=True)]


def _crop_videos(cropper: VideoCropper, clips: Sequence[Clip]) -> list[Any]:
    requests = [clip.request for clip in clips]
    videos = [wrap_packets(packets, r.extradata, r.profile, (r.width, r.height)) for r, packets in clips]
    wanted, boxes, flips = zip(*((r.wanted, r.box, r.flip) for r in requests), strict=True)
    return cropper.crop(videos, wanted, boxes, flips)


def compare(clips: Sequence[Clip], graph: Graph, size: int) -> dict[str, float]:
    """Levels by which the graph's pixels are off those of the CPU's decoders."""
    requests = [clip.request for clip in clips]
    expected = np.empty((len(clips), OPTIONS.num_frames, size, size, 3), np.uint8)
    failures = ClipDecoder(size, OPTIONS.num_frames).decode_into(requests, expected)
    if failures:
        raise ValueError(f"the CPU cannot decode clip {failures[0][0]}: {failures[0][1]}")
    off = []
    for frames, request, right in zip(graph(clips), requests, expected, strict=True):
        pixels = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
        off.append(np.abs(pixels[list(request.order)].astype(np.int16) - right))
    return {"mean": round(float(np.mean(off)), 3), "largest": int(np.max(off))}


def repeat_batches(clips: Sequence[Clip], graph: Graph, batch: int, size: int, gpu: int | None) -> Callable[[], object]:
    """A call decodes the next batch, to where a model would find it."""
    starts = _endlessly(range(0, len(clips) - batch + 1, batch))
    shape = (batch, OPTIONS.num_frames, size, size, 3)
    rows = torch.empty(shape, dtype=torch.uint8, device="cpu" if gpu is None else torch.device("cuda", gpu))

    def run() -> None:
        start = next(starts)
        for row, frames in zip(rows, graph(clips[start : start + batch]), strict=True):
            row[: len(frames)] = torch.as_tensor(frames)
        if gpu is not None:
            torch.cuda.synchronize(gpu)

    return run


def _endlessly(items: Iterable[int]) -> Iterator[int]:
    kept = list(items)
    while True:
        yield from kept


def open_loader(shards: ShardSet, batch: int, size: int, workers: int, device: torch.device) -> ClipLoader:
    """As in training, without end."""
    turns = train_turns(
        Order([shard.samples for shard in shards.shards], 0),
        **{"global_batch": batch, "micro_batch": batch, "rank": 0, "world": 1},
        start_step=0,
        num_steps=10**9,
    )
    settings: Mapping[str, Any] = {"options": OPTIONS, "workers": workers, "prefetch": PREFETCH, "device": device}
    return ClipLoader(shards, turns, micro_batch=batch, size=size, **settings)


def interleaved(subjects: Sequence[Subject], rounds: int, seconds: float) -> list[list[float]]:
    """Clips a second of every subject in every round."""
    speeds: list[list[float]] = [[] for _ in subjects]
    for subject in subjects:
        subject.run()  # processes start
    for number in range(rounds):
        for k in range(len(subjects)):
            place = (number + k) % len(subjects)
            wait_for_rest()  # the queues of the others are full
            speeds[place].append(clips_per_second(subjects[place], seconds))
    return speeds


def clips_per_second(subject: Subject, seconds: float) -> float:
    """Of at least one batch, and so many seconds."""
    for _ in range(subject.drain):
        subject.run()
    start, batches = time.perf_counter(), 0
    while batches == 0 or time.perf_counter() - start < seconds:
        subject.run()
        batches += 1
    return batches * subject.batch / (time.perf_counter() - start)


def describe(profile: str, subject: Subject, speeds: Sequence[float], bytes_a_clip: float) -> dict[str, Any]:
    middle = statistics.median(speeds)
    return {
        "profile": profile,
        "way": subject.way,
        "batch": subject.batch,
        "clips_per_s": round(middle, 2),
        "lowest": round(min(speeds), 2),
        "highest": round(max(speeds), 2),
        "frames_per_s": round(middle * OPTIONS.num_frames, 1),
        "megabytes_per_s": round(middle * bytes_a_clip / 1e6, 1),
    }


def table(document: Mapping[str, Any]) -> list[str]:
    """The results for people."""
    machine, settings = document["hardware"], document["settings"]
    lines = [
        f"clips of {settings['clip_frames']} × {settings['size']} × {settings['size']}, {settings['rounds']} rounds on "
        f"{machine['gpu'] or machine['processor']} ({machine['cores']} cores)",
        "" if document["on_gpu"] else "no CUDA device: nothing here was measured on a GPU",
        f"{'profile':9}{'way':18}{'clips a run':>12}{'clips/s':>10}{'lowest..highest':>20}{'frames/s':>10}{'MB/s':>8}",
    ]
    for row in document["rates"]:
        spread = f"{row['lowest']:.1f}..{row['highest']:.1f}"
        lines.append(
            f"{row['profile']:9}{row['way']:18}{row['batch']:12}{row['clips_per_s']:10.1f}{spread:>20}"
            f"{row['frames_per_s']:10.0f}{row['megabytes_per_s']:8.1f}"
        )
    for profile, off in document["equality"].items():
        lines.append(f"{profile}: pixels are {off['mean']} levels off the CPU's in the mean, {off['largest']} at most")
    return lines + [f"{what}: not measured: {reason}" for what, reason in document["not_measured"].items()]


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, metavar="DIR", help="for videos and packed sets, which stay (default: a temporary one)")
    add("--json", type=Path, metavar="FILE", help="write the JSON object there too")
    add("--profiles", nargs="+", choices=PROFILES, default=PROFILES, help="default: all")
    add("--videos", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--frames", type=int, default=144, metavar="N", help="of a video (default: %(default)s)")
    add("--batches", type=int, nargs="+", default=[8, 32], metavar="B", help="clips a run (default: 8 32)")
    add("--size", type=int, default=224, metavar="S", help="of the clips, in pixels (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes on the CPU (default: as in training)")
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--seconds", type=float, default=1.0, metavar="S", help="of a measurement, at least (default: %(default)g)")
    args = parser.parse_args()
    if args.json:
        writable(args.json, "--json")
    if args.workers is None:
        args.workers = default_workers(1, "cuda" if torch.cuda.is_available() else "cpu")
    for name, numbers in {**vars(args), "batches": min(args.batches)}.items():
        if isinstance(numbers, int | float) and numbers <= 0:
            raise ValueError(f"--{name} {numbers}: allowed is more than 0")
    return args


if __name__ == "__main__":
    run_cli(main)
