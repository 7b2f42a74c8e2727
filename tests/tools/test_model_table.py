"""The table of costs: our counts beside the published numbers, all of these, the same in every format."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shell import call_program
from tools.model_table import (
    BACKBONES,
    GRID,
    as_csv,
    as_json,
    grid_rows,
    main,
    markdown,
    parse_arguments,
    published_rows,
    record,
    text_tables,
)
from tools.parts.published import CLIP_B, IN21K_B, SWIN_B, TABLES, Published

ROOT = Path(__file__).resolve().parents[2]
METHODS_FILE = ROOT.parent / "shared" / "reference" / "methods.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call_program(main, *arguments)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """AIM on CLIP's ViT-B/16 alone, which 13 published rows are of."""
    rows = [*grid_rows(["aim"], [CLIP_B], 400), *published_rows(["aim"], [CLIP_B])]
    return [record(row) for row in rows]


def test_the_grid_has_our_counts_beside_the_published_numbers(records: list[dict]) -> None:
    grid = [row for row in records if row["table"] == GRID]
    keys = ("views", "total", "tunable", "published_params_m", "published_tunable_m", "published_top1")
    assert [tuple(row[key] for key in keys) for row in grid] == [
        ("8x3x1", 96_764_560, 10_966_672, 97, 11, 83.9),
        ("16x3x1", 96_770_704, 10_972_816, 97, 11, 84.5),
        ("32x3x1", 96_782_992, 10_985_104, 97, 11, 84.7),
    ]
    assert [row["gflops"] for row in grid] == pytest.approx([606.26, 1213.92, 2433.42], abs=0.01)
    assert [row["kept_bytes_per_clip"] for row in grid] == sorted(row["kept_bytes_per_clip"] for row in grid)


def test_every_count_is_within_half_a_percent_of_what_was_published(records: list[dict]) -> None:
    both = [row for row in records if row["total"] is not None and row["published_gflops"] is not None]
    assert len(both) > 10
    for row in both:
        assert row["gflops"] == pytest.approx(row["published_gflops"], rel=0.005), row
    for row in (row for row in records if row["total"] is not None):
        for ours, theirs in (("total", "published_params_m"), ("tunable", "published_tunable_m")):
            assert row[theirs] is None or row[ours] / 1e6 == pytest.approx(row[theirs], abs=0.5), row


def test_another_number_of_classes_has_no_published_numbers_beside_it() -> None:
    rows = list(grid_rows(["aim"], [CLIP_B], 5))
    assert [row.published for row in rows] == [None, None, None]
    assert [row.classes for row in rows] == [5, 5, 5]


def test_every_method_stands_with_every_image_model_that_it_can_adapt() -> None:
    pairs = {
        (row.method, row.rebuilt.name) for row in grid_rows(["aim", "video_swin"], list(BACKBONES), 400) if row.rebuilt
    }
    assert pairs == {("aim", name) for name in BACKBONES} | {("video_swin", SWIN_B)}


def test_text_is_stable_and_marks_what_is_published(records: list[dict]) -> None:
    text = text_tables(records)
    lines = text.splitlines()
    assert lines[0] == GRID
    assert lines[1].split("  ")[0] == "method" and lines[1].split()[-1] == "top-5*"
    assert re.sub(" +", " ", lines[2]).startswith("aim ViT-B/16 CLIP 8x3x1 96.76 10.97 202.1 606 ")
    assert lines[2].split()[-5:] == ["97", "11", "606", "83.9", "96.3"]
    swin = next(line for line in lines if line.startswith("VideoSwin-L"))
    assert swin.split()[1:] == "- IN-21K 32x4x3 - - - - - 197 197 7248 83.1 95.9".split()
    assert len([line for line in lines if line.startswith("* published: ")]) == 1 + len(TABLES)
    assert text == text_tables(records)


def test_all_formats_say_the_same(records: list[dict]) -> None:
    whole = json.loads(as_json(records))
    assert whole["rows"] == json.loads(json.dumps(records))
    assert whole["versions"].keys() == {"python", "torch", "open_clip_torch", "timm"}
    assert set(whole["published"]) == {table.title for table in TABLES}
    rows = list(csv.DictReader(io.StringIO(as_csv(records))))
    assert [row["total"] for row in rows] == ["" if r["total"] is None else str(r["total"]) for r in records]
    document = markdown(records)
    assert document.count("\n## ") == 1 + len(TABLES)
    cells = [line.strip("| ").split(" | ") for line in document.splitlines() if line.startswith("| ")]
    text = [re.split("  +", line.strip()) for line in text_tables(records).splitlines() if "  " in line]
    assert [row for row in cells if not row[0].startswith("---")] == text


