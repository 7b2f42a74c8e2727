"""Files that run without this project: every method in PyTorch's form, the two kinds of models in ONNX, for any number
of clips; what such a file holds, and that one which answers otherwise is refused."""

from __future__ import annotations

import json
import operator
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model import graphs
from model.geometry import CLIPGeometry, ImageTower, SwinGeometry, ViTGeometry
from model.graphs import compare, exported, write_onnx, write_torch_export
from model.methods import METHODS, create
from model.video import VideoModel
from tests import towers

ROOT = Path(__file__).resolve().parents[2]
OF_THE_SAME_FORWARD = {"adaptformer", "frozen", "finetuned", "pro_tuning", "st_adapter", "zero_i2v", "zero_shot"}
"""Methods with another's stack of other blocks. tools/check_exports.py has tried them."""
SWIN = SwinGeometry(width=32, depths=(2,), heads=(1,), window=4, image_size=16)


def small(method: str, geometry: type | None = None) -> VideoModel:
    """A method on one block, whose trained parts are not where they start."""
    kinds = METHODS[method].models
    if SwinGeometry in kinds and (geometry is SwinGeometry or len(kinds) == 1):
        tower = ImageTower(SWIN, {})
    elif list(kinds) == [CLIPGeometry]:
        tower = towers.both_towers(replace(towers.BOTH, layers=1, text_layers=1))
    else:
        tower = towers.tower(replace(towers.CLIP, layers=1, image_size=32))
    model = create(method, tower, num_classes=3, num_frames=4)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    if model.reads_class_names:
        model.name_classes(["run", "jump", "a long walk"])
    return model.eval()


@pytest.mark.parametrize("method", sorted(set(METHODS) - OF_THE_SAME_FORWARD))
def test_every_method_takes_any_number_of_clips(method: str) -> None:
    model = small(method)
    program = exported(model)
    assert compare(model, program.module(), method) <= 1e-6
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    operators = called - {operator.getitem, operator.mul, operator.floordiv}  # of numbers of clips
    assert {operation.namespace for operation in operators} == {"aten"}


def test_onnx_with_the_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model above 2 GB. Swin's attention has a bias, which is taken apart where gradients are wanted."""
    monkeypatch.setattr(graphs, "LARGEST_ONNX", 1000)
    said = write_onnx(small("aim", SwinGeometry), tmp_path / "model.onnx")
    assert said["largest_error"] <= 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_the_file_holds_no_pickle_and_nothing_of_this_machine(tmp_path: Path) -> None:
    said = write_torch_export(small("zero_shot"), tmp_path / "model.pt2")
    assert said["largest_error"] <= 1e-6
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        contents = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    lists = [json.loads(text)["config"] for name, text in contents.items() if name.endswith("_config.json")]
    assert len(lists) == 2 and all(not entry["use_pickle"] for entries in lists for entry in entries.values())
    assert contents["data/sample_inputs/model.pt"] == b""
    assert not any(str(ROOT).encode() in content for content in contents.values())
    assert not any("text" in name for entries in lists for name in entries)  # the text tower has done its work


def test_a_file_that_answers_otherwise_is_refused() -> None:
    model = small("frozen")
    assert compare(model, model, "itself") == 0
    with pytest.raises(ValueError, match=r"x\.onnx answers 1 clips of noise otherwise .* allowed is 0.001"):
        compare(model, lambda frames: model(frames) * 1.002, "x.onnx")
    with pytest.raises(ValueError, match="answers 1 clips"):
        compare(model, lambda frames: model(frames) * torch.nan, "x.onnx")
    with pytest.raises(ValueError, match="answers 2 clips"):  # as if the number of clips were part of the file
        compare(model, lambda frames: model(frames[:1]), "x.onnx")


def test_a_model_without_classes_has_nothing_to_answer() -> None:
    bare = create("frozen", towers.tower(replace(towers.CLIP, layers=1)), num_classes=None, num_frames=2)
    with pytest.raises(ValueError, match="has no classes to answer with"):
        graphs.Answering(bare)
    assert isinstance(bare.geometry, ViTGeometry)
