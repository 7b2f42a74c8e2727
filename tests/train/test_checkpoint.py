"""Checkpoints: resume to the last bit, also after a kill, and refusal of everything that would not be the same run."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.sets import make_set
from tests.train.runs import FP32, SCRIPT, arguments, metrics, run_here, start, trace
from train.checkpoint import newest_checkpoint, read_checkpoint

SAVING = ("train.checkpoint_every=2", "train.keep=9", "train.log_every=2", "schedule.epochs=4", "optimizer.lr=0.003")
STEPS = 13  # ceil(4 · 26 / 8): step 4 is in the middle of the second epoch


@pytest.fixture(scope="module")
def finished(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run in each precision."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        import torch

        torch.set_num_threads(1)
        run_here(packed, folder / "fp32", *SAVING, FP32)
        run_here(packed, folder / "bf16", *SAVING)
    return {"fp32": folder / "fp32", "bf16": folder / "bf16"}


def cut_back(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when it had just saved `step`."""
    shutil.copytree(run, to)
    for checkpoint in to.glob("checkpoint-*"):
        if int(checkpoint.name[-6:]) > step:
            shutil.rmtree(checkpoint)
    return to


def assert_same_end(run: Path, reference: Path, from_step: int) -> None:
    """Same losses, samples, frames, crops and flips after `from_step`, same weights and optimizer state at the end."""
    after: list[dict[str, Any]] = [line for line in trace(reference) if line["step"] > from_step]
    assert trace(run)[-len(after) :] == after
    name = f"checkpoint-{STEPS:06d}/state.safetensors"
    assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert metrics(run, "eval") == metrics(reference, "eval")
    steps = [line["step"] for line in metrics(run, "train")]
    assert steps == sorted(set(steps)), "lines of steps that were repeated are gone"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_in_the_middle_of_an_epoch_is_exact(
    packed: Path, tmp_path: Path, finished: dict[str, Path], precision: str
) -> None:
    out = cut_back(finished[precision], tmp_path / "run", 4)
    (out / ".checkpoint-000099.part").mkdir()  # of a process killed while it saved
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    run_here(packed, out, *SAVING, *[FP32] * (precision == "fp32"), resume=True)
    assert_same_end(out, finished[precision], 4)
    assert not list(out.glob(".checkpoint*"))
    assert json.loads((out / "run.json").read_text())["resumed_from_step"] == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_that_was_killed_continues_exactly(
    packed: Path, tmp_path: Path, finished: dict[str, Path], precision: str
) -> None:
    out = tmp_path / "run"
    settings = [*SAVING, *[FP32] * (precision == "fp32")]
    process = start(sys.executable, SCRIPT, *arguments(packed, out, *settings))
    deadline = time.monotonic() + 120
    while not (out / "trace-0.jsonl").exists() or len((out / "trace-0.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen = len((out / "trace-0.jsonl").read_text().splitlines())
    assert newest_checkpoint(out) is not None and 4 < seen < STEPS
    with (out / "trace-0.jsonl").open("a") as file:  # a line that the kill may have cut
        file.write("" if (out / "trace-0.jsonl").read_text().endswith("\n") else "\n")
    saved = int(newest_checkpoint(out).name[-6:])  # type: ignore[union-attr]
    run_here(packed, out, *settings, resume=True)
    assert_same_end(out, finished[precision], saved)


def test_stores_what_trains_and_nothing_else(finished: dict[str, Path]) -> None:
    folder = finished["bf16"] / f"checkpoint-{STEPS:06d}"
    tensors = load_file(folder / "state.safetensors")
    document = json.loads((folder / "state.json").read_text())
    assert {name.split("/", 1)[0] for name in tensors} == {"weights", "exp_avg", "exp_avg_sq", "step"}
    assert {str(array.dtype) for array in tensors.values()} == {"float32"}
    assert all(tensors[f"step/{name}"] == STEPS for name in document["parameters"])
    assert not any("attn" in name or "conv1" in name for name in tensors)
    assert (document["step"], document["samples_seen"]) == (STEPS, STEPS * 8)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.num_frames=8", "data.num_frames is 8 now and was 4"),
        ("train.seed=1", "train.seed is 1 now and was 0"),
        ("data.shuffle_shards=2", "data.shuffle_shards is 2 now and was 0"),
        ("ds.train_batch_size=16", "ds.train_batch_size is 16 now and was 8"),
        ("schedule.epochs=5", "schedule.epochs is 5.0 now and was 4.0"),
        ("optimizer.lr=1", "optimizer.lr is 1.0 now and was 0.003"),
        ('model.adapters=["spatial"]', "model.adapters is"),
        ("model.positions=top 1", 'model.positions is "top 1" now and was "all"'),
        ("model.normalisation=imagenet", 'model.normalisation is "imagenet" now and was ""'),
        ("data.fraction=0.5", "data.fraction is 0.5 now and was 1.0"),
        ("optimizer.backbone_lr=0.1", "optimizer.backbone_lr is 0.1 now and was 1.0"),
        ("schedule.cosine=epoch", 'schedule.cosine is "epoch" now and was "step"'),
        (FP32, "ds.torch_autocast is"),
    ],
)
def test_resume_refuses_another_run(
    packed: Path, tmp_path: Path, finished: dict[str, Path], setting: str, said: str
) -> None:
    out = cut_back(finished["bf16"], tmp_path / "run", 4)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match="cannot resume from") as failure:
        run_here(packed, out, *SAVING, setting, resume=True)
    assert said in str(failure.value)
    assert sorted(path.name for path in out.iterdir()) == before


