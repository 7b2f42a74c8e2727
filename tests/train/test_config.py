"""What each section allows, said where a value is made; what a recipe says of the same mistakes: `test_resolve.py`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from model.methods import METHODS
from model.methods.aim import AIMOptions, SpaceOnlyOptions
from model.speed import SpeedOptions
from pipelines.cache import CacheSettings, default_cache_folder
from pipelines.subset import Part
from train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    allow,
)
from train.resolve import config_from_dict

INF, NAN = float("inf"), float("nan")
DOCUMENT = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "torch_autocast": {"enabled": False}}


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        (DataConfig, {"fraction": NAN}, "data.fraction = NaN; allowed is a share, 0 < fraction <= 1"),
        (DataConfig, {"fraction_seed": 2**63}, "data.fraction_seed = 9223372036854775808; allowed is 0 to 2^63 - 1"),
        (DataConfig, {"shots": -1}, "data.shots = -1; allowed is 0 (all) or more"),
        (DataConfig, {"episode": -1}, "data.episode = -1; allowed is 0 or more"),
        (DataConfig, {"classes": ("run",)}, 'data.classes = ["run"]; allowed is [] (all), or two names or more'),
        (
            DataConfig,
            {"shots": 5, "fraction": 0.5},
            "data.fraction and data.shots each say what is learned from; give one of them",
        ),
        (
            DataConfig,
            {"episodes": "e.json", "classes": ("run", "jump")},
            "data.episodes and data.classes each say what is learned from; give one of them",
        ),
        (DataConfig, {"shuffle_shards": -1}, "data.shuffle_shards = -1; allowed is 0 (all) or more shards"),
        (DataConfig, {"cache_gb": 0.0}, "data.cache_gb = 0.0; allowed is more than 0"),
        (DataConfig, {"cache_gb": INF}, "data.cache_gb = Infinity; allowed is more than 0"),
        (DataConfig, {"workers": 257}, "data.workers = 257; allowed is 0 (automatic) to 256"),
        (DataConfig, {"prefetch": 0}, "data.prefetch = 0; allowed is 1 to 4 batches"),
        (DataConfig, {"prefetch": 5}, "data.prefetch = 5; allowed is 1 to 4 batches"),
        (DataConfig, {"max_bad_fraction": 1.01}, "data.max_bad_fraction = 1.01; allowed is a share, 0 to 1"),
        (DataConfig, {"train_split": ""}, 'data.train_split = ""; allowed is the name of a split'),
        (OptimizerConfig, {"lr": INF}, "optimizer.lr = Infinity; allowed is more than 0"),
        (OptimizerConfig, {"backbone_lr": NAN}, "optimizer.backbone_lr = NaN; allowed is a factor, more than 0"),
        (
            OptimizerConfig,
            {"betas": (0.9, 1.0)},
            "optimizer.betas = [0.9, 1.0]; allowed is two numbers, 0 <= beta < 1",
        ),
        (OptimizerConfig, {"eps": 0.0}, "optimizer.eps = 0.0; allowed is more than 0"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay = -0.1; allowed is 0 or more"),
        (ScheduleConfig, {"epochs": 0.0}, "schedule.epochs = 0.0; allowed is more than 0, up to 100000"),
        (ScheduleConfig, {"epochs": NAN}, "schedule.epochs = NaN; allowed is more than 0, up to 100000"),
        (ScheduleConfig, {"epochs": 2.0}, "schedule.warmup_epochs = 2.5; allowed is 0 to schedule.epochs = 2"),
        (
            ScheduleConfig,
            {"warmup_epochs": -1.0},
            "schedule.warmup_epochs = -1.0; allowed is 0 to schedule.epochs = 30",
        ),
        (ScheduleConfig, {"warmup_start": 1.1}, "schedule.warmup_start = 1.1; allowed is 0 to 1"),
        (TrainConfig, {"label_smoothing": 1.0}, "train.label_smoothing = 1.0; allowed is 0 <= share < 1"),
        (TrainConfig, {"seed": -1}, "train.seed = -1; allowed is 0 to 2^63 - 1"),
        (TrainConfig, {"seed": 2**63}, "train.seed = 9223372036854775808; allowed is 0 to 2^63 - 1"),
        (TrainConfig, {"eval_every": INF}, "train.eval_every = Infinity; allowed is epochs, or 0 for only at the end"),
        (TrainConfig, {"checkpoint_every": -1}, "train.checkpoint_every = -1; allowed is steps, or 0 for only at the "),
        (TrainConfig, {"keep": 0}, "train.keep = 0; allowed is 1 or more"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(section: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        section(**values)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (DataConfig, {"fraction": 1e-9, "fraction_seed": 2**63 - 1, "workers": 256, "prefetch": 1}),
        (DataConfig, {"cache_gb": 1e-9, "prefetch": 4, "max_bad_fraction": 0.0, "val_split": ""}),
        (DataConfig, {"max_bad_fraction": 1.0}),
        (OptimizerConfig, {"lr": 1e30, "betas": (0.0, 0.0), "weight_decay": 0.0, "backbone_lr": 1e-9}),
        (ScheduleConfig, {"epochs": 100_000.0, "warmup_epochs": 100_000.0, "warmup_start": 0.0}),
        (ScheduleConfig, {"epochs": 0.01, "warmup_epochs": 0.0, "warmup_start": 1.0}),
        (TrainConfig, {"label_smoothing": 0.0, "seed": 2**63 - 1, "eval_every": 0.0, "checkpoint_every": 0}),
        (TrainConfig, {"log_every": 1, "keep": 1}),
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(section: Any, values: dict[str, Any]) -> None:
    made = section(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_what_is_refused_is_written_as_in_a_file() -> None:
    allow("a.b", object(), True, "anything")
    for value, text in ((None, "null"), (True, "true"), ("x\ny", r'"x\ny"'), ((1, 2.5), "[1, 2.5]")):
        with pytest.raises(ValueError) as error:
            allow("a.b", value, False, "something else")
        assert str(error.value) == f"a.b = {text}; allowed is something else"


def test_options_are_those_of_the_method() -> None:
    for name, method in METHODS.items():
        assert ModelConfig(method=name).options == method.options()
    assert ModelConfig(method="frozen") == ModelConfig(method="frozen", options=SpaceOnlyOptions())
    with pytest.raises(AssertionError):
        ModelConfig(method="frozen", options=AIMOptions())
    plain = ModelConfig(options=AIMOptions(positions="top 2")).as_dict()
    assert plain["positions"] == "top 2" and plain["method"] == "aim" and "options" not in plain


def test_nothing_of_a_configuration_changes() -> None:
    for section in (Config(), DataConfig(), ModelConfig(), OptimizerConfig(), ScheduleConfig(), TrainConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)
    assert dataclasses.replace(TrainConfig(), seed=3).seed == 3
    with pytest.raises(ValueError, match=r"train\.seed"):
        dataclasses.replace(TrainConfig(), seed=-3)


@pytest.mark.parametrize(
    ("settings", "batch", "peak"),
    [
        ({"lr": 1e-3}, 4096, 1e-3),
        ({"lr": 1e-3, "lr_scaling": "linear"}, 64, 1e-3),
        ({"lr": 1e-3, "lr_scaling": "linear"}, 256, 4e-3),
        ({"lr": 1e-3, "lr_scaling": "linear", "backbone_lr": 0.1}, 1, 1e-3 / 64),  # the head's
    ],
)
def test_the_peak_follows_the_batch_where_that_is_asked_for(settings: dict[str, Any], batch: int, peak: float) -> None:
    assert OptimizerConfig(**settings).peak(batch) == pytest.approx(peak, rel=1e-12)


def test_the_cache_is_where_and_as_large_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig().cache == CacheSettings(default_cache_folder(), 100 * 10**9)
    assert DataConfig(cache_dir="~/kept", cache_gb=0.0015).cache == CacheSettings(tmp_path / "kept", 1_500_000)
    assert DataConfig(cache_dir="here").cache.folder == Path("here")


def test_the_part_of_a_set_that_is_learned(tmp_path: Path) -> None:
    assert DataConfig().part == Part()
    assert DataConfig(shots=5, fraction_seed=3, classes=("run", "jump")).part == Part(1.0, 5, 3, ("run", "jump"))
    path = tmp_path / "episodes.json"
    entries = [{"classes": ["a", "b"], "train": ["x"]}, {"classes": ["c", "d"], "train": ["x", "y"], "test": ["z"]}]
    path.write_text(json.dumps({"episodes": entries}))
    part = DataConfig(episodes=str(path), episode=1).part
    assert part == Part(classes=("c", "d"), train_keys=("x", "y"), test_keys=("z",))
    with pytest.raises(ValueError, match=r"data\.episode = 2; allowed is 0 to 1"):
        _ = DataConfig(episodes=str(path), episode=2).part


def test_a_configuration_other_than_the_defaults_everywhere_comes_back_from_json() -> None:
    config = Config(
        data=DataConfig(shards="set", num_frames=3, sampling="uniform", crop_scale=(0.5, 1.0), rand_augment=(2.0, 9.0)),
        model=ModelConfig("frozen", "tiny-clip", "none", "imagenet", SpaceOnlyOptions(head_dropout=0.25)),
        optimizer=OptimizerConfig(lr=1.0, lr_scaling="linear", betas=(0.5, 0.75)),
        schedule=ScheduleConfig(epochs=4.5, warmup_epochs=0.0, cosine="epoch"),
        train=TrainConfig(seed=2**62, label_smoothing=0.5, keep=9),
        speed=SpeedOptions(checkpoint_blocks=2, cache_gb=0.5),
        run=RunConfig(out="there", report=False, trace=True),
        deepspeed=DOCUMENT,
    )
    document = config.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["optimizer"]["betas"] == [0.5, 0.75] and document["data"]["rand_augment"] == [2.0, 9.0]
    back = config_from_dict(document)
    assert dataclasses.replace(back, deepspeed=DOCUMENT) == config
    assert DOCUMENT.items() <= {**back.deepspeed, "torch_autocast": {"enabled": back.bf16}}.items()
    assert config_from_dict(back.as_dict()) == back
    document["deepspeed"]["torch_autocast"]["enabled"] = True
    assert not config.bf16, "what it gave away is a copy"
