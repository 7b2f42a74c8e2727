"""Which clips a report shows, and their pixels as evaluation cuts them.

A handful is read again from the set, in a worker process, as a decoder that dies must not take the trainer with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.loader import ClipLoader
from pipelines.plan import EVAL_EPOCH, ClipOptions, Turn
from pipelines.shards import ShardSet
from train.run_folder import Answers

_CLIPS_AT_ONCE = 4  # in memory: of 32 frames of 336 pixels 43 MB


@dataclass(frozen=True)
class ShownClip:
    """A sample of a split and what was said of it."""

    sample_id: int
    key: str
    truth: tuple[str, ...]
    """Names of its classes."""
    answer: str
    """The likeliest class."""
    probability: float
    """Of the answer."""


def surest(answers: Answers, *, right: bool) -> list[ShownClip]:
    """All clips whose likeliest class is (one of) theirs, or is not: the surest first."""
    result = answers.evaluation
    predicted, rows = result.predicted, np.arange(len(result.valid))
    hits = result.labels[rows, predicted] > 0 if result.multi_label else result.labels == predicted
    sure = _probabilities(result.logits, result.multi_label)[rows, predicted]
    chosen = np.flatnonzero(result.valid & (hits == right))
    clips = []
    for row in chosen[np.argsort(-sure[chosen], kind="stable")].tolist():
        labels = np.flatnonzero(result.labels[row]).tolist() if result.multi_label else [int(result.labels[row])]
        truth = tuple(answers.classes[label] for label in labels)
        clips.append(ShownClip(row, answers.keys[row], truth, answers.classes[predicted[row]], float(sure[row])))
    return clips


def of_different_classes(clips: Sequence[ShownClip], count: int) -> list[ShownClip]:
    """The first clip of each truth, then the others, until there are `count`."""
    firsts: list[ShownClip] = []
    others: list[ShownClip] = []
    seen: set[tuple[str, ...]] = set()
    for clip in clips:
        (others if clip.truth in seen else firsts).append(clip)
        seen.add(clip.truth)
    return [*firsts, *others][:count]


def read_frames(
    shards: ShardSet, sample_ids: Sequence[int], options: ClipOptions, size: int
) -> dict[int, NDArray[np.uint8]]:
    """The middle clip of each sample as evaluation cuts it, uint8 RGB [T, size, size, 3]; those that cannot be decoded
    are left out.

    Raises ValueError or OSError where nothing of the set can be read.
    """
    turns = [Turn(sample_id, EVAL_EPOCH) for sample_id in dict.fromkeys(sample_ids)]
    batches = [turns[start : start + _CLIPS_AT_ONCE] for start in range(0, len(turns), _CLIPS_AT_ONCE)]
    frames: dict[int, NDArray[np.uint8]] = {}
    with ClipLoader(
        shards, batches, micro_batch=_CLIPS_AT_ONCE, size=size, options=options, prefetch=1, max_bad_fraction=1.0
    ) as loader:
        for batch in loader:
            for row, turn in enumerate(batch.turns):
                if batch.valid[row]:
                    frames[turn.sample_id] = batch.frames[row].numpy().copy()
    return frames


def _probabilities(logits: NDArray[np.float32], multi_label: bool) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    if multi_label:
        return 0.5 * (1 + np.tanh(0.5 * scores))  # the sigmoid without an overflow
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    shares: NDArray[np.float64] = exponentials / exponentials.sum(1, keepdims=True)
    return shares
