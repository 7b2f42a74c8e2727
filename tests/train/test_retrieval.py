"""Recall and median rank both ways, worked out by hand, and that equal scores never flatter."""

from __future__ import annotations

import numpy as np
import pytest

from train.retrieval import first_places, recall, retrieve


def test_one_text_a_video_by_hand() -> None:
    similarity = np.asarray(
        [
            [0.9, 0.1, 0.3],  # video 0: its text 0 is first
            [0.8, 0.2, 0.7],  # video 1: its text 1 is last
            [0.1, 0.3, 0.2],  # video 2: its text 2 is second
        ]
    )
    found = retrieve(similarity, np.asarray([0, 1, 2]))
    # Text 0 finds video 0 first; text 1 its video second (0.3, 0.2, 0.1); text 2 its video last (0.7, 0.3, 0.2).
    assert found["text_to_video"] == {
        **{"r1": 1 / 3, "r5": 1.0, "r10": 1.0, "median_rank": 2.0},
        **{"queries": 3, "candidates": 3},
    }
    assert found["video_to_text"] == {
        **{"r1": 1 / 3, "r5": 1.0, "r10": 1.0, "median_rank": 2.0},
        **{"queries": 3, "candidates": 3},
    }
    assert first_places(similarity, np.eye(3, dtype=bool)).tolist() == [1, 3, 2]
    assert first_places(similarity.T, np.eye(3, dtype=bool)).tolist() == [1, 2, 3]


def test_several_videos_of_a_text_by_hand() -> None:
    similarity = np.asarray(
        [
            [0.5, 0.4, 0.0],  # of text 1
            [0.6, 0.1, 0.0],  # of text 0
            [0.7, 0.3, 0.9],  # of text 0
            [0.2, 0.6, 0.8],  # of text 1
        ]
    )
    found = retrieve(similarity, np.asarray([1, 0, 0, 1]))
    # Text 0: video 2 of its two is first. Text 1: video 3 is first. Text 2 has no video and does not ask.
    assert found["text_to_video"] == {
        **{"r1": 1.0, "r5": 1.0, "r10": 1.0, "median_rank": 1.0},
        **{"queries": 2, "candidates": 4},
    }
    # Places of the videos' texts: 2, 1, 2 (behind text 2), 2 (behind text 2).
    assert found["video_to_text"] == {
        **{"r1": 0.25, "r5": 1.0, "r10": 1.0, "median_rank": 2.0},
        **{"queries": 4, "candidates": 3},
    }


def test_recall_at_each_depth_and_the_median_of_an_even_number() -> None:
    assert recall(np.asarray([1, 2, 5, 6, 10, 11, 40, 100]), 100) == {
        **{"r1": 1 / 8, "r5": 3 / 8, "r10": 5 / 8, "median_rank": 8.0},
        **{"queries": 8, "candidates": 100},
    }


def test_equal_scores_never_flatter() -> None:
    """A model that finds everything alike is last, whatever the order; so is one whose differences are rounding."""
    rng = np.random.default_rng(0)
    for similarity in (np.zeros((7, 7)), np.full((7, 7), 0.3), 0.3 + 1e-9 * rng.standard_normal((7, 7))):
        found = retrieve(similarity, np.arange(7))
        assert [found[way]["median_rank"] for way in found] == [7.0, 7.0]
        assert [found[way]["r1"] for way in found] == [0.0, 0.0]
    # Of two equal videos of a text none is before the other: with one stranger beside them the place is 2, not 3.
    assert first_places(np.asarray([[0.5, 0.5, 0.5, 0.1]]), np.asarray([[True, True, False, False]])).tolist() == [2]


def test_the_order_of_videos_and_texts_means_nothing() -> None:
    rng = np.random.default_rng(1)
    similarity = rng.integers(0, 6, (40, 12)) / 6  # many equal scores
    of = rng.integers(0, 12, 40)
    expected = retrieve(similarity, of)
    videos, texts = rng.permutation(40), rng.permutation(12)
    assert retrieve(similarity[videos][:, texts], np.argsort(texts)[of[videos]]) == expected


@pytest.mark.parametrize(
    ("similarity", "of", "message"),
    [
        (np.zeros((2, 2, 1)), [0, 1], r"similarities of shape \[2, 2, 1\]"),
        (np.zeros((0, 2)), [], r"allowed are \[videos, texts\] and \[videos\], none of them 0"),
        (np.zeros((2, 3)), [0, 1, 2], r"texts of videos of shape \[3\]"),
        (np.zeros((2, 3)), [0, 3], "belongs to text 3; allowed are 0 to 2"),
        (np.zeros((2, 3)), [-1, 0], "belongs to text -1"),
        (np.asarray([[0.0, 1.0], [np.nan, 1.0]]), [0, 1], "of video 1 are not all finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity: np.ndarray, of: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieve(similarity, np.asarray(of, np.int64))
