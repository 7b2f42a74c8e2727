"""Evaluation over all processes: every view of every sample once, the same result however it is shared out.

Each process adds what its views say to a table of the whole split and the tables are added, so every number below is
computed from the same [n, C] table whatever the number of processes or the batch. Sums are float64 and scores that
differ by no more than the model's own rounding count as equal, so that neither the order of summation nor the size of a
batch decides between them. Several views of a video are averaged as probabilities, which is not the same as averaging
logits (published: `average_clips="prob"`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.video import VideoModel
from pipelines.loader import BadSample, ClipLoader
from pipelines.plan import eval_turns
from pipelines.shards import ShardSet, write_durably
from train.engine import World, to_device
from train.loss import clip_loss
from train.stem_cache import StemCache

AVERAGINGS = ("prob", "logits")
TIE = 1e-6
"""Scores this close, relative to the largest beside them, are equal: float32 sums of a few hundred terms differ by a
third of it when a batch has another size."""


@dataclass(frozen=True)
class Evaluation:
    """What a model answered for the n samples of a split, of C classes."""

    logits: NDArray[np.float32]
    """[n, C]; zero where the sample could not be decoded. Of one view, the model's own, and of several averaged as
    logits, their mean; of several averaged as probabilities, the logits of the mean: softmax (in a multi-label set,
    sigmoid) gives it back."""
    labels: NDArray[Any]
    """int64 [n]; of a multi-label set multi-hot, uint8 [n, C]."""
    valid: NDArray[np.bool_]
    """[n]: False where no view of the sample could be decoded; it counts nowhere."""
    bad: Mapping[int, BadSample] = field(default_factory=dict)
    """The samples that this process could not decode, by id."""

    @property
    def multi_label(self) -> bool:
        """Whether samples have any number of classes."""
        return self.labels.ndim == 2

    @cached_property
    def ranking(self) -> NDArray[np.int64]:
        """[n, C]: every sample's classes, the likeliest first; of equally likely ones the lower number."""
        return np.argsort(tie_groups(self.logits), axis=1, kind="stable")

    @property
    def predicted(self) -> NDArray[np.int64]:
        """[n]: the likeliest class of every sample."""
        return self.ranking[:, 0]

    def metrics(self) -> dict[str, float]:
        """top1, top5 (of fewer classes: all), mean_class_accuracy over the classes present, loss; of a multi-label set
        mean_average_precision, top1 (the likeliest class is one of the sample's) and loss; counts."""
        labels = self.labels[self.valid]
        answers, truth = torch.from_numpy(self.logits[self.valid]).double(), torch.from_numpy(labels)
        counts: dict[str, float] = {"samples": len(labels), "undecodable": int((~self.valid).sum())}
        ranking = self.ranking[self.valid]
        if self.multi_label:
            return {
                "mean_average_precision": _mean_of_present(self.class_precision()),
                "top1": float(np.take_along_axis(labels, ranking[:, :1], 1).mean()),
                "loss": clip_loss(answers, truth.double(), multi_label=True).item(),
                **counts,
            }
        hits = ranking[:, :5] == labels[:, None]
        return {
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits.any(1).mean()),
            "mean_class_accuracy": _mean_of_present(self.class_accuracy()),
            "loss": clip_loss(answers, truth, multi_label=False).item(),
            **counts,
        }

    def class_samples(self) -> NDArray[np.int64]:
        """[C]: how many samples of each class could be decoded."""
        labels = self.labels[self.valid]
        return (
            labels.sum(0, dtype=np.int64) if self.multi_label else np.bincount(labels, minlength=self.logits.shape[1])
        )

    def confusion(self) -> NDArray[np.int64]:
        """[C, C]: samples of the row's class that were taken for the column's. Not for sets with several labels a
        sample."""
        assert not self.multi_label
        num_classes = self.logits.shape[1]
        pairs = self.labels[self.valid] * num_classes + self.predicted[self.valid]
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def class_accuracy(self) -> NDArray[np.float64]:
        """[C]: share of the class's samples that were recognised; NaN for a class without any."""
        with np.errstate(invalid="ignore"):
            return np.diagonal(self.confusion()) / self.class_samples()

    def class_precision(self) -> NDArray[np.float64]:
        """[C]: average precision of each class of a multi-label set; NaN for a class without any sample."""
        scores, hits = self.logits[self.valid], self.labels[self.valid] > 0
        columns = zip(scores.T, hits.T, strict=True)
        return np.asarray([average_precision(column, of) if of.any() else math.nan for column, of in columns])

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


