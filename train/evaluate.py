"""Evaluation over all processes: every view of every sample once, the same result however it is shared out.

Each process adds what its views say to a table of the whole split and the tables are added, so every number below is
computed from the same [n, C] table whatever the number of processes or the batch. Several views of a video are averaged
as probabilities, which is not the same as averaging logits (published: `average_clips="prob"`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.aim import AIM
from pipelines.loader import BadSample, ClipLoader
from pipelines.plan import eval_turns
from pipelines.shards import ShardSet, write_durably
from train.engine import World
from train.loss import clip_loss


@dataclass(frozen=True)
class Evaluation:
    """What a model answered for the n samples of a split, of C classes."""

    logits: NDArray[np.float32]
    """[n, C]; zero where the sample could not be decoded. Of one view, the model's own; of several, the logits of the
    mean probabilities: softmax (in a multi-label set, sigmoid) gives the mean over the views in either case."""
    labels: NDArray[Any]
    """int64 [n]; of a multi-label set multi-hot, uint8 [n, C]."""
    valid: NDArray[np.bool_]
    """[n]: False where no view of the sample could be decoded; it counts nowhere."""
    bad: Mapping[int, BadSample] = field(default_factory=dict)
    """The samples that this process could not decode, by id."""

    def metrics(self) -> dict[str, float]:
        """top1, top5 (of fewer classes: all), mean_class_accuracy over the classes present, loss; of a multi-label set
        mean_average_precision, top1 (the likeliest class is one of the sample's) and loss; counts."""
        logits = torch.from_numpy(self.logits[self.valid]).double()
        labels = torch.from_numpy(self.labels[self.valid])
        counts: dict[str, float] = {"samples": len(labels), "undecodable": int((~self.valid).sum())}
        if labels.ndim == 2:
            hits = labels.gather(1, logits.argmax(1, keepdim=True)).double()
            return {
                "mean_average_precision": mean_average_precision(logits.numpy(), labels.numpy() > 0),
                "top1": hits.mean().item(),
                "loss": clip_loss(logits, labels.double(), multi_label=True).item(),
                **counts,
            }
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits = best[:, 0].double()
        per_class = [hits[labels == c].mean() for c in labels.unique()]
        return {
            "top1": hits.mean().item(),
            "top5": best.any(1).double().mean().item(),
            "mean_class_accuracy": torch.stack(per_class).mean().item(),
            "loss": clip_loss(logits, labels, multi_label=False).item(),
            **counts,
        }

    def save(self, path: Path, shards: ShardSet) -> None:
        """Writes an .npz for reports: keys [n] (empty where the index is damaged), labels, logits, valid, and the class
        names [C]."""
        keys = np.asarray([_key(shards, i) for i in range(len(shards))])
        classes = np.asarray(shards.classes)
        buffer = io.BytesIO()
        np.savez(buffer, keys=keys, classes=classes, logits=self.logits, labels=self.labels, valid=self.valid)
        write_durably(path, buffer.getvalue())


def _key(shards: ShardSet, sample_id: int) -> str:
    try:
        return shards[sample_id].key
    except (ValueError, OSError):  # it is not valid either
        return ""


def mean_average_precision(scores: NDArray[Any], hits: NDArray[np.bool_]) -> float:
    """Mean over the classes that any sample has; scores and hits are [n, C]. NaN where no sample has a label."""
    precisions = [average_precision(scores[:, c], hits[:, c]) for c in np.flatnonzero(hits.any(0))]
    return float(np.mean(precisions)) if precisions else float("nan")


def average_precision(scores: NDArray[Any], hits: NDArray[np.bool_]) -> float:
    """Of one class with at least one hit: the mean over the hits of the precision among all samples that score at least
    as high. Equal scores count together, so the order of samples means nothing."""
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.flatnonzero(np.diff(scores[order], append=np.nan))
    found = np.cumsum(hits[order])[last_of_equals]
    precision = found / (last_of_equals + 1)
    return float(np.sum(precision * np.diff(found, prepend=0)) / found[-1])


@torch.no_grad()
def evaluate(
    model: AIM, shards: ShardSet, world: World, *, micro_batch: int, loader_options: Mapping[str, Any]
) -> Evaluation:
    """Evaluates on all processes together, on as many views a video as `loader_options["options"]` says; all processes
    get the result. `loader_options` go to `ClipLoader`.

    Raises ValueError, on all alike, when no sample could be decoded, or fewer than the loader allows.
    """
    num_classes, several = len(shards.classes), shards.multi_label
    num_views = loader_options["options"].num_views
    table = partial(torch.zeros, device=world.device)
    answers = table((len(shards), num_classes), dtype=torch.float64)
    labels = table((len(shards), num_classes) if several else len(shards), dtype=torch.float64)
    counts = table(len(shards), dtype=torch.float64)
    turns = eval_turns(len(shards), num_views, micro_batch=micro_batch, rank=world.rank, world=world.size)
    failure = None
    with ClipLoader(shards, turns, micro_batch=micro_batch, size=model.geometry.image_size, **loader_options) as loader:
        try:
            for batch in loader:
                rows = torch.tensor([turn.sample_id for turn in batch.turns])[batch.valid].to(world.device)
                logits = model(batch.frames.to(world.device, non_blocking=True))[batch.valid.to(world.device)].double()
                answers.index_add_(0, rows, logits if num_views == 1 else _probabilities(logits, several))
                labels.index_add_(0, rows, batch.labels[batch.valid].to(world.device).double())
                counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
        except (ValueError, OSError) as error:  # the others know nothing of it and come to where all meet
            failure = error
    world.agree(failure)
    for sums in (answers, labels, counts):
        world.sum(sums)
    valid = counts > 0
    if not valid.any():
        raise ValueError(f"{shards.folder}: no sample of split {shards.split!r} could be decoded")
    labels[valid] /= counts[valid, None] if several else counts[valid]
    if num_views > 1:
        answers[valid] = _logits(answers[valid] / counts[valid, None], several)
    label_type = torch.uint8 if several else torch.int64
    arrays = (answers.float().cpu().numpy(), labels.to(label_type).cpu().numpy(), valid.cpu().numpy())
    return Evaluation(*arrays, bad=loader.bad)


def _probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    return logits.sigmoid() if multi_label else logits.softmax(1)


def _logits(probabilities: Tensor, multi_label: bool) -> Tensor:
    """What `_probabilities` turns into these; finite for 0 and 1 too."""
    smallest = torch.finfo(probabilities.dtype).tiny
    logits = probabilities.clamp_min(smallest).log()
    return logits - (1 - probabilities).clamp_min(smallest).log() if multi_label else logits
