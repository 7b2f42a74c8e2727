"""The parts of a report: each a function of its source, and of the folder that keeps pictures and tables, to markup."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.parameters import parameter_table
from pipelines.shards import write_durably
from train.bad_samples import FILE_NAME as BAD_SAMPLES
from train.config import Config, ModelConfig
from train.evaluate import Evaluation
from train.looks import looks_of
from train.metrics import FEW_CLASSES, counted, metrics_text
from train.page import figures, folded, heading, listing, paragraph, picture, table, tiles
from train.pictures import draw_bars, draw_curves, filmstrips, frame_grid
from train.report_clips import ShownClip
from train.report_source import MISTAKES, NotThere, Source, again
from train.resolve import DEEPSPEED_DEFAULTS
from train.run_folder import RunFolder, read_bad_samples
from train.tables import CONFUSION, CONFUSION_PICTURE, PER_CLASS, per_class, write_tables

MOST_CLASSES = 1000
"""With more, a confusion matrix is larger than anybody opens: it is left out."""
_CLASSES_SHOWN = 10  # at either end, and of confusions
_FRAMES_SHOWN = 8  # of a clip
_COLUMNS = 4  # in the page, so that people can be told on a telephone
_SIDE = 132  # pixels of a frame in the page
_BAD_SHOWN = 10
_NARROW = 900  # pixels of a confusion matrix that has room beside another picture
_LARGEST_EMBEDDED = 500_000  # bytes of a confusion matrix; of a larger one (of some hundred classes) a small copy
_LARGEST = 1e30  # more is no measurement
_NOTHING = "–"
_TITLES = {"mean_average_precision": "mAP", "top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}
_PICTURES = {
    **{"loss": "loss.png", "lr": "learning_rate.png", "accuracy": "accuracy.png", "classes": "classes.png"},
    **{"waiting": "waiting.png", "pace": "clips_per_s.png", "mistakes": "mistakes.png", "attention": "attention.png"},
}
FILES = (*_PICTURES.values(), PER_CLASS, CONFUSION, CONFUSION_PICTURE)
"""All that the parts may leave in their folder."""


def _summary(source: Source, _: Path) -> str:
    run, evaluations, ends = source.run, source.run.of_kind("eval"), source.run.of_kind("end")
    last: Mapping[str, Any] = source.evaluation or (evaluations[-1] if evaluations else {})
    end: Mapping[str, Any] = ends[-1] if ends else {}
    total, trainable = run.facts["parameters"]["total"], run.facts["parameters"]["trainable"]
    skipped = _skipped(run)
    entries = {
        "state": source.state,
        **{title: _percent(last.get(name)) for name, title in _titles(run).items()},
        "loss of the evaluation": _short(last.get("loss")),
        "clips a second, training": _short(end.get("clips_per_s")),
        "waiting for data": _percent(end.get("wait_share")),
        "parameters that train": f"{trainable:,} of {total:,}",
        "training samples": f"{run.facts['samples']:,}",
        "device": f"{run.facts['device']}, {counted(run.facts['world_size'], 'process', 'es')}",
        "skipped steps": str(skipped[-1][1]) if skipped else _NOTHING,
    }
    return tiles((name, value) for name, value in entries.items() if value != _NOTHING)


def _learning(source: Source, beside: Path) -> str:
    run = source.run
    losses = [("training", *_averages(run, "loss")), ("evaluation", *_series(run, "eval", "loss"))]
    rates = ("learning rate", *_series(run, "train", "lr"))
    accuracies = [(title, *_series(run, "eval", name, 100)) for name, title in _titles(run).items()]
    marks = [step for step, _ in _skipped(run)]
    words = "Loss over steps" + ("; red: steps were skipped since the line before" if marks else "")
    drawn = []
    for name, title, y, lines, described, red in (
        ("loss", "Loss", "loss", losses, words, marks),
        ("accuracy", "Evaluations", "%", accuracies, "Accuracy at evaluations over steps", []),
        ("lr", "Learning rate", "learning rate", [rates], "Learning rate over steps", []),
    ):
        shown = [line for line in lines if line[1]]
        if shown:
            drawn.append(_figure(beside, name, draw_curves(shown, title=title, x="step", y=y, marks=red), described))
    if not drawn:
        raise NotThere("Nothing was logged yet.")
    notes = paragraph(words, soft=True) * bool(marks) + paragraph(_left_out(run), soft=True) * bool(_left_out(run))
    return figures(drawn) + notes + _evaluations(run)


def _evaluations(run: RunFolder) -> str:
    evaluations = run.of_kind("eval")
    names = [name for name in _titles(run) if any(name in line for line in evaluations)]
    if not evaluations:
        return paragraph("Nothing was evaluated.", soft=True)
    rows = [
        [line["step"], _short(line.get("epoch")), *(_percent(line.get(n)) for n in names), _short(line.get("loss"))]
        for line in evaluations
    ]
    head = ["step", "epoch", *(_TITLES[name] for name in names), "loss"]
    return heading("Evaluations") + table(head, rows, numbers=range(len(head)))


def _pace(source: Source, beside: Path) -> str:
    run, drawn = source.run, []
    shares, rates = _averages(run, "wait_share", 100), _averages(run, "clips_per_s")
    if not rates[0]:
        raise NotThere("The run was too short to be measured (its first steps are warm-up).")
    for name, title, y, series in (
        ("pace", "Clips a second", "clips a second", rates),
        ("waiting", "Waiting for data", "% of the time", shares),
    ):
        chart = draw_curves([(title, *series)], title=title, x="step", y=y, from_zero=True)
        drawn.append(_figure(beside, name, chart, f"{title} over steps"))
    words = "Between two lines of the log; evaluation, checkpoints and this report are not in it."
    end = run.of_kind("end")
    if end and _is_number(share := end[-1].get("wait_share")):
        words += f" Over the whole run {_percent(share)} of the time was spent waiting for data"
        words += "; python tools/profile_throughput.py says what is slow." if share > 0.05 else "."
    return figures(drawn) + paragraph(f"{words} {_left_out(run)}", soft=True)


def _classes(source: Source, beside: Path) -> str:
    result, names = source.answers.evaluation, source.answers.classes
    scores = result.class_precision() if result.multi_label else result.class_accuracy()
    present = [int(c) for c in np.argsort(-scores, kind="stable") if not math.isnan(scores[c])]
    few = len(present) <= 2 * _CLASSES_SHOWN
    groups = [present] if few else [present[:_CLASSES_SHOWN], present[-_CLASSES_SHOWN:]]
    title = "All classes" if few else f"The {_CLASSES_SHOWN} best and the {_CLASSES_SHOWN} worst classes"
    what = "average precision" if result.multi_label else "accuracy"
    shown = [[(names[c], float(scores[c])) for c in group] for group in groups]
    bars = _figure(beside, "classes", draw_bars(shown, title=title, x=f"{what}, %"), f"{title}: {what}")
    head, *rows = per_class(result, names)
    titles = [str(cell).replace("_", " ") for cell in head]
    chosen = [_class_cells(rows[c]) for group in groups for c in group]
    missing = len(names) - len(present)
    words = metrics_text(result.metrics(), len(names)).replace("  (", " (").replace("  ", ", ") + (
        f"; {missing} of {len(names)} classes have no sample" if missing else ""
    )
    return (
        paragraph(words)
        + _tables(beside, result, names, bars)
        + heading(title)
        + table(titles, chosen, numbers=[i for i in range(1, len(head)) if i != 4])
    )


def _class_cells(row: Sequence[object]) -> list[object]:
    """A line of per_class with its share in percent."""
    at = 2 if len(row) == 3 else 3
    return [_percent(float(str(cell))) if i == at else cell for i, cell in enumerate(row)]


def _tables(beside: Path, result: Evaluation, names: Sequence[str], bars: str) -> str:
    """Keeps the tables; returns the bars and, where there is one, the confusion matrix."""
    if result.multi_label:
        write_tables(beside, result, names)
        return figures([bars])
    if len(names) > MOST_CLASSES:
        words = f"The confusion matrix of {len(names)} classes is left out ({MOST_CLASSES} at most)."
        return figures([bars]) + paragraph(words, soft=True)
    write_tables(beside, result, names)
    data = (beside / CONFUSION_PICTURE).read_bytes()
    with Image.open(io.BytesIO(data)) as drawing:
        narrow = drawing.width <= _NARROW
        if len(data) > _LARGEST_EMBEDDED:
            small = drawing.convert("RGB")
            small.thumbnail((1200, 1200))
            data = _encoded(small, "PNG")
    words = f"Row: the truth, column: the answer. With counts: {beside.name}/{CONFUSION}"
    matrix = picture(data, "Confusion matrix", caption=words + (f"; larger: {CONFUSION_PICTURE}" if not narrow else ""))
    drawn = figures([bars, matrix]) if narrow else figures([bars]) + figures([matrix], whole=True)
    return drawn + _confusions(result, names)


def _confusions(result: Evaluation, names: Sequence[str]) -> str:
    """The cells beside the diagonal with the most samples."""
    wrong = result.confusion()
    np.fill_diagonal(wrong, 0)
    most = np.argsort(-wrong, axis=None, kind="stable")[:_CLASSES_SHOWN]
    pairs = [divmod(int(cell), len(names)) for cell in most if wrong.flat[cell]]
    if not pairs:
        return ""
    rows = [[names[truth], names[answer], int(wrong[truth, answer])] for truth, answer in pairs]
    return heading("What is mistaken for what most often") + table(["truth", "answer", "clips"], rows, numbers=[2])


def _mistakes(source: Source, beside: Path) -> str:
    wrong = source.mistakes
    if not wrong:
        raise NotThere("None: every clip that could be decoded was recognised.")
    shown = [clip for clip in wrong[:MISTAKES] if clip.sample_id in source.frames]
    if not shown:
        raise NotThere("None of these clips can be decoded any more.")
    strips = [_fewer(source.frames[clip.sample_id], _FRAMES_SHOWN) for clip in shown]
    sheet = filmstrips([_resized(strip) for strip in strips], list(map(_said, shown)))
    write_durably(beside / _PICTURES["mistakes"], _encoded(sheet, "PNG"))
    pictures = [
        picture(_grid(_in_rows(strip)), f"Frames of {clip.key}", caption=_said(clip))
        for clip, strip in zip(shown, strips, strict=True)
    ]
    valid = int(source.answers.evaluation.valid.sum())
    words = (
        f"{len(wrong)} of {valid} clips; the surest of these, from the middle of their videos, as the model sees them:"
    )
    return paragraph(words, soft=True) + figures(pictures)


def _attention(source: Source, beside: Path) -> str:
    trained, frames = source.trained, source.frames
    clips = [clip for clip in source.looked_at if clip.sample_id in frames]
    if not clips:
        raise NotThere("No clip can be decoded.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        looks = looks_of(trained, np.stack([frames[clip.sample_id] for clip in clips]), device=device)
    except (ValueError, torch.OutOfMemoryError) as error:
        raise NotThere(f"Not drawn: {error}.") from error
    rows, captions, pictures = [], [], []
    for clip, look in zip(clips, looks, strict=True):
        three = [look.frames, look.image_model, look.trained]
        rows += [_resized(_fewer(row, _FRAMES_SHOWN)) for row in three]
        captions += [_said(clip), "image model", "trained model"]
        grid = _grid([_fewer(row, _COLUMNS) for row in three])
        pictures.append(picture(grid, f"Attention in {clip.key}", caption=_said(clip)))
    write_durably(beside / _PICTURES["attention"], _encoded(filmstrips(rows, captions), "PNG"))
    words = (
        "Where the class token looks in the last block, mean over heads. Rows: the frames; the image model without "
        f"what the method added; the model after step {trained.step}. Red is most; each clip has its own scale."
    )
    if all(look.alike for look in looks):
        words += " The two are equal: this method changes nothing in where the image model looks."
    return paragraph(words, soft=True) + figures(pictures)


def _settings(source: Source, _: Path) -> str:
    given = _flat(source.run.facts["config"])
    micro = "deepspeed.train_micro_batch_size_per_gpu"
    if micro in given:  # it shrinks to what divides the batch
        given[micro] = source.run.facts.get("micro_batch", given[micro])
    try:
        usual = _flat(_defaults(source.config))
        note = "In colour: what differs from the defaults."
    except NotThere as reason:
        usual, note = given, str(reason)
    rows = [[key, _json(value), _json(usual[key]) if key in usual else _NOTHING] for key, value in given.items()]
    changed = [number for number, (key, value) in enumerate(given.items()) if usual.get(key) != value]
    head = ["key", "value", "default"]
    own = table(head, [rows[number] for number in changed])
    whole = table(head, rows, marked=changed)
    return (
        paragraph(f"{len(changed)} of {len(rows)} settings differ from the defaults:", soft=True)
        + own
        + folded("All settings", paragraph(note, soft=True) + whole)
    )


def _parameters(source: Source, _: Path) -> str:
    counts = source.run.facts["parameters"]
    try:
        return listing(parameter_table(source.trained.model))
    except NotThere as reason:
        return paragraph(f"{counts['total']:,}, of which {counts['trainable']:,} train") + paragraph(reason, soft=True)


def _bad_samples(source: Source, _: Path) -> str:
    try:
        bad = read_bad_samples(source.run.path)
    except (ValueError, OSError) as error:
        raise NotThere(error) from error
    if not bad:
        raise NotThere("None: every sample that was read could be decoded.")
    words = f"{len(bad)} samples could not be decoded; in training others took their place ({BAD_SAMPLES} lists all):"
    return paragraph(words) + table(list(bad[0]), [list(row.values()) for row in bad[:_BAD_SHOWN]])


def _environment(source: Source, _: Path) -> str:
    facts = source.run.facts
    names = ("started", "resumed_from_step", "device", "world_size", "micro_batch", "accumulation", "cores", "threads")
    rows = [[name.replace("_", " "), facts[name]] for name in (*names, "platform", "git") if name in facts]
    rows += [[f"package {name}", version] for name, version in facts["packages"].items()]
    return table(["what", "value"], rows) + heading("Command") + listing(_command(source.run), wrapped=True)


def _what_next(source: Source, _: Path) -> str:
    run = shlex.quote(str(source.run.path))
    lines = {
        "Go on where it stopped": f"{_command(source.run).removesuffix(' --resume')} --resume",
        "Evaluate with more views": f"python tools/evaluate.py {run} --views 3x1",
        "Label a video": f"python tools/predict.py {run} VIDEO",
        "See where it looks in a video": f"python tools/plot_attention.py {run} VIDEO --out attention.png",
        "Take the model elsewhere": f"python tools/export.py {run} EXPORTED",
        "Write this report again": again(source.folder),
    }
    if source.run.of_kind("end"):
        del lines["Go on where it stopped"]
    return "".join(paragraph(words) + listing(line, wrapped=True) for words, line in lines.items())


def _command(run: RunFolder) -> str:
    """As it may be given again; what the launcher added is left out."""
    words = [str(word) for word in run.facts.get("command", []) if not str(word).startswith("--local_rank")]
    launcher = run.facts.get("launcher") or ["deepspeed" if run.facts["world_size"] != 1 else "python"]
    return shlex.join([*map(str, launcher), *words])


def _figure(beside: Path, name: str, data: bytes, described: str) -> str:
    """Keeps a picture and returns its markup."""
    write_durably(beside / _PICTURES[name], data)
    return picture(data, described)


def _series(run: RunFolder, kind: str, name: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    """Steps, and the numbers of that name in the lines of one kind."""
    found = [(line["step"], line[name]) for line in run.of_kind(kind) if _is_number(line.get(name))]
    return [step for step, _ in found], [factor * value for _, value in found]


def _averages(run: RunFolder, name: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    """As `_series` of the lines of training, each an average since the line before; without a last one of too few."""
    steps, values = _series(run, "train", name, factor)
    if _left_out(run) and steps and steps[-1] == run.of_kind("train")[-1]["step"]:
        return steps[:-1], values[:-1]
    return steps, values


def _left_out(run: RunFolder) -> str:
    """What to say where the last line stands for fewer than half the usual number of steps, or nothing."""
    lengths = np.diff([0, *(line["step"] for line in run.of_kind("train"))])
    if len(lengths) < 3 or 2 * lengths[-1] >= np.median(lengths):
        return ""
    return f"The last line of the log is of {counted(int(lengths[-1]), 'step')} and not drawn: too few for an average."


def _titles(run: RunFolder) -> dict[str, str]:
    """Metrics that are shown, with their titles."""
    classes = run.facts.get("num_classes")
    few = isinstance(classes, int) and classes <= FEW_CLASSES
    return {name: title for name, title in _TITLES.items() if not (few and name == "top5")}


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether it can be drawn: a metric that was not measured is None, one of a stranger's file anything."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _skipped(run: RunFolder) -> list[tuple[int, int]]:
    """The lines of the log before which steps were skipped: (step, skipped so far)."""
    steps, counts = _series(run, "train", "skipped_steps")
    return [(step, int(now)) for step, before, now in zip(steps, [0, *counts], counts, strict=False) if now > before]


def _percent(share: Any) -> str:
    return f"{100 * share:.2f} %" if _is_number(share) else _NOTHING


def _short(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else _NOTHING


def _said(clip: ShownClip) -> str:
    """For people: what it is, what the model took it for."""
    truth = " + ".join(clip.truth) or "no class"
    if not clip.answer:
        return f"{truth}: {clip.key}"
    what = "recognised" if clip.answer in clip.truth else f"taken for {clip.answer}"
    return f"{truth}, {what} ({100 * clip.probability:.0f} %): {clip.key}"


def _fewer(frames: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Up to `count` frames, spread over the clip."""
    if len(frames) <= count:
        return frames
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def _in_rows(frames: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [frames[start : start + _COLUMNS] for start in range(0, len(frames), _COLUMNS)]


def _grid(rows: Sequence[NDArray[np.uint8]]) -> bytes:
    return _encoded(frame_grid(rows, side=_SIDE), "JPEG")


def _resized(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """No wider than in the page: nobody opens a sheet of many large clips."""
    if frames.shape[1] <= _SIDE:
        return frames
    return np.stack([np.asarray(frame_grid([frame[None]], side=_SIDE)) for frame in frames])


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _defaults(config: Config) -> dict[str, Any]:
    """The defaults of a run of the same method."""
    usual = Config(model=ModelConfig(method=config.model.method))
    return usual.as_dict() | {"deepspeed": DEEPSPEED_DEFAULTS}


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections → dotted names."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and prefix.count(".") < 3:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


PARTS: Mapping[str, Callable[[Source, Path], str]] = {
    **{"Summary": _summary, "Learning": _learning, "Pace": _pace, "Classes": _classes, "Mistakes": _mistakes},
    **{"Attention": _attention, "Settings": _settings, "Parameters": _parameters, "Bad samples": _bad_samples},
    **{"Environment": _environment, "What next": _what_next},
}
"""Title → what returns its markup, or raises `NotThere`."""
