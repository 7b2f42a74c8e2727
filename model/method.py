"""What a method's file declares: `METHODS`, a tuple of these, which `model.methods` collects.

    frozen image model + options ─ Method.models ─▶ VideoModel: clips → logits
                                                      what trains, its optimizer's groups, its random masks,
                                                      its input: `model.video`
    published checkpoints        ◀─ Method.formats ─▶ the same: `model.official`

Adding a method is adding one file to model/methods; model/README.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model.geometry import Geometry, ImageTower
from model.official import Format
from model.video import VideoModel

Create = Callable[[ImageTower, int | None, int, Any], VideoModel]
"""Image model, number of classes (None: no head), frames a clip, options → the model at its initialisation, float32."""


@dataclass(frozen=True)
class Method:
    """A method: what it is in one line, the dataclass of its options, and its model for each kind of image model."""

    name: str
    """`model.method` in a recipe."""
    summary: str
    options: type
    models: Mapping[type[Geometry], Create]
    formats: tuple[Format, ...] = ()
    """In which its models are published."""
    shown_options: tuple[str, ...] = ()
    """Options that the tensors of a checkpoint show, so that nobody needs to set them when one is loaded."""
    hidden_geometry: tuple[str, ...] = ()
    """Of the geometry, what tensors show of other methods' models but not of this one's: it can be set when one is
    loaded."""
    reads_texts: Callable[[Any], bool] = lambda _: False
    """Whether the model with these options needs the text tower that belongs to the image model."""
    trains: bool = True
    """Whether there is anything to train; if not, tools/evaluate.py takes a recipe for a checkpoint."""
    paper: str = ""
    """Whom to cite: authors, title, venue and year; empty: there is nothing to."""
