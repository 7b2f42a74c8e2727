"""The loader: right frames in every profile, same batches however many workers, and what happens when things break."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import loader as loader_module
from pipelines.loader import ClipLoader
from pipelines.plan import EVAL_EPOCH, ClipOptions, Order, Turn, eval_turns, train_turns
from pipelines.read import ShardReader
from pipelines.shards import ShardSet
from tests.sets import open_set
from tests.videos import read_number

OPTIONS = ClipOptions(num_frames=4, sampling="uniform", eval_crop=1.0, crop_scale=(0.5, 1.0))


def evaluate(shards: ShardSet, micro: int = 3, **settings: object) -> ClipLoader:
    turns = eval_turns(len(shards), micro_batch=micro, rank=0, world=1)
    arguments = {"micro_batch": micro, "size": 48, "options": OPTIONS} | settings
    return ClipLoader(shards, turns, **arguments)  # type: ignore[arg-type]


def train(shards: ShardSet, steps: int, micro: int = 4, **settings: object) -> ClipLoader:
    turns = train_turns(
        Order(len(shards), 3), global_batch=micro, micro_batch=micro, rank=0, world=1, start_step=0, num_steps=steps
    )
    arguments = {"micro_batch": micro, "size": 48, "options": OPTIONS, "seed": 3} | settings
    return ClipLoader(shards, turns, **arguments)  # type: ignore[arg-type]


def copies(loader: ClipLoader) -> list[tuple[np.ndarray, list[int], tuple[Turn, ...]]]:
    with loader:
        return [(b.frames.numpy().copy(), b.labels.tolist(), b.turns) for b in loader]


@pytest.mark.parametrize("profile", ["jpeg", "h264", "copy"])
def test_frames_are_the_planned_ones(tmp_path: Path, profile: str) -> None:
    shards = open_set(tmp_path / "set", [30, 45, 3, 17, 64], profile=profile, size=(64, 64))
    seen = 0
    with evaluate(shards) as loader:
        for batch in loader:
            for row in torch.nonzero(batch.valid).flatten().tolist():
                plan = batch.plans[row]
                assert [read_number(f) for f in batch.frames[row].numpy()] == list(plan.frames)
                assert batch.labels[row] == plan.sample_id % 2 and batch.keys[row].startswith(f"{plan.sample_id:06d}")
                seen += 1
        assert loader.largest_shift == 0
    assert seen == 5 and not batch.valid[-1]


@pytest.mark.parametrize("profile", ["jpeg", "h264", "copy"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turned_videos_come_out_upright(tmp_path: Path, profile: str, rotation: int) -> None:
    """Square, so that the centre crop holds the whole number, which is readable upright only."""
    shards = open_set(tmp_path / "set", [9], profile=profile, size=(64, 64), rotation=rotation)
    with evaluate(shards, micro=1) as loader:
        batch = next(loader)
        assert not loader.bad
        assert [read_number(frame) for frame in batch.frames[0].numpy()] == list(batch.plans[0].frames)


def test_thinned_sets_give_the_nearest_stored_frames(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [45], fps="source/4", size=(64, 64))
    with evaluate(shards, micro=1) as loader:
        batch = next(loader)
        numbers = [read_number(f) for f in batch.frames[0].numpy()]
        assert numbers == [int(shards[0].frames.source_frame[i]) for i in batch.plans[0].stored]
        assert loader.largest_shift == max(abs(a - b) for a, b in zip(numbers, batch.plans[0].frames, strict=True)) > 0


def test_crops_and_flips_are_the_planned_ones(tmp_path: Path) -> None:
    """DALI's decode, crop, resize and flip against PIL's on the same JPEGs."""
    shards = open_set(tmp_path / "set", [20] * 6, size=(120, 90))
    reader = ShardReader()
    flips = set()
    with train(shards, steps=4) as loader:
        for batch in loader:
            for row, plan in enumerate(batch.plans):
                flips.add(plan.flip)
                left, top, width, height = plan.box
                for frame, stored in zip(batch.frames[row].numpy(), plan.stored, strict=True):
                    image = Image.open(io.BytesIO(reader.frames(shards[plan.sample_id], [stored])[0]))
                    crop = image.crop((left, top, left + width, top + height))
                    expected = np.asarray(crop.resize((48, 48), Image.Resampling.BILINEAR), np.int16)
                    expected = expected[:, ::-1] if plan.flip else expected
                    assert np.abs(frame - expected).mean() < 1.0 and np.abs(frame - expected).max() < 16
    assert flips == {False, True}


@pytest.mark.parametrize("profile", ["jpeg", "h264"])
def test_batches_do_not_depend_on_workers_or_prefetch(tmp_path: Path, profile: str) -> None:
    shards = open_set(tmp_path / "set", [20, 30, 25, 40, 33], profile=profile)
    one = copies(train(shards, steps=5, workers=1, prefetch=1))
    many = copies(train(shards, steps=5, workers=3, prefetch=4))
    assert len(one) == 5
    for (frames, labels, turns), (frames2, labels2, turns2) in zip(one, many, strict=True):
        assert (labels, turns) == (labels2, turns2) and np.array_equal(frames, frames2)


def flip_byte(shards: ShardSet, sample_id: int, frame: int = 0) -> None:
    sample = shards[sample_id]
    with sample.shard.open("r+b") as file:
        position = sample.video_offset + int(sample.frames.offset[frame]) + 40
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_a_damaged_sample_is_named_and_replaced_in_training(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [8] * 6)
    for frame in range(8):
        flip_byte(shards, 2, frame)
    runs = []
    for workers in (1, 2):
        with train(shards, steps=9, workers=workers) as loader:
            runs.append([(b.frames.numpy().copy(), b.turns, bool(b.valid.all())) for b in loader])
            assert set(loader.bad) == {2} and "checksum" in loader.bad[2]
    for (frames, turns, valid), (frames2, turns2, _) in zip(*runs, strict=True):
        assert valid and turns == turns2 and np.array_equal(frames, frames2)
        assert all(turn.sample_id != 2 for turn in turns)
    order = Order(6, 3)
    planned = [order.turn(p) for p in range(36)]
    delivered = [turn for _, turns, _ in runs[0] for turn in turns]
    assert [p == d for p, d in zip(planned, delivered, strict=True)] == [p.sample_id != 2 for p in planned]


def test_a_damaged_sample_is_struck_out_in_evaluation(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [8] * 5)
    for frame in range(8):
        flip_byte(shards, 1, frame)
    with evaluate(shards, micro=5) as loader:
        assert next(loader).valid.tolist() == [True, False, True, True, True]


def test_too_many_damaged_samples_stop_the_run(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [8] * 6)
    for frame in range(8):
        flip_byte(shards, 2, frame)
    with (
        pytest.raises(ValueError, match=r"1 of 2\d\d samples .* \(first: 000002_numbers\), more than data.max_bad"),
        train(shards, steps=60, max_bad_fraction=0.001) as loader,
    ):
        loader._planned = 190  # as if 190 good samples had gone before
        for _ in loader:
            pass


def test_a_killed_worker_is_replaced_and_the_batch_keeps_its_content(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [20, 30, 25, 40])
    calm = copies(train(shards, steps=8))
    with train(shards, steps=8) as loader:
        for step, batch in enumerate(loader):
            assert np.array_equal(batch.frames.numpy(), calm[step][0])
            if step in (1, 4):
                os.kill(loader._decoder._workers[0]._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    assert step == 7 and not loader.bad


def test_a_hanging_worker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_set(tmp_path / "set", [20, 30, 25, 40])
    calm = copies(train(shards, steps=6))
    with train(shards, steps=6) as loader:
        next(loader)
        monkeypatch.setattr(loader_module, "HANG_SECONDS", 2.0)
        os.kill(loader._decoder._workers[0]._process.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        rest = [batch.frames.numpy().copy() for batch in loader]
    assert all(np.array_equal(a, b[0]) for a, b in zip(rest, calm[1:], strict=True)) and not loader.bad


def test_a_clip_that_kills_its_decoder_twice_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The poison is planted in the worker's source: a plan for sample 1 makes the process end at once."""
    shards = open_set(tmp_path / "set", [8] * 5)
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'pipelines.worker' in sys.orig_argv:\n"
        "    from pipelines.decode import ClipDecoder\n"
        "    real = ClipDecoder.decode_into\n"
        "    def decode_into(self, plans, rows):\n"
        "        if any(plan.sample_id == 1 for plan in plans):\n"
        "            os._exit(9)\n"
        "        return real(self, plans, rows)\n"
        "    ClipDecoder.decode_into = decode_into\n"
    )
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'poison'}:{root}")
    turns = [[Turn(0, EVAL_EPOCH), None, None, None, None], [Turn(i, EVAL_EPOCH) for i in range(5)]]
    with ClipLoader(shards, turns, micro_batch=5, size=48, options=OPTIONS) as loader:
        next(loader)
        batch = next(loader)
        assert batch.valid.tolist() == [True, False, True, True, True]
        assert "died (status 9)" in loader.bad[1]


