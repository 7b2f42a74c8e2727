"""Training on CUDA: the host does not wait for the device, runs resume to the last bit, answers are the CPU's."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from pipelines.loader import ClipBatch, ClipLoader
from pipelines.plan import Order, plan_mix, train_turns
from tests.sets import make_set
from tests.shell import shell_environment
from tests.train.runs import ROOT, arguments, metrics, run_here, trace
from train.engine import start_world
from train.resolve import load_config, resolve_batch
from train.start import Prepared, prepare
from train.step import Step

WARM_UP, WATCHED = 4, 6  # steps
PLAIN = ("train.label_smoothing=0.1",)
AUGMENTED = (
    *("data.color_jitter=[0.4, 0.4, 0.4, 0.1]", "data.grayscale=0.2"),
    *("data.random_erasing=0.5", "data.mixup_alpha=0.8", "data.cutmix_alpha=1.0"),
)


def prepare_run(packed: Path, out: Path, *settings: str) -> Prepared:
    """What `train.main` makes of a command line, before it joins the world."""
    given = [value for key, value in itertools.pairwise(arguments(packed, out, *settings)) if key == "--set"]
    config = load_config("demo", given)
    return prepare(config, resolve_batch(config.deepspeed, 1, in_pairs=config.data.mixes), resume=False)


def fetch(prepared: Prepared, count: int) -> list[ClipBatch]:
    """The first micro-batches of the plan, decoded on the CPU, each with memory of its own."""
    config, batch = prepared.config, prepared.batch
    turns = train_turns(
        Order([shard.samples for shard in prepared.shards.shards], config.train.seed),
        **{"global_batch": batch.total, "micro_batch": batch.micro, "rank": 0, "world": 1},
        start_step=0,
        num_steps=count,
    )
    size = prepared.model.geometry.image_size
    with ClipLoader(prepared.shards, turns, micro_batch=batch.micro, size=size, options=config.data) as loader:
        return [replace(clips, frames=clips.frames.clone()) for clips in itertools.islice(loader, count)]


class NoValues(TorchFunctionMode):
    """Nobody may ask a tensor for its value or bring numbers to the device and wait: on a CPU that costs nothing, and
    would go unnoticed."""

    ASKING = frozenset(
        getattr(torch.Tensor, name)
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in self.ASKING, f"{func.__name__} of a tensor {list(args[0].shape)}"
        brings = func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        assert not brings, f"numbers of the host: {args[0]}"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An error where the host waits for the device."""
    if device.type == "cpu":
        with NoValues():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


ON_CUDA = pytest.mark.gpu


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (PLAIN, "cpu"),
        (AUGMENTED, "cpu"),
        pytest.param(PLAIN, "cuda", marks=ON_CUDA),
        pytest.param((*AUGMENTED, "data.rand_augment=[4, 7]"), "cuda", marks=ON_CUDA),
    ],
)
def test_steps_that_do_not_log_never_wait_for_the_device(
    packed: Path, tmp_path: Path, settings: tuple[str, ...], where: str
) -> None:
    """With DropPath, head dropout and two micro-batches a step; on CUDA compiled, as by default, and with RandAugment,
    whose numbers torchvision brings to the device (on a CPU they are there). Without gradient clipping, for which
    DeepSpeed waits."""
    if where == "cpu" and torch.cuda.is_available():
        pytest.skip("a run takes the GPU where there is one")
    prepared = prepare_run(packed, tmp_path / "run", *settings, "ds.train_micro_batch_size_per_gpu=4")
    batches = fetch(prepared, WARM_UP + WATCHED)
    world = start_world()
    engine = prepared.start_engine(world)
    for group in engine.optimizer.param_groups:
        group["fused"] = True  # as on CUDA anyway; the other one looks at its count of steps
    engine.optimizer._optimizer_step_pre_hooks.clear()  # how a step is skipped on the CPU alone
    parts = Step(prepared.config, prepared.model, engine, prepared.shards, world.device)
    losses = torch.zeros(len(batches), device=world.device)

    def learn(first: int, last: int) -> None:
        for number in range(first, last):
            mix = plan_mix(prepared.config.train.seed, number // 2, prepared.config.data)
            micro_batch = parts.to_device(batches[number])
            parts.augment(micro_batch, mix)
            loss = parts.loss(micro_batch)
            engine.backward(loss)
            engine.update(1e-3)
            losses[number] += loss.detach()

    learn(0, WARM_UP)
    with no_waiting(world.device):
        learn(WARM_UP, len(batches))
    assert losses.isfinite().all() and (losses > 0).all()


@pytest.fixture(scope="session")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in what their frames show: long videos come to numbers that short ones have not."""
    folder = tmp_path_factory.mktemp("readable") / "set"
    return make_set(folder, [6, 60] * 12, classes=2, splits=("train", "val"))


LEARNING = (
    *("model.drop_path=0", "model.head_dropout=0", "schedule.epochs=10", "schedule.warmup_epochs=1"),
    *("train.log_every=5", "train.keep=9", "optimizer.lr=1e-2"),
)


@pytest.mark.gpu
def test_a_run_on_cuda_learns_and_resumes_to_the_last_bit(readable: Path, tmp_path: Path) -> None:
    """Cut off in its middle, all steps and weights that follow are the same."""
    out = tmp_path / "run"
    run_here(readable, out, *LEARNING)
    losses = [line["loss"] for line in trace(out)]
    assert len(losses) == 30 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5]), losses
    whole = load_file(out / "checkpoint-000030" / "state.safetensors")
    for step in (18, 24, 30):
        shutil.rmtree(out / f"checkpoint-{step:06d}")
    run_here(readable, out, *LEARNING, resume=True)
    assert [line["loss"] for line in trace(out)[30:]] == losses[12:]
    again = load_file(out / "checkpoint-000030" / "state.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.gpu
def test_what_learned_on_cuda_answers_alike_on_the_cpu(readable: Path, tmp_path: Path) -> None:
    """Logits within bfloat16's rounding and nvJPEG's, which is not libjpeg's."""
    run, out = tmp_path / "run", tmp_path / "on_cpu"
    run_here(readable, run, *LEARNING)
    command = [sys.executable, "tools/evaluate.py", str(run), "--out", str(out)]
    hidden = shell_environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(run / "predictions.npz") as here, np.load(out / "predictions.npz") as there:
        assert here["keys"].tolist() == there["keys"].tolist() and here["valid"].all() and there["valid"].all()
        largest = np.abs(there["logits"]).max()
        assert np.abs(here["logits"] - there["logits"]).max() < 0.05 * largest
        assert (here["logits"].argmax(1) == there["logits"].argmax(1)).mean() > 0.95
    assert metrics(run, "eval")[-1]["top1"] > 0.9
