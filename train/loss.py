"""What training minimises: cross entropy for one label a video, binary cross entropy for several."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Labels of a batch, int64 [B] or multi-hot float [B, C], as float [B, C]: what mixing works on."""
    return labels if labels.ndim == 2 else F.one_hot(labels, num_classes).float()


def clip_loss(logits: Tensor, targets: Tensor, *, multi_label: bool, label_smoothing: float = 0.0) -> Tensor:
    """Mean loss of a batch.

    Args:
        logits: float32 [B, C].
        targets: int64 [B], or shares of each class, float [B, C].
        multi_label: every class is learned as yes or no by itself (the mean over B × C); else one of them is right.
        label_smoothing: share of the target spread evenly over all classes; only where one class is right.
    """
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
