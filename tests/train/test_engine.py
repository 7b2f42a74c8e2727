"""DeepSpeed as we use it: exact float32 masters, plain AdamW, and what happens without a compiler."""

from __future__ import annotations

import copy
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.geometry import ViTGeometry
from model.methods import METHODS
from model.methods.aim import AIMOptions
from pipelines.plan import Turn, draw_masks
from tests.train.runs import FP32, metrics, run_here, trace
from train import engine as engine_module
from train.build import build_model
from train.config import Batch, ModelConfig, OptimizerConfig
from train.engine import Engine, start_world

ACCUMULATION = 2
SETTINGS = OptimizerConfig(lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("clipping", [0.0, 0.05])
def test_masters_and_adam_state_are_those_of_plain_adamw(precision: str, clipping: float) -> None:
    """Bit for bit from the first step: no rounded masters, no step before training, float32 gradients."""
    model = build_model(
        ModelConfig(name="tiny-clip", pretrained="none", options=AIMOptions(drop_path=0.0, head_dropout=0.0)),
        num_classes=3,
        num_frames=2,
        seed=0,
    )
    bf16 = precision == "bfloat16"
    if bf16:
        model.set_compute_dtype(torch.bfloat16)
    reference = copy.deepcopy(model)
    plain = torch.optim.AdamW(reference.optimizer_groups(SETTINGS.weight_decay), lr=1.0, eps=SETTINGS.eps)
    document = {
        "train_batch_size": 4,
        "gradient_clipping": clipping,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "zero_optimization": {"stage": 0},
    }
    engine = Engine(start_world(), model, SETTINGS, document, Batch(total=4, micro=2, accumulation=ACCUMULATION))
    assert type(engine.optimizer) is torch.optim.AdamW and not engine.optimizer.state
    assert_equal_parameters(model, reference)

    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        lr = 1e-3 * (step + 1)
        for _ in range(ACCUMULATION):
            frames = torch.randint(0, 256, (2, 2, 48, 48, 3), dtype=torch.uint8, generator=generator)
            labels = torch.randint(0, 3, (2,), generator=generator)
            engine.backward(F.cross_entropy(engine(frames, {}), labels))
            engine.update(lr)
            (F.cross_entropy(reference(frames), labels) / ACCUMULATION).backward()
        gradients = [p.grad for p in reference.parameters() if p.grad is not None]
        assert {g.dtype for g in gradients} == {torch.float32}
        if clipping:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), clipping)
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        plain.zero_grad()
        assert_equal_parameters(model, reference, 1e-5 if clipping else 0.0)
        # Each step is compared by itself: now and then a difference of 1e-9 turns a weight to the next bfloat16.
        reference.load_state_dict(model.state_dict())
        states = zip(engine.optimizer.state.values(), plain.state.values(), strict=True)
        for ours, theirs in states:
            assert ours["step"].item() == theirs["step"].item() == step + 1
            for name in ("exp_avg", "exp_avg_sq"):
                assert ours[name].dtype == torch.float32
                assert clipping or torch.equal(ours[name], theirs[name])
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32} and frozen == {torch.bfloat16 if bf16 else torch.float32}


def assert_equal_parameters(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 0.0) -> None:
    """A tolerance is for clipping: DeepSpeed's sums the norm in another order."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)


def test_the_backbone_may_learn_more_slowly_than_the_head() -> None:
    """The first step of AdamW moves every weight by its learning rate, whatever the gradient."""
    model = build_model(ModelConfig(name="tiny-clip", pretrained="none"), num_classes=3, num_frames=2, seed=0)
    settings = OptimizerConfig(weight_decay=0.0, backbone_lr=0.1)
    document = {"train_batch_size": 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    engine = Engine(start_world(), model, settings, document, Batch(total=2, micro=2, accumulation=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frames = torch.randint(0, 256, (2, 2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    engine.backward(F.cross_entropy(engine(frames, {}), torch.tensor([0, 2])))
    engine.update(1e-3)
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if p.requires_grad}
    assert moved["cls_head.fc_cls.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["backbone.ln_post.weight"] == pytest.approx(1e-4, rel=1e-2)
    assert moved["backbone.temporal_embedding"] == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if ViTGeometry in entry.models])
def test_every_method_takes_a_step_in_bfloat16_and_leaves_what_is_frozen(method: str) -> None:
    config = ModelConfig(method=method, name="tiny-clip", pretrained="none")
    model = build_model(config, num_classes=3, num_frames=2, seed=0)
    model.set_compute_dtype(torch.bfloat16)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    head = model.cls_head.fc_cls.weight.detach().clone()
    document = {"train_batch_size": 2, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    engine = Engine(start_world(), model, SETTINGS, document, Batch(total=2, micro=2, accumulation=1))
    drawn = draw_masks(0, [Turn(0, 0), Turn(1, 0)], {name: p.numpy() for name, p in model.random_masks.items()})
    frames = torch.randint(0, 256, (2, 2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(engine(frames, {n: torch.from_numpy(m) for n, m in drawn.items()}), torch.tensor([0, 2]))
    engine.backward(loss)
    engine.update(1e-3)
    assert loss.isfinite() and not torch.equal(model.cls_head.fc_cls.weight, head)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_threads_are_the_users_where_set() -> None:
    start_world()
    assert torch.get_num_threads() == 1


def test_threads_share_the_cores_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert start_world().local_size == 2
    assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)


def test_without_compiler_and_operator_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no C\+\+ compiler .* apt-get install g\+\+, then make setup"):
        start_world()


def test_with_broken_compiler_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.comm.torch import build_shm_op  # noqa: F401  # imported before PATH is emptied
    from deepspeed.ops.op_builder.builder import OpBuilder

    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    with pytest.raises(ValueError, match="cannot build its operator for CPU communication") as failure:
        start_world()
    assert "\n" not in str(failure.value)
    assert "about a minute" in capfd.readouterr().err


def test_build_that_was_cut_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.cpp_extension as extension

    monkeypatch.setattr(extension, "_get_build_directory", lambda *_: str(tmp_path))
    lock = tmp_path / "lock"
    lock.touch()
    old = time.time() - 2 * engine_module.STALE_BUILD_SECONDS
    os.utime(lock, (old, old))
    with pytest.raises(ValueError, match="was cut off; delete"):
        start_world()


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [('speed.compile="on"', 1e-4), ("speed.checkpoint_blocks=-1", 0.0)],
    ids=["compiled", "computed twice"],
)
def test_a_run_learns_the_same_however_its_steps_are_computed(
    packed: Path, tmp_path: Path, setting: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DeepSpeed, evaluations included; of the compiler all but the making of kernels."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = (FP32, "schedule.epochs=2", "train.eval_every=1")
    run_here(packed, tmp_path / "plain", *settings)
    run_here(packed, tmp_path / "other", *settings, setting)
    losses = [[entry["loss"] for entry in trace(tmp_path / name)] for name in ("plain", "other")]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance, abs=0)
    tops = [[line["loss"] for line in metrics(tmp_path / name, "eval")] for name in ("plain", "other")]
    assert tops[1] == pytest.approx(tops[0], rel=10 * tolerance, abs=0)
