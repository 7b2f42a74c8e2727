"""The table of traps in model/README.md names a test, or a reason, for each trap of the specification."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| (\d+) \| (.+?) \| (.+) \|$", (ROOT / "model/README.md").read_text(encoding="utf-8"), re.MULTILINE
)
REASONS = ("by construction: ", "does not apply: ", "measured: ")


def test_every_trap_has_a_row() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 38))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_keeps_it_away_exists(row: tuple[str, str, str]) -> None:
    kept_away = row[2]
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", kept_away)
    assert named or kept_away.startswith(REASONS), kept_away
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, test)
    for path in re.findall(r"`(tools/\S+)`", kept_away):
        assert (ROOT / path).is_file()
