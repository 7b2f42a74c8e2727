"""Evaluation: the same table however it is shared out, padding and undecodable samples counted nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.aim import AIM
from pipelines.plan import ClipOptions
from pipelines.shards import ShardSet
from tests.sets import make_set
from train.build import build_model
from train.config import ModelConfig
from train.engine import World
from train.evaluate import Evaluation, evaluate

OPTIONS: dict[str, Any] = {"options": ClipOptions(num_frames=2, sampling="uniform"), "max_bad_fraction": 1.0}


class Share(World):
    """One of several processes, whose sums stay its own."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture(scope="module")
def model() -> AIM:
    model = build_model(ModelConfig(name="tiny-clip", pretrained="none"), num_classes=3, num_frames=2, seed=0)
    torch.nn.init.normal_(model.cls_head.fc_cls.weight)
    return model


def share(model: AIM, shards: ShardSet, rank: int, size: int, micro: int) -> Evaluation:
    return evaluate(
        model, shards, Share(rank, size, size, torch.device("cpu")), micro_batch=micro, loader_options=OPTIONS
    )


def test_table_does_not_depend_on_batch_or_processes(packed: Path, model: AIM) -> None:
    shards = ShardSet.open(packed, "val")
    whole = share(model, shards, 0, 1, 8)
    assert whole.valid.all() and whole.labels.tolist() == shards.labels.tolist()
    assert whole.logits.std() > 0
    parts = [share(model, shards, rank, 3, 4) for rank in range(3)]
    assert (sum(part.valid.astype(int) for part in parts) == 1).all()
    np.testing.assert_allclose(sum(part.logits for part in parts), whole.logits, rtol=1e-4, atol=1e-4)
    together = replace(whole, logits=sum(part.logits for part in parts))
    for name, value in whole.metrics().items():
        assert together.metrics()[name] == pytest.approx(value, rel=1e-5)


def test_sample_that_cannot_be_decoded_counts_nowhere(tmp_path: Path, model: AIM) -> None:
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
    assert 0.5 <= metrics["top5"] <= 1 and metrics["undecodable"] == 1
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits[:4]), torch.from_numpy(labels[:4]))
    assert metrics["loss"] == pytest.approx(expected.item())


def test_predictions_are_kept_for_reports(tmp_path: Path, packed: Path, model: AIM) -> None:
    shards = ShardSet.open(packed, "val")
    result = share(model, shards, 0, 1, 8)
    result.save(tmp_path / "predictions.npz", shards)
    with np.load(tmp_path / "predictions.npz") as file:
        assert file["keys"].tolist() == [shards[i].key for i in range(26)]
        assert file["classes"].tolist() == list(shards.classes)
        np.testing.assert_array_equal(file["logits"], result.logits)
