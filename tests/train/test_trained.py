"""Opening a model from where it lies: which checkpoint, what is known of it, what is assumed, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints import convert, read_folder, write_folder
from tests import official_files
from tests.official_files import saved
from train.build import backbone_checksum, build_model
from train.checkpoint import identity, save_checkpoint
from train.config import Batch, Config
from train.resolve import config_from_dict
from train.trained import Trained, open_trained

HEAD = "weights/cls_head.fc_cls.weight"
NAMES = ("x", "y", "z")


def save_run(out: Path) -> Path:
    """A run on random frozen weights with checkpoints after 3 and after 10 steps, whose head holds that number."""
    sections = {
        "data": {"shards": "set", "num_frames": 2, "sampling": "uniform"},
        "model": {"name": "tiny-clip", "pretrained": "none"},
        "train": {"seed": 4},
        "deepspeed": {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 6},
    }
    config = config_from_dict(sections)
    model = build_model(config.model, num_classes=3, num_frames=2, seed=4)
    facts: dict[str, Any] = {"config": config, "world_size": 1, "batch": Batch(12, 6, 2), "bad_samples": (), "keep": 2}
    facts["run"] = identity(config, fingerprint="", backbone=backbone_checksum(model))
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in model.optimizer_groups(0.0)])
    assert model.cls_head is not None
    out.mkdir()
    for step in (3, 10):
        torch.nn.init.constant_(model.cls_head.fc_cls.weight, step)
        save_checkpoint(out, step, model, optimizer, classes=NAMES, **facts)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "own"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published AIM of 4 frames and 5 classes."""
    folder = tmp_path_factory.mktemp("converted")
    write_folder(convert(saved(official_files.aim_clip(), folder / "aim.safetensors")), folder / "aim")
    return folder / "aim"


