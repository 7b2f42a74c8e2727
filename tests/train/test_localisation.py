"""Mean average precision against one written straight from the definition, cases worked out by hand, strangers' files,
and how proposals get their frames and classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.localisation import (
    ACTIVITYNET_TIOUS,
    THUMOS_TIOUS,
    Segments,
    Truth,
    average_precision,
    classify,
    frames_inside,
    mean_average_precision,
    read_segments,
    read_truth,
    suppress,
    write_segments,
)

VIDEOS, CLASSES = ("a", "b", "c"), ("jump", "run")


def segments(*rows: tuple[int, float, float, int, float]) -> Segments:
    """Of (video, start, end, label, score)."""
    table = np.asarray(rows, np.float64).reshape(-1, 5)
    video, label = table[:, 0].astype(np.int64), table[:, 3].astype(np.int64)
    return Segments(video, table[:, 1:3], label, table[:, 4])


def truth_of(*rows: tuple[int, float, float, int]) -> Truth:
    return Truth(VIDEOS, CLASSES, segments(*((*row, 1.0) for row in rows)))


def by_definition(truth: Truth, detections: Segments, label: int, tiou: float) -> float:
    """Average precision of one class at one tIoU in plain Python, one detection and one recall at a time."""
    rows = zip(*(getattr(truth.segments, name).tolist() for name in ("video", "times", "label")), strict=True)
    wanted = [[video, start, end, False] for video, (start, end), of in rows if of == label]
    if not wanted:
        return float("nan")
    rows_found = zip(
        *(getattr(detections, name).tolist() for name in ("score", "video", "times", "label")), strict=True
    )
    found = sorted(
        ((-score, video, start, end) for score, video, (start, end), of in rows_found if of == label),
    )
    points = []  # (recall, precision) after each detection
    right = 0
    for count, (_, video, start, end) in enumerate(found, start=1):
        best, chosen = 0.0, None
        for target in wanted:
            if target[0] != video or target[3]:
                continue
            shared = max(0.0, min(end, target[2]) - max(start, target[1]))
            union = max(end, target[2]) - min(start, target[1]) if shared else 1.0
            if shared / union > best and shared / union >= tiou - 1e-9:
                best, chosen = shared / union, target
        if chosen is not None:
            chosen[3] = True
            right += 1
        points.append((right / len(wanted), right / count))
    area = 0.0
    for hit in range(1, right + 1):  # the recalls that are reached
        recall = hit / len(wanted)
        area += (1 / len(wanted)) * max(precision for reached, precision in points if reached >= recall - 1e-12)
    return area


@pytest.mark.parametrize("seed", range(6))
def test_random_proposals_agree_with_the_definition(seed: int) -> None:
    """Crowded videos, so that segments are found twice and overlap several; equal scores; a class without segments,
    one without detections, and videos without either."""
    rng = np.random.default_rng(seed)
    num_truth, num_found, num_videos, num_classes = 40, 300, 9, 6
    times = rng.uniform(0, 30, (num_truth, 1)) + rng.uniform(0, 12, (num_truth, 2)).cumsum(1)
    label = rng.integers(1, num_classes, num_truth)
    of = Segments(rng.integers(0, num_videos - 1, num_truth), times, label, np.ones(num_truth))
    truth = Truth(tuple(f"v{i}" for i in range(num_videos)), tuple(map(str, range(num_classes))), of)
    near = rng.integers(0, num_truth, num_found)  # most detections are somewhere about a segment
    moved = of.times[near] + rng.normal(0, 2.5, (num_found, 2))
    detections = Segments(
        np.where(rng.random(num_found) < 0.8, of.video[near], rng.integers(0, num_videos, num_found)),
        np.sort(np.abs(moved), axis=1) + np.asarray([0, 0.01]),
        np.where(rng.random(num_found) < 0.8, label[near], rng.integers(0, num_classes - 1, num_found)),
        np.round(rng.random(num_found), 2),
    )
    tious = (*THUMOS_TIOUS, 0.9)
    expected = [[by_definition(truth, detections, c, tiou) for tiou in tious] for c in range(num_classes)]
    result = average_precision(truth, detections, tious)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    assert np.isnan(result[0]).all() and 0.02 < np.nanmean(result) < 0.9
    means = mean_average_precision(truth, detections, tious)
    assert means["0.30"] == pytest.approx(np.nanmean([row[0] for row in expected]))
    assert means["mean"] == pytest.approx(np.mean([np.nanmean([row[k] for row in expected]) for k in range(6)]))
    shuffled = detections[rng.permutation(num_found)]
    np.testing.assert_array_equal(average_precision(truth, shuffled, tious), result)


def test_average_precision_by_hand() -> None:
    """Two segments; detections: wrong, right, right. Precision 0, 1/2, 2/3: interpolated 2/3 at both recalls."""
    truth = truth_of((0, 0, 10, 0), (1, 5, 15, 0))
    found = segments((2, 0, 10, 0, 0.9), (0, 0, 10, 0, 0.8), (1, 5, 15, 0, 0.7))
    assert average_precision(truth, found, [0.5])[0, 0] == pytest.approx(2 / 3)
    # Right, wrong, right: 1 at the first half of the recall, 2/3 at the second.
    found = segments((0, 0, 10, 0, 0.9), (2, 0, 10, 0, 0.8), (1, 5, 15, 0, 0.7))
    assert average_precision(truth, found, [0.5])[0, 0] == pytest.approx((1 + 2 / 3) / 2)
    # Only one of the two is found: half of the recall is never reached.
    assert average_precision(truth, segments((0, 0, 10, 0, 0.9)), [0.5])[0, 0] == pytest.approx(0.5)
    assert average_precision(truth, segments(), [0.5])[0, 0] == 0


def test_a_segment_is_found_once_and_a_detection_takes_what_it_overlaps_most() -> None:
    truth = truth_of((0, 0, 10, 0), (0, 4, 14, 0))
    twice = segments((0, 0, 10, 0, 0.9), (0, 0, 10, 0, 0.8))
    # The second has tIoU 6/14 with the other segment: found at 0.4, wrong at 0.5.
    assert average_precision(truth, twice, [0.4, 0.5])[0].tolist() == [1.0, 0.5]
    # tIoU 9/11 with the first segment and 7/13 with the second, which is left for the next.
    between = segments((0, 1, 11, 0, 0.9), (0, 4, 14, 0, 0.8))
    assert average_precision(truth, between, [0.5])[0, 0] == 1.0


def test_the_overlap_that_is_just_enough_is_enough() -> None:
    truth = truth_of((0, 0, 1, 0))
    for tiou in (*THUMOS_TIOUS, *ACTIVITYNET_TIOUS):
        assert average_precision(truth, segments((0, 0, tiou, 0, 1)), [tiou])[0, 0] == 1, tiou
        assert average_precision(truth, segments((0, 0, tiou - 1e-6, 0, 1)), [tiou])[0, 0] == 0, tiou


def test_the_mean_is_over_the_classes_that_happen_and_over_the_thresholds() -> None:
    truth = truth_of((0, 0, 10, 0), (1, 0, 10, 0))
    found = segments((0, 0, 10, 0, 0.9), (1, 0, 6, 0, 0.8), (2, 0, 6, 1, 0.95))
    assert mean_average_precision(truth, found, THUMOS_TIOUS) == {
        **{"0.30": 1.0, "0.40": 1.0, "0.50": 1.0, "0.60": 1.0, "0.70": 0.5},
        "mean": pytest.approx(0.9),
    }
    assert list(mean_average_precision(truth, found, ACTIVITYNET_TIOUS)) == [
        *(f"{t:.2f}" for t in ACTIVITYNET_TIOUS),
        "mean",
    ]
    with pytest.raises(ValueError, match="no segment"):
        mean_average_precision(truth_of(), found, THUMOS_TIOUS)
    with pytest.raises(ValueError, match="1 of 1 detections have no class"):
        mean_average_precision(truth, segments((0, 0, 1, -1, 1)), THUMOS_TIOUS)


def test_a_segment_of_no_length_counts_and_is_never_found() -> None:
    truth = truth_of((0, 0, 10, 0), (0, 3, 3, 0))
    assert average_precision(truth, segments((0, 0, 10, 0, 0.9), (0, 2, 4, 0, 0.8)), [0.3])[0, 0] == 0.5


def test_frames_are_spread_over_a_segment_and_one_between_frames_has_the_nearer() -> None:
    seconds = np.arange(10) / 2  # 0, 0.5, … 4.5
    times = np.asarray([[0.0, 4.5], [1.0, 2.5], [1.0, 1.6], [2.1, 2.2], [2.3, 2.4], [9.0, 12.0]])
    assert frames_inside(seconds, times, 5).tolist() == [
        [1, 3, 5, 7, 9],
        [2, 3, 4, 4, 5],
        [2, 2, 3, 3, 3],
        [4] * 5,
        [5] * 5,
        [9] * 5,
    ]
    assert frames_inside(seconds, times[:2], 1).tolist() == [[5], [4]]


def test_a_proposal_takes_its_likeliest_classes() -> None:
    proposals = segments((0, 0, 1, -1, 0.5), (1, 2, 3, -1, 0.8))
    probabilities = np.asarray([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
    two = classify(proposals, probabilities, 2)
    assert two.label.tolist() == [1, 2, 0, 2] and two.video.tolist() == [0, 0, 1, 1]
    assert two.score.tolist() == pytest.approx([0.25, 0.15, 0.32, 0.32])
    assert len(classify(proposals, probabilities, 0)) == 6


def test_what_overlaps_a_better_one_of_its_class_and_video_goes() -> None:
    given = segments(
        (0, 0, 10, 0, 0.5),
        (0, 1, 11, 0, 0.9),  # tIoU 9/11 with the first
        (0, 1, 11, 1, 0.4),  # another class
        (1, 1, 11, 0, 0.3),  # another video
        (0, 8, 20, 0, 0.8),  # tIoU 3/19 with the second, 2/20 with the first
        (0, 0, 5, 0, 0.1),  # tIoU 4/11 with the second, 5/10 with the first, which is gone
    )
    assert suppress(given, 0.45).score.tolist() == [0.9, 0.8, 0.4, 0.3, 0.1]
    assert suppress(given, 0.9).score.tolist() == [0.9, 0.8, 0.5, 0.4, 0.3, 0.1]
    assert len(suppress(segments(), 0.5)) == 0


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def database(*annotations: dict[str, Any], subset: str = "validation") -> dict[str, Any]:
    return {"subset": subset, "duration": 20.5, "annotations": list(annotations)}


def test_files_are_read_and_written(tmp_path: Path) -> None:
    """Subsets are kept apart, a video without annotations is evaluated too, and what is written is read the same."""
    videos = {
        "v1": database({"segment": [0, 10.25], "label": "run"}, {"segment": [3, 3], "label": "jump"}),
        "v2": database(),
        "v3": database({"segment": [1, 2], "label": "swim"}, subset="training"),
    }
    path = write(tmp_path / "truth.json", {"version": "1.3", "taxonomy": [], "database": videos})
    truth = read_truth(path, "validation")
    assert (truth.videos, truth.classes, truth.others) == (("v1", "v2"), ("jump", "run"), {"v3"})
    assert truth.segments.times.tolist() == [[0, 10.25], [3, 3]] and truth.segments.label.tolist() == [1, 0]
    with pytest.raises(ValueError, match="subset 'test' is not there; allowed is one of 'training', 'validation'"):
        read_truth(path, "test")
    with pytest.raises(ValueError, match="subset '' is not there"):
        read_truth(path)

    results = {
        "v2": [{"segment": [1, 2.0004], "score": 0.123456789, "label": "jump"}],
        "v1": [{"segment": [0, 5], "score": 3}],
        "v3": [{"segment": [0, 5], "score": 1, "label": "unknown"}],
    }
    given = read_segments(write(tmp_path / "found.json", {"results": results}), truth)
    assert (
        given.video.tolist() == [1, 0] and given.label.tolist() == [0, -1] and given.score.tolist() == [0.123456789, 3]
    )
    write_segments(tmp_path / "again.json", truth, given)
    assert json.loads((tmp_path / "again.json").read_text()) == {
        "results": {
            "v1": [{"segment": [0.0, 5.0], "score": 3.0}],
            "v2": [{"segment": [1.0, 2.0004], "score": 0.123457, "label": "jump"}],
        }
    }


def test_some_classes_of_the_truth(tmp_path: Path) -> None:
    truth = truth_of((0, 0, 1, 0), (2, 1, 2, 1), (2, 4, 5, 0))
    only = truth.of_classes(["run"])
    assert (only.videos, only.classes, only.others) == (("c",), ("run",), {"a", "b"})
    assert (only.segments.video.tolist(), only.segments.label.tolist(), only.segments.times.tolist()) == (
        [0],
        [0],
        [[1, 2]],
    )
    assert truth.of_classes(["run", "jump"]).segments.label.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="'swim' is no class of the truth, which has 2"):
        truth.of_classes(["swim"])


def test_the_text_files_of_thumos(tmp_path: Path) -> None:
    (tmp_path / "Diving_test.txt").write_text("video_test_0000006  5.9 9.8\n\nvideo_test_0000006 41.1  46.8\n")
    (tmp_path / "BaseballPitch_test.txt").write_text("video_test_0000324 0.0 2.5\n")
    (tmp_path / "Ambiguous_test.txt").write_text("video_test_0000999 1 2\n")
    truth = read_truth(tmp_path)
    assert truth.classes == ("BaseballPitch", "Diving") and truth.videos == ("video_test_0000324", "video_test_0000006")
    assert truth.segments.times.tolist() == [[0, 2.5], [5.9, 9.8], [41.1, 46.8]]
    assert truth.segments.label.tolist() == [0, 1, 1]
    for line, message in (
        ("v 1", "line 1 is 'v 1'; the form is"),
        ("v 1 x", "'x' is no number"),
        ("v 2 1", "a segment from 2 to 1 s; allowed is 0 <= start < end"),
        ("v 1 nan", "line 1 = nan; allowed is a finite number"),
        ("v 1 \xff", "decode"),
    ):
        (tmp_path / "Diving_test.txt").write_bytes(line.encode("latin-1"))
        with pytest.raises(ValueError, match=f"Diving_test.txt: .*{message}") as failure:
            read_truth(tmp_path)
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "not in ActivityNet's format"),
        ('{"database": []}', "not in ActivityNet's format"),
        ('{"database": {}}', "holds no annotated segment"),
        ('{"database": {"v": 3}}', "video 'v' is 3; allowed is an object"),
        ('{"database": {"v": {"annotations": {}}}}', "annotations = {}; allowed is a list"),
        ('{"database": {"v": {"annotations": []}}}', "holds no annotated segment"),
        ('{"database": {"v": {"annotations": [{"label": "a"}]}}}', "annotation 0 has no segment"),
        ('{"database": {"v": {"annotations": [{"segment": [0, 1]}]}}}', "annotation 0 has no label"),
        ('{"database": {"v": {"annotations": [{"segment": [0, 1], "label": 1}]}}}', "label = 1; allowed is text"),
        ('{"database": {"v": {"annotations": [{"segment": [0], "label": "a"}]}}}', r"segment = \[0\]; allowed is"),
        (
            '{"database": {"v": {"annotations": [{"segment": [0, NaN], "label": "a"}]}}}',
            "segment = nan; allowed is a finite",
        ),
        ('{"database": {"v": {"annotations": [{"segment": [0, 1e99], "label": "a"}]}}}', "segment = 1e.99; allowed"),
        ('{"database": {"v": {"annotations": [{"segment": [2, 1], "label": "a"}]}}}', "from 2 to 1 s; allowed is"),
        ('{"database": {"v": {"annotations": [{"segment": [-1, 1], "label": "a"}]}}}', "from -1 to 1 s; allowed is"),
        ('{"database": {"v": {"annotations": [{"segment": [true, 1], "label": "a"}]}}}', "allowed is .start, end. in"),
    ],
)
def test_a_truth_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as failure:
        read_truth(path)
    assert "\n" not in str(failure.value) and "truth.json" in str(failure.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"segment": [0, 1]}, "video 'a', entry 0 has no score"),
        ({"segment": [0, 1], "score": "1"}, "score = '1'; allowed is a number"),
        ({"segment": [0, 1], "score": float("nan")}, "score = nan; allowed is a finite number"),
        ({"segment": [0, 1], "score": float("inf")}, "score = inf; allowed is a finite number"),
        ({"segment": [1, 1], "score": 1}, "a segment from 1 to 1 s; allowed is 0 <= start < end"),
        ({"segment": [0, 1], "score": 1, "label": "swim"}, "'swim' is no class of the truth, which has 2"),
        (7, "entry 0 is 7; allowed is an object"),
    ],
)
def test_proposals_that_are_none_are_refused_in_one_line(tmp_path: Path, entry: Any, message: str) -> None:
    path = write(tmp_path / "found.json", {"results": {"a": [entry]}})
    with pytest.raises(ValueError, match=message) as failure:
        read_segments(path, truth_of((0, 0, 1, 0)))
    assert "\n" not in str(failure.value)


def test_proposals_of_unknown_videos_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "found.json", {"results": {"z": []}})
    with pytest.raises(ValueError, match="video 'z' is not in the truth, which has 3 videos"):
        read_segments(path, truth_of((0, 0, 1, 0)))
    write(path, {"results": {"a": {}}})
    with pytest.raises(ValueError, match=r"video 'a' has \{\}; allowed is a list"):
        read_segments(path, truth_of((0, 0, 1, 0)))
