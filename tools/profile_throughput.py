"""What bounds a training run on this machine, and what to change: every stage alone, and all of them together.

    python tools/profile_throughput.py --recipe NAME --shards DIR [--set KEY=VALUE …] [--out DIR] [--json FILE]
        [--trace FILE] [--sweep threads,prefetch,batch] [--max-batch]

A run is set up as train/main.py would do it, with the recipe's plan, loader, model and DeepSpeed, and trained in
memory: nothing is written to run.out. Three bounds take turns, round by round: the loader with nobody learning, the
whole step on one batch that stays on the device, and both together, as in training. Beside them each stage is timed:
reading and decoding clips of the same plan in one thread, copying, augmenting, forward, backward, optimizer.

The table gives medians, with the lowest and the highest round (bounds) or quartiles over steps (stages), and ends with
a sentence on what bounds the run and the keys to turn. Loader and model alone say what both can reach together: on CUDA
the slower of them, on a CPU, where they share the cores, one after the other; the report says whether that was reached.

--out writes report.json and timeline.png (where each millisecond of a step goes); --json writes the same object to a
file, or with - to standard output, which then holds nothing else. --trace writes a Chrome trace of three steps
(chrome://tracing, Perfetto). --sweep tries decode workers, batches decoded ahead and micro-batch sizes and prints the
lines to put into the recipe and the DeepSpeed file; --max-batch looks for the largest micro-batch that fits (compiled
blocks are compiled for each).

It measures one process, which takes the whole step; data lie in the page cache after the first round, so a slow disk
shows only where the set is larger than memory. A cache of the stem (speed.cache_gb) is left out. The demo takes about a
minute on two cores. CUDA's side of this program has not been run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# As in train/main.py, before torch is loaded: threads that spin while they wait take the cores from the decode workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tqdm import tqdm

from model.flops import device_peak
from model.speed import compiles
from pipelines.cli import one_of_several, run_cli, writable
from pipelines.loader import ClipBatch, ClipLoader
from pipelines.machine import (
    command_line,
    forget_peak_memory,
    installed_versions,
    peak_memory,
    process_tree,
    processor_name,
)
from pipelines.read import ClipRequest
from pipelines.shards import write_durably
from tools.parts.throughput_measure import (
    STAGES,
    Phase,
    Rig,
    Round,
    Stages,
    frames_decoded,
    gather_requests,
    keep_batch,
    measure_round,
    measured_peak,
    time_copying,
    time_decoding,
    time_reading,
    trace_steps,
)
from tools.parts.throughput_report import Facts, draw, judge, table
from tools.parts.throughput_search import batch_lines, check_dimensions, largest_batch, sweep, sweep_table
from train.resolve import load_config, resolve_batch
from train.start import prepare
from train.step import MicroBatch

ROUNDS = 5
MAX_SECONDS = 60.0  # for rounds of which nobody said how many
PACKAGES = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "xformers")
REACHED = 0.9  # of what the bounds allow together
BUSY = 0.15  # cores that others may take before the report says so
SHOWN_SPANS = 90  # of the timeline


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles one run; returns the exit status. Raises ValueError or OSError for what a user can mend."""
    started = time.monotonic()
    arguments = parse_arguments(argv)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="profile_throughput-") as scratch, _Progress() as tell:
        document = profile(arguments, Path(scratch), tell)
    document["command"] = shlex.join(
        ["python", "tools/profile_throughput.py", *(sys.argv[1:] if argv is None else argv)]
    )
    document["took_seconds"] = round(time.monotonic() - started, 1)
    _publish(document, arguments)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", required=True, help="a TOML file, or the name of one in train/recipes")
    add("--shards", metavar="DIR", help="the packed set; default: the recipe's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, as in train/main.py")
    add("--deepspeed_config", help="DeepSpeed JSON; default: what the recipe names, or ds_config.json")
    add("--out", type=Path, metavar="DIR", help="write report.json and timeline.png there")
    add("--json", type=Path, metavar="FILE", help="write the JSON object there; - for standard output")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace of three steps there")
    add("--sweep", metavar="WHAT", help="try settings: threads, prefetch, batch, separated by commas")
    add("--max-batch", action="store_true", help="find the largest micro-batch that fits")
    add("--seconds", type=float, default=2.0, metavar="S", help="of each measurement, at least (default: %(default)g)")
    add("--rounds", type=int, metavar="N", help="of the three bounds (default: 5, fewer if they take a minute)")
    add("--device", choices=("cpu", "cuda"), help="default: CUDA where there is a GPU")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds <= 3600 or (arguments.rounds is not None and not 1 <= arguments.rounds <= 1000):
        raise ValueError(
            f"--seconds {arguments.seconds:g}, --rounds {arguments.rounds}: allowed are more than 0 seconds, up to an "
            "hour, and 1 to 1000 rounds"
        )
    for path, option in ((arguments.json, "--json"), (arguments.trace, "--trace")):
        if path and not (option == "--json" and str(path) == "-"):
            writable(path, option)
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out} is not a folder")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this program measures one process: start it with python, not with deepspeed or torchrun")
    return arguments