def head(trained: Trained) -> float:
    """The step that its head tells of."""
    assert trained.model.cls_head is not None
    values = trained.model.cls_head.fc_cls.weight.unique().tolist()
    assert len(values) == 1
    return float(values[0])


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Another checkpoint, whose checksum holds; without that of its document, as in those of earlier versions."""
    document, tensors = json.loads((checkpoint / "state.json").read_text()), load_file(checkpoint / "state.safetensors")
    change(document, tensors)
    save_file(tensors, checkpoint / "state.safetensors")
    document["tensors_sha256"] = hashlib.sha256((checkpoint / "state.safetensors").read_bytes()).hexdigest()
    del document["document_sha256"]
    (checkpoint / "state.json").write_text(json.dumps(document))


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_is_itself(run: Path) -> None:
    newest, older = open_trained(run), open_trained(run / "checkpoint-000003")
    assert [(one.step, head(one)) for one in (newest, older)] == [(10, 10.0), (3, 3.0)]
    for one in (newest, older):
        assert (one.folder, one.classes, one.micro_batch, one.assumed) == (run, NAMES, 6, "")
        assert one.config.data.sampling == "uniform" and one.config.train.seed == 4
        assert not one.model.training
        assert {(p.dtype, p.device.type) for p in one.model.parameters()} == {(torch.float32, "cpu")}


def test_reports_go_to_the_run_also_where_the_checkpoint_is_named_from_within(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run / "checkpoint-000003")
    assert open_trained(Path(".")).folder == run


def test_the_model_before_training_is_the_one_that_the_run_started_from(run: Path, converted: Path) -> None:
    trained = open_trained(run)
    before = trained.before_training()
    assert before is not None and not before.training
    expected = build_model(trained.config.model, num_classes=3, num_frames=2, seed=4).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in before.state_dict().items())
    assert head(trained) == 10.0, "another model than the trained one"
    assert open_trained(converted).before_training() is None


def test_overrides_change_what_is_not_in_the_weights(run: Path) -> None:
    changed = open_trained(run, ["data.eval_crop=0.5", "run.out=there"]).config
    assert (changed.data.eval_crop, changed.run.out) == (0.5, "there")
    for setting, said in (
        ("data.evalcrop=0.5", "did you mean data.eval_crop?"),
        ("train.seed=5", f"the weights of tiny-clip (none) are not those that {run / 'checkpoint-000010'} was trained"),
        ("data.num_frames=4", "the checkpoint does not fit the model: "),
    ):
        with pytest.raises(ValueError) as error:
            open_trained(run, [setting])
        assert said in str(error.value) and "\n" not in str(error.value)


def test_other_frozen_weights_are_refused_with_what_to_do(own_run: Path) -> None:
    rewrite(own_run / "checkpoint-000010", lambda d, _: d["run"].update({"checksum of the frozen weights": "0"}))
    with pytest.raises(ValueError, match=r"\(checksum\); bring those back, or name their file with --set model\.pre"):
        open_trained(own_run)
    assert open_trained(own_run / "checkpoint-000003").step == 3


def test_a_checkpoint_without_a_head_has_nothing_to_answer(own_run: Path) -> None:
    def cut(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(HEAD)
        document.pop("classes")

    rewrite(own_run / "checkpoint-000010", cut)
    with pytest.raises(ValueError, match=r"checkpoint-000010 holds no classifier, nor the names of its classes$"):
        open_trained(own_run)


def test_a_damaged_newest_checkpoint_is_not_passed_over(own_run: Path) -> None:
    """An older model in its place would be an answer to another question."""
    with (own_run / "checkpoint-000010" / "state.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"is damaged \(checksum\); delete .*checkpoint-000010 to use an earlier one"):
        open_trained(own_run)
    (own_run / ".checkpoint-000011.part").mkdir()  # of a run that was killed
    shutil.rmtree(own_run / "checkpoint-000010")
    assert open_trained(own_run).step == 3


def test_what_is_nothing_of_the_kind_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "aim.pth").touch()
    (tmp_path / "empty").mkdir()
    cases = (
        (
            "aim.pth",
            ValueError,
            "is a file; convert it to a folder, then give that: python tools/convert_checkpoint.py ",
        ),
        ("none", FileNotFoundError, "is no folder; give a run, one of its checkpoints or a converted checkpoint"),
        (
            "empty",
            FileNotFoundError,
            "is neither a run with a checkpoint (checkpoint-…), nor a checkpoint (state.json), nor a converted "
            "checkpoint (config.json)",
        ),
    )
    for name, kind, said in cases:
        with pytest.raises(kind) as error:
            open_trained(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name} {said}")


def test_what_a_converted_checkpoint_is_given_and_what_it_lacks(converted: Path) -> None:
    opened = open_trained(converted)
    assert (opened.folder, opened.step, opened.classes, opened.micro_batch) == (converted, None, None, 8)
    data = opened.config.data
    assert (data.num_frames, data.sampling, data.interval) == (4, "dense", 32)
    assert opened.config.deepspeed["train_batch_size"] == 8
    assert not opened.model.training and opened.model.num_classes == 5


@pytest.mark.parametrize(("frames", "interval"), [(1, 128), (3, 42), (128, 1), (200, 1)])
def test_a_converted_clip_covers_what_published_ones_do(converted: Path, frames: int, interval: int) -> None:
    opened = open_trained(converted, [f"model.num_frames={frames}"])
    assert (opened.config.data.num_frames, opened.config.data.interval) == (frames, interval)
    assert f"{interval} frames apart" in opened.assumed


def test_of_settings_for_a_converted_checkpoint_the_last_one_counts(converted: Path) -> None:
    settings = ["data.interval=2", "data.interval=5", "model.adapter_scale=2.0", "model.adapter_scale=3.0"]
    opened = open_trained(converted, settings)
    assert (opened.config.data.interval, opened.model.options.adapter_scale) == (5, 3.0)
    assert "5 frames apart" in opened.assumed, "its sampling is not known yet"
    for setting in ("model.options.adapter_scale=1", "schedule.epochs=1", "train.seed=1"):
        with pytest.raises(ValueError) as error:
            open_trained(converted, [setting])
        said = (
            f"--set {setting}: {converted} is converted, and no training's; of it can be set model.X (the settings of "
        )
        assert str(error.value).startswith(said)


def test_what_a_converted_run_knows_is_not_assumed(converted: Path, tmp_path: Path) -> None:
    known = dataclasses.replace(read_folder(converted), classes=tuple("abcde"), sampling="uniform")
    write_folder(known, tmp_path / "known")
    opened = open_trained(tmp_path / "known")
    assert (opened.assumed, opened.classes, opened.config.data.sampling) == ("", tuple("abcde"), "uniform")


def test_classes_must_be_those_of_training(run: Path) -> None:
    trained = open_trained(run)
    trained.require_classes(NAMES, "the set")
    number = f"and {run} was trained for 3; pack the set with the class list of the training set"
    for names, said in (
        (
            ("x", "z", "y"),
            f"the classes of the set are not those of {run}: class 1 is 'z' there and was 'y' in training",
        ),
        (("x", "y"), f"the set has 2 classes {number}"),
        ((*NAMES, "more"), f"the set has 4 classes {number}"),
    ):
        with pytest.raises(ValueError) as error:
            trained.require_classes(names, "the set")
        assert str(error.value).startswith(said)


def test_classes_without_names_are_compared_by_their_number(own_run: Path) -> None:
    rewrite(own_run / "checkpoint-000010", lambda document, _: document.pop("classes"))
    trained = open_trained(own_run)
    assert trained.classes is None
    trained.require_classes(("any", "three", "names"), "the set")
    with pytest.raises(ValueError, match=r"the set has 1 classes and .* was trained for 3"):
        trained.require_classes(("one",), "the set")


def test_a_model_without_a_head_cannot_be_compared_with_labels(tmp_path: Path) -> None:
    write_folder(convert(saved(official_files.aim_clip(classes=None), tmp_path / "a.safetensors")), tmp_path / "a")
    opened = open_trained(tmp_path / "a")
    assert opened.assumed.startswith("clips are cut densely") and "class names" not in opened.assumed
    assert isinstance(opened.config, Config)
    with pytest.raises(ValueError, match="has no classifier, so there is nothing to compare with labels; train it"):
        opened.require_classes(NAMES, "the set")
