"""report.html: what a run was, how it went, what it gets wrong and where it looks, in one file that needs nothing else.

`write_report` reads a run's folder, its set and its newest checkpoint (`report_source.py`) and writes the page and, in
a folder of the same name beside it, its pictures as PNG and its tables as CSV (`report_parts.py`). Whatever cannot be
had (an unfinished run, no validation split, a set that has moved, a model whose attention cannot be drawn) is said in
one line, and the rest is there.

Cost: at most 20 clips are decoded and the model is loaded once from its checkpoint; with the tiny CLIP 2 to 3 s on two
CPU cores, 0.4 s of it importing matplotlib. A confusion matrix of 400 classes takes 4 s more. Attention is computed on
the GPU where there is one, which has not been tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.shards import write_durably
from train.page import Section, page, paragraph
from train.report_parts import FILES, PARTS
from train.report_source import NotThere, Source, again

REPORT = "report.html"


def write_report(folder: Path, out: Path | None = None, *, fetches: bool = True) -> Path:
    """Writes the report of a run, or of an evaluation of one, to `out` (report.html in that folder); returns where.

    `fetches`: whether clips may be read from a set at an address, each of which may bring a whole shard with it.
    Raises ValueError or OSError: `folder` is neither, run.json or metrics.jsonl are damaged, nothing can be written.
    """
    source = Source.find(folder, fetches)
    out = out or folder / REPORT
    beside = out.with_suffix("")
    beside.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier report
        (beside / name).unlink(missing_ok=True)
    sections = []
    for title, part in PARTS.items():
        try:
            sections.append(Section(title, part(source, beside)))
        except NotThere as reason:
            sections.append(Section(title, paragraph(reason, soft=True), there=False))
    foot = f"Its pictures and tables as files: {beside.name}/ beside this page."
    write_durably(out, page(source.title, source.subtitle, sections, foot).encode(errors="replace"))
    return out


def report_finished_run(folder: Path) -> None:
    """The report at the end of a training; what goes wrong with it is said and never ends the training."""
    try:
        print(f"report: {write_report(folder, fetches=False)}", flush=True)
    except Exception as error:  # the run is done and saved, and no defect of a picture may make it count as failed
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"no report was written ({reason}); try again: {again(folder)}", file=sys.stderr, flush=True)