def profile(arguments: argparse.Namespace, scratch: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything that was asked for, as one JSON object."""
    dimensions = check_dimensions(arguments.sweep) if arguments.sweep is not None else []
    tell("setting up")
    rig = _set_up(arguments, scratch)
    seconds = arguments.seconds
    with closing(rig.job.train_loader()) as loader:
        tell("warming up")
        requests, kept, clips = _warm_up(rig, loader)
        source = rig.synthetic(kept, rig.batch.micro)
        _forget_memory(rig)
        rounds = _take_rounds(lambda: measure_round(rig, loader, source, seconds, tell), arguments.rounds)
        document = _describe_run(arguments, rig, requests) | _summarise(rig, rounds)
        document["notes"] += _busy_note(document)
        document["memory"] = _peak_memory(rig)
        if arguments.trace:
            tell("tracing")
            trace_steps(rig, loader, arguments.trace)
    tell("stages")
    document["stages"] = _stages(rig, rounds, requests, clips, seconds)
    document["compute"] = _compute(rig, document["bounds"]["whole"]["clips_per_s"])
    document["verdict"] = _judge(document, rig, requests)
    if arguments.max_batch:
        document["max_batch"] = largest_batch(rig, kept, tell)
    if dimensions:
        document["sweep"] = sweep(rig, dimensions, seconds, len(rounds), tell)
    return document


def _take_rounds(take: Callable[[], Round], wanted: int | None) -> list[Round]:
    """So many rounds; if nobody said how many, five, or fewer of a slow model."""
    rounds: list[Round] = []
    begin = time.monotonic()
    while len(rounds) < (wanted or ROUNDS):
        passed = time.monotonic() - begin
        if wanted is None and rounds and passed * (len(rounds) + 1) / len(rounds) > MAX_SECONDS:
            break
        rounds.append(take())
    return rounds


def _set_up(arguments: argparse.Namespace, scratch: Path) -> Rig:
    """The run that is asked for, but for its folder and its evaluations."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave it out, or take --device cpu")
    shards = [f"data.shards={json.dumps(arguments.shards)}"] if arguments.shards is not None else []
    config = load_config(arguments.recipe, [*arguments.set, *shards], arguments.deepspeed_config)
    data, run = replace(config.data, val_split=""), replace(config.run, out=str(scratch), trace=False)
    config = replace(config, data=data, run=run)
    batch = resolve_batch(config.deepspeed, 1, in_pairs=config.data.mixes)
    if config.speed.cuda_graphs and (arguments.max_batch or "batch" in (arguments.sweep or "")):
        raise ValueError(
            "speed.cuda_graphs = true: graphs are for micro-batches of one size; try others with "
            "--set speed.cuda_graphs=false"
        )
    return Rig(prepare(config, batch, resume=False), scratch)


def _warm_up(rig: Rig, loader: ClipLoader) -> tuple[list[ClipRequest], MicroBatch, ClipBatch]:
    """A few steps, then the requests of some clips, a micro-batch to keep, and one of the loader."""
    source, stages = rig.from_loader(loader), Stages(rig.device)
    for _ in range(2):
        rig.take_step(source, stages)
    requests = gather_requests(rig, loader)
    kept, clips = keep_batch(rig, loader)
    return requests, kept, clips


def _describe_run(arguments: argparse.Namespace, rig: Rig, requests: Sequence[ClipRequest]) -> dict[str, Any]:
    """What was measured, and what the plan says without measuring."""
    config, shards = rig.config, rig.job.shards
    on_cuda = rig.device.type == "cuda"
    notes = [rig.batch.note] if rig.batch.note else []
    if config.speed.cache_gb:
        notes.append("speed.cache_gb is left out: these are the numbers of clips that are seen for the first time")
    used = sum(len(request.wanted) for request in requests)
    return {
        "recipe": Path(arguments.recipe).stem,
        "settings": {
            "total": rig.batch.total,
            "micro": rig.batch.micro,
            "accumulation": rig.batch.accumulation,
            "workers": rig.workers,
            "prefetch": config.data.prefetch,
            "frames": config.data.num_frames,
            "size": rig.job.model.geometry.image_size,
            "profile": shards.profile,
            "precision": "bfloat16" if config.bf16 else "float32",
            "method": config.model.method,
            "model": config.model.name,
            "speed": config.as_dict()["speed"],
            "seconds": arguments.seconds,
        },
        "hardware": {
            "device": torch.cuda.get_device_name(rig.device) if on_cuda else processor_name(),
            "kind": rig.device.type,
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        },
        "versions": installed_versions(PACKAGES),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "decoded_per_used_frame": sum(map(frames_decoded, requests)) / used,
        "bytes_per_clip": sum(size for request in requests for _, size, _ in request.packets) / len(requests),
        "notes": notes,
    }


