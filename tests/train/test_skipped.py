"""Steps whose loss or gradients are no finite numbers: as if they had never been, on all ranks; named; and a limit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.shell import LAUNCHER
from tests.train.runs import FP32, arguments, metrics, run_here, trace
from tests.train.together import Together, poison
from train.build import build_model
from train.checkpoint import newest_checkpoint, read_checkpoint
from train.config import Batch, ModelConfig, OptimizerConfig
from train.engine import Engine, start_world

NAN, INF = float("nan"), float("inf")
SHORT = (FP32, "run.report=false", 'data.val_split=""', "train.log_every=2", "schedule.epochs=3")
STEPS = 10


class Learner:
    """A small model whose running statistics change too, under DeepSpeed."""

    def __init__(self, *, clipping: float, accumulation: int = 1, max_skipped: int = 2) -> None:
        config = ModelConfig(method="aim", name="tiny-clip", pretrained="none")
        self.model = build_model(config, num_classes=3, num_frames=2, seed=0)
        self.model.register_buffer("counted", torch.zeros(2))
        document = {"train_batch_size": 2 * accumulation, "gradient_clipping": clipping}
        document |= {"zero_optimization": {"stage": 0}}  # type: ignore[dict-item]
        batch = Batch(total=2 * accumulation, micro=2, accumulation=accumulation)
        world = start_world()
        self.device = world.device
        self.engine = Engine(world, self.model, OptimizerConfig(), document, batch, max_skipped)
        self.accumulation = accumulation

    def step(self, seed: int, factors: tuple[float, ...]) -> bool:
        """One step, each micro-batch's loss times a factor; whether it was skipped."""
        generator = torch.Generator().manual_seed(seed)
        for factor in factors:
            frames = torch.randint(0, 256, (2, 2, 48, 48, 3), dtype=torch.uint8, generator=generator)
            logits = self.engine(frames.to(self.device), {})
            self.model.counted += 1 if factor == 1 else NAN  # type: ignore[operator]
            self.engine.backward(F.cross_entropy(logits, torch.tensor([0, 2], device=self.device)) * factor)
            self.engine.update(1e-3)
        return bool(self.engine.skipped.item())

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for p, entries in self.engine.optimizer.state.items():
            found |= {f"{names[id(p)]} {part}": copy.deepcopy(value) for part, value in entries.items()}
        return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_a_skipped_step_is_as_if_it_had_never_been(bad: float, clipping: float) -> None:
    """Weights, Adam's state and counts, running statistics, and all that is learned later; also in one micro-batch of
    two, and before there is any state. On a machine with a GPU it is the device that decides."""
    ours, plain = (Learner(clipping=clipping, accumulation=2) for _ in range(2))
    assert ours.step(9, (1, bad))
    assert all(not entries["step"].item() for entries in ours.engine.optimizer.state.values())
    for seed in range(3):
        assert not ours.step(seed, (1, 1)) and not plain.step(seed, (1, 1))
        before = ours.state()
        assert ours.step(10 + seed, (bad, 1))
        assert_same(ours.state(), before)
    assert_same(ours.state(), plain.state())


def test_a_loss_that_is_not_finite_counts_even_where_its_gradient_is_and_the_other_way_round() -> None:
    learner = Learner(clipping=0.0)
    learner.engine(torch.zeros(2, 2, 48, 48, 3, dtype=torch.uint8, device=learner.device), {})
    head = learner.model.cls_head.fc_cls.weight
    learner.engine.backward(head.sum() + INF)  # its gradient is 1
    learner.engine.update(1e-3)
    assert learner.engine.skipped.item() == 1
    handle = head.register_hook(lambda gradient: gradient / 0)
    assert learner.step(0, (1,))
    handle.remove()
    assert not learner.step(0, (1,))


