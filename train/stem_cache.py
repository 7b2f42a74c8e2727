"""What the frozen part of a model made of a clip, kept in memory for when the clip comes again (`speed.cache_gb`).

A clip that is kept need not be decoded: its loader asks `known`. Nothing is evicted: an epoch visits every clip once,
so that the clip thrown away would be the one needed next; when the memory is full, the others are computed as usual.
What was computed in another batch may differ in its last bits.

Clips come again in evaluations, whose views are fixed, and in training where those are too (`data.fixed_views`). A clip
of 8 frames at 224 × 224 takes 2.4 MB with ViT-B/16 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.video import VideoModel
from pipelines.plan import ClipPlan
from train.engine import to_device

Key = tuple[str, int, tuple[int, ...], tuple[int, int, int, int], bool]
"""Split, sample, stored frames, box, flip: all that decides the pixels of a clip that is not augmented."""


class StemCache:
    """Of one process."""

    def __init__(self, model: VideoModel, max_gigabytes: float) -> None:
        self._model, self._room = model, max_gigabytes * 1e9
        self._kept: dict[Key, Tensor] = {}
        self.hits = 0
        """Clips that were not computed again."""

    def known(self, split: str, plan: ClipPlan) -> bool:
        """Whether the clip's pixels are not needed any more."""
        return _key(split, plan) in self._kept

    def tokens(self, split: str, frames: Tensor, plans: Sequence[ClipPlan]) -> Tensor:
        """uint8 frames [B, T, S, S, 3] on the model's device, of known clips anything → tokens [B, T, N, D] there.

        Waits for the device where a clip is new.
        """
        keys = [_key(split, plan) for plan in plans]
        new = [row for row, key in enumerate(keys) if key not in self._kept]
        self.hits += len(keys) - len(new)
        computed = dict(zip(new, self._model.stem(frames[new]), strict=True)) if new else {}
        rows = [
            computed[row] if row in computed else to_device(self._kept[key], frames.device)
            for row, key in enumerate(keys)
        ]
        for row, tokens in computed.items():
            self._keep(keys[row], tokens)
        return torch.stack(rows)

    def _keep(self, key: Key, tokens: Tensor) -> None:
        _, sample_id, *_ = key
        size = tokens.numel() * tokens.element_size()
        if sample_id >= 0 and size <= self._room:
            self._kept[key] = tokens.clone() if tokens.device.type == "cpu" else tokens.cpu()
            self._room -= size


def _key(split: str, plan: ClipPlan) -> Key:
    assert not plan.ops and plan.erase is None, "an augmented clip"
    return split, plan.sample_id, plan.stored, plan.box, plan.flip
