"""Models that read class names, in the trainer and the tools: candidates, other classes than those of training, and
what has nothing to train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.sets import make_set
from tests.train.runs import metrics, trace
from tools import evaluate
from train.main import main
from train.resolve import load_config, resolve_batch
from train.start import prepare
from train.trained import open_trained

RECIPE = """
[data]
num_frames = 2
sampling = "uniform"
[model]
method = "zero_shot"
name = "tiny-clip"
pretrained = "none"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "plain.toml").write_text(RECIPE + f'[run]\nout = "{tmp_path / "plain"}"\n')
    return tmp_path / "plain.toml"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A set of five classes."""
    return make_set(tmp_path / "others", [9, 12, 9, 12, 9, 12], classes=5, splits=("val",))


def evaluated(*arguments: object) -> dict[str, object]:
    """What tools/evaluate.py wrote."""
    out = Path(str(arguments[-1]))
    assert evaluate.main([*map(str, arguments[:-1]), "--fp32", "--out", str(out)]) == 0
    predictions = np.load(out / "predictions.npz")
    return {**json.loads((out / "metrics.json").read_text()), "shape": predictions["logits"].shape}


def test_a_run_with_candidates_answers_for_other_classes(
    packed: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        *(f"data.shards={packed}", "data.num_frames=2", "data.workers=1", "data.test_crops=1"),
        *("model.method=prompt_clip", "model.pretrained=none", "model.prefix=2", "model.postfix=2"),
        *("model.num_candidates=2", "ds.train_batch_size=4", "ds.train_micro_batch_size_per_gpu=2"),
        *("schedule.epochs=0.4", "schedule.warmup_epochs=0", "train.eval_every=0"),
        *(f"run.out={tmp_path / 'run'}", "run.trace=true", "run.report=false"),
    ]
    assert main(["--recipe", "demo", *(part for setting in settings for part in ("--set", setting))]) == 0
    losses = [line["loss"] for line in trace(tmp_path / "run")]
    assert losses and max(losses) < 50  # two candidates, the right one among them: else it were 10,000
    (last,) = metrics(tmp_path / "run", "eval")
    assert last["loss"] < 50
    monkeypatch.delenv("RANK", raising=False)  # which the training left
    answers = evaluated(tmp_path / "run", "--shards", others, tmp_path / "answers")
    assert answers["shape"] == (6, 5) and answers["samples"] == 6


def test_a_recipe_without_training_is_evaluated_and_not_trained(
    recipe: Path, packed: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    answers = evaluated(recipe, "--shards", others, tmp_path / "answers")
    assert (answers["shape"], answers["checkpoint"], answers["step"]) == ((6, 5), str(recipe), None)
    config = load_config(str(recipe), [f"data.shards={packed}"])
    with pytest.raises(ValueError, match=r"'zero_shot' has nothing to train: evaluate it, python tools/evaluate\.py"):
        prepare(config, resolve_batch(config.deepspeed, 1), resume=False)
    with pytest.raises(ValueError, match=r"--set data\.shards=FOLDER"):
        load_config(str(recipe))


def test_a_recipe_that_must_be_trained_is_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    trained = open_trained(recipe, ["model.template=some {}", "ds.train_micro_batch_size_per_gpu=3"])
    assert trained.model.options.template == "some {}" and trained.micro_batch == 3  # type: ignore[union-attr]
    assert trained.classes is None and trained.before_training() is None and trained.folder == tmp_path / "plain"
    with pytest.raises(ValueError, match=r"of method aim must be trained: python train/main\.py --recipe .*zero_shot"):
        open_trained(recipe, ["model.method=aim"])
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        open_trained(tmp_path / "none.toml")
