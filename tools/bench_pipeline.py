"""Our loader beside the ways people read video for training today: clips per CPU-second, on this machine.

    python tools/bench_pipeline.py [--json FILE] [--plot FILE] [--work DIR]

Everybody gets the same 20 videos (340 × 256, 30 fps, 10 s, H.264 with a keyframe every 250 frames) and delivers the
same clips in batches of 8: (a) decord in a DataLoader, as MMAction2 does it, (b) PyAV the same, (c) torchcodec the
same, (d) webdataset and PyAV, ours from the two training profiles, and (e) the bare path: our decoding of bytes that
lie in memory already, without plan, index, checksum or queue.

A contender runs in a process of its own with the same number of workers, one after the other, several rounds. CPU
seconds are user and system time of the process and its children, without start-up and first batches, between two
moments at which its queues are full and nobody works. In a round all begin at the same place of the same sequence of
clips and get as far as they can. Before that our clips are compared with those of (a), pixel by pixel, before
normalisation, which we leave to the training device.

The last line of the output is one JSON object. Two cores need 8 minutes; rounds that would end after 10 are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch
from tqdm import tqdm

from pipelines.cli import run_cli
from pipelines.encode import DEFAULT_QUALITY, library_versions
from pipelines.machine import cpu_seconds, installed_versions, processor_name, wait_for_rest
from pipelines.shards import write_durably
from tools.parts.bench_checks import frames_decoded, same_clips, stored_quality
from tools.parts.bench_contenders import BATCH, CONTENDERS, SAMPLINGS, SIZE, NotAvailable, Setup, check_decord
from tools.parts.bench_sources import HEIGHT, WIDTH, make_sources, pack

CASES = tuple(f"{profile}_{sampling}" for profile in ("jpeg", "h264") for sampling in SAMPLINGS)
PACKAGES = ("torch", "numpy", "nvidia-dali-cuda130", "decord", "torchcodec", "webdataset")
RIVALS = tuple(name for name, contender in CONTENDERS.items() if contender.profile is None)
COLOURS = {"ours": "tab:orange", "bare": "wheat"}
TIME_LIMIT = 560.0  # seconds for everything: no round begins that would go beyond
_SPAWN = multiprocessing.get_context("spawn")


class Run(NamedTuple):
    """One measurement."""

    clips: int
    cpu_seconds: float
    wall_seconds: float


def run_contender(name: str, setup: Setup, samplings: Sequence[str]) -> dict[str, Run] | str:
    """One round of a contender, in a process of its own; a text says why it cannot take part."""
    answers, theirs = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_contend, args=(name, setup, samplings, theirs))
    process.start()
    theirs.close()
    try:
        answer: dict[str, Run] | str = answers.recv()
    except EOFError:
        raise ValueError(f"{name} failed; its message is above") from None
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # what is left of its workers
            os.killpg(process.ident or -1, signal.SIGKILL)
        process.join()
    return answer


def _contend(name: str, setup: Setup, samplings: Sequence[str], answers: Connection) -> None:
    os.setsid()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    runs = {}
    try:
        for sampling in samplings:
            with closing(CONTENDERS[name].batches(setup, sampling)) as batches:
                runs[sampling] = measure(batches, setup)
    except NotAvailable as reason:
        answers.send(str(reason))
        return
    answers.send(runs)


def measure(batches: Iterator[Any], setup: Setup) -> Run:
    """Whole passes over the set, for at least so many seconds, after a first batch of every worker.

    Between two moments at which all queues are full and nobody works, so that as much is decoded as is handed over.
    """
    batches_a_pass = math.lcm(len(setup.shards(setup.profiles[0])), BATCH) // BATCH
    for _ in range(max(2, setup.workers)):
        next(batches)
    wait_for_rest()
    number, start, cpu_before = 0, time.perf_counter(), cpu_seconds()
    while number % batches_a_pass or time.perf_counter() - start < setup.seconds:
        next(batches)
        number += 1
    end = wait_for_rest()
    cpu_after = cpu_seconds()
    return Run(number * BATCH, cpu_after - cpu_before, end - start)


def main() -> None:
    started = time.monotonic()
    args = _parse_args()
    check_decord()
    cases = [case for case in CASES if case in args.cases]
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory(prefix="bench_pipeline-") as folder:
        setup = Setup(Path(folder), tuple(dict.fromkeys(c.split("_")[0] for c in cases)), args.workers, args.seconds)
        sources = make_sources(setup.work / "sources", args.clips, args.frames, generated=args.generated)
        print(describe(sources), flush=True)
        for profile in setup.profiles:
            pack(setup.work, profile, args.quality)
        quality = stored_quality(setup)
        same = {case: same_clips(setup, *case.split("_")) for case in cases}
        waste = frames_decoded(setup, tuple(SAMPLINGS))
        rounds, missing = _measure_rounds(setup, cases, args, started)
    results = summarise(cases, rounds, waste)
    document = {
        **results,
        "quality": quality,
        "same_clips": same,
        "not_available": missing,
        "sources": sources,
        "settings": {"batch": BATCH, "size": SIZE, "workers": args.workers, "quality": args.quality},
        "rounds": len(next(iter(rounds.values()))),
        "hardware": {"processor": processor_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": library_versions() | installed_versions(PACKAGES),
        "command": shlex.join(["python", "tools/bench_pipeline.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_seconds": round(time.monotonic() - started),
    }
    print(table(document))
    if args.plot:
        draw(document, args.plot)
    if args.json:
        write_durably(args.json, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    print(json.dumps(document, ensure_ascii=False))


def _parse_args() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the JSON object there too")
    add("--plot", type=Path, metavar="FILE", help="write a chart there (.png)")
    add("--quick", action="store_true", help="one round, 6 sources, a second each: a rehearsal of a minute or two")
    add("--rounds", type=int, metavar="N", help="default: 3")
    add("--seconds", type=float, metavar="S", help="of every measurement, at least (default: 3.5)")
    add("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    add("--rivals", nargs="*", choices=RIVALS, default=RIVALS, metavar="NAME", help=f"of {', '.join(RIVALS)}")
    add("--workers", type=int, default=min(2, cores), metavar="N", help="processes of everybody (default: %(default)s)")
    add("--work", type=Path, metavar="DIR", help="keep sources and shards there; sources that are there are used again")
    add("--quality", type=int, default=DEFAULT_QUALITY, metavar="Q", help="of the packed sets (default: %(default)s)")
    add("--clips", type=int, metavar="N", help="sources (default: 20)")
    add("--frames", type=int, default=300, metavar="N", help="of every source (default: %(default)s)")
    add("--generated", action="store_true", help="generated sources even where natural videos are at hand")
    args = parser.parse_args()
    for name, usual, quick in (("rounds", 3, 1), ("seconds", 3.5, 1.0), ("clips", 20, 6)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: give a number above 0")
    if args.workers < 1 or args.frames < 2 or args.clips < 2:
        raise ValueError("--workers is 1 or more, --frames and --clips are 2 or more")
    return args


Rounds = dict[tuple[str, str], list[Run]]
"""(contender, sampling) → one run a round."""


def _measure_rounds(
    setup: Setup, cases: Sequence[str], args: argparse.Namespace, started: float
) -> tuple[Rounds, dict[str, str]]:
    """All contenders one after the other, round by round; and why some did not take part."""
    samplings = {name: [s for s in SAMPLINGS if any(c.endswith(s) for c in cases)] for name in ("decord", *args.rivals)}
    for name, contender in CONTENDERS.items():
        if contender.profile is not None:
            samplings[name] = [s for s in SAMPLINGS if f"{contender.profile}_{s}" in cases]
    rounds: Rounds = defaultdict(list)
    missing: dict[str, str] = {}
    began = time.monotonic()
    with tqdm(total=args.rounds * sum(map(bool, samplings.values())), unit="run", disable=None) as bar:
        for number in range(args.rounds):
            now, took = time.monotonic(), time.monotonic() - began
            if number and now - started + took > TIME_LIMIT:
                print(f"only {number} rounds: another one would take too long")
                break
            began = now
            for name in (name for name in CONTENDERS if samplings.get(name) and name not in missing):
                bar.set_description(name)
                answer = run_contender(name, replace(setup, start=number * 10_000 * args.clips), samplings[name])
                if isinstance(answer, str):
                    missing[name] = answer
                else:
                    for sampling, run in answer.items():
                        rounds[name, sampling].append(run)
                bar.update()
    return rounds, missing


def summarise(cases: Sequence[str], rounds: Rounds, waste: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios of clips per CPU-second, the median over the rounds of each round's own; and every contender's speeds."""

    def ratio(one: str, other: str, sampling: str) -> float:
        pairs = zip(rounds[one, sampling], rounds[other, sampling], strict=True)
        return round(statistics.median(a.clips / a.cpu_seconds / (b.clips / b.cpu_seconds) for a, b in pairs), 3)

    contenders: dict[str, dict[str, Any]] = defaultdict(dict)
    for (name, sampling), runs in rounds.items():
        speeds = [run.clips / run.cpu_seconds for run in runs]
        contenders[name][sampling] = {
            "clips_per_cpu_second": round(statistics.median(speeds), 2),
            "lowest": round(min(speeds), 2),
            "highest": round(max(speeds), 2),
            "clips_per_second": round(statistics.median(run.clips / run.wall_seconds for run in runs), 2),
            "clips": sum(run.clips for run in runs),
            "frames_decoded_per_frame_used": round(waste[sampling][name], 3),
        }
    split = {case: case.split("_") for case in cases}
    return {
        "ratios": {case: ratio(f"ours_{p}", "decord", s) for case, (p, s) in split.items()},
        "loader_vs_bare": {case: ratio(f"ours_{p}", f"bare_{p}", s) for case, (p, s) in split.items()},
        "contenders": contenders,
    }


