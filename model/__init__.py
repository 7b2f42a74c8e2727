"""Frozen image transformers and the small trainable parts that make them understand video.

`model.load(FOLDER, **settings)` opens what tools/convert_checkpoint.py made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.checkpoints import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load` brings every method with it, which most users of this package do not need."""
    if name == "load":
        from model.checkpoints import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
