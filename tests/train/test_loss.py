"""The loss against its definition written out."""

from __future__ import annotations

import math

import pytest
import torch

from train.loss import clip_loss, soft_targets

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0]])


def test_smoothed_targets_are_the_published_ones() -> None:
    """1 - ε + ε/K on the true class, ε/K on the others (section 1.8 of the specification)."""
    logs = LOGITS.log_softmax(1)[0]
    expected = -sum((0.925 if c == 2 else 0.025) * logs[c].item() for c in range(4))
    ours = clip_loss(LOGITS, torch.tensor([2]), multi_label=False, label_smoothing=0.1)
    assert ours.item() == pytest.approx(expected, rel=1e-6)
    mixed = soft_targets(torch.tensor([2]), 4)
    assert clip_loss(LOGITS, mixed, multi_label=False, label_smoothing=0.1).item() == pytest.approx(expected, rel=1e-6)


def test_several_labels_are_learned_one_by_one() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    chances = [1 / (1 + math.exp(-x)) for x in LOGITS[0].tolist()]
    expected = -sum(math.log(p if t else 1 - p) for p, t in zip(chances, targets[0].tolist(), strict=True)) / 4
    assert clip_loss(LOGITS, targets, multi_label=True).item() == pytest.approx(expected, rel=1e-5)