def test_waiting_is_measured(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [8] * 4)
    with train(shards, steps=12, prefetch=4) as loader:
        next(loader)
        started = loader.wait_seconds
        assert started > 0.1  # the worker had to start
        for _ in range(10):
            time.sleep(0.1)  # a slow trainer: the loader is always ahead
            next(loader)
        assert loader.wait_seconds - started < 0.3


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    shards = open_set(tmp_path / "set", [8])
    with pytest.raises(ValueError, match=r"data.prefetch = 9; allowed is 1 to 4"):
        train(shards, steps=1, prefetch=9)
    with pytest.raises(ValueError, match=r"data.workers = 0"):
        train(shards, steps=1, workers=0)


def test_what_decodes_is_said(tmp_path: Path) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    jpeg = open_set(tmp_path / "jpeg", [4])
    h264 = open_set(tmp_path / "h264", [4], profile="h264")
    assert loader_module.describe_decoding(jpeg, cpu, 1) == "DALI on the CPU in 1 worker process a rank"
    assert loader_module.describe_decoding(jpeg, cuda, 8) == "DALI on the GPU"
    assert (
        loader_module.describe_decoding(h264, cuda, 8) == "FFmpeg, then DALI, on the CPU in 8 worker processes a rank"
    )


@pytest.mark.gpu
def test_gpu_batches_equal_cpu_batches(tmp_path: Path) -> None:
    """Same clips in the same rows; nvJPEG rounds otherwise than libjpeg."""
    shards = open_set(tmp_path / "set", [20, 30, 25, 40])
    on_cpu = copies(train(shards, steps=6))
    with train(shards, steps=6, device="cuda") as loader:
        for batch, (frames, labels, turns) in zip(loader, on_cpu, strict=True):
            assert batch.frames.is_cuda and (batch.labels.tolist(), batch.turns) == (labels, turns)
            difference = np.abs(batch.frames.cpu().numpy().astype(np.int16) - frames)
            assert difference.mean() < 1.0 and difference.max() < 24
