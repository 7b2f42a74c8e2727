"""The searches of tools/profile_throughput.py: which settings are fastest, and the largest micro-batch that fits."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from pipelines.loader import decodes_on_gpu
from pipelines.machine import available_memory, forget_peak_memory, peak_memory
from tools.parts.throughput_measure import Rig, Stages, measure_loader, measure_whole
from tools.parts.throughput_report import wrap
from train.config import Batch
from train.step import MicroBatch

DIMENSIONS = ("threads", "prefetch", "batch")
KEYS = {"threads": "workers", "prefetch": "prefetch", "batch": "train_micro_batch_size_per_gpu"}
WORTH = 1.03  # of the present speed: less is noise, and no reason to change a setting
BELOW, ABOVE = 2, 3  # candidates smaller and larger than the present setting
MAX_PASSES = 2
LARGEST = 2**14  # clips: no micro-batch beyond is tried
SHARE_OF_MEMORY = 0.8  # of what is available on a CPU; the rest is for others


def check_dimensions(text: str) -> list[str]:
    """`threads,batch` → its parts; ValueError for others."""
    dimensions = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in dimensions if part not in DIMENSIONS]
    if unknown or not dimensions:
        raise ValueError(f"--sweep {text}: allowed are {', '.join(DIMENSIONS)}, separated by commas")
    return dimensions


def sweep(
    rig: Rig, dimensions: Sequence[str], seconds: float, passes: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Tries settings, one dimension after the other, each from the best of those before; sets `rig` to the best.

    Candidates take turns, there and back, each with a loader of its own; a setting changes only for a gain of 3 % end
    to end.
    """
    tried: dict[str, list[dict[str, Any]]] = {}
    best: dict[str, int] = {}
    for dimension in dimensions:
        if dimension == "threads" and not rig.workers:
            continue  # the GPU decodes
        present, candidates = _candidates(rig, dimension)
        speeds: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for number in range(min(passes, MAX_PASSES)):
            for value in candidates if number % 2 == 0 else reversed(candidates):
                tell(f"{KEYS[dimension]} = {value} ({number + 1})")
                _set(rig, dimension, value)
                if (speed := _try(rig, seconds)) is not None:
                    speeds[value].append(speed)
        tried[dimension] = [
            {
                "value": value,
                "loader_clips_per_s": median(a for a, _ in pairs),
                "clips_per_s": median(b for _, b in pairs),
            }
            for value, pairs in speeds.items()
        ]
        best[dimension] = choose(present, {value: [whole for _, whole in pairs] for value, pairs in speeds.items()})
        _set(rig, dimension, best[dimension])
    return {"tried": tried, "best": best, "lines": lines_for(best)}


def choose(present: int, speeds: dict[int, list[float]]) -> int:
    """The fastest setting by its speeds in each pass, if it beats the present one by 3 % and in every pass."""
    fastest = max(speeds, key=lambda value: median(speeds[value]), default=present)
    if present not in speeds:
        return fastest
    before, after = speeds[present], speeds[fastest]
    better = median(after) >= WORTH * median(before) and all(b > a for a, b in zip(before, after, strict=False))
    return fastest if better else present


def lines_for(best: dict[str, int]) -> list[str]:
    """What to write into the recipe and the DeepSpeed file."""
    data = [f"{KEYS[name]} = {value}" for name, value in best.items() if name != "batch"]
    lines = ["recipe:", "  [data]", *(f"  {line}" for line in data)] if data else []
    if "batch" in best:
        lines += ["ds_config.json:", f'  "{KEYS["batch"]}": {best["batch"]}']
    return lines


def sweep_table(result: dict[str, Any]) -> list[str]:
    """The sweep for people."""
    rows = [f"{'setting':40}{'loader only':>14}{'end to end':>14}  clips/s"]
    for dimension, tried in result["tried"].items():
        for row in tried:
            mark = "  <- best" if row["value"] == result["best"][dimension] else ""
            name = f"{KEYS[dimension]} = {row['value']}"
            rows.append(f"{name:40}{row['loader_clips_per_s']:14,.1f}{row['clips_per_s']:14,.1f}{mark}")
    return [*rows, "", *result["lines"]]


def _candidates(rig: Rig, dimension: str) -> tuple[int, list[int]]:
    """The present value and those to try, it among them."""
    data = rig.config.data
    if dimension == "prefetch":
        return data.prefetch, [1, 2, 3, 4]
    if dimension == "batch":
        return rig.batch.micro, _around(rig.batch.micro, _sizes(rig))
    cores = len(os.sched_getaffinity(0))
    powers = [2**k for k in range(cores.bit_length()) if 2**k <= cores]
    return rig.workers, _around(rig.workers, sorted({*powers, max(1, cores - 1), cores, rig.workers}))


def _around(present: int, values: Sequence[int]) -> list[int]:
    """The present one and its neighbours in the list."""
    at = values.index(present)
    return list(values[max(0, at - BELOW) : at + ABOVE + 1])


def _sizes(rig: Rig) -> list[int]:
    """Micro-batches into which the batch can be cut."""
    unit = 2 if rig.config.data.mixes else 1  # clips are mixed in pairs
    return [size for size in range(unit, rig.batch.total + 1, unit) if rig.batch.total % size == 0]


