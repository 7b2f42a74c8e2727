"""Pictures of runs: whole pixels, names of any kind, sizes that people open."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from train.pictures import draw_bars, draw_confusion, draw_curves, filmstrips, frame_grid, printable, shortened

ODD = ["$x^", "視頻", "line\nbreak", "\ud800", "\u202egnp.exe", "", "x" * 500]


def size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_small_frames_are_enlarged_whole() -> None:
    clip = np.arange(2 * 48 * 48 * 3, dtype=np.uint8).reshape(2, 48, 48, 3)
    sheet = np.asarray(filmstrips([clip], ["caption"]))
    assert np.array_equal(sheet[18 : 18 + 96 : 2, :96:2], clip[0])


def test_a_grid_has_the_frames_in_rows() -> None:
    rows = [np.full((count, 10, 10, 3), 40 * count, np.uint8) for count in (3, 2)]
    grid = np.asarray(frame_grid(rows, side=20))
    assert grid.shape == (2 * 24 - 4, 3 * 24 - 4, 3)
    assert (grid[:20, 48:] == 120).all() and (grid[24:, 24:44] == 80).all() and (grid[24:, 48:] == 255).all()


def test_four_hundred_classes_are_drawn_with_names_that_can_be_read() -> None:
    """A cell and a line of text have twelve pixels; names may hold what a typesetter would read as formulas."""
    names = [f"class $_{i}^ with a long name that goes on and on 視頻" for i in range(400)]
    width, height = size(draw_confusion(np.eye(400, dtype=np.int64), names))
    assert min(width, height) > 400 * 12 and max(width, height) < 7000


def test_names_of_any_kind_are_drawn() -> None:
    for data in (
        draw_confusion(np.eye(len(ODD), dtype=np.int64), ODD),
        draw_bars([[(name, 0.5) for name in ODD], [("last", 1.0)]], title="a", x="b"),
    ):
        assert min(size(data)) > 200
    assert filmstrips([np.zeros((1, 96, 96, 3), np.uint8)] * len(ODD), ODD).size == (100, 7 * 118)
    assert [printable(name) for name in ODD[2:5]] == ["line break", "\ufffd", "\ufffdgnp.exe"]
    assert len(shortened(ODD[-1])) == 40 and shortened("as it is") == "as it is"


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0, 0.0], [5.0, -5.0]])
def test_curves_fit_a_telephone(values: list[float]) -> None:
    """Twice as wide as its screen, for letters that can be read."""
    lines = [("a", [1, 2], values), ("b", [1], [0.5])]
    width, height = size(draw_curves(lines, title="t", x="x", y="y", marks=[1], from_zero=True))
    assert 700 < width < 900 and 400 < height < 600
