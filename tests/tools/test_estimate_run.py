"""What a run will cost: numbers that can be worked out by hand, and what is said where they cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from model.flops import count_cost
from model.parameters import count_parameters
from tests.sets import make_set
from tests.shell import call_program
from tools.estimate_run import estimate_recipe, main, model_without_data, trainable_recipes
from train.resolve import RECIPES, load_config

TINY = ("--set", "model.name=tiny-clip", "--set", "model.pretrained=none")


def test_the_numbers_are_those_of_the_counted_model() -> None:
    config = load_config("aim_b16_k400")
    model = model_without_data(config, 400)
    total, trainable = count_parameters(model)
    cost = count_cost(model)
    estimate = estimate_recipe("aim_b16_k400", [], 64_000, 400)
    assert estimate.steps == 30_000 and estimate.micro_batch == 16
    assert estimate.operations == pytest.approx(2e9 * cost.training_gmac * 30_000 * 64)
    assert estimate.fixed_bytes == 2 * (total - trainable) + 16 * trainable + cost.copied_bytes
    assert estimate.memory_gb(3) == pytest.approx((estimate.fixed_bytes + 3 * cost.kept_bytes) / 1e9)
    assert estimate.hours(1e15) == pytest.approx(estimate.operations / 3.6e18)
    most = estimate.most_clips(80)
    assert estimate.memory_gb(most) <= 72 < estimate.memory_gb(2 * most)
    assert estimate.most_clips(0.001) == 0


def test_texts_are_computed_once_a_micro_batch() -> None:
    """Classes cost the same for two clips at once as for one."""
    few, many = (estimate_recipe("prompt_clip_k400", [], 6400, classes) for classes in (10, 300))
    assert few.bytes_per_clip == pytest.approx(many.bytes_per_clip, rel=0.01)
    assert many.fixed_bytes > 2 * few.fixed_bytes


def test_every_recipe_of_a_published_set_is_estimated() -> None:
    own = {"demo", "demo_baseline", "my_videos", "zero_shot"}
    assert set(trainable_recipes()) == {path.stem for path in RECIPES.glob("*.toml")} - own


def test_a_packed_set_says_how_much_there_is(tmp_path: Path) -> None:
    packed = make_set(tmp_path / "set", [12, 9, 16, 11, 14, 10], classes=3, splits=("train", "val"))
    epochs = load_config("my_videos").schedule.epochs
    done = call_program(main, "my_videos", *TINY, "--set", f"data.shards={packed}", "--gpu", "A100", "--gpus", 8)
    assert done.returncode == 0, done.stderr
    heading, row, last = done.stdout.splitlines()
    clips, steps = row.split()[1:3]
    assert "micro-batch: GB largest in 80 GB 10^18 ops   hours" in heading and len(heading) == len(row) <= 100
    assert int(steps) == math.ceil(epochs * int(clips) / 64) and int(clips) == 6
    assert "8 × A100" in last and "312 TFLOP/s" in last


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("nothing",), "nothing"),
        (("my_videos",), "--samples"),
        (("my_videos", "--samples", "100"), "--classes"),
        (("zero_shot", "--samples", "9", "--classes", "3"), "not trained"),
        (("aim_b16_k400", "--gpu", "Abacus"), "H200"),
        (("aim_b16_k400", "--gpus", "0"), "--gpus 0"),
        (("aim_b16_k400", "--share", "1.5"), "at most 1"),
        (("aim_b16_k400", "--memory", "0"), "--memory 0"),
        (("aim_b16_k400", "--samples", "-3"), "--samples -3"),
        (("aim_b16_k400", "--set", "model.name=ViT-Z"), "ViT-Z"),
        (("aim_b16_k400", "--set", "model.layers=3"), "layers"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(given: tuple[str, ...], words: str) -> None:
    done = call_program(main, *given)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