def _summarise(rig: Rig, rounds: Sequence[Round]) -> dict[str, Any]:
    """The bounds, what they say of each other, and where the time of a step goes."""
    kind = rig.device.type
    bounds = {name: _bound(rig, [getattr(r, name) for r in rounds]) for name in ("loader", "model", "whole")}
    ratio = median(r.whole.clips_per_s / r.expected(kind) for r in rounds)
    rule = "1 / (1 / loader + 1 / model)" if kind == "cpu" else "the slower of loader and model"
    samples, epochs = rig.job.shards.num_kept, rig.prepared.config.schedule.epochs
    phases = [phase for r in rounds for phase in (r.loader, r.model, r.whole)]
    utilizations = [r.utilization for r in rounds if r.utilization is not None]
    return {
        "bounds": bounds,
        "consistency": {
            "expected_clips_per_s": median(r.expected(kind) for r in rounds),
            "rule": rule,
            "ratio": ratio,
            "ratio_to_slower": median(r.whole.clips_per_s / r.expected("cuda") for r in rounds),
            "at_least": REACHED,
            "holds": ratio >= REACHED,
        },
        "others_cores": sum(phase.others_cpu for phase in phases) / sum(phase.seconds for phase in phases),
        "waiting_share": median(r.waiting_share(kind) for r in rounds),
        "host_waiting_share": median(r.whole.waited / r.whole.seconds for r in rounds),
        "device_busy_share": min(1.0, median(r.whole.clips_per_s / r.model.clips_per_s for r in rounds)),
        "cuda_utilization_percent": median(utilizations) if utilizations else None,
        "projected": {
            "epochs": epochs,
            "samples": samples,
            "hours": epochs * samples / bounds["whole"]["clips_per_s"] / 3600,
        },
        "timeline": _timeline(rounds[-1]),
        "rounds": [{name: getattr(r, name).clips_per_s for name in bounds} for r in rounds],
    }


def _busy_note(document: dict[str, Any]) -> list[str]:
    others = document["others_cores"]
    if others < BUSY:
        return []
    return [f"other programs kept {others:.1f} cores busy meanwhile: measure again on a quiet machine"]


def _bound(rig: Rig, phases: Sequence[Phase]) -> dict[str, float]:
    speeds = [phase.clips_per_s for phase in phases]
    return {
        "clips_per_s": median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "frames_per_s": median(speeds) * rig.config.data.num_frames,
        "step_ms": 1000 * rig.batch.total / median(speeds),
        "trainer_cores": median(phase.trainer_cpu / phase.seconds for phase in phases),
        "workers_cores": median(phase.workers_cpu / phase.seconds for phase in phases),
        "cpu_ms_per_clip": median(1000 * (phase.trainer_cpu + phase.workers_cpu) / phase.clips for phase in phases),
    }


