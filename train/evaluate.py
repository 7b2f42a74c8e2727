"""Evaluation over all processes: every sample once, one centre view each, the same result however it is shared out.

Each process fills the rows of its samples in a table of logits of the whole split and the tables are added, so every
number below is computed from the same [n, C] table whatever the number of processes or the batch.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.aim import AIM
from pipelines.loader import ClipLoader
from pipelines.plan import eval_turns
from pipelines.shards import ShardSet, write_durably
from train.engine import World


@dataclass(frozen=True)
class Evaluation:
    """What a model answered for the n samples of a split, of C classes."""

    logits: NDArray[np.float32]
    """[n, C]; zero where the sample could not be decoded."""
    labels: NDArray[np.int64]
    """[n]."""
    valid: NDArray[np.bool_]
    """[n]: False where the sample could not be decoded; it counts nowhere."""

    def metrics(self) -> dict[str, float]:
        """top1, top5 (of fewer classes: all), mean_class_accuracy over the classes present, loss; counts."""
        logits = torch.from_numpy(self.logits[self.valid]).double()
        labels = torch.from_numpy(self.labels[self.valid])
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits = best[:, 0].double()
        per_class = [hits[labels == c].mean() for c in labels.unique()]
        return {
            "top1": hits.mean().item(),
            "top5": best.any(1).double().mean().item(),
            "mean_class_accuracy": torch.stack(per_class).mean().item(),
            "loss": F.cross_entropy(logits, labels).item(),
            "samples": len(labels),
            "undecodable": int((~self.valid).sum()),
        }

    def save(self, path: Path, shards: ShardSet) -> None:
        """Writes an .npz for reports: keys [n], labels, logits, valid, and the class names [C]."""
        keys = np.asarray([shards[i].key for i in range(len(shards))])
        classes = np.asarray(shards.classes)
        buffer = io.BytesIO()
        np.savez(buffer, keys=keys, classes=classes, logits=self.logits, labels=self.labels, valid=self.valid)
        write_durably(path, buffer.getvalue())


@torch.no_grad()
def evaluate(
    model: AIM, shards: ShardSet, world: World, *, micro_batch: int, loader_options: Mapping[str, Any]
) -> Evaluation:
    """Evaluates on all processes together; all get the result. `loader_options` go to `ClipLoader`.

    Raises ValueError when no sample could be decoded, or more than the loader allows.
    """
    logits = torch.zeros((len(shards), len(shards.classes)), device=world.device)
    labels = torch.zeros(len(shards), dtype=torch.int64, device=world.device)
    valid = torch.zeros(len(shards), dtype=torch.int64, device=world.device)
    turns = eval_turns(len(shards), micro_batch=micro_batch, rank=world.rank, world=world.size)
    with ClipLoader(shards, turns, micro_batch=micro_batch, size=model.geometry.image_size, **loader_options) as loader:
        for batch in loader:
            rows = torch.tensor([turn.sample_id for turn in batch.turns])[batch.valid].to(world.device)
            answers = model(batch.frames.to(world.device, non_blocking=True))
            logits[rows] = answers[batch.valid.to(world.device)]
            labels[rows] = batch.labels[batch.valid].to(world.device)
            valid[rows] = 1
    for table in (logits, labels, valid):
        world.sum(table)
    if not valid.any():
        raise ValueError(f"{shards.folder}: no sample of split {shards.split!r} could be decoded")
    return Evaluation(logits.cpu().numpy(), labels.cpu().numpy(), valid.cpu().numpy().astype(bool))
