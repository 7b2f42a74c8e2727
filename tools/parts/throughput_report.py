"""What the measurements of tools/profile_throughput.py mean, and how they are shown: a verdict, a table, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = 0.15  # of the time that a clip takes of a core: no more could be won
NEAR = 0.9  # of a bound: so close, that bound is what holds the run back
FULL = 0.8  # of the workers' time: they could not do more
COPIES = 0.05  # of a step: worth a word
OVERSIZE = 1.5  # stored frames ÷ model input: more than random crops need
EVEN = 1.1  # loader and model within 10 %: neither is far ahead
STAGE_NAMES = {
    "read": "read",
    "decode": "decode",
    "fetch": "plan and wait",
    "to_device": "host to device",
    "augment": "augment",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
}
COLOURS = {
    "fetch": "#c0392b",
    "to_device": "#e59866",
    "augment": "#f4d03f",
    "forward": "#5dade2",
    "backward": "#2874a6",
    "optimizer": "#58b368",
}
BOUND_NAMES = {"loader": "loader only", "model": "synthetic input only", "whole": "end to end"}


@dataclass(frozen=True)
class Facts:
    """The numbers that decide what bounds a run and what may help."""

    loader: float
    """Clips/s of the loader alone."""
    model: float
    """Of the model alone, on input that lies on the device."""
    whole: float
    """Of both together."""
    reached: float
    """The last ÷ the slower of the first two: the median of each round's own."""
    device: str = "cpu"
    cores: int = 2
    workers: int = 1
    """Decode processes; 0: the GPU decodes."""
    workers_busy: float = 1.0
    """Cores that they kept busy with nobody learning."""
    waiting_share: float = 0.0
    """Of an end-to-end step, 0 to 1."""
    copy_share: float = 0.0
    """Host-to-device, of an end-to-end step."""
    decode_cpu_ms: float = 1.0
    """Milliseconds of a core that a clip takes until it is decoded."""
    model_cpu_ms: float = 1.0
    profile: str = "jpeg"
    decoded_per_used: float = 1.0
    oversize: float = 1.0
    """Stored short side ÷ the model's; the published recipes have 256 ÷ 224."""
    accumulation: int = 1
    micro: int = 16
    compiled: bool = False
    checkpointed: bool = False
    bf16: bool = True


@dataclass(frozen=True)
class Verdict:
    """What bounds a run."""

    bound: str
    """`loader`, `model`, `copies`, `shared cores` or `host`."""
    text: str
    """One sentence, by numbers."""
    levers: tuple[str, ...]
    """What to change, the most promising first, each with its key."""


def judge(facts: Facts) -> Verdict:
    """Says what bounds a run: the slower of loader and model if both together come near it, else what they share."""
    decoding = facts.decode_cpu_ms / (facts.decode_cpu_ms + facts.model_cpu_ms)
    one_is_all = facts.device == "cpu" and not SMALL <= decoding <= 1 - SMALL
    if facts.reached >= NEAR or one_is_all:
        return _one_bounds(facts)
    alone = f"alone, the loader gives {_number(facts.loader)} clips/s and the model takes {_number(facts.model)}, "
    if facts.device == "cpu":
        return Verdict("shared cores", *_shared_cores(facts, alone))
    lost = 1 - facts.reached
    if facts.copy_share >= max(COPIES, lost / 2):
        text = (
            f"Host-to-device copies bound this run: {alone}together they reach {_number(facts.whole)}, and a step "
            f"spends {100 * facts.copy_share:.0f} % on copies."
        )
        return Verdict("copies", text, _copy_levers(facts))
    text = (
        f"The host holds this run up: {alone}together they reach only {_number(facts.whole)}, {100 * lost:.0f} % less "
        f"than the slower of them; copies are {100 * facts.copy_share:.1f} % of a step, and the process that launches "
        f"kernels shares {facts.cores} cores with {facts.workers or 'no'} decode workers."
    )
    return Verdict("host", text, _host_levers(facts))


def _one_bounds(facts: Facts) -> Verdict:
    """The slower of the two does."""
    loader, model = facts.loader, facts.model
    bound = "loader" if loader < model else "model"
    text = (
        f"The {bound} bounds this run: the loader gives {_number(loader / model)} × what the model takes "
        f"({_number(loader)} and {_number(model)} clips/s), together they reach {_number(facts.whole)}, and the "
        f"trainer waits {100 * facts.waiting_share:.1f} % of the time"
    )
    if max(loader, model) <= EVEN * min(loader, model):
        text += "; the two are so close that speeding up one alone gains little"
    return Verdict(bound, text + ".", _loader_levers(facts) if bound == "loader" else _model_levers(facts))


