"""Every method goes the whole way through the trainer: learns, is saved, goes on to the last bit, is evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.geometry import CLIPGeometry
from model.methods import METHODS
from tests.train.runs import metrics, trace
from train.main import main
from train.trained import open_trained

ON_CLIP = [
    name
    for name, entry in METHODS.items()
    if entry.trains and any(issubclass(CLIPGeometry, kind) for kind in entry.models)
]
FITTING = {"prompt_clip": ("model.prefix=4", "model.postfix=4")}  # texts of the tiny CLIP have 24 places
DROPS = ("drop_path", "head_dropout", "dropout", "prompt_dropout", "adapter_dropout")
"""Rates that are set above 0, where a method has them: what is random must come again."""


def arguments(packed: Path, out: Path, method: str) -> list[str]:
    rates = [f"model.{name}=0.2" for name in DROPS if hasattr(METHODS[method].options(), name)]
    settings = [
        *(f"data.shards={packed}", "data.num_frames=4", "data.workers=1", "data.test_crops=1"),
        *(f"model.method={method}", "model.pretrained=none", *rates),
        *FITTING.get(method, ()),
        *("ds.train_batch_size=4", "ds.train_micro_batch_size_per_gpu=2"),
        *("schedule.epochs=0.6", "schedule.warmup_epochs=0", "train.eval_every=0", "train.checkpoint_every=1"),
        *("train.keep=99", f"run.out={out}", "run.trace=true", "run.report=false"),
    ]
    return ["--recipe", "demo", *(part for setting in settings for part in ("--set", setting))]


@pytest.mark.parametrize("method", ON_CLIP)
def test_a_run_goes_on_to_the_last_bit_and_answers(method: str, packed: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(arguments(packed, whole, method)) == 0
    steps = sorted(path.name for path in whole.glob("checkpoint-*"))
    assert len(steps) >= 2
    shutil.copytree(whole, resumed)
    for name in steps[1:]:
        shutil.rmtree(resumed / name)
    (resumed / "predictions.npz").unlink()
    (resumed / "trace-0.jsonl").unlink()
    assert main([*arguments(packed, resumed, method), "--resume"]) == 0
    again = trace(resumed)
    assert again == [line for line in trace(whole) if line["step"] >= 2]
    states = [load_file(folder / steps[-1] / "state.safetensors") for folder in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    (first,), (second,) = metrics(whole, "eval"), metrics(resumed, "eval")
    assert first == second
    trained = open_trained(whole)
    size = trained.model.geometry.image_size
    clip = torch.randint(0, 256, (1, 4, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():
        answer = trained.model(clip)
    assert answer.shape == (1, trained.model.num_classes) and answer.isfinite().all()
