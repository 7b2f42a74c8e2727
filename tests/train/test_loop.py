"""The loop: the same batches and losses however a run is shared out, the clock, the logs, and a loss that runs away."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.shards import EncodedVideo, FrameTable, ShardSet, ShardWriter, checksum, write_manifest
from pipelines.subset import choose_fraction
from tests.sets import make_set
from tests.train.runs import FP32, launch, launch_machines, metrics, run_here, trace
from train.checkpoint import identity
from train.clock import WARMUP_STEPS
from train.config import Batch
from train.evaluate import evaluate
from train.resolve import load_config
from train.start import _smaller_batch

STEPS = 20
LONG = (FP32, "schedule.epochs=6", "train.log_every=1", "optimizer.lr=1e-3")


def global_batches(out: Path, world: int) -> list[dict[str, Any]]:
    """Step by step, what all ranks saw together, in order, and their mean loss."""
    steps = []
    for step in range(1, STEPS + 1):
        lines = [line for rank in range(world) for line in trace(out, rank) if line["step"] == step]
        keys = ("samples", "epochs", "frames", "boxes", "flips")
        seen = {key: list(itertools.chain.from_iterable(line[key] for line in lines)) for key in keys}
        steps.append(seen | {"loss": sum(line["loss"] for line in lines) / len(lines)})
    return steps


def test_batches_and_losses_do_not_depend_on_how_a_run_is_shared(packed: Path, tmp_path: Path) -> None:
    """One process, two, and two machines of one with accumulation; DropPath and head dropout on. The steps straddle
    epochs."""
    two, four = tmp_path / "two", tmp_path / "four"
    runs = [launch(2, packed, two, *LONG)]
    runs += launch_machines(packed, four, *LONG, "ds.train_micro_batch_size_per_gpu=2")
    run_here(packed, tmp_path / "one", *LONG)
    said = []
    for run in runs:
        output, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
        assert "Traceback" not in errors and "Warning" not in errors, errors
        said.append(output.count("top-1"))
    assert said == [1, 1, 0], "rank 0 alone speaks"
    one = global_batches(tmp_path / "one", 1)
    assert {epoch for step in one for epoch in step["epochs"]} == set(range(7))
    for other in (two, four):
        for step, theirs in zip(one, global_batches(other, 2), strict=True):
            assert {k: v for k, v in step.items() if k != "loss"} == {k: v for k, v in theirs.items() if k != "loss"}
            assert theirs["loss"] == pytest.approx(step["loss"], rel=1e-5)
        logged = [line["loss"] for line in metrics(other, "train")]
        assert logged == pytest.approx([step["loss"] for step in one], rel=1e-5)
        evaluated = [metrics(out, "eval")[-1] for out in (tmp_path / "one", other)]
        assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], rel=1e-4)
        assert evaluated[0]["samples"] == evaluated[1]["samples"] == 26
    assert len(trace(four, 0)) == 2 * len(trace(two, 0)) == 2 * STEPS


AUGMENTED = (
    *("data.color_jitter=[0.4, 0.4, 0.4, 0.1]", "data.grayscale=0.2", "data.rand_augment=[2, 9]"),
    *("data.random_erasing=0.25", "data.mixup_alpha=0.8", "data.cutmix_alpha=1.0"),
)


def test_augmented_batches_and_losses_do_not_depend_on_the_micro_batch(packed: Path, tmp_path: Path) -> None:
    """Labels are mixed too: the losses would tell."""
    settings = (FP32, "schedule.epochs=2", "train.label_smoothing=0.1", 'data.val_split=""', *AUGMENTED)
    seen = []
    for micro in (8, 2):
        out = tmp_path / str(micro)
        run_here(packed, out, *settings, f"ds.train_micro_batch_size_per_gpu={micro}")
        lines = trace(out)
        steps = [[line for line in lines if line["step"] == step] for step in range(1, 8)]
        assert all(len(step) == 8 // micro and all(line["mix"] == step[0]["mix"] for line in step) for step in steps)
        keys = ("samples", "frames", "boxes", "flips", "ops", "erased")
        batches = [[list(itertools.chain(*(line[key] for line in step))) for key in keys] for step in steps]
        losses = [sum(line["loss"] for line in step) / len(step) for step in steps]
        seen.append(([step[0]["mix"] for step in steps], batches, losses))
    (mixes, batches, losses), (mixes2, batches2, losses2) = seen
    assert (mixes, batches) == (mixes2, batches2) and losses == pytest.approx(losses2, rel=1e-4)
    assert {mix[1] is None for mix in mixes} == {True, False}, "both mixup and cutmix came up"
    assert any(batch[4][0] for batch in batches) and any(any(batch[5]) for batch in batches)


def test_run_on_a_set_with_several_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixed too; evaluated on one view while it trains, on all views at its end."""
    folder = make_set(tmp_path / "set", [8, 9] * 6, classes=3, splits=("train", "val"), multi_label=True)
    with pytest.raises(ValueError, match=r"train.label_smoothing = 0.1; allowed is 0: the videos of .* several labels"):
        run_here(folder, tmp_path / "run", "train.label_smoothing=0.1")
    assert not (tmp_path / "run").exists()
    views = []

    def watched(*arguments: Any, **options: Any) -> Any:
        views.append(options["loader_options"]["options"].num_views)
        return evaluate(*arguments, **options)

    monkeypatch.setattr("train.loop.evaluate", watched)
    settings = ("data.test_clips=2", "data.test_crops=3", "train.eval_every=1", "schedule.epochs=3")
    run_here(folder, tmp_path / "run", *settings, *AUGMENTED)
    assert views == [1, 1, 6]
    last = metrics(tmp_path / "run", "eval")[-1]
    assert 0 < last["mean_average_precision"] <= 1 and last["samples"] == 12 and "top5" not in last
    assert 0.3 < trace(tmp_path / "run")[0]["loss"] < 1.5, "of 3 classes, each learned as yes or no"
    assert "mAP" in capsys.readouterr().out
    with np.load(tmp_path / "run" / "predictions.npz") as file:
        assert file["labels"].shape == (12, 3) and file["labels"][1].tolist() == [1, 1, 0]