def _shared_cores(facts: Facts, alone: str) -> tuple[str, tuple[str, ...]]:
    """On a CPU, where what one takes the other lacks."""
    decode, learn = facts.decode_cpu_ms, facts.model_cpu_ms
    text = (
        f"Loader and model bound this run together, for they share {facts.cores} cores: {alone}together they reach "
        f"{_number(facts.whole)}; of the time that a clip takes of a core, {decode:.3g} ms are for decoding and "
        f"{learn:.3g} ms for learning."
    )
    return text, (*_packing_levers(facts), *_model_levers(facts)) if decode > learn else (
        *_model_levers(facts),
        *_packing_levers(facts),
    )


def _packing_levers(facts: Facts) -> tuple[str, ...]:
    """What makes decoding cheaper."""
    levers = []
    if facts.profile != "jpeg":
        levers.append(
            f"pack with --profile jpeg: {facts.profile} decodes {facts.decoded_per_used:.2f} frames for each one used"
        )
    if facts.oversize > OVERSIZE:
        levers.append(
            f"pack with a smaller --short-side: stored frames are {facts.oversize:.1f} × as high or wide as the model's"
        )
    return tuple(levers)


def _loader_levers(facts: Facts) -> tuple[str, ...]:
    levers = list(_packing_levers(facts))
    wanted = math.ceil(facts.workers * facts.model / facts.loader)
    if 0 < facts.workers < facts.cores and wanted > facts.workers and facts.workers_busy >= FULL * facts.workers:
        levers.append(
            f"data.workers = {min(facts.cores, wanted)}: the {facts.workers} of now keep {facts.workers_busy:.1f} of "
            f"{facts.cores} cores busy"
        )
    if facts.workers_busy < FULL * facts.workers:
        levers.append(
            f"a faster disk, or an idle machine: {facts.workers} workers keep only "
            f"{facts.workers_busy:.1f} cores busy, and wait the rest of the time"
        )
    if not levers:
        levers.append("more cores: decoding has all of these" if facts.workers else "another GPU: this one decodes too")
    return tuple(levers)


def _model_levers(facts: Facts) -> tuple[str, ...]:
    levers = []
    if not facts.bf16:
        levers.append("ds.torch_autocast.enabled = true: products in bfloat16")
    if not facts.compiled:
        levers.append('speed.compile = "on": blocks compiled, where there is a compiler')
    if facts.checkpointed:
        levers.append("speed.checkpoint_blocks = 0, if memory allows: no activation is computed twice")
    if facts.accumulation > 1:
        levers.append(
            f"ds.train_micro_batch_size_per_gpu above {facts.micro}: a step takes {facts.accumulation} micro-batches "
            "(--max-batch says what fits, --sweep batch what is fastest)"
        )
    if facts.device == "cuda":
        levers.append("speed.fp8 = true on Hopper, at some cost in accuracy")
    if not levers or facts.device == "cpu":
        levers.append("a faster device, a smaller model, or adapters in the upper blocks only (model.positions)")
    return tuple(levers)


def _copy_levers(facts: Facts) -> tuple[str, ...]:
    levers = []
    if facts.workers:
        levers.append("pack with --profile jpeg and verify: then the GPU decodes and clips are not copied")
    levers.append("ds.train_micro_batch_size_per_gpu larger: fewer, longer copies")
    return tuple(levers)


def _host_levers(facts: Facts) -> tuple[str, ...]:
    levers = []
    if facts.workers >= facts.cores - 1:
        levers.append(f"data.workers = {max(1, facts.cores - 2)}: leaves the trainer's process a core")
    levers.append(f"ds.train_micro_batch_size_per_gpu above {facts.micro}: more work for each launch")
    levers.append("speed.cuda_graphs = true: a block's kernels are launched as one")
    return tuple(levers)