def _timeline(last: Round) -> list[list[Any]]:
    """[step, stage, start, end] in milliseconds of a few consecutive steps of the last round, from its middle."""
    spans = last.whole.spans
    steps = sorted({span.step for span in spans})
    number = max(1, SHOWN_SPANS * len(steps) // max(1, len(spans)))
    first = steps[max(0, (len(steps) - min(number, 4)) // 2)]
    shown = [span for span in spans if first <= span.step < first + min(number, 4)]
    begin = shown[0].start
    return [[s.step - first, s.stage, 1000 * (s.start - begin), 1000 * (s.end - begin)] for s in shown]


def _stages(
    rig: Rig, rounds: Sequence[Round], requests: Sequence[ClipRequest], clips: ClipBatch, seconds: float
) -> dict[str, Any]:
    """Milliseconds of each stage, alone and end to end."""

    total = rig.batch.total
    per_step: dict[str, list[float]] = {}
    reading = time_reading(requests, seconds / 2)
    per_step["read"] = [total * took for took in reading]
    decoding = [total * max(0.0, took - median(reading)) for took in time_decoding(rig, requests, seconds / 2)]
    per_step["decode"] = decoding
    per_step["to_device"] = [rig.batch.accumulation * took for took in time_copying(rig, clips, seconds / 4)]
    for stage in STAGES[2:]:
        per_step[stage] = [took for r in rounds for took in r.model.step_seconds(stage)]
    together = {stage: [took for r in rounds for took in r.whole.step_seconds(stage)] for stage in STAGES}
    return {
        "alone": {stage: _spread(taken, total) for stage, taken in per_step.items()},
        "end_to_end": {stage: _spread(taken, total) for stage, taken in together.items()},
    }


def _spread(taken: Sequence[float], clips: int) -> dict[str, Any]:
    """Of a stage's seconds in each step."""
    low, middle, high = quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [taken[0]] * 3
    return {
        "ms_per_clip": 1000 * middle / clips,
        "ms_per_step": 1000 * middle,
        "quartiles_ms_per_step": [1000 * low, 1000 * high],
        "measured": len(taken),
    }


def _compute(rig: Rig, clips_per_s: float) -> dict[str, Any]:
    """Operations a second, and their share of what the device could do."""
    dtype = torch.bfloat16 if rig.config.bf16 else torch.float32
    stated = device_peak(rig.device, dtype)
    peak = measured_peak(rig.device, dtype) if stated is None else stated
    tflops = 2 * rig.gmac * clips_per_s / 1000
    return {
        "training_gmac_per_clip": rig.gmac,
        "tflops": tflops,
        "peak_tflops": peak / 1e12,
        "peak_source": "stated by the maker" if stated is not None else "measured: a large product of matrices here",
        "mfu": tflops / (peak / 1e12),
    }


def _forget_memory(rig: Rig) -> None:
    forget_peak_memory()
    if rig.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rig.device)


def _peak_memory(rig: Rig) -> dict[str, int]:
    """Bytes, by whom."""
    own, *others = process_tree()
    workers = [pid for pid in others if "pipelines.worker" in command_line(pid)]  # torch.compile has its own
    held = {"trainer": peak_memory(own), "workers": sum(map(peak_memory, workers))}
    if rig.device.type == "cuda":
        held["device"] = torch.cuda.max_memory_allocated(rig.device)
    return held


def _judge(document: dict[str, Any], rig: Rig, requests: Sequence[ClipRequest]) -> dict[str, Any]:
    bounds, settings, speed = document["bounds"], document["settings"], rig.config.speed
    stored = median(min(request.width, request.height) for request in requests)
    facts = Facts(
        loader=bounds["loader"]["clips_per_s"],
        model=bounds["model"]["clips_per_s"],
        whole=bounds["whole"]["clips_per_s"],
        reached=document["consistency"]["ratio_to_slower"],
        device=rig.device.type,
        cores=document["hardware"]["cores"],
        workers=rig.workers,
        workers_busy=bounds["loader"]["workers_cores"],
        waiting_share=document["waiting_share"],
        copy_share=document["stages"]["end_to_end"]["to_device"]["ms_per_step"] / bounds["whole"]["step_ms"],
        decode_cpu_ms=bounds["loader"]["cpu_ms_per_clip"],
        model_cpu_ms=bounds["model"]["cpu_ms_per_clip"],
        profile=settings["profile"],
        decoded_per_used=document["decoded_per_used_frame"],
        oversize=stored / settings["size"],
        accumulation=settings["accumulation"],
        micro=settings["micro"],
        compiled=compiles(speed, rig.device),
        checkpointed=speed.checkpoint_blocks != 0,
        bf16=rig.config.bf16,
    )
    return asdict(judge(facts))


class _Progress:
    """Says on one line of standard error what is being measured."""

    def __enter__(self) -> Callable[[str], None]:
        self._bar = tqdm(bar_format="{elapsed} {desc}", disable=None, leave=False)
        return lambda text: self._bar.set_description_str(text)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def _publish(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table, or the JSON in its place, and the files."""
    text, to_stdout = json.dumps(document, indent=1, ensure_ascii=False) + "\n", str(arguments.json) == "-"
    if to_stdout:
        print(text, end="")
    else:
        print(table(document))
        for name, lines in (("max_batch", batch_lines), ("sweep", sweep_table)):
            if name in document:
                print("\n" + "\n".join(lines(document[name])))
    if arguments.out:
        draw(document, arguments.out / "timeline.png")
    for path in (None if to_stdout else arguments.json, arguments.out and arguments.out / "report.json"):
        if path:
            write_durably(path, text.encode())


if __name__ == "__main__":
    run_cli(lambda: one_of_several(main))
