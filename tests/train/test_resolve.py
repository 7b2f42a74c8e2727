"""Recipes and the DeepSpeed file: what they resolve to, and what every mistake is answered with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from model.methods import METHODS
from model.methods.aim import AIMOptions, SpaceOnlyOptions
from pipelines.plan import ClipOptions
from train.config import Batch, ModelConfig
from train.resolve import DEEPSPEED_KEYS, config_from_dict, load_config, resolve_batch

SHARDS = "data.shards=somewhere"


def test_defaults_are_the_published_ones() -> None:
    config = load_config("aim_b16_k400")
    assert (config.model.name, config.model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert config.model.method == "aim" and config.model.options == AIMOptions()
    published = ClipOptions(test_clips=3, eval_crop=1.0)  # the official test; its validation is the default
    assert {k: getattr(config.data, k) for k in asdict(published)} == asdict(published)
    adamw = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
    assert asdict(config.optimizer) == adamw | {"lr_scaling": "none", "backbone_lr": 1.0}
    schedule = {"epochs": 30.0, "warmup_epochs": 2.5, "warmup_start": 0.1}
    assert asdict(config.schedule) == schedule | {"cosine": "step"}
    assert config.deepspeed["train_batch_size"] == 64 and config.deepspeed["gradient_clipping"] == 0.0
    assert config.bf16 and config.run.out == "runs/aim_b16_k400"


def test_overrides_take_toml_or_a_bare_word() -> None:
    settings = [
        "model.adapters=[]",
        "model.name=tiny-clip",
        "optimizer.lr=1",
        "data.crop_scale=[0.5, 1]",
        "data.val_split=",  # as a shell hands on data.val_split=""
    ]
    config = load_config("my_videos", [*settings, "ds.torch_autocast.enabled=false", "ds.train_batch_size=4"])
    assert config.model.options.adapters == () and config.model.name == "tiny-clip" and config.data.val_split == ""
    assert config.optimizer.lr == 1.0 and config.data.crop_scale == (0.5, 1.0)
    assert not config.bf16 and config.deepspeed["train_batch_size"] == 4


def test_a_method_has_its_own_keys_beside_the_models(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[model]\nhead_dropout = 0.25\nmethod = "frozen"\n[data]\nshards = "x"\n')
    config = load_config(str(tmp_path / "r.toml"))
    assert config.model == ModelConfig(method="frozen", options=SpaceOnlyOptions(head_dropout=0.25))
    assert load_config(str(tmp_path / "r.toml"), ["model.method=aim"]).model.options == AIMOptions(head_dropout=0.25)
    for method, entry in METHODS.items():
        chosen = load_config("aim_b16_k400", [f"model.method={method}"]).model
        assert chosen.options == entry.options()
        names = {"method", "name", "pretrained", "normalisation"} | asdict(entry.options()).keys()
        assert chosen.as_dict().keys() == names


@pytest.mark.parametrize(("given", "read"), [('"top 2"', "top 2"), ("every 2", "every 2"), ("[0, 3]", (0, 3))])
def test_positions_are_text_or_a_list(given: str, read: object) -> None:
    assert load_config("demo", [SHARDS, f"model.positions={given}"]).model.options.positions == read


def test_a_printed_configuration_is_a_recipe() -> None:
    settings = [
        "model.positions=[0, 2]",
        "data.rand_augment=[4, 7]",
        "optimizer.lr_scaling=linear",
        "data.fraction=0.1",
    ]
    for config in (load_config("demo", [SHARDS, *settings]), load_config("aim_b16_k400", ["model.method=finetuned"])):
        document = config.as_dict()
        assert config_from_dict(document) == config and json.loads(json.dumps(document)) == document
        assert not any(isinstance(value, dict) for value in document["model"].values())


def test_a_configuration_of_an_earlier_version_has_the_defaults_of_what_is_new() -> None:
    document = load_config("demo", [SHARDS]).as_dict()
    for section, key in (("data", "fraction"), ("model", "positions"), ("schedule", "cosine")):
        del document[section][key]
    assert config_from_dict(document) == load_config("demo", [SHARDS])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"method": "frozen", "drop_path": 0.1}}, "config: model.drop_path is no key of method frozen"),
        ({"model": 3}, "config: model stands outside a section"),
        ({"modle": {"method": "aim"}}, "config: unknown key modle.method"),
        ({"deepspeed": 3}, "config: deepspeed = 3; allowed is a DeepSpeed document"),
        ({"deepspeed": {}}, "train_batch_size is missing"),
        ({"data": {"num_frames": "8"}}, 'data.num_frames = "8"; allowed is a whole number'),
    ],
)
def test_a_configuration_is_checked_like_a_recipe(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as failure:
        config_from_dict(load_config("demo", [SHARDS]).as_dict() | change)
    assert said in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(("scaling", "peaks"), [("none", [3e-4, 3e-4]), ("linear", [3e-4, 3.75e-5])])
def test_learning_rate_is_for_64_clips_or_for_those_there_are(scaling: str, peaks: list[float]) -> None:
    optimizer = load_config("aim_b16_k400", [f"optimizer.lr_scaling={scaling}"]).optimizer
    assert [optimizer.peak(64), optimizer.peak(8)] == pytest.approx(peaks)


def test_deepspeed_file_of_the_command_line_wins_over_the_recipes(tmp_path: Path) -> None:
    document = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2}
    (tmp_path / "ours.json").write_text(json.dumps(document))
    (tmp_path / "theirs.json").write_text(json.dumps(document | {"train_batch_size": 12}))
    (tmp_path / "r.toml").write_text('deepspeed_config = "ours.json"\n[data]\nshards = "x"\n')
    recipe = str(tmp_path / "r.toml")
    assert load_config(recipe).deepspeed["train_batch_size"] == 6
    assert load_config(recipe, deepspeed_file=str(tmp_path / "theirs.json")).deepspeed["train_batch_size"] == 12
    assert load_config(recipe).deepspeed["gradient_clipping"] == 0.0  # DeepSpeed's own default would clip at 1


def test_another_method_leaves_the_recipes_own_options_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = load_config("demo", [SHARDS, "model.method=frozen"]).model
    assert (chosen.method, chosen.options) == ("frozen", SpaceOnlyOptions(head_dropout=0.0))
    said = capsys.readouterr().err
    assert "left out model.adapter_scale, model.drop_path, which method frozen does not have" in said
    with pytest.raises(ValueError, match=r"adapter_scale is no key of method frozen, which has head_dropout"):
        load_config("demo", [SHARDS, "model.method=frozen", "model.adapter_scale=0.5"])
    capsys.readouterr()
    load_config("demo", [SHARDS, "model.method=aim"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.num_frame=8", "did you mean data.num_frames?"),
        ("train.epochs=8", "did you mean schedule.epochs?"),
        ("nothing.here=8", "sections are data, model"),
        ("optimizer.learning_rate=0.1", "did you mean optimizer.lr?"),
        ("optimizer.momentum=0.1", "unknown key optimizer.momentum; [optimizer] has lr, "),
        ("train_batch_size=8", "did you mean --set ds.train_batch_size=8?"),
        ("num_frames=8", "did you mean --set data.num_frames=8?"),
        ("train.train_batch_size=8", "belongs in the DeepSpeed file (ds_config.json)"),
        ("train.batch_size=8", "has train_batch_size, here --set ds.train_batch_size"),
        ("ds.train_batchsize=8", "did you mean train_batch_size?"),
        ("ds.torch_autocast.enable=true", "did you mean torch_autocast.enabled?"),
        ("ds.lr=0.1", "lr belongs in the recipe, as optimizer.lr"),
        ("ds.optimizer.type=Adam", "optimizer belongs in the recipe"),
        ("ds.scheduler.type=WarmupLR", "scheduler belongs in the recipe, as section [schedule]"),
        ("ds.epochs=3", "epochs belongs in the recipe, as schedule.epochs"),
        ("ds.gradient_accumulation_steps=2", "leave it out"),
        ("ds.bf16.enabled=true", "use torch_autocast"),
        ("ds.fp16.enabled=true", "use torch_autocast"),
        ("ds.torch_autocast.dtype=float16", 'allowed is "bfloat16"'),
        ("ds.zero_optimization.stage=2", "allowed is 0"),
        ("ds.train_batch_size=0", "allowed is 1 or more"),
        ("ds.train_batch_size=eight", "allowed is a whole number"),
        ("ds.gradient_clipping=-1", "allowed is 0 (off) or more"),
        ("optimizer.lr", "the form is section.key=value"),
        ("lr=0.1", "the form is section.key=value"),
        ("optimizer.=0.1", "the form is section.key=value"),
        ("model.adapters=[spatial]", "not valid TOML"),
        ("optimizer.lr=", "allowed is a number"),
        ("optimizer.lr=fast", "allowed is a number"),
        ("optimizer.lr=true", "allowed is a number"),
        ("optimizer.lr=-0.1", "allowed is more than 0"),
        ("optimizer.lr=nan", "allowed is more than 0"),
        ("optimizer.betas=[0.9]", "allowed is [a number, a number]"),
        ("data.num_frames=8.5", "allowed is a whole number"),
        ("data.sampling=densely", "allowed are dense, uniform"),
        ("data.flip=2", "allowed is a probability"),
        ("data.rand_augment=4", "data.rand_augment = 4; allowed is a list, each a number"),
        ("data.rand_augment=[4]", "data.rand_augment = [4.0]; allowed is [] or [n, m] or [n, m, mstd]"),
        ("data.color_jitter=[0.4, 0.4]", "allowed is [a number, a number, a number, a number]"),
        ("data.colour_jitter=[0.4, 0.4, 0.4, 0.1]", "did you mean data.color_jitter?"),
        ("data.test_crops=2", "data.test_crops = 2; allowed is 1 or 3"),
        ("data.mixup_alfa=0.8", "did you mean data.mixup_alpha?"),
        ("data.workers=-1", "allowed is 0 (automatic) to 256"),
        ("model.method=vivit", "aim or frozen or finetuned or "),
        ("model.method=3", "allowed is text"),
        ("model.drop_paths=0.1", "did you mean model.drop_path?"),
        (
            "model.window=7",
            "unknown key model.window; method aim has method, name, pretrained, normalisation, adapters",
        ),
        ("model.positions=3", "allowed is text, or a list, each a whole number"),
        ("model.positions=left 2", 'model.positions = "left 2"; allowed is "all"'),
        ("model.normalisation=rgb", 'model.normalisation = "rgb"; allowed is one of ["", "openai_clip", "aim_clip"'),
        ("optimizer.lr_scaling=sqrt", "allowed is none or linear"),
        ("optimizer.backbone_lr=0", "allowed is a factor, more than 0"),
        ("schedule.cosine=iteration", "allowed is step or epoch"),
        ("data.fraction=0", "data.fraction = 0.0; allowed is a share, 0 < fraction <= 1"),
        ("data.fraction=1.5", "allowed is a share"),
        ("data.fraction_seed=-1", "allowed is 0 to 2^63 - 1"),
        ('model.adapters=["spatially"]', "is none of spatial, temporal, joint"),
        ("schedule.warmup_epochs=99", "allowed is 0 to schedule.epochs = "),
        ("train.log_every=0", "allowed is 1 or more"),
        ("run.trace=1", "allowed is true or false"),
    ],
)
def test_mistakes_are_one_line_that_says_what_is_right(setting: str, said: str) -> None:
    with pytest.raises(ValueError) as failure:
        load_config("demo", [SHARDS, setting])
    assert said in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[data\n", "is not valid TOML"),
        ("train_batch_size = 3\n", "belongs in the DeepSpeed file"),
        ("lr = 0.1\n", "lr stands outside a section; its is [optimizer]"),
        ("[zero_optimization]\nstage = 1\n", "zero_optimization.stage belongs in the DeepSpeed file"),
        ("deepspeed_config = 3\n", "allowed is the path of a JSON file"),
        ('deepspeed_config = "none.json"\n', "no such DeepSpeed file"),
        ("", "names no data"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises((ValueError, OSError)) as failure:
        load_config(str(tmp_path / "mine.toml"))
    assert said in str(failure.value) and str(tmp_path) in str(failure.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train_batch_size": 3, "train_batch_size": 4}', "stands there twice"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "train_batch_size is missing"),
        ('{"torch_autocast": true}', "allowed is a section with enabled, dtype"),
    ],
)
def test_mistakes_in_a_deepspeed_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="ds") as failure:
        load_config("demo", [SHARDS], str(path))
    assert said in str(failure.value)


def test_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such recipe: dmeo; train/recipes has demo, ") as failure:
        load_config("dmeo")
    named = str(failure.value).partition(" has ")[2].partition(" …")[0].split(", ")
    assert len(named) == 10 and len(set(named)) == 10
    with pytest.raises(FileNotFoundError, match=r"train/recipes has aim_b16_k400, "):
        load_config("recipes/aim_b16_k40.toml")


@pytest.mark.parametrize(
    ("total", "micro", "world", "expected"),
    [(64, 16, 1, (16, 4)), (64, 16, 4, (16, 1)), (64, 16, 8, (8, 1)), (60, 16, 2, (15, 2)), (64, 7, 1, (4, 16))],
)
def test_batch_is_shared_equally(total: int, micro: int, world: int, expected: tuple[int, int]) -> None:
    batch = resolve_batch({"train_batch_size": total, "train_micro_batch_size_per_gpu": micro}, world)
    assert (batch.micro, batch.accumulation) == expected and batch.total == total
    assert bool(batch.note) == (batch.micro != micro)
    assert isinstance(batch, Batch)


def test_batch_that_cannot_be_shared_is_refused_with_sizes_that_can() -> None:
    with pytest.raises(ValueError, match=r"set it to 63 or 66 .* or start 1, 2, 4, 8, 16, 32, 64 processes"):
        resolve_batch({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}, 3)


@pytest.mark.parametrize(
    ("total", "micro", "world", "expected"),
    [(64, 16, 1, (16, 4)), (20, 5, 1, (4, 5)), (24, 8, 2, (6, 2)), (24, 9, 2, (6, 2)), (6, 64, 3, (2, 1))],
)
def test_clips_that_are_mixed_come_in_pairs(total: int, micro: int, world: int, expected: tuple[int, int]) -> None:
    document = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro}
    batch = resolve_batch(document, world, in_pairs=True)
    assert (batch.micro, batch.accumulation) == expected
    assert bool(batch.note) == (batch.micro != micro)


@pytest.mark.parametrize(
    ("total", "micro", "world", "said"),
    [
        (15, 15, 1, "gives each of 1 processes 15 clips, and mixup and cutmix take them in pairs: set it to 14 or 16"),
        (8, 4, 8, "in pairs: set it to 16 (--set ds.train_batch_size=16)"),
        (8, 1, 2, "train_micro_batch_size_per_gpu = 1: mixup and cutmix take clips in pairs; set it to 2, 4 (--set"),
    ],
)
def test_batch_that_leaves_a_clip_without_its_pair_is_refused(total: int, micro: int, world: int, said: str) -> None:
    document = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro}
    with pytest.raises(ValueError) as failure:
        resolve_batch(document, world, in_pairs=True)
    assert said in str(failure.value) and "\n" not in str(failure.value)
    assert resolve_batch(document, world).total == total


def test_keys_we_pass_on_are_keys_that_deepspeed_knows() -> None:
    """DeepSpeed takes an unknown top-level key in silence: ours must be spelt as its own source spells them."""
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero import config as zero

    known = {text for module in (runtime, constants, zero) for text in vars(module).values() if isinstance(text, str)}
    assert DEEPSPEED_KEYS.keys() <= known
    assert DEEPSPEED_KEYS["torch_autocast"].keys() <= known
    assert DEEPSPEED_KEYS["zero_optimization"].keys() <= zero.DeepSpeedZeroConfig.model_fields.keys()