def _number(value: float) -> str:
    """Three digits and more, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.001 else "0"


def table(document: dict[str, Any]) -> str:
    """The report for people: at most 45 lines of 110 columns."""
    return "\n".join(
        [
            *_head(document),
            "",
            *_stage_rows(document),
            "",
            *_bound_rows(document),
            "",
            *_facts_rows(document),
            "",
            *wrap(document["verdict"]["text"]),
            *(line for lever in document["verdict"]["levers"] for line in wrap(lever, "  - ")),
        ]
    )


def wrap(text: str, bullet: str = "", width: int = 110) -> list[str]:
    """Lines no longer than `width`, the first after `bullet`, the others indented as much."""
    lines, line = [], bullet
    for word in text.split():
        if len(line) + len(word) + 1 > width:
            lines.append(line.rstrip())
            line = " " * len(bullet)
        line += word + " "
    return [*lines, line.rstrip()]


def _head(document: dict[str, Any]) -> list[str]:
    settings, hardware = document["settings"], document["hardware"]
    side = settings["size"]
    workers = settings["workers"]
    decoders = f"{workers} decode worker{'s' if workers > 1 else ''}" if workers else "decoding on the GPU"
    return wrap(
        f"{document['recipe']} on {hardware['device']} ({hardware['cores']} cores), {settings['precision']}: clips of "
        f"{settings['frames']} × {side} × {side} from {settings['profile']} shards; a step is "
        f"{settings['accumulation']} × {settings['micro']} clips; {decoders}, {settings['prefetch']} batches ahead"
    )


def _stage_rows(document: dict[str, Any]) -> list[str]:
    heads = ("stage", "ms/clip", "ms/step", "quartiles", "ms/step", "share")
    rows = [
        f"{'':20}{'alone':>42}{'end to end':>27}",
        f"{heads[0]:20}{heads[1]:>11}{heads[2]:>11}{heads[3]:>20}{heads[4]:>18}{heads[5]:>10}",
    ]
    step, one_thread = document["bounds"]["whole"]["step_ms"], bool(document["settings"]["workers"])
    for stage, name in STAGE_NAMES.items():
        alone, together = document["stages"]["alone"].get(stage), document["stages"]["end_to_end"].get(stage)
        by_loader = stage in ("read", "decode")
        row = f"{name + ', 1 thread' * (by_loader and one_thread):20}"
        if alone is None:
            row += f"{'–':>11}{'–':>11}{'–':>20}"
        else:
            quartiles = "..".join(map(_number, alone["quartiles_ms_per_step"]))
            row += f"{_number(alone['ms_per_clip']):>11}{_number(alone['ms_per_step']):>11}{quartiles:>20}"
        if together is not None:
            share = 100 * together["ms_per_step"] / step
            row += f"{_number(together['ms_per_step']):>18}{share:8.1f} %"
        elif by_loader:
            row += f"{'meanwhile':>18}{'–':>10}"
        rows.append(row)
    return rows


def _bound_rows(document: dict[str, Any]) -> list[str]:
    heads = ("clips/s", "lowest..highest", "frames/s", "step ms", "cores busy: trainer + workers")
    rows = [f"{'bound':20}{heads[0]:>11}{heads[1]:>20}{heads[2]:>11}{heads[3]:>11}{heads[4]:>33}"]
    for bound, name in BOUND_NAMES.items():
        facts = document["bounds"][bound]
        spread = "..".join(map(_number, (facts["lowest"], facts["highest"])))
        cores = f"{facts['trainer_cores']:.2f} + {facts['workers_cores']:.2f}"
        speed, frames, step = map(_number, (facts["clips_per_s"], facts["frames_per_s"], facts["step_ms"]))
        rows.append(f"{name:20}{speed:>11}{spread:>20}{frames:>11}{step:>11}{cores:>33}")
    check = document["consistency"]
    rows.append(
        f"{'expected together':20}{_number(check['expected_clips_per_s']):>11}   = {check['rule']}; reached: "
        f"{check['ratio']:.2f} ×, must be {check['at_least']:.1f}"
    )
    if not check["holds"]:
        rows.append("! less than that: something else holds the run back, or other programs took the cores meanwhile")
    return rows


def _facts_rows(document: dict[str, Any]) -> list[str]:
    compute, memory, projected = document["compute"], document["memory"], document["projected"]
    mfu = 100 * compute["mfu"]
    held = [f"{name.replace('_', ' ')} {value / 1e6:,.0f} MB" for name, value in memory.items()]
    busy = f"the device computes {100 * document['device_busy_share']:.0f} % of a step"
    if document["cuda_utilization_percent"] is not None:
        busy += f" (the driver says it is in use {document['cuda_utilization_percent']:.0f} % of the time)"
    lines = [
        f"waiting {100 * document['waiting_share']:.1f} %; {busy}; {document['decoded_per_used_frame']:.2f} frames "
        f"decoded for each used; {document['bytes_per_clip']:,.0f} bytes a clip",
        f"{_number(compute['tflops'])} TFLOP/s of {_number(compute['peak_tflops'])} ({compute['peak_source']}): MFU "
        f"{mfu:.1f} %; {_number(compute['training_gmac_per_clip'])} GMAC to learn from a clip",
        f"peak memory: {', '.join(held)}",
        f"projected: {projected['epochs']:g} epochs × {projected['samples']:,} clips: {_duration(projected['hours'])}, "
        "evaluation and checkpoints left out",
    ]
    notes = [line for note in document["notes"] for line in wrap(note, "! ")]
    return [part for line in lines for part in wrap(line)] + notes


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def draw(document: dict[str, Any], path: Path) -> None:
    """timeline.png: a few measured steps, lane by lane; the median step, stage by stage; the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    hardware, settings = document["hardware"], document["settings"]
    figure = plt.figure(figsize=(13, 8.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    _draw_lanes(above.subplots(), document["timeline"])
    step, bounds = below.subplots(1, 2, width_ratios=[1.15, 1])
    _draw_step(step, document)
    _draw_bounds(bounds, document)
    figure.suptitle(
        f"{document['recipe']}: where the time of a training step goes   ({hardware['device']}, {hardware['cores']} "
        f"cores, {settings['precision']}, {settings['accumulation']} × {settings['micro']} clips a step)",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_lanes(axis: Any, timeline: Sequence[Sequence[Any]]) -> None:
    """Each stage a lane, each micro-batch a bar in it; every other step shaded."""
    names = list(COLOURS)
    begin, finish = timeline[0][2], timeline[-1][3]
    for step in sorted({step for step, *_ in timeline}):
        start = min(span[2] for span in timeline if span[0] == step)
        end = max(span[3] for span in timeline if span[0] == step)
        if step % 2 == 0:
            axis.axvspan(start, end, color="0.955", zorder=0)
        place = {"ha": "center", "va": "center", "fontsize": 9, "color": "0.3"}
        axis.text((start + end) / 2, -0.75, f"step {step + 1}: {_number(end - start)} ms", **place)
    shortest = 0.0015 * (finish - begin)  # what is shorter would not be seen
    for _, stage, start, end in timeline:
        width = max(end - start, shortest)
        axis.barh(names.index(stage), width, left=start, height=0.74, color=COLOURS[stage], zorder=2)
    axis.set_yticks(range(len(names)), [STAGE_NAMES[name] for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set(ylim=(len(names) - 0.5, -1.15), xlim=(begin, finish), xlabel="milliseconds")
    axis.set_title("Consecutive steps, end to end", loc="left", fontsize=11)
    axis.grid(axis="x", color="0.88", zorder=1)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _draw_step(axis: Any, document: dict[str, Any]) -> None:
    """The median step as a stack of its stages, end to end and each alone."""
    stages = document["stages"]
    rows = {"end to end": stages["end_to_end"], "each stage\nalone": stages["alone"]}
    widths = [[row[name]["ms_per_step"] if name in row else 0.0 for name in COLOURS] for row in rows.values()]
    longest = max(map(sum, widths))
    for row, of_row in enumerate(widths):
        left = 0.0
        for name, width in zip(COLOURS, of_row, strict=True):
            axis.barh(row, width, left=left, color=COLOURS[name], height=0.5, edgecolor="white", linewidth=0.6)
            if width > 0.07 * longest:
                colour = "black" if name in ("to_device", "augment") else "white"
                axis.text(left + width / 2, row, _number(width), ha="center", va="center", fontsize=9, color=colour)
            left += width
        axis.text(left + 0.012 * longest, row, f"{_number(left)} ms", va="center", fontsize=9)
    handles = [axis.barh(0, 0, color=colour) for colour in COLOURS.values()]
    labels = [STAGE_NAMES[name] for name in COLOURS]
    axis.legend(handles, labels, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=9)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set(xlim=(0, 1.16 * longest), ylim=(1.5, -0.5), xlabel="milliseconds of a step")
    _bare(axis, "The median step, stage by stage")


def _draw_bounds(axis: Any, document: dict[str, Any]) -> None:
    """A step of each bound, its fastest and slowest round, and what was to be expected of both together."""
    bounds = document["bounds"]
    clips = document["settings"]["total"]
    steps = [bounds[name]["step_ms"] for name in BOUND_NAMES]
    fastest, slowest = ([1000 * clips / bounds[name][end] for name in BOUND_NAMES] for end in ("highest", "lowest"))
    expected = 1000 * clips / document["consistency"]["expected_clips_per_s"]
    longest = max(*slowest, expected)
    axis.barh(list(BOUND_NAMES.values()), steps, color=["0.72", "0.72", COLOURS["backward"]], height=0.5)
    for row, (step, low, high, name) in enumerate(zip(steps, fastest, slowest, BOUND_NAMES, strict=True)):
        axis.plot([low, high], [row, row], color="black", linewidth=1.5, solid_capstyle="butt")
        text = f"{_number(bounds[name]['clips_per_s'])} clips/s"
        axis.text(max(step, high, expected * (row == 2)) + 0.02 * longest, row, text, va="center", fontsize=9)
    axis.plot([expected, expected], [1.62, 2.38], color="black", linestyle=":", linewidth=2, label="expected of both")
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    axis.set(
        xlim=(0, 1.35 * longest), ylim=(2.5, -0.5), xlabel="milliseconds of a step (line: fastest to slowest round)"
    )
    _bare(axis, "The three bounds")


def _bare(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
