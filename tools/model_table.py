"""What every method costs on every image model, in parameters, multiply-adds and memory, beside published numbers.

    python tools/model_table.py [--methods aim timesformer] [--backbones ViT-B-16-quickgelu] [--out table.md]

Models are built without weights, data or a network, and counted (see `model.flops`); all of it takes some minutes.
Methods that read class names are left out: their text tower costs what the classes are. The first table has every
method, image model and number of frames, tested as on Kinetics-400; then come the published
tables, in which every row that can be rebuilt here has our count beside it. Columns marked * hold published numbers; a
row without a count of ours is published through and through. No accuracy here is ours.

    views       frames × clips × crops of a test
    params M    parameters in millions, the classification head among them; tunable M: those of them that train
    GMAC/view   10⁹ multiply-adds of one view, layer norms left out (a JSON or CSV file has them)
    GFLOPs      the same for all views, in the papers' unit: 1 for a multiply-add
    MiB/clip    what autograd keeps of one training clip for the backward pass, in bf16 with fused attention
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import groupby
from math import prod
from pathlib import Path
from textwrap import dedent
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from model.backbone import load_image_tower
from model.flops import Cost, WithoutData, count_cost
from model.geometry import RANDOM_WEIGHTS, ImageTower, SwinGeometry
from model.methods import METHODS, create, load_tower
from model.parameters import count_parameters
from pipelines.cli import run_cli
from tools.parts.published import CLIP_B, CLIP_L, IN21K_B, KINETICS400, SWIN_B, TABLES, Published, Rebuilt

BACKBONES = {
    "ViT-B-32-quickgelu": ("ViT-B/32", "CLIP"),
    CLIP_B: ("ViT-B/16", "CLIP"),
    CLIP_L: ("ViT-L/14", "CLIP"),
    "ViT-L-14-336-quickgelu": ("ViT-L/14 336", "CLIP"),
    "ViT-H-14": ("ViT-H/14", "CLIP"),
    IN21K_B: ("ViT-B/16", "IN-21K"),
    SWIN_B: ("Swin-B", "IN-21K"),
}
"""`model.name` → what papers call it, and what it is pretrained on."""
FRAMES = (8, 16, 32)
GRID = "Every method, image model and number of frames"
COUNTED = [
    name
    for name, entry in METHODS.items()
    if not any(getattr(model, "reads_class_names", False) for model in entry.models.values())
]
"""Methods whose cost is of a clip; the others' text tower costs what the classes are, however many clips there are."""
PUBLISHED_KEYS = ("params_m", "tunable_m", "gflops", "top1", "top5", "memory_gb", "hours")

Record = dict[str, Any]
"""A row as it goes into a file; None: not known."""


@dataclass(frozen=True)
class Column:
    """A column as it is shown."""

    key: str
    """Of a record."""
    header: str
    write: Callable[[Any], str] = str
    is_name: bool = False

    def text(self, value: Any) -> str:
        return "-" if value in (None, "") else self.write(value)


COLUMNS = (
    Column("method", "method", is_name=True),
    Column("backbone", "backbone", is_name=True),
    Column("pretrain", "pretrain", is_name=True),
    Column("views", "views", is_name=True),
    Column("total", "params M", lambda count: f"{count / 1e6:.2f}"),
    Column("tunable", "tunable M", lambda count: f"{count / 1e6:.2f}"),
    Column("gmac_per_view", "GMAC/view", lambda gmac: f"{gmac:.1f}"),
    Column("gflops", "GFLOPs", lambda gflops: f"{gflops:.0f}"),
    Column("kept_bytes_per_clip", "MiB/clip", lambda size: f"{size / 2**20:.0f}"),
    Column("published_params_m", "params M*"),
    Column("published_tunable_m", "tunable M*"),
    Column("published_gflops", "GFLOPs*"),
    Column("published_top1", "top-1*"),
    Column("published_top5", "top-5*"),
    Column("published_memory_gb", "GB a V100*"),
    Column("published_hours", "hours*"),
)


@dataclass(frozen=True)
class Row:
    """A row of a table before it is counted."""

    table: str
    method: str
    backbone: str
    pretrain: str
    views: str
    """Frames × clips × crops; empty where a publication does not say."""
    classes: int
    rebuilt: Rebuilt | None
    """The model to count; None: published only."""
    published: Published | None


@dataclass(frozen=True)
class Counted:
    """What was counted of a model."""

    total: int
    trainable: int
    cost: Cost


