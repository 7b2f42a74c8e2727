"""What the project wants of an H200, and what of it a report reached (tools/gpu_report.py).

The speed goals are the issue's, set before anything ran on a GPU. A step's numbers are those of the fastest way to
compute it that costs no accuracy, all three of the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINE = "paper"
EQUAL_FRAMES = (
    "test_gpu_batches_equal_cpu_batches",
    "test_the_way_over_cuda_gives_the_same_clips",
    "test_the_graph_for_cuda_gives_what_the_cpu_path_gives",
)
NO_LEAKS = ("test_a_thousand_bad_clips_leak_nothing",)
Results = Mapping[str, Any]
"""What the parts of a report found, by their names; a part that did not come to an end is missing."""


@dataclass(frozen=True)
class Goal:
    """One of them."""

    text: str
    value: Callable[[Results], float | None]
    """Of a report; None where it was not measured. May raise KeyError where a part is missing."""
    goal: float
    floor: float | None = None
    """What is still acceptable; None: nothing less than the goal."""
    at_most: bool = False
    """Whether less is better."""
    unit: str = ""


@dataclass(frozen=True)
class Judged:
    """What became of a goal."""

    text: str
    wanted: str
    value: float | None
    state: str
    """`reached`, `floor` (between floor and goal), `missed` or `not measured`."""
    note: str = ""


def judge(value: float | None, goal: float, floor: float | None = None, *, at_most: bool = False) -> str:
    """What a value is called."""
    if value is None or value != value:
        return "not measured"
    sign = -1 if at_most else 1
    if sign * value >= sign * goal:
        return "reached"
    return "floor" if floor is not None and sign * value >= sign * floor else "missed"


def judge_goals(results: Results) -> list[Judged]:
    """All goals, in their order."""
    judged = []
    for goal in GOALS:
        try:
            value = goal.value(results)
        except KeyError:
            value = None
        sign, unit = "≤" if goal.at_most else "≥", f" {goal.unit}" if goal.unit else ""
        wanted = f"{sign} {goal.goal:g}{unit}" + (f" (floor {goal.floor:g})" if goal.floor is not None else "")
        state = judge(value, goal.goal, goal.floor, at_most=goal.at_most)
        judged.append(Judged(goal.text, wanted, value, state))
    return [*judged, *(judge_tests(text, names, results) for text, names in TESTED)]


def fastest(variants: Mapping[str, Mapping[str, Any]]) -> str:
    """Our way to compute a step that takes the least time, FP8 left out; KeyError where there is none."""
    ours = [name for name in variants if name.startswith("ours") and "fp8" not in name]
    if not ours:
        raise KeyError("ours")
    return min(ours, key=lambda name: variants[name]["step"]["ms"])


def judge_tests(text: str, names: Sequence[str], results: Results) -> Judged:
    """Whether tests of these names, in all their variants, passed; one that did not run leaves the goal open."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for test, outcome in results.get("tests", {}).get("outcomes", {}).items():
        name = test.rpartition("::")[2].partition("[")[0]
        if name in found:
            found[name].append(outcome)
    outcomes = [outcome for of_name in found.values() for outcome in of_name]
    if "failed" in outcomes:
        state = "missed"
    elif all(found.values()) and set(outcomes) == {"passed"}:
        state = "reached"
    else:
        state = "not measured"
    counted = f"{outcomes.count('passed')} of {len(outcomes)} tests passed" if outcomes else ""
    return Judged(text, "tests pass", None, state, counted)


def _clips(part: str) -> Callable[[Results], float | None]:
    return lambda results: float(_variant(results[part])["clips_per_second"])


def _times_baseline(part: str) -> Callable[[Results], float | None]:
    return lambda results: float(_variant(results[part])["step"]["ratio"])


def _memory_percent(part: str) -> Callable[[Results], float | None]:
    def percent(results: Results) -> float:
        variants = results[part]["variants"]
        return 100.0 * _variant(results[part])["memory_bytes"] / variants[BASELINE]["memory_bytes"]

    return percent


def _variant(step: Mapping[str, Any]) -> Mapping[str, Any]:
    variants: Mapping[str, Mapping[str, Any]] = step["variants"]
    return variants[fastest(variants)]


def _temporal(results: Results) -> float | None:
    """Times FlashAttention 2 as PyTorch ships it; None where that could not run, for then it is beside another."""
    over_time = results["step_b16"]["temporal_attention"]
    return float(over_time["auto"]["forward_backward"]["ratio"]) if "flash" in over_time else None


GOALS = (
    Goal("ViT-B/16, 8 frames, synthetic input", _clips("step_b16"), 450, 300, unit="clips/s"),
    Goal("ViT-B/16, 8 frames: the plain eager step", _times_baseline("step_b16"), 2.5, unit="×"),
    Goal("ViT-B/16, 8 frames: of its peak memory", _memory_percent("step_b16"), 50, at_most=True, unit="%"),
    Goal("ViT-L/14, 8 frames, synthetic input", _clips("step_l14"), 90, 60, unit="clips/s"),
    Goal("ViT-L/14, 8 frames: the plain eager step", _times_baseline("step_l14"), 2.5, unit="×"),
    Goal("ViT-L/14, 8 frames: of its peak memory", _memory_percent("step_l14"), 50, at_most=True, unit="%"),
    Goal("temporal attention of 8 steps, both passes: fa2-pt", _temporal, 3.0, unit="×"),
    Goal(
        "ViT-B/16, 8 frames, from jpeg shards",
        lambda results: float(results["profile"]["bounds"]["whole"]["clips_per_s"]),
        *(400, 250),
        unit="clips/s",
    ),
    Goal(
        "the same: waiting for data",
        lambda results: 100.0 * results["profile"]["waiting_share"],
        2,
        at_most=True,
        unit="%",
    ),
    Goal(
        "the same: ÷ the slower of loader and model alone",
        lambda results: float(results["profile"]["consistency"]["ratio_to_slower"]),
        0.9,
    ),
)
TESTED = (("GPU frames equal CPU frames", EQUAL_FRAMES), ("1,000 bad clips leak nothing", NO_LEAKS))
