"""What published implementations compute, from the parity files beside the repository, which are never part of it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Any]]:
    """Official state dict, clips [B, 3, T, H, W], the output they give, and the file's other facts; skips the test
    where there are no such files."""
    loaded: tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Any]] = _fill().load(FOLDER / f"{name}.json")
    return loaded


def load_golden_on_clip(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Any]]:
    """The same of a model around a whole CLIP (`clipmodel.`) and an input of frame features. CLIP's weights were filled
    under CLIP's own names, before it became part of the model; of the image tower, which is not run, there is one block
    here, and it is zeros."""
    fill, facts = _fill(), json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    state = {
        name: torch.zeros(shape)
        if name.startswith("clipmodel.visual.")
        else fill.named_tensor(name.removeprefix("clipmodel."), tuple(shape), facts["seed"], facts["std"])
        for name, shape in facts["keys"].items()
        if not re.match(r"clipmodel\.visual\.transformer\.resblocks\.[1-9]", name)
    }
    features = torch.randn(facts["input"], generator=torch.Generator().manual_seed(facts["input_seed"]))
    return state, features, torch.tensor(facts["output"]).reshape(facts["output_shape"]), facts


def _fill() -> Any:
    """The module that the files come with."""
    if not FOLDER.is_dir():
        pytest.skip(f"parity files are not here: {FOLDER}")
    spec = importlib.util.spec_from_file_location("fill", FOLDER / "fill.py")
    assert spec and spec.loader
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return fill
