"""Retrieval with a checkpoint: the numbers of its own answers, names for models that read them, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model.backbone import load_image_tower
from model.checkpoints import of_model, write_folder
from model.methods import create
from model.methods.aim import Frozen
from tests.sets import make_set
from tools import evaluate
from tools.retrieve import main
from train.retrieval import retrieve


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 videos of 4 classes."""
    return make_set(tmp_path_factory.mktemp("packed") / "set", [12, 20, 9] * 3 + [31, 14], classes=4, splits=("val",))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """An untrained model of 4 classes whose head is large enough for answers that differ."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = create("frozen", load_image_tower("tiny-clip", "none"), num_classes=4, num_frames=2)
    assert model.cls_head is not None
    torch.nn.init.normal_(model.cls_head.fc_cls.weight)
    write_folder(of_model(model), tmp_path / "model")
    yield tmp_path / "model"
    torch.set_num_threads(before)


def test_retrieval_is_of_the_models_own_answers(
    packed: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [str(checkpoint), "--shards", str(packed), "--set", "data.workers=1", "--views", "2x1"]
    assert evaluate.main([*shared, "--average", "logits", "--out", str(tmp_path / "evaluation")]) == 0
    assert main([*shared, "--out", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "evaluation" / "predictions.npz") as answers:
        expected = retrieve(answers["logits"], answers["labels"])
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert {way: written[way] for way in expected} == expected
    assert expected["text_to_video"]["queries"] == 4 and expected["video_to_text"]["queries"] == 11
    assert written["split"] == "val" and written["views"] == 2 and "retrieve.py" in written["command"]
    r1, text = 100 * expected["video_to_text"]["r1"], (tmp_path / "out" / "retrieval.md").read_text()
    assert f"| video → text | {r1:.1f} | 100.0 | 100.0 |" in text and "| 11 | 4 |" in text
    assert text.partition("\n\n")[2] in capsys.readouterr().out


def test_other_classes_and_several_labels_are_refused(packed: Path, checkpoint: Path, tmp_path: Path) -> None:
    fewer = ["--set", 'data.classes=["class1", "class0"]']
    with pytest.raises(ValueError, match=r"has 2 classes and .* was trained for 4"):
        main([str(checkpoint), "--shards", str(packed), *fewer])
    several = make_set(tmp_path / "several", [9] * 4, classes=4, splits=("val",), multi_label=True)
    with pytest.raises(ValueError, match="several labels each; retrieval needs sets with one"):
        main([str(checkpoint), "--shards", str(several)])


def test_a_model_that_reads_its_class_names_is_given_those_of_the_set(
    packed: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Sequence[str]] = []

    def name_classes(self: Frozen, names: Sequence[str]) -> None:
        given.append(names)
        self.cls_head = self.make_head(len(names))

    monkeypatch.setattr(Frozen, "reads_class_names", True)
    monkeypatch.setattr(Frozen, "name_classes", name_classes)
    fewer = ["--set", 'data.classes=["class2", "class0"]', "--set", "data.workers=1"]
    assert main([str(checkpoint), "--shards", str(packed), *fewer, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert given == [("class2", "class0")] and written["video_to_text"]["queries"] == 6
