"""Episodes from end to end in one process, going on after a cut, from a file, and the answers to mistakes."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.shards import ShardSet
from tests.sets import make_set
from tools.few_shot import interval95, main, mean_text, parse_arguments, plan_episodes, read_recipe

SMALL = (
    *("schedule.epochs=1", "schedule.warmup_epochs=0", "data.workers=1", "data.num_frames=2"),
    *("model.pretrained=none", "ds.train_batch_size=4", "ds.train_micro_batch_size_per_gpu=4"),
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 videos of 4 classes in splits train and val: 6 of the first two, 5 of the others."""
    return make_set(tmp_path_factory.mktemp("packed") / "set", [9] * 22, classes=4, splits=("train", "val"))


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what an earlier training left in the environment, nor leaving any; one thread."""
    before, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.delenv("RANK", raising=False)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


def command(packed: Path, out: Path, *more: str) -> list[str]:
    settings = [word for text in SMALL for word in ("--set", text)]
    return ["demo", "--shards", str(packed), "--out", str(out), *settings, *more]


def test_from_end_to_end_and_again(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    ways = ("--ways", "2", "--shots", "3")
    assert main(command(packed, out, *ways, "--episodes", "1")) == 0
    said = capsys.readouterr().out
    assert "1 episode, 0 of them done before" in said and "[1/1] class" in said and "left 0:00:00" in said
    alone = json.loads((out / "result.json").read_text())
    assert main(command(packed, out, *ways, "--episodes", "2", "--set", "data.prefetch=2")) == 0, "as cut before"
    assert "2 episodes, 1 of them done before" in capsys.readouterr().out
    assert "loss" not in said, "what the trainer prints is in the logs"
    result = json.loads((out / "result.json").read_text())
    assert result["episodes"][:1] == alone["episodes"]
    assert result["num_episodes"] == 2 and result["training_clips"] == [6] and "--ways 2" in result["command"]
    tests = ShardSet.open(packed, "val")
    for row in result["episodes"]:
        run = out / "runs" / row["run"]
        facts = json.loads((run / "run.json").read_text())
        assert facts["config"]["data"]["shots"] == 3 and facts["samples"] == 6
        assert facts["config"]["data"]["classes"] == row["classes"] and len(set(row["classes"])) == 2
        with np.load(run / "predictions.npz") as answers:
            labels = dict(zip(answers["keys"].tolist(), answers["labels"].tolist(), strict=True))
            assert answers["classes"].tolist() == row["classes"] and answers["logits"].shape == (len(labels), 2)
            assert row["top1"] == pytest.approx((answers["logits"].argmax(1) == answers["labels"]).mean())
        truth = {tests[i].key: tests.classes[tests[i].label] for i in range(len(tests))}
        wanted = {key: row["classes"].index(name) for key, name in truth.items() if name in row["classes"]}
        assert labels == wanted, "all test clips of the two classes and no others, by their new numbers"
        assert not list(run.glob("checkpoint-*")) and (out / "runs" / f"{row['run']}.log").stat().st_size
    assert result["mean_top1"] == pytest.approx(statistics.fmean(row["top1"] for row in result["episodes"]), abs=1e-6)
    assert f"{100 * result['mean_top1']:.1f}" in (out / "result.md").read_text()


def test_episodes_of_a_file(packed: Path, tmp_path: Path) -> None:
    keys = [f"{i:06d}_numbers" for i in range(22)]
    entry = {"classes": ["class3", "class1"], "train": [keys[3], keys[1], keys[7]], "test": [keys[5], keys[11]]}
    path = tmp_path / "episodes.json"
    path.write_text(json.dumps({"episodes": [entry]}))
    assert main(command(packed, tmp_path / "file", "--from", str(path))) == 0
    result = json.loads((tmp_path / "file" / "result.json").read_text())
    assert result["training_clips"] == [3] and result["interval95"] is None
    with np.load(tmp_path / "file" / "runs" / result["episodes"][0]["run"] / "predictions.npz") as answers:
        assert answers["keys"].tolist() == entry["test"] and answers["labels"].tolist() == [1, 0]

    # Another file of the same episode is the same one, and another episode in the same file is another.
    def planned(file: Path, *more: str) -> list[str]:
        arguments = parse_arguments(command(packed, tmp_path / "file", "--from", str(file), *more))
        return [episode.key for episode in plan_episodes(arguments, read_recipe(arguments))]

    (tmp_path / "copy.json").write_text(json.dumps({"episodes": [entry | {"train": keys[:4]}, entry]}))
    other, same = planned(tmp_path / "copy.json")
    assert [same] == planned(path) == [result["episodes"][0]["run"]] and other != same
    with pytest.raises(ValueError, match=r"--episodes 2: .* has 1"):
        planned(path, "--episodes", "2")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "data.shots=3"], "--set data.shots=3: this program sets data.shots; use --shots"),
        (["--set", "data.fraction=0.5"], "data.fraction = 0.5; allowed is 1: --shots says"),
        (["--set", "data.val_split="], "an episode is tested on a split"),
        (["--ways", "5"], "5 classes were asked for; allowed is 1 to 4"),
        (["--ways", "2", "--shots", "6"], "data.shots = 6: class 'class2' has 5 samples"),
        (["--ways", "2", "--set", 'data.classes=["class0", "class9"]'], "'class9' is no class of"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    packed: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as failure:
        main(command(packed, tmp_path / "out", *more))
    assert "\n" not in str(failure.value) and not (tmp_path / "out").exists()


def test_all_classes_take_part_in_splits_that_differ(packed: Path, tmp_path: Path) -> None:
    arguments = parse_arguments(command(packed, tmp_path / "out", "--ways", "all", "--shots", "2", "--episodes", "3"))
    planned = plan_episodes(arguments, read_recipe(arguments))
    train, keys = ShardSet.open(packed, "train"), []
    for episode in planned:
        chosen = episode.config.data.part.of_training(train)
        assert chosen.classes == train.classes and chosen.kept is not None and len(chosen.kept) == 8
        keys.append(tuple(chosen.kept.tolist()))
    assert len(set(keys)) == len({episode.key for episode in planned}) == 3


def test_the_interval_of_a_mean() -> None:
    """Deviation 0.2 of the sample, root of 4: 1.96 · 0.1."""
    values = [0.5, 0.5 + 0.1 * 12**0.5, 0.5, 0.5 - 0.1 * 12**0.5]
    assert statistics.stdev(values) == pytest.approx(0.08**0.5)
    assert interval95(values) == pytest.approx(1.96 * 0.08**0.5 / 2) and interval95([0.5]) is None
    assert mean_text([0.8, 0.9]) == "mean 85.0 ± 9.8 %" and mean_text([0.8]) == "mean 80.0 %"