def tie_groups(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Places of scores [..., n] along the last axis, from 0 for the highest; equal scores share one (see `TIE`)."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ordered = np.take_along_axis(scores, order, -1).astype(np.float64)
    tolerance = TIE * np.abs(scores).max(-1, keepdims=True)
    places = np.zeros(scores.shape, np.int64)
    places[..., 1:] = np.cumsum(-np.diff(ordered, axis=-1) > tolerance, axis=-1)
    groups = np.empty_like(places)
    np.put_along_axis(groups, order, places, -1)
    return groups


def average_precision(scores: NDArray[Any], hits: NDArray[np.bool_]) -> float:
    """Of one class with at least one hit: the mean over the hits of the precision among all samples that score at least
    as high. Equal scores count together, so the order of samples means nothing."""
    groups = tie_groups(scores)
    order = np.argsort(groups, kind="stable")
    last_of_equals = np.flatnonzero(np.diff(groups[order], append=-1))
    found = np.cumsum(hits[order])[last_of_equals]
    precision = found / (last_of_equals + 1)
    return float(np.sum(precision * np.diff(found, prepend=0)) / found[-1])


def _mean_of_present(values: NDArray[np.float64]) -> float:
    """Mean over the classes that have samples; NaN where none has."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else math.nan


@torch.no_grad()
def evaluate(
    model: VideoModel,
    shards: ShardSet,
    world: World,
    *,
    micro_batch: int,
    loader_options: Mapping[str, Any],
    averaging: str = "prob",
    on_batch: Callable[[], None] | None = None,
    cache: StemCache | None = None,
) -> Evaluation:
    """Evaluates on all processes together, on as many views a video as `loader_options["options"]` says; all processes
    get the result.

    `loader_options` go to `ClipLoader`; views are averaged as probabilities ("prob") or as "logits"; `on_batch` is
    called after each micro-batch of this process, of which all have equally many; `cache` keeps what the model's frozen
    part makes of the views.

    Raises ValueError, on all alike, when no sample could be decoded, or fewer than the loader allows, or an answer is
    not a finite number.
    """
    if averaging not in AVERAGINGS:
        raise ValueError(f"averaging = {averaging!r}; allowed is {' or '.join(AVERAGINGS)}")
    num_classes, several = len(shards.classes), shards.multi_label
    num_views = loader_options["options"].num_views
    as_probabilities = num_views > 1 and averaging == "prob"
    table = partial(torch.zeros, device=world.device, dtype=torch.float64)
    answers, counts = table((len(shards), num_classes)), table(len(shards))
    labels = table((len(shards), num_classes) if several else len(shards))
    turns = eval_turns(len(shards), num_views, micro_batch=micro_batch, rank=world.rank, world=world.size)
    failure = None
    trains = model.training
    model.eval()
    size, known = model.geometry.image_size, None if cache is None else partial(cache.known, shards.split)
    with ClipLoader(shards, turns, micro_batch=micro_batch, size=size, known=known, **loader_options) as loader:
        try:
            for batch in loader:
                rows = torch.tensor([turn.sample_id for turn in batch.turns])[batch.valid].to(world.device)
                clips = to_device(batch.frames, world.device)
                if cache is not None:
                    clips = cache.tokens(shards.split, clips, batch.plans)
                logits = model(clips)[batch.valid.to(world.device)].double()
                answers.index_add_(0, rows, _probabilities(logits, several) if as_probabilities else logits)
                labels.index_add_(0, rows, batch.labels[batch.valid].to(world.device).double())
                counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
                if on_batch is not None:
                    on_batch()
        except (ValueError, OSError) as error:  # the others know nothing of it and come to where all meet
            failure = error
    model.train(trains)
    world.agree(failure)
    for sums in (answers, labels, counts):
        world.sum(sums)
    valid = counts > 0
    if not valid.any():
        raise ValueError(f"{shards.folder}: no sample of split {shards.split!r} could be decoded")
    labels[valid] /= counts[valid, None] if several else counts[valid]
    answers[valid] /= counts[valid, None]
    _require_finite(answers, shards)
    if as_probabilities:
        answers[valid] = _logits(answers[valid], several)
    label_type = torch.uint8 if several else torch.int64
    arrays = (answers.float().cpu().numpy(), labels.to(label_type).cpu().numpy(), valid.cpu().numpy())
    return Evaluation(*arrays, bad=loader.bad)


def _require_finite(answers: Tensor, shards: ShardSet) -> None:
    broken = torch.nonzero(~answers.isfinite().all(1)).flatten().tolist()
    if broken:
        raise ValueError(
            f"the model's answers to {len(broken)} of {len(shards)} samples of {shards.folder} are not finite numbers, "
            f"first to {_key(shards, broken[0])}: its weights are damaged, or its precision is too low"
        )


def _probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    return logits.sigmoid() if multi_label else logits.softmax(1)


def _logits(probabilities: Tensor, multi_label: bool) -> Tensor:
    """What `_probabilities` turns into these; finite for 0 and 1 too."""
    smallest = torch.finfo(probabilities.dtype).tiny
    logits = probabilities.clamp_min(smallest).log()
    return logits - (1 - probabilities).clamp_min(smallest).log() if multi_label else logits