def _set(rig: Rig, dimension: str, value: int) -> None:
    if dimension == "batch":
        torch.compiler.reset()  # blocks of another size are other graphs
        rig.change(Batch(rig.batch.total, value, rig.batch.total // value))
    else:
        rig.change(data={KEYS[dimension]: value})


def _try(rig: Rig, seconds: float) -> tuple[float, float] | None:
    """Clips/s of the loader alone and end to end; None where the GPU's memory does not suffice."""
    try:
        with rig.job.train_loader() as loader:
            whole = measure_whole(rig, loader, seconds)
            return measure_loader(rig, loader, seconds).clips_per_s, whole.clips_per_s
    except torch.cuda.OutOfMemoryError:
        rig.forget()
        return None


def largest_batch(rig: Rig, clips: MicroBatch, tell: Callable[[str], None]) -> dict[str, Any]:
    """The largest micro-batch whose step fits into memory, and the largest of those that the batch can be cut into.

    On CUDA it is found by trying, to within an eighth. On a CPU nothing is tried until the system ends us: the peak
    memory of steps no larger than the run's own is carried on, in a straight line, to 80 % of what is available.
    """
    usual, unit = rig.batch, 2 if rig.config.data.mixes else 1
    find = _largest_by_trying if rig.device.type == "cuda" else _largest_by_line
    facts = find(rig, clips, unit, tell)
    rig.change(usual)
    if facts["largest"]:
        facts["setting"] = max(size for size in _sizes(rig) if size <= facts["largest"])
    return facts


def _step_of(rig: Rig, clips: MicroBatch, size: int) -> None:
    """Two steps of one micro-batch of this size."""
    rig.change(Batch(size, size, 1))
    source, stages = rig.synthetic(clips, size), Stages(rig.device)
    for _ in range(2):
        rig.take_step(source, stages)
    rig.settle()


def _clip_bytes(rig: Rig) -> int:
    """Of decoded clips, what each clip of a micro-batch adds to the queue."""
    data, side = rig.config.data, rig.job.model.geometry.image_size
    return (data.prefetch + 1) * data.num_frames * side * side * 3


def _largest_by_trying(rig: Rig, clips: MicroBatch, unit: int, tell: Callable[[str], None]) -> dict[str, Any]:
    def fits(size: int) -> bool:
        tell(f"micro-batch {size}")
        torch.compiler.reset()  # every size is another graph, and their number is limited
        queue = _clip_bytes(rig) * size if decodes_on_gpu(rig.job.shards, rig.device) else 0
        try:
            held = torch.empty(queue, dtype=torch.uint8, device=rig.device)
            _step_of(rig, clips, size)
            del held
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            rig.forget()

    return {"largest": largest_that(fits, unit), "how": "tried on this GPU, to within an eighth"}


def largest_that(fits: Callable[[int], bool], unit: int) -> int:
    """The largest multiple of `unit` that fits, to within an eighth of it: doubled until one does not, then halved."""
    low, high = 0, unit
    while high <= LARGEST and fits(high):
        low, high = high, 2 * high
    while high <= LARGEST and high - low > max(unit, low // 8):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_by_line(rig: Rig, clips: MicroBatch, unit: int, tell: Callable[[str], None]) -> dict[str, Any]:
    most = max(rig.batch.micro, 2 * unit)
    sizes = sorted({max(unit, most // part // unit * unit) for part in (4, 2, 1)})
    peaks = []
    for size in sizes:
        tell(f"micro-batch {size}")
        forget_peak_memory()
        _step_of(rig, clips, size)
        peaks.append(peak_memory(os.getpid()))
    slope, fixed = np.polyfit(sizes, peaks, 1)
    a_clip = max(rig.kept_bytes, float(slope)) + _clip_bytes(rig)
    forget_peak_memory()
    room = SHARE_OF_MEMORY * (available_memory() + peak_memory(os.getpid())) - max(0.0, float(fixed))
    largest = int(max(0.0, room) / a_clip) // unit * unit
    return {
        "largest": min(largest, LARGEST),
        "bytes_per_clip": round(a_clip),
        "measured": dict(zip(map(str, sizes), peaks, strict=True)),
        "how": f"extrapolated from the peak memory of steps of {', '.join(map(str, sizes))} clips to "
        f"{100 * SHARE_OF_MEMORY:.0f} % of what is available; not tried",
    }


def batch_lines(facts: dict[str, Any]) -> list[str]:
    """The search for the largest micro-batch, for people."""
    if not facts["largest"]:
        return [f"no micro-batch fits ({facts['how']}): speed.checkpoint_blocks = -1 takes less memory"]
    more = f", {facts['bytes_per_clip'] / 1e6:.1f} MB a clip" if "bytes_per_clip" in facts else ""
    return [
        *wrap(f"largest micro-batch: {facts['largest']} clips ({facts['how']}{more})"),
        "ds_config.json, the largest of those into which the batch can be cut:",
        f'  "train_micro_batch_size_per_gpu": {facts["setting"]}',
    ]