def describe(sources: dict[str, Any]) -> str:
    """One line."""
    rates = sources["kbps_of_each"]
    return (
        f"sources: {sources['clips']} {sources['kind']}, {WIDTH} × {HEIGHT}, {sources['frames']} frames, "
        f"{sources['kbps']:.0f} kb/s on average ({min(rates)} to {max(rates)}); {sources['played_to_and_fro']} of them "
        "are shorter clips played to and fro"
    )


def table(document: dict[str, Any]) -> str:
    """The results for people."""
    lines = []
    for sampling in SAMPLINGS:
        rows = {name: facts[sampling] for name, facts in document["contenders"].items() if sampling in facts}
        heads = ("clips/CPU-s", "lowest..highest", "clips/s", "× (a)", "decoded/used")
        lines += ["", f"{sampling:28}{heads[0]:>12}{heads[1]:>17}{heads[2]:>9}{heads[3]:>8}{heads[4]:>14}"]
        for name, f in rows.items():
            speed, spread = f["clips_per_cpu_second"], f"{f['lowest']:.1f}..{f['highest']:.1f}"
            lines.append(
                f"{CONTENDERS[name].title:28}{speed:12.1f}{spread:>17}{f['clips_per_second']:9.1f}"
                f"{speed / rows['decord']['clips_per_cpu_second']:8.2f}{f['frames_decoded_per_frame_used']:14.2f}"
            )
    for name, reason in document["not_available"].items():
        lines += ["", f"{CONTENDERS[name].title}: not available: {reason}"]
    lines.append("")
    for profile, q in document["quality"].items():
        lines.append(
            f"{profile}: {q['bytes_ratio']:.2f} × the sources' bytes (mean of the clips' own ratios "
            f"{q['mean_of_bytes_ratios']:.2f}), PSNR {q['psnr_db']:.1f} dB (the worst clip {q['lowest_psnr_db']:.1f})"
        )
    for case, ratio in document["ratios"].items():
        same = document["same_clips"][case]
        lines.append(
            f"{case}: {ratio:.2f} × (a), {100 * document['loader_vs_bare'][case]:.0f} % of (e); the same clips as (a) "
            f"at {same['psnr_db']:.1f} dB (the worst of {same['frames']} frames {same['lowest_db']:.1f})"
        )
    return "\n".join(lines)


def draw(document: dict[str, Any], path: Path) -> None:
    """A bar for every contender, a panel for every way of sampling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    samplings = [s for s in SAMPLINGS if s in document["contenders"]["decord"]]
    shape = {"figsize": (6 * len(samplings), 3.6), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(samplings), **shape)
    for axis, sampling in zip(axes[0], samplings, strict=True):
        rows = {name: facts[sampling] for name, facts in document["contenders"].items() if sampling in facts}
        speeds = [facts["clips_per_cpu_second"] for facts in rows.values()]
        spread = [[v - f["lowest"], f["highest"] - v] for v, f in zip(speeds, rows.values(), strict=True)]
        colours = [COLOURS.get(name.split("_")[0], "tab:gray") for name in rows]
        bars = axis.barh([CONTENDERS[name].title for name in rows], speeds, color=colours, xerr=np.transpose(spread))
        axis.bar_label(bars, [f"{speed / speeds[0]:.1f}×" for speed in speeds], padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(title=sampling, xlabel="clips per CPU-second")
    hardware = document["hardware"]
    figure.suptitle(f"{hardware['processor']}, {hardware['cores']} cores, {document['date'][:10]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_cli(main)