def test_a_fraction_of_the_training_split_is_learned_from_and_all_of_the_other_evaluated(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of 9, 9 and 8 samples are 3 each: 9 samples, 3 epochs, steps of 8. Cut off and taken up, it goes on."""
    out, settings = tmp_path / "run", ("data.fraction=0.334", "data.fraction_seed=5", "train.keep=9")
    kept = choose_fraction(ShardSet.open(packed, "train"), 0.334, 5)
    assert kept is not None and sorted(i % 3 for i in kept.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    run_here(packed, out, FP32, *settings)
    said = capsys.readouterr().out
    assert "9 of 26 samples (data.fraction = 0.334, data.fraction_seed = 5), 3 classes; 4 steps of 8 clips" in said
    facts = json.loads((out / "run.json").read_text())
    assert facts["samples"] == 9 and facts["config"]["data"]["fraction_seed"] == 5
    seen = list(itertools.chain.from_iterable(line["samples"] for line in trace(out)))
    assert [sorted(seen[start : start + 9]) for start in (0, 9, 18)] == 3 * [kept.tolist()]
    assert metrics(out, "eval")[-1]["samples"] == 26
    assert metrics(out, "eval")[-1]["epoch"] == pytest.approx(32 / 9)
    for step in (3, 4):
        shutil.rmtree(out / f"checkpoint-{step:06d}")
    run_here(packed, out, FP32, *settings, resume=True)
    assert [line["loss"] for line in trace(out)[4:]] == [line["loss"] for line in trace(out)[2:4]]
    with pytest.raises(ValueError, match=r"data\.fraction_seed is 6 now and was 5"):
        run_here(packed, out, FP32, *settings, "data.fraction_seed=6", resume=True)


def test_which_part_of_a_set_is_all_of_it_is_free() -> None:
    configs = [load_config("demo", ["data.shards=x", f"data.fraction_seed={seed}"]) for seed in (0, 1)]
    assert len({json.dumps(identity(config, fingerprint="", backbone="")) for config in configs}) == 1


def test_how_a_run_is_tested_may_change_when_it_is_resumed() -> None:
    configs = [load_config("demo", ["data.shards=x", f"data.test_clips={clips}"]) for clips in (1, 3)]
    assert len({json.dumps(identity(config, fingerprint="", backbone="")) for config in configs}) == 1
    other = load_config("demo", ["data.shards=x", "data.random_erasing=0.25"])
    assert identity(other, fingerprint="", backbone="") != identity(configs[0], fingerprint="", backbone="")


def colour_set(folder: Path) -> Path:
    """12 still videos, red or blue: what a model with random frozen weights can learn."""
    folder.mkdir()
    writer = ShardWriter(folder, "train-000000.tar")
    for i in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48), [(200, 40 + i, 40), (40, 40 + i, 200)][i % 2]).save(buffer, "JPEG")
        jpeg = buffer.getvalue()
        offsets = np.arange(6, dtype=np.int64) * len(jpeg)
        sizes, sums = np.full(6, len(jpeg), np.int32), np.full(6, checksum(jpeg), np.uint64)
        table = FrameTable(offsets, sizes, sums, np.arange(6, dtype=np.int32), np.ones(6, np.uint8))
        writer.add(f"{i:06d}", [i % 2], EncodedVideo(jpeg * 6, "mp4", table, 64, 48, 6, 30.0), {})
    entry = {"samples": 12, "shards": [asdict(writer.close())]}
    splits = {"train": entry, "val": entry}
    facts = {"classes": ["red", "blue"], "multi_label": False, "verified": True, "profile": {"name": "jpeg"}}
    write_manifest(folder, {**facts, "splits": splits})
    return folder


def test_run_learns_and_logs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("train.eval_every=4", "train.keep=3")  # logged and saved often, for the run is short
    run_here(colour_set(tmp_path / "set"), out, *settings, "schedule.epochs=13")
    lines = metrics(out, "train")
    assert [line["step"] for line in lines] == [4, 6, 8, 12, 16, 18, 20]
    assert lines[0]["clips_per_s"] is None and lines[2]["clips_per_s"] > 0 and 0 <= lines[2]["wait_share"] <= 1
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert [line["step"] for line in metrics(out, "eval")] == [6, 12, 18, 20]
    assert metrics(out, "eval")[-1]["top1"] == 1.0
    assert metrics(out, "end")[0]["measured_steps"] == 20 - WARMUP_STEPS
    written = {"metrics.jsonl", "predictions.npz", "run.json", "tensorboard", "trace-0.jsonl", ".lock"}
    saved = {f"checkpoint-{step:06d}" for step in (12, 16, 20)}
    assert {path.name for path in out.iterdir()} == written | saved


@pytest.mark.parametrize(
    ("epochs", "batch", "samples", "world", "said"),
    [
        (1, 64, 640, 1, "only 10 steps: a smaller batch takes more steps, such as --set ds.train_batch_size=8"),
        (1, 8, 80, 3, "only 10 steps: a smaller batch takes more steps, such as --set ds.train_batch_size=3"),
        (200, 64, 40, 1, "a step of 64 clips repeats some of the 40 samples: a smaller batch takes more steps"),
        (2, 64, 40, 1, "only 2 steps, and a step of 64 clips repeats some of the 40 samples: a smaller batch"),
        (100, 64, 64, 1, ""),
        (1, 1, 10, 1, ""),
        (1, 4, 10, 4, ""),
    ],
)
def test_few_steps_are_said_with_a_batch_that_takes_more(
    epochs: int, batch: int, samples: int, world: int, said: str
) -> None:
    config = load_config("demo", ["data.shards=x", f"schedule.epochs={epochs}", "schedule.warmup_epochs=0"])
    steps = -(-epochs * samples // batch)
    parts = {"batch": Batch(batch, 1, 1), "shards": SimpleNamespace(num_kept=samples), "num_steps": steps}
    job: Any = SimpleNamespace(config=config, world=SimpleNamespace(size=world), **parts)
    assert _smaller_batch(job).startswith(said) and bool(_smaller_batch(job)) == bool(said)
