"""What published implementations compute, from the parity files beside the repository, which are never part of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Any]]:
    """Official state dict, clips [B, 3, T, H, W], the output they give, and the file's other facts; skips the test
    where there are no such files."""
    if not FOLDER.is_dir():
        pytest.skip(f"parity files are not here: {FOLDER}")
    spec = importlib.util.spec_from_file_location("fill", FOLDER / "fill.py")
    assert spec and spec.loader
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    loaded: tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Any]] = fill.load(FOLDER / f"{name}.json")
    return loaded