def test_the_committed_table_is_of_this_code(records: list[dict]) -> None:
    """Else: `python tools/model_table.py --out tools/results/model_table.md tools/results/model_table.json`."""
    committed = json.loads((ROOT / "tools/results/model_table.json").read_text(encoding="utf-8"))["rows"]
    names = ("table", "method", "model_name", "views")
    counts = ("total", "tunable", "gmac_per_view", "published_top1")
    found = {tuple(row[key] for key in names): [row[key] for key in counts] for row in committed}
    for row in records:
        if row["total"] is not None:
            assert found[tuple(row[key] for key in names)] == [row[key] for key in counts]


def test_every_published_row_of_others_is_there() -> None:
    """As the reference lists them, where it is at hand."""
    if not METHODS_FILE.is_file():
        pytest.skip(f"the reference is not here: {METHODS_FILE}")
    text = METHODS_FILE.read_text(encoding="utf-8")
    section = text[text.index("### 16.2") : text.index("### 16.3")].replace("\n", " ")
    formats = {
        "Kinetics-400": "gflops params_m tunable_m top1 top5 views",
        "Kinetics-700": "tunable_m top1",
        "Diving-48": "tunable_m top1",
    }
    parts = re.split(r"K400, `[^`]*`:|K700, `[^`]*`:| Diving48: (?=TimeS)", section)[1:]
    for (title, keys), part in zip(formats.items(), parts, strict=True):
        listed = [[word.strip(" .") for word in row.split("|")] for row in part.split(";")]
        ours = [row for table in TABLES if table.title == title for row in table.rows if row.rebuilt is None]
        assert [as_listed(row, keys.split()) for row in ours] == listed, title


def as_listed(row: Published, keys: list[str]) -> list[str]:
    values = [row.method, row.pretrain or None, *(getattr(row, key) for key in keys)]
    return ["-" if value is None else str(value) for value in values]


def test_published_rows_are_complete() -> None:
    """Those that the papers' tables have, with what this project rebuilds."""
    rebuilt = {table.title: sum(row.rebuilt is not None for row in table.rows) for table in TABLES}
    assert rebuilt == {
        "Kinetics-400": 6,
        "Pre-trained models, Kinetics-400": 6,
        "Components, Something-Something V2": 7,
        "Positions of the adapters, Kinetics-400": 4,
        "Bottleneck ratios, Kinetics-400": 4,
        "Other methods, Kinetics-400": 10,
        "Kinetics-700": 2,
        "Diving-48": 2,
    }


def test_the_tool_writes_what_it_prints(tmp_path: Path) -> None:
    outs = [tmp_path / "new" / f"table{ending}" for ending in (".md", ".json", ".csv")]
    done = run("--methods", "frozen", "--backbones", IN21K_B, "--classes", "7", "--out", *map(str, outs))
    assert done.returncode == 0, done.stderr
    assert "frozen space-only     ViT-B/16  IN-21K" in done.stdout
    rows = json.loads(outs[1].read_text(encoding="utf-8"))["rows"]
    assert rows[0]["tunable"] == 2 * 768 + 7 * 769
    counted = [row for row in rows if row["total"] is not None]
    assert [row["method"] for row in counted] == ["frozen", "frozen", "frozen", "frozen space-only"]
    assert text_tables(rows) + "\n" == done.stdout
    assert all(out.stat().st_size > 1000 for out in outs)


def test_bad_input_is_one_line() -> None:
    done = run("--methods", "aim", "--backbones", "ViT-B-61")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown model.name 'ViT-B-61'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods aims", "--methods aims: allowed are adaptformer, "),
        ("--out table.txt", "--out table.txt: allowed endings are .md, .json, .csv"),
        ("--classes 0", "--classes 0: allowed are 1 to 1,000,000"),
    ],
)
def test_arguments_are_checked(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["model_table.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        parse_arguments()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_methods_that_fit_no_image_model_are_refused() -> None:
    with pytest.raises(ValueError, match=f"video_swin cannot adapt --backbones {CLIP_B}; {CLIP_B} allows "):
        list(grid_rows(["video_swin"], [CLIP_B], 400))
