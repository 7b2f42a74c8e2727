"""Evaluation: the same table however it is shared out, padding and undecodable samples counted nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.video import VideoModel
from pipelines.loader import ClipLoader
from pipelines.plan import EVAL_EPOCH, ClipOptions, Turn
from pipelines.shards import ShardSet
from tests.sets import make_set
from train.build import build_model
from train.config import ModelConfig
from train.engine import World
from train.evaluate import Evaluation, average_precision, evaluate, tie_groups

OPTIONS: dict[str, Any] = {"options": ClipOptions(num_frames=2, sampling="uniform"), "max_bad_fraction": 1.0}


VIEWS: dict[str, Any] = {
    **OPTIONS,
    "options": ClipOptions(num_frames=2, sampling="uniform", test_clips=2, test_crops=3),
}


class Share(World):
    """One of several processes, which hears nothing of the others and that hears of no other."""

    def gather(self, text: str) -> list[str]:
        return [text]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture(scope="module")
def model() -> VideoModel:
    model = build_model(ModelConfig(name="tiny-clip", pretrained="none"), num_classes=3, num_frames=2, seed=0)
    assert model.cls_head is not None
    torch.nn.init.normal_(model.cls_head.fc_cls.weight)
    return model


def share(model: VideoModel, shards: ShardSet, rank: int, size: int, micro: int) -> Evaluation:
    return evaluate(
        model, shards, Share(rank, size, size, torch.device("cpu")), micro_batch=micro, loader_options=OPTIONS
    )


def test_table_does_not_depend_on_batch_or_processes(packed: Path, model: VideoModel) -> None:
    shards = ShardSet.open(packed, "val")
    whole = share(model, shards, 0, 1, 8)
    assert whole.valid.all() and whole.labels.tolist() == [shards[i].label for i in range(len(shards))]
    assert whole.logits.std() > 0
    parts = [share(model, shards, rank, 3, 4) for rank in range(3)]
    assert (sum(part.valid.astype(int) for part in parts) == 1).all()
    np.testing.assert_allclose(sum(part.logits for part in parts), whole.logits, rtol=1e-4, atol=1e-4)
    together = replace(whole, logits=sum(part.logits for part in parts))
    for name, value in whole.metrics().items():
        assert together.metrics()[name] == pytest.approx(value, rel=1e-5)


def evaluate_together(
    model: VideoModel, shards: ShardSet, size: int, micro: int, options: dict[str, Any], **more: Any
) -> Evaluation:
    """The result of `size` processes, one after another: their sums are gathered first, then handed to the last."""
    tables: list[list[torch.Tensor]] = []

    def run(rank: int, summed: Callable[[torch.Tensor], torch.Tensor]) -> Evaluation:
        world = Share(rank, size, size, torch.device("cpu"))
        object.__setattr__(world, "sum", summed)
        return evaluate(model, shards, world, micro_batch=micro, loader_options=options, **more)

    def keep(values: torch.Tensor) -> torch.Tensor:
        tables[-1].append(values.clone())
        return values

    if size == 1:
        return run(0, lambda values: values)
    for rank in range(size):
        tables.append([])
        run(rank, keep)
    totals = iter([sum(parts) for parts in zip(*tables, strict=True)])
    return run(0, lambda values: values.copy_(next(totals)))


@pytest.mark.parametrize("multi_label", [False, True])
def test_views_are_averaged_as_probabilities(tmp_path: Path, model: VideoModel, multi_label: bool) -> None:
    folder = make_set(tmp_path / "set", [9, 14, 20, 6], classes=3, splits=("val",), multi_label=multi_label)
    shards = ShardSet.open(folder, "val")
    expected = []
    turns = [[Turn(sample_id, EVAL_EPOCH, view) for view in range(6)] for sample_id in range(4)]
    with ClipLoader(shards, turns, micro_batch=6, size=48, **VIEWS) as loader, torch.no_grad():
        for batch in loader:
            assert len({(plan.frames, plan.box) for plan in batch.plans}) == 6
            logits = model(batch.frames).double()
            expected.append((logits.sigmoid() if multi_label else logits.softmax(1)).mean(0).numpy())
    whole = evaluate_together(model, shards, 1, 5, VIEWS)
    answered = torch.from_numpy(whole.logits)
    probabilities = answered.sigmoid() if multi_label else answered.softmax(1)
    np.testing.assert_allclose(probabilities, np.stack(expected), atol=1e-6)
    assert whole.valid.all()
    other = evaluate_together(model, shards, 3, 2, VIEWS)  # the views of the second sample lie in two processes
    np.testing.assert_allclose(other.logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert np.array_equal(other.labels, whole.labels) and other.valid.all()


def test_one_view_keeps_the_models_own_logits(packed: Path, model: VideoModel) -> None:
    shards = ShardSet.open(packed, "val")
    turns = [[Turn(i, EVAL_EPOCH) for i in range(8)]]
    with ClipLoader(shards, turns, micro_batch=8, size=48, **OPTIONS) as loader, torch.no_grad():
        logits = model(next(loader).frames).numpy()
    assert np.array_equal(share(model, shards, 0, 1, 8).logits[:8], logits)


def test_a_view_that_cannot_be_decoded_is_left_out_of_the_mean(tmp_path: Path, model: VideoModel) -> None:
    options = {**OPTIONS, "options": ClipOptions(num_frames=2, sampling="uniform", test_clips=2)}
    folder = make_set(tmp_path / "set", [30, 30], classes=3, splits=("val",))
    shards = ShardSet.open(folder, "val")
    first, second = ([Turn(1, EVAL_EPOCH, view)] for view in (0, 1))
    with ClipLoader(shards, [first, second], micro_batch=1, size=48, **options) as loader, torch.no_grad():
        frame = next(loader).plans[0].stored[0]
        good = model(next(loader).frames).softmax(1).numpy()
    sample = shards[1]
    with sample.shard.open("r+b") as file:
        file.seek(sample.video_offset + int(sample.frames.offset[frame]) + 30)
        file.write(b"damage")
    result = evaluate_together(model, ShardSet.open(folder, "val"), 1, 4, options)
    assert result.valid.tolist() == [True, True]
    np.testing.assert_allclose(torch.from_numpy(result.logits[1:]).softmax(1), good, atol=1e-6)


def test_sets_with_several_labels_are_judged_by_mean_average_precision(tmp_path: Path, model: VideoModel) -> None:
    folder = make_set(tmp_path / "set", [6] * 6, classes=3, splits=("val",), multi_label=True)
    shards = ShardSet.open(folder, "val")
    result = share(model, shards, 0, 1, 4)
    expected = [[int(c in {i % 3, i // 2 % 3}) for c in range(3)] for i in range(6)]
    assert result.labels.tolist() == expected
    metrics = result.metrics()
    logits, labels = torch.from_numpy(result.logits).double(), torch.tensor(expected).double()
    assert metrics["loss"] == pytest.approx(
        -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean().item()
    )
    columns = zip(logits.numpy().T, labels.numpy().T > 0, strict=True)
    precision = [average_precision(scores, hits) for scores, hits in columns]
    assert result.class_precision().tolist() == precision
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(precision))
    assert result.class_samples().tolist() == labels.sum(0).tolist()
    assert metrics["top1"] == np.mean([expected[i][c] for i, c in enumerate(result.logits.argmax(1))])
    assert (metrics["samples"], metrics["undecodable"]) == (6, 0)
    result.save(tmp_path / "predictions.npz", shards)
    with np.load(tmp_path / "predictions.npz") as file:
        assert file["labels"].tolist() == expected


def test_average_precision_of_a_ranking_made_by_hand() -> None:
    """Hits at ranks 1, 3 and 5: precision 1/1, 2/3, 3/5 there."""
    scores, hits = np.asarray([0.1, 0.9, 0.5, 0.8, 0.7]), np.asarray([True, True, False, False, True])
    assert average_precision(scores, hits) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(-np.arange(4.0), np.asarray([True, True, False, False])) == 1.0
    assert average_precision(np.arange(4.0), np.asarray([True, False, False, False])) == 0.25
    tied = np.asarray([1.0, 1.0, 0.0, 0.0])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):  # equal scores: 1 of 2, then 2 of 4
        assert average_precision(tied, np.asarray([True, False, False, True])[order]) == pytest.approx(0.5)
    table = np.stack([scores, scores, -scores], 1).astype(np.float32)
    classes = np.stack([hits, np.zeros(5, bool), hits], 1).astype(np.uint8)
    result = Evaluation(table, classes, np.ones(5, bool))
    expected = [average_precision(scores, hits), np.nan, average_precision(-scores, hits)]
    np.testing.assert_allclose(result.class_precision(), expected)
    assert result.metrics()["mean_average_precision"] == pytest.approx((expected[0] + expected[2]) / 2)


def test_sample_that_cannot_be_decoded_counts_nowhere(tmp_path: Path, model: VideoModel) -> None:
    folder = make_set(tmp_path / "set", [6] * 6, classes=3, splits=("val",))
    shards = ShardSet.open(folder, "val")
    whole = share(model, shards, 0, 1, 4)
    with (folder / "val-000000.tar").open("r+b") as file:
        file.seek(shards[1].video_offset)
        file.write(bytes(shards[1].video_bytes))
    result = share(model, ShardSet.open(folder, "val"), 0, 1, 4)
    assert result.valid.tolist() == [True, False, True, True, True, True]
    assert result.metrics() == replace(whole, valid=result.valid).metrics()
    assert (result.metrics()["samples"], result.metrics()["undecodable"]) == (5, 1)


def test_metrics_of_a_table_made_by_hand(tmp_path: Path, packed: Path) -> None:
    logits = np.zeros((5, 7), np.float32)
    logits[:, 6], logits[0, 2], logits[1, 3] = 1, 3, 2
    labels = np.asarray([2, 2, 2, 6, 0])
    result = Evaluation(logits, labels, np.asarray([True, True, True, True, False]))
    metrics = result.metrics()
    assert metrics["top1"] == 2 / 4 and metrics["mean_class_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert metrics["top5"] == 1 and metrics["undecodable"] == 1
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits[:4]), torch.from_numpy(labels[:4]))
    assert metrics["loss"] == pytest.approx(expected.item())


def test_predictions_are_kept_for_reports(tmp_path: Path, packed: Path, model: VideoModel) -> None:
    shards = ShardSet.open(packed, "val")
    result = share(model, shards, 0, 1, 8)
    result.save(tmp_path / "predictions.npz", shards)
    with np.load(tmp_path / "predictions.npz") as file:
        assert file["keys"].tolist() == [shards[i].key for i in range(26)]
        assert file["classes"].tolist() == list(shards.classes)
        np.testing.assert_array_equal(file["logits"], result.logits)


@pytest.mark.parametrize(("averaging", "multi_label"), [("prob", False), ("logits", True)])
def test_equal_metrics_for_any_batch_and_processes(
    tmp_path: Path, model: VideoModel, averaging: str, multi_label: bool
) -> None:
    """13 videos, some of them the same with other labels: their scores tie but for the rounding of other batches."""
    folder = make_set(tmp_path / "set", [9, 14, 9, 20] * 3 + [6], classes=3, splits=("val",), multi_label=multi_label)
    shards = ShardSet.open(folder, "val")
    results = [
        evaluate_together(model, shards, size, micro, VIEWS, averaging=averaging)
        for size, micro in ((1, 7), (2, 1), (2, 7))  # 78 views: the last batches are partial, or padding alone
    ]
    scale = np.abs(results[0].logits).max()
    for other in results[1:]:
        np.testing.assert_allclose(other.logits, results[0].logits, rtol=0, atol=1e-5 * scale)
        assert np.array_equal(other.predicted, results[0].predicted)
        expected = results[0].metrics()
        assert other.metrics() == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-6)}


def test_averaging_logits_is_not_averaging_probabilities(tmp_path: Path, model: VideoModel) -> None:
    shards = ShardSet.open(make_set(tmp_path / "set", [40, 23], classes=3, splits=("val",)), "val")
    turns = [[Turn(sample_id, EVAL_EPOCH, view) for view in range(6)] for sample_id in range(2)]
    with ClipLoader(shards, turns, micro_batch=6, size=48, **VIEWS) as loader, torch.no_grad():
        means = np.stack([model(batch.frames).double().mean(0).numpy() for batch in loader])
    logits = evaluate_together(model, shards, 1, 4, VIEWS, averaging="logits")
    np.testing.assert_allclose(logits.logits, means, atol=1e-5)
    prob = evaluate_together(model, shards, 1, 4, VIEWS)
    likelihoods = [torch.from_numpy(result.logits).log_softmax(1).numpy() for result in (logits, prob)]
    assert np.abs(likelihoods[0] - likelihoods[1]).max() > 0.01
    with pytest.raises(ValueError, match="averaging = 'mean'; allowed is prob or logits"):
        evaluate_together(model, shards, 1, 4, VIEWS, averaging="mean")


def test_scores_that_differ_by_rounding_are_equal() -> None:
    scores = np.asarray([[2.0, 3.0, 3.0 - 1e-7, 1.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, -1e-3]], np.float32)
    assert tie_groups(scores).tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert tie_groups(np.zeros((2, 1))).tolist() == [[0], [0]]
    for noise in (-1, 0, 1):
        result = Evaluation(
            scores + np.float32(1e-7) * noise * np.eye(3, 4, 1, np.float32), np.zeros(3, int), scores[:, 0] > -1
        )
        assert result.ranking.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_confusion_and_accuracy_of_each_class() -> None:
    logits = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 0, 3]]
    labels = np.asarray([0, 0, 1, 2, 2, 3])
    result = Evaluation(logits, labels, np.asarray([True] * 5 + [False]))
    assert result.confusion().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert result.class_samples().tolist() == [2, 1, 2, 0]
    np.testing.assert_array_equal(result.class_accuracy(), [0.5, 1, 0.5, np.nan])
    assert result.metrics()["mean_class_accuracy"] == pytest.approx(2 / 3)
    assert result.predicted.tolist() == [0, 1, 1, 2, 0, 3]


def test_answers_that_are_no_numbers_end_it(packed: Path, model: VideoModel) -> None:
    """Else they would count as right or wrong by the accident of how NaN compares."""
    shards = ShardSet.open(packed, "val")
    broken = build_model(ModelConfig(name="tiny-clip", pretrained="none"), num_classes=3, num_frames=2, seed=0)
    assert broken.cls_head is not None
    torch.nn.init.constant_(broken.cls_head.fc_cls.bias, float("nan"))
    with pytest.raises(ValueError, match=r"answers to 26 of 26 samples of .* not finite numbers, first to 000000_n"):
        share(broken, shards, 0, 1, 8)


def test_progress_counts_micro_batches(packed: Path, model: VideoModel) -> None:
    steps: list[int] = []
    shards = ShardSet.open(packed, "val")
    world = Share(0, 1, 1, torch.device("cpu"))
    evaluate(model, shards, world, micro_batch=8, loader_options=OPTIONS, on_batch=lambda: steps.append(1))
    assert len(steps) == 4