def main() -> None:
    arguments = parse_arguments()
    rows = [*grid_rows(arguments.methods, arguments.backbones, arguments.classes)]
    rows += published_rows(arguments.methods, arguments.backbones)
    for path in arguments.out:
        path.parent.mkdir(parents=True, exist_ok=True)
    counted = (record(row) for row in tqdm(rows, desc="models", leave=False, disable=None))
    records = [values for values in counted if values is not None]
    for path in arguments.out:
        path.write_text(WRITERS[path.suffix](records), encoding="utf-8")
    print(text_tables(records))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods, backbones = ", ".join(COUNTED), ", ".join(BACKBONES)
    parser.add_argument(
        "--methods", nargs="+", default=COUNTED, metavar="NAME", help=f"which to count (default: {methods})"
    )
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=list(BACKBONES),
        metavar="NAME",
        help=f"image models, each a model.name of open_clip or timm (default: {backbones})",
    )
    parser.add_argument(
        "--classes", type=int, default=KINETICS400.classes, metavar="N", help="of the first table (default: 400)"
    )
    parser.add_argument(
        "--out", nargs="+", type=Path, default=[], metavar="FILE", help=f"also write: {', '.join(WRITERS)}"
    )
    arguments = parser.parse_args()
    for method in arguments.methods:
        if method not in COUNTED:
            parser.error(f"--methods {method}: allowed are {methods}")
    for path in arguments.out:
        if path.suffix not in WRITERS:
            parser.error(f"--out {path}: allowed endings are {', '.join(WRITERS)}")
    if not 1 <= arguments.classes <= 1_000_000:
        parser.error(f"--classes {arguments.classes}: allowed are 1 to 1,000,000")
    return arguments


def grid_rows(methods: Sequence[str], names: Sequence[str], classes: int) -> Iterator[Row]:
    """Every method on every image model that it can adapt, with every number of frames, tested as on Kinetics-400."""
    pairs = [(m, n) for m in methods for n in names if fits(m, n)]
    if not pairs:
        fitting = ", ".join(m for m in COUNTED if fits(m, names[0]))
        raise ValueError(
            f"--methods {' '.join(methods)} cannot adapt --backbones {' '.join(names)}; {names[0]} allows {fitting}"
        )
    for method, name in pairs:
        backbone, pretrain = BACKBONES.get(name, (name, ""))
        clips_crops = "4x3" if isinstance(tower(method, name).geometry, SwinGeometry) else "3x1"
        for frames in FRAMES:
            rebuilt = Rebuilt(method, name)
            published = find_published(rebuilt, frames) if classes == KINETICS400.classes else None
            views = f"{frames}x{clips_crops}" if published is None else published.views
            yield Row(GRID, method, backbone, pretrain, views, classes, rebuilt, published)


def find_published(rebuilt: Rebuilt, frames: int) -> Published | None:
    """The row that was published of a model trained on Kinetics-400."""
    tables = (table for table in TABLES if table.classes == KINETICS400.classes)
    rows = (row for table in tables for row in table.rows)
    return next((row for row in rows if row.rebuilt == rebuilt and num_frames(row.views) == frames), None)


def published_rows(methods: Sequence[str], names: Sequence[str]) -> Iterator[Row]:
    """The published tables; models of other methods or on other image models than these are not counted."""
    for table in TABLES:
        for row in table.rows:
            rebuilt = row.rebuilt
            if rebuilt is not None and (rebuilt.method not in methods or rebuilt.name not in names):
                rebuilt = None
            if rebuilt is None and all(getattr(row, key) is None for key in PUBLISHED_KEYS):
                continue
            yield Row(table.title, row.method, row.backbone, row.pretrain, row.views, table.classes, rebuilt, row)


def num_frames(views: str) -> int:
    """`32x4x3` → 32."""
    return int(views.partition("x")[0])


def fits(method: str, name: str) -> bool:
    """Whether a method can adapt an image model."""
    load_image_tower(name, RANDOM_WEIGHTS)  # a ValueError, if there is none of that name
    try:
        geometry = tower(method, name).geometry
    except ValueError:  # it reads texts, and the image model has no text tower
        return False
    return any(isinstance(geometry, kind) for kind in METHODS[method].models)


@cache
def tower(method: str, name: str) -> ImageTower:
    """The geometry of an image model, with its text tower where the method reads texts."""
    return load_tower(method, name, RANDOM_WEIGHTS)


