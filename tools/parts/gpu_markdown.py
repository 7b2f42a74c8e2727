"""The report of tools/gpu_report.py as people read it: machine, goals, tests, decoding, steps, a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BASELINE = "paper"
MARKS = {"floor": "**above the floor only**", "missed": "**missed**"}


def markdown(document: Mapping[str, Any]) -> str:
    """The whole report; parts that did not come to an end say why."""
    parts = document["parts"]
    shown = {"tests": _tests, "decode": _decode, "profile": _profile}
    lines = [f"**{document['note']}**", ""] if document["note"] else []
    lines += ["# GPU report", "", f"`{document['command']}`, {document['date']}", ""]
    for name, part in parts.items():
        if name == "machine":
            lines += ["## The machine", ""]
            lines += [*_machine(part["result"]), ""] if part["result"] else []
            lines += [*_troubles(part), *_goals(document["goals"]), ""]
            continue
        lines += [f"## {part['title'][0].upper()}{part['title'][1:]}", "", *_troubles(part)]
        if part["result"] is not None:
            lines += [*shown.get(name, _step)(part["result"]), ""]
        lines += [f"`{part['command']}`, {part['seconds']:.0f} s" if part["status"] != "skipped" else "", ""]
    return "\n".join(lines).rstrip()


def summary(document: Mapping[str, Any]) -> str:
    """What became of the goals and of the parts, for the screen."""
    lines = []
    for goal in document["goals"]:
        lines.append(f"{goal['state']:>12}  {goal['text']}: {_value(goal)} (wanted {goal['wanted']})")
    parts = document["parts"].values()
    troubles = [f"{part['title']} ({part['status']})" for part in parts if part["status"] != "done"]
    return "\n".join([*lines, *([f"not whole: {', '.join(troubles)}"] if troubles else [])])


def _value(goal: Mapping[str, Any]) -> str:
    return f"{goal['value']:.4g}" if goal["value"] is not None else goal["note"] or "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, all others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _troubles(part: Mapping[str, Any]) -> list[str]:
    if part["status"] == "done":
        return []
    if part["status"] == "skipped":
        return [f"**Skipped**: {part['said'][0]}.", ""]
    end = f"**{part['status'].capitalize()}** after {part['seconds']:.0f} s. Its last lines:"
    return [end, "", "```", *part["said"], "```", ""]


def _machine(machine: Mapping[str, Any]) -> list[str]:
    gpu = machine["gpu"]
    rows = [["GPU", "none that torch sees"]]
    if gpu is not None:
        memory, count = gpu["memory_bytes"] / 2**30, f" (one of {gpu['count']})" if gpu["count"] > 1 else ""
        rows = [["GPU", f"{gpu['name']}{count}, {memory:.0f} GiB, CUDA {gpu['cuda']}"]]
    rows += [
        ["driver", machine["driver"] or "nvidia-smi is not there"],
        ["processor", f"{machine['processor']}, {machine['cores']} cores"],
        *([library, where] for library, where in machine["libraries"].items()),
        ["packages", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())],
    ]
    if machine["not_as_pinned"]:
        rows.append(["not as pinned", "; ".join(machine["not_as_pinned"])])
    return _table(["", ""], rows)


def _goals(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[goal["text"], goal["wanted"], _value(goal), MARKS.get(goal["state"], goal["state"])] for goal in goals]
    return ["## Goals for an H200", "", *_table(["", "wanted", "found", ""], rows)]


def _tests(tests: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    return [f"{counts}.", *(f"- `{failed['test']}`: {failed['message']}" for failed in tests["failures"])]


def _decode(decode: Mapping[str, Any]) -> list[str]:
    settings, rows = decode["settings"], []
    for row in decode["rates"]:
        spread = f"{row['lowest']:.0f}–{row['highest']:.0f}"
        speed = [f"{row['clips_per_s']:.0f}", spread, f"{row['frames_per_s']:.0f}", f"{row['megabytes_per_s']:.0f}"]
        rows.append([row["profile"], row["way"], str(row["batch"]), *speed])
    lines = [
        f"Clips of {settings['clip_frames']} frames at {settings['size']} px; worker processes on the CPU: "
        f"{settings['workers']}.",
        "",
        *_table(["profile", "way", "clips a run", "clips/s", "lowest–highest", "frames/s", "MB/s"], rows),
        "",
    ]
    for profile, off in decode["equality"].items():
        lines.append(f"- {profile}: pixels {off['mean']} levels off the CPU's in the mean, {off['largest']} at most")
    return lines + [f"- {what}: not measured: {reason}" for what, reason in decode["not_measured"].items()]


def _step(step: Mapping[str, Any]) -> list[str]:
    settings, paper, rows = step["settings"], step["variants"][BASELINE]["memory_bytes"], []
    for name, v in step["variants"].items():
        mfu = "–" if v["mfu"] is None else f"{100 * v['mfu']:.0f} %"
        blocks = [f"{v['forward_backward']['ms']:.1f}", f"{v['forward_backward']['ratio']:.2f}"]
        whole = [f"{v['clips_per_second']:.1f}", f"{v['step']['ratio']:.2f}", f"{v['tflops']:.1f}", mfu]
        held = [f"{v['memory_bytes'] / 2**20:.0f}", f"{100 * v['memory_bytes'] / paper:.0f} %"]
        rows.append([name, *blocks, *whole, *held])
    head = ["", "blocks ms", "× paper", "step clips/s", "× paper", "TFLOP/s", "MFU", "MiB", "of paper"]
    lines = [
        f"{settings['model']}, {settings['layers']} blocks, {settings['clips']} clips of {settings['frames']} frames, "
        f"{settings['dtype']}. Memory: {step['memory_is']}.",
        "",
        *_table(head, rows),
        "",
        *_over_time(step["temporal_attention"]),
    ]
    left_out = {**step["left_out"], **{f"temporal attention by {k}": v for k, v in step["attention_left_out"].items()}}
    return lines + [f"- {name}: left out: {reason}" for name, reason in left_out.items()]


def _over_time(backends: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, v in backends.items():
        forward, both = v["forward"], v["forward_backward"]
        times = [f"{1e3 * forward['ms']:.0f}", f"{1e3 * both['ms']:.0f}"]
        rows.append([name, *times, f"{both['ratio']:.2f}", f"{both['gb_per_second']:.0f}"])
    against = "fa2-pt" if "flash" in backends else "sdpa"
    return [*_table(["temporal attention", "forward µs", "both passes µs", f"× {against}", "GB/s"], rows), ""]


def _profile(profile: Mapping[str, Any]) -> list[str]:
    settings, rows = profile["settings"], []
    for key, name in (("loader", "loader only"), ("model", "synthetic input"), ("whole", "end to end")):
        bound = profile["bounds"][key]
        spread = f"{bound['lowest']:.0f}–{bound['highest']:.0f}"
        rows.append([name, f"{bound['clips_per_s']:.0f}", spread, f"{bound['step_ms']:.1f}"])
    compute, memory = profile["compute"], profile["memory"]
    held = ", ".join(f"{who} {size / 2**20:.0f} MiB" for who, size in memory.items())
    return [
        f"Recipe {profile['recipe']}: {settings['model']}, {settings['frames']} frames at {settings['size']} px, steps "
        f"of {settings['accumulation']} × {settings['micro']} clips, {settings['precision']}.",
        "",
        *_table(["", "clips/s", "lowest–highest", "step ms"], rows),
        "",
        f"- {profile['verdict']['text']}",
        *(f"- {lever}" for lever in profile["verdict"]["levers"]),
        f"- waiting {100 * profile['waiting_share']:.1f} % of a step; {compute['tflops']:.3g} TFLOP/s, MFU "
        f"{100 * compute['mfu']:.1f} % of {compute['peak_tflops']:.3g} ({compute['peak_source']}); peak memory: {held}",
        "",
        "![where the time of a step goes](timeline.png)",
    ]
