"""How well texts find their videos and videos their texts, from the similarities of all of them.

A text asks for its videos, of which there may be several (as where the sentences are class names): the best placed one
counts. A video asks for its one text. What is asked for stands behind everything else that scores as high (as
`evaluate.tie_groups` says), so that a model which finds all alike gains nothing by it. Costs a sort of every row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.evaluate import tie_groups

DEPTHS = (1, 5, 10)


def retrieve(similarity: NDArray[Any], text_of_video: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Both directions, as "text_to_video" and "video_to_text": see `recall` for what each holds.

    Args:
        similarity: [V, N], of V videos and N texts; the higher the likelier.
        text_of_video: [V], the text of each video, 0 to N - 1. Texts without a video ask for none and are only found.

    Raises ValueError for other shapes, no video, a text that is not there, and similarities that are no finite numbers.
    """
    _check(similarity, text_of_video)
    belongs = np.zeros(similarity.shape, bool)
    belongs[np.arange(len(similarity)), text_of_video] = True
    asked = belongs.any(0)
    return {
        "text_to_video": recall(first_places(similarity.T[asked], belongs.T[asked]), similarity.shape[0]),
        "video_to_text": recall(first_places(similarity, belongs), similarity.shape[1]),
    }


def first_places(scores: NDArray[Any], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each row of scores [Q, n] the place, from 1, of the first that is wanted [Q, n]; every row wants one at least.
    Those not wanted that score as high stand before it."""
    groups = tie_groups(scores)
    best = np.where(wanted, groups, scores.shape[1]).min(1, keepdims=True)
    return 1 + ((groups <= best) & ~wanted).sum(1)


def recall(places: NDArray[np.int64], candidates: int) -> dict[str, float]:
    """From the place of each of Q queries: the share of them within 1, 5 and 10 (r1, r5, r10), the median place (of an
    even number, the mean of the middle two), and the numbers of queries and candidates."""
    shares = {f"r{depth}": float((places <= depth).mean()) for depth in DEPTHS}
    return {**shares, "median_rank": float(np.median(places)), "queries": len(places), "candidates": candidates}


def _check(similarity: NDArray[Any], text_of_video: NDArray[np.int64]) -> None:
    if similarity.ndim != 2 or 0 in similarity.shape or text_of_video.shape != similarity.shape[:1]:
        raise ValueError(
            f"similarities of shape {list(similarity.shape)} and texts of videos of shape {list(text_of_video.shape)}; "
            "allowed are [videos, texts] and [videos], none of them 0"
        )
    if text_of_video.min() < 0 or text_of_video.max() >= similarity.shape[1]:
        wrong = int(text_of_video[(text_of_video < 0) | (text_of_video >= similarity.shape[1])][0])
        raise ValueError(f"a video belongs to text {wrong}; allowed are 0 to {similarity.shape[1] - 1}")
    if not np.isfinite(similarity).all():
        row = int(np.flatnonzero(~np.isfinite(similarity).all(1))[0])
        raise ValueError(f"the similarities of video {row} are not all finite numbers")