@cache
def options_of(method: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    """A method's options, by default but for some."""
    return METHODS[method].options(**dict(changes))


@cache
def count(method: str, name: str, changes: tuple[tuple[str, Any], ...], frames: int, classes: int) -> Counted:
    """Builds a model without weights and counts it; once for all tables."""
    options = options_of(method, changes)
    with WithoutData():
        model = create(method, tower(method, name), num_classes=classes, num_frames=frames, options=options)
    return Counted(*count_parameters(model), count_cost(model))


def record(row: Row) -> Record | None:
    """A row, counted, as plain values; None for a number of frames that a method of the first table cannot take."""
    rebuilt, published = row.rebuilt, row.published
    counted = None
    if rebuilt is not None:
        changes = tuple(rebuilt.options.items())
        try:
            counted = count(rebuilt.method, rebuilt.name, changes, num_frames(row.views), row.classes)
        except ValueError:
            if row.table != GRID:
                raise
            return None
    cost = counted.cost if counted else None
    views = prod(map(int, row.views.split("x")[1:])) if row.views else 0
    return {
        "table": row.table,
        "method": row.method,
        "backbone": row.backbone,
        "pretrain": row.pretrain,
        "views": row.views,
        "classes": row.classes,
        "model_method": rebuilt.method if rebuilt else None,
        "model_name": rebuilt.name if rebuilt else None,
        "model_options": dict(rebuilt.options) if rebuilt else None,
        "total": counted.total if counted else None,
        "tunable": counted.trainable if counted else None,
        "gmac_per_view": cost.gmac if cost else None,
        "layer_norm_gflops_per_view": cost.layer_norm if cost else None,
        "gflops": cost.gmac * views if cost else None,
        "kept_bytes_per_clip": cost.kept_bytes if cost else None,
        "kept_weight_copies_bytes": cost.copied_bytes if cost else None,
        **{f"published_{key}": getattr(published, key) if published else None for key in PUBLISHED_KEYS},
    }


def text_tables(records: Sequence[Record]) -> str:
    """For the terminal."""
    blocks = []
    for title, note, columns, lines in by_table(records):
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        pads = [str.ljust if column.is_name else str.rjust for column in columns]
        body = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([title, *body, note]))
    return "\n\n".join(blocks)


def markdown(records: Sequence[Record]) -> str:
    """For documents."""
    made = f"Made by `{command()}` with {', '.join(f'{name} {number}' for name, number in versions().items())}."
    blocks = ["# What every method costs", made, f"```\n{legend()}\n```"]
    for title, note, columns, (header, *lines) in by_table(records):
        ruler = ["---" if column.is_name else "---:" for column in columns]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *lines))
        blocks.append(f"## {title}\n\n{body}\n\n\\{note}")
    return "\n\n".join(blocks) + "\n"


def as_json(records: Sequence[Record]) -> str:
    """Every row in full: counts to the integer, bytes, options."""
    sources = {table.title: table.source for table in TABLES}
    whole = {"command": command(), "versions": versions(), "published": sources, "rows": list(records)}
    return json.dumps(whole, indent=1) + "\n"


def as_csv(records: Sequence[Record]) -> str:
    """The same rows; empty where nothing is known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for values in records:
        options = values["model_options"]
        writer.writerow(values | {"model_options": None if options is None else json.dumps(options)})
    return text.getvalue()


WRITERS: dict[str, Callable[[Sequence[Record]], str]] = {".md": markdown, ".json": as_json, ".csv": as_csv}


def by_table(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Column], list[list[str]]]]:
    """Of each table its title, where its published numbers are from, and the columns that have values in it, as text:
    the headers, then a line a row."""
    sources = {table.title: table.source for table in TABLES}
    for title, group in groupby(records, lambda values: values["table"]):
        rows = list(group)
        columns = [column for column in COLUMNS if any(row[column.key] not in (None, "") for row in rows)]
        lines = [[column.header for column in columns]]
        lines += [[column.text(row[column.key]) for column in columns] for row in rows]
        yield title, f"* published: {sources.get(title, 'see the tables that follow')}", columns, lines


def legend() -> str:
    """What the columns are, from the head of this file."""
    text = __doc__ or ""
    return dedent(text[text.index("    views ") :]).rstrip()


def command() -> str:
    return shlex.join(["python", "tools/model_table.py", *sys.argv[1:]])


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "open_clip_torch", "timm")}
    return {"python": platform.python_version(), **packages}


if __name__ == "__main__":
    run_cli(main)