def test_after_too_many_in_a_row_nothing_is_learned_any_more() -> None:
    """The device decides, and the host hears of it some steps later: until then the state must not move on."""
    learner = Learner(clipping=0.0, max_skipped=2)
    assert [learner.step(i, (f,)) for i, f in enumerate((1, NAN, NAN, 1, NAN, NAN, NAN))] == [0, 1, 1, 0, 1, 1, 1]
    before = learner.state()
    assert [learner.step(i, (1,)) for i in range(3)] == [1, 1, 1]
    assert_same(learner.state(), before)


def test_skipped_steps_are_named_and_counted_and_the_log_leaves_them_out(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 3, 6)
        run_here(packed, out, *SHORT)
    lines, losses = metrics(out, "train"), [line["loss"] for line in trace(out)]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 2]
    assert [losses[i] == losses[i] for i in range(STEPS)] == [i not in (2, 5) for i in range(STEPS)]
    assert [lines[1]["loss"], lines[2]["loss"]] == pytest.approx([losses[3], losses[4]], rel=1e-6)
    assert metrics(out, "end")[0]["skipped_steps"] == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line[:27] for line in said] == ["warning: step 3 was skipped", "warning: step 6 was skipped"]
    keys = {f"{sample:06d}_numbers" for sample in trace(out)[2]["samples"]}
    assert set(said[0].partition("rank 0: ")[2].split(", ")) == keys
    document, tensors = read_checkpoint(out / f"checkpoint-{STEPS:06d}")
    assert document["skipped_steps"] == 2
    assert {tensor.item() for name, tensor in tensors.items() if name.startswith("step/")} == {STEPS - 2}


def test_too_many_in_a_row_stop_the_run_with_the_state_before_them(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in no step of the row, though it were its turn; then, with the cause gone, the run goes on."""
    settings = (*SHORT, "train.max_skipped_steps=1")
    run_here(packed, tmp_path / "whole", *settings)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 4, 5)
        with pytest.raises(
            ValueError, match=r"^3 steps in a row were skipped, .*max_skipped_steps = 1\); the state"
        ) as end:
            run_here(packed, out, *settings)
    assert "of step 3, is saved. Start anew with a lower optimizer.lr" in str(end.value)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000003"]
    run_here(packed, out, *settings, resume=True)
    name = f"checkpoint-{STEPS:06d}/state.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_runs_away_stops_and_says_what_to_change(packed: Path, tmp_path: Path) -> None:
    settings = (*SHORT, "optimizer.lr=1e30", "schedule.warmup_epochs=0", "train.max_skipped_steps=0")
    with pytest.raises(ValueError, match=r"skipped, .* of step 1, is saved\. .*ds\.gradient_clipping=1\.0"):
        run_here(packed, tmp_path / "run", *settings)
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-000001"


def test_all_ranks_skip_what_one_of_them_cannot_learn(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of rank 1 alone is NaN in step 4; the run of two ends where that of one does which skips it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    two = tmp_path / "two"
    with Together(tmp_path, arguments(packed, two, *SHORT), nan_at={1: 4}) as run:
        assert run.end() == [0, 0]
    (said,) = [line for line in run.said() if "skipped" in line]
    assert said.startswith("warning: step 4 was skipped: the loss is no finite number on rank 1: ")
    assert metrics(two, "end")[0]["skipped_steps"] == 1
    after = [[line["loss"] for line in trace(two, rank)] for rank in range(2)]
    assert [loss == loss for loss in after[1]] == [step != 3 for step in range(STEPS)]
    assert all(loss == loss for loss in after[0])
    with monkeypatch.context() as patch:
        poison(patch, 4)
        run_here(packed, tmp_path / "one", *SHORT)
    ones = [line["loss"] for line in trace(tmp_path / "one")]
    for step in (4, 5, 9):
        assert (after[0][step] + after[1][step]) / 2 == pytest.approx(ones[step], rel=1e-4)
    assert json.loads((two / "checkpoint-000010" / "state.json").read_text())["skipped_steps"] == 1