def test_resume_refuses_other_data_and_another_backbone(
    tmp_path: Path, finished: dict[str, Path], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cut_back(finished["bf16"], tmp_path / "run", 4)
    other = make_set(tmp_path / "set", [12, 20], classes=3, splits=("train", "val"))
    with pytest.raises(ValueError, match=r"fingerprint of data\.shards is"):
        run_here(other, out, *SAVING, resume=True)
    monkeypatch.setattr("train.start.backbone_checksum", lambda model: "another")
    with pytest.raises(ValueError, match='checksum of the frozen weights is "another" now'):
        run_here(packed, out, *SAVING, resume=True)


def damage_tensor(folder: Path) -> None:
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.safetensors").write_bytes(data)


def truncate_tensors(folder: Path) -> None:
    data = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(data[: len(data) // 2])


def truncate_state(folder: Path) -> None:
    (folder / "state.json").write_text((folder / "state.json").read_text()[:40])


def empty_state(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def remove_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_tensor, truncate_tensors, truncate_state, empty_state, remove_tensors])
def test_damaged_checkpoint_is_named(packed: Path, tmp_path: Path, finished: dict[str, Path], damage: Any) -> None:
    out = cut_back(finished["bf16"], tmp_path / "run", 4)
    damage(out / "checkpoint-000004")
    with pytest.raises((ValueError, OSError)) as failure:
        run_here(packed, out, *SAVING, resume=True)
    assert "checkpoint-000004" in str(failure.value)


def without(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda document: json.dumps({key: value for key, value in document.items() if key != name})


@pytest.mark.parametrize(
    ("write", "tensors"),
    [
        (without("config"), None),
        (without("step"), None),
        (lambda document: "[" * 100_000, None),
        (lambda document: json.dumps(document | {"tensors_sha256": sha256(b"no tensors").hexdigest()}), b"no tensors"),
    ],
    ids=["no config", "no step", "nested", "no tensors"],
)
def test_a_strangers_checkpoint_ends_in_one_line(
    write: Callable[[dict[str, Any]], str], tensors: bytes | None, tmp_path: Path, finished: dict[str, Path]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(finished["fp32"] / f"checkpoint-{STEPS:06d}", checkpoint)
    document = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(write(document))
    if tensors is not None:
        (checkpoint / "state.safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match=r"is damaged|holds no tensors"):
        read_checkpoint(checkpoint)


def test_resume_without_checkpoint_starts_fresh_and_says_so(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(packed, tmp_path / "run", "schedule.epochs=0.5", "schedule.warmup_epochs=0", resume=True)
    assert "no checkpoint in" in capsys.readouterr().out
    before = metrics(tmp_path / "run", "train")
    run_here(packed, tmp_path / "run", "schedule.epochs=0.5", "schedule.warmup_epochs=0", resume=True)
    assert metrics(tmp_path / "run", "train") == before, "a finished run is only evaluated again"


def test_resume_without_checkpoint_refuses_another_run(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was stopped before it saved anything."""
    out, settings = tmp_path / "run", ("schedule.epochs=0.5", "schedule.warmup_epochs=0", 'data.val_split=""')
    run_here(packed, out, *settings)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = (out / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"cannot resume from .*run: optimizer\.lr is 1\.0 now .* another run\.out"):
        run_here(packed, out, *settings, "optimizer.lr=1", resume=True)
    assert (out / "run.json").read_bytes() == before
    run_here(packed, out, *settings, resume=True)
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_full_disk_is_named_and_leaves_no_half_checkpoint(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.checkpoint._write", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-000002: No space left on device; make room"):
        run_here(packed, tmp_path / "run", *SAVING)
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]
