"""The public door: a published checkpoint through the program, then `model.load`, equals what was published."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from model.methods.aim import AIM
from model.parameters import count_parameters
from model.video import VideoModel
from tests import official_files
from tests.golden import load_golden
from tests.official_files import filled, saved
from tools.convert_checkpoint import main
from train.build import backbone_checksum, build_model
from train.checkpoint import identity, save_checkpoint
from train.config import Batch
from train.resolve import config_from_dict
from train.trained import open_trained

ROOT = Path(__file__).resolve().parents[2]


def refusal(*arguments: str | Path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def converted(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the program in this process and returns what it says."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["aim_clip_tiny", "aim_clip_b16_k400", "timesformer_divided"])
def test_equals_the_published_implementation(name: str, tmp_path: Path, converted: Callable[..., str]) -> None:
    state, clips, expected, facts = load_golden(name)
    save_file(state, tmp_path / "official.safetensors")
    said = converted(tmp_path / "official.safetensors", tmp_path / "out")
    assert f"parameters: {facts['total']:,}, of which {facts['trainable']:,} train" in said
    loaded = model.load(tmp_path / "out")
    assert count_parameters(loaded) == (facts["total"], facts["trainable"])
    with torch.inference_mode():
        logits = loaded(clips.transpose(1, 2))
    assert not loaded.training and logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_it_says(tmp_path: Path, converted: Callable[..., str]) -> None:
    state: dict[str, Any] = filled(official_files.aim_clip())
    state["backbone.proj"] = torch.zeros(128, 64)
    torch.save({"state_dict": state, "meta": {"epoch": 30}, "optimizer": {}}, tmp_path / "aim.pth")
    out = tmp_path / "new" / "aim"
    lines = converted(tmp_path / "aim.pth", out, "--from", "aim").splitlines()
    assert lines.pop(2).startswith("options: adapters = (spatial, temporal, joint), positions = all")
    assert lines == [
        "format: aim_clip (AIM on CLIP's ViT)",
        "model: aim on vit, width 128, patch 16, image 32, 4 frames, 5 classes",
        "parameters: 547,397, of which 51,525 train",
        "dropped: meta, optimizer: state of the training program, not weights",
        "dropped: backbone.proj: CLIP's projection to the texts' space: the head reads the features before it",
        "assumed, for no tensor shows it (settings of model.load): heads = 2, quick_gelu = True, adapter_scale = 0.5, "
        "mean = (0.4814, 0.4578, 0.408), std = (0.2686, 0.2613, 0.2758)",
        f"{out}: written; open it with model.load({str(out)!r})",
    ]
    back = converted(out, tmp_path / "back.safetensors", "--to", "aim").splitlines()
    assert back[-2] == f"{tmp_path / 'back.safetensors'}: 58 tensors under the names of aim_clip (AIM on CLIP's ViT)"
    assert back[-1].endswith("adapter_scale = 0.5, num_frames = 4")
    tensors = load_file(tmp_path / "back.safetensors")
    assert tensors.keys() == state.keys() - {"backbone.proj"}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)


def test_buffers_that_the_file_lacks_are_listed(tmp_path: Path, converted: Callable[..., str]) -> None:
    said = converted(saved(official_files.aim_swin(), tmp_path / "swin.safetensors"), tmp_path / "swin")
    assert (
        "kept as constructed, for the file lacks them: backbone.layers.0.blocks.0.attn.relative_position_index" in said
    )


def make_run(out: Path, **model_section: Any) -> VideoModel:
    """A run's folder with a checkpoint of tiny CLIP, and its model."""
    sections = {
        "data": {"num_frames": 4, "sampling": "uniform", "interval": 3},
        "model": {"name": "tiny-clip", "pretrained": "shapes", **model_section},
        "deepspeed": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8},
    }
    config = config_from_dict(sections)
    trained = build_model(config.model, num_classes=3, num_frames=4, seed=config.train.seed)
    checksum = backbone_checksum(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    groups = [{"params": group["params"]} for group in trained.optimizer_groups(0.0)]
    run = identity(config, fingerprint="", backbone=checksum)
    out.mkdir()
    save_checkpoint(
        out,
        3,
        trained,
        torch.optim.AdamW(groups),
        run=run,
        config=config,
        world_size=1,
        batch=Batch(8, 8, 1),
        bad_samples=(),
        classes=["a", "b", "c"],
        keep=1,
    )
    return trained.eval()


def test_a_run_goes_back_to_official_names_with_its_frozen_weights(
    tmp_path: Path, converted: Callable[..., str]
) -> None:
    trained = make_run(tmp_path / "run", adapter_scale=0.7)
    said = converted(tmp_path / "run", tmp_path / "official.pth", "--to", "aim")
    assert "adapter_scale = 0.7" in said.splitlines()[-2]
    document = torch.load(tmp_path / "official.pth", weights_only=True)
    own = dict(trained.named_parameters())
    assert document["state_dict"].keys() == own.keys()
    assert all(torch.equal(document["state_dict"][name], own[name]) for name in own)

    converted(tmp_path / "official.pth", tmp_path / "aim")
    clips = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = trained(clips)
        given = model.load(tmp_path / "aim", scale=0.7, mean=trained.geometry.mean, std=trained.geometry.std)(clips)
    torch.testing.assert_close(given, expected)


def test_the_command_that_it_prints_brings_the_same_model_back(tmp_path: Path, converted: Callable[..., str]) -> None:
    """The run's scale, mean and std are none of those that conversion assumes."""
    trained = make_run(tmp_path / "run", adapter_scale=1.0, normalisation="half", head_dropout=0.0)
    said = converted(tmp_path / "run", tmp_path / "official.pth", "--to", "aim").splitlines()
    command = shlex.split(said[-1].partition("assumed: ")[2])
    assert command[:4] == ["python", "tools/convert_checkpoint.py", str(tmp_path / "official.pth"), "NEW"]
    assert command[4:] == [
        *("--set", "adapter_scale=1.0", "--set", "head_dropout=0.0"),
        *("--set", "mean=[0.5,0.5,0.5]", "--set", "std=[0.5,0.5,0.5]"),
    ]
    said = converted(command[2], tmp_path / "back", *command[4:]).splitlines()
    assert "as --set says: adapter_scale = 1, head_dropout = 0, mean = (0.5, 0.5, 0.5), std = (0.5, 0.5, 0.5)" in said
    back = model.load(tmp_path / "back")
    assert (back.geometry, back.options.adapter_scale) == (trained.geometry, 1.0)
    clips = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(back(clips), trained(clips))
    converted(tmp_path / "back", tmp_path / "again.pth", "--to", "aim")
    assert open_trained(tmp_path / "back").model.geometry == trained.geometry


def test_a_run_keeps_its_classes_and_how_its_clips_are_cut(tmp_path: Path, converted: Callable[..., str]) -> None:
    make_run(tmp_path / "run")
    converted(tmp_path / "run", tmp_path / "folder")
    of_run, of_folder = open_trained(tmp_path / "run"), open_trained(tmp_path / "folder")
    assert of_folder.classes == of_run.classes == ("a", "b", "c") and of_folder.assumed == of_run.assumed == ""
    cut = [
        (one.config.data.num_frames, one.config.data.sampling, one.config.data.interval) for one in (of_run, of_folder)
    ]
    assert cut == [(4, "uniform", 3)] * 2


@pytest.mark.parametrize("method", ["finetuned", "frozen"])
def test_a_method_that_official_files_do_not_hold_is_named(
    method: str, tmp_path: Path, converted: Callable[..., str]
) -> None:
    make_run(tmp_path / "run", method=method)
    said = converted(tmp_path / "run", tmp_path / "official.pth", "--to", "aim").splitlines()
    assert f"official files do not hold the method: converted back, {method} becomes aim without adapters" in said
    converted(tmp_path / "official.pth", tmp_path / "back")
    back = model.load(tmp_path / "back")
    assert type(back) is AIM and back.options.adapters == ()


def test_what_cannot_be_made_is_said_before_anything_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(official_files.aim_clip(), tmp_path / "aim.safetensors")
    main([str(path), str(tmp_path / "folder")])
    capsys.readouterr()
    assert "must end in .safetensors or .pth" in refusal(tmp_path / "folder", tmp_path / "y.bin", "--to", "aim")
    assert "not timesformer: say --to aim" in refusal(tmp_path / "folder", tmp_path / "y.pth", "--to", "timesformer")
    assert f"{path} is a file; give a name in a folder" in refusal(tmp_path / "folder", path / "y.pth", "--to", "aim")
    assert f"{path} is a file; give a name in a folder" in refusal(path, path / "new" / "out")
    assert "unknown setting 'mena'" in refusal(path, tmp_path / "out", "--set", "mena=[0,0,0]")
    assert "allowed is 3 numbers" in refusal(path, tmp_path / "out", "--set", "mean=[0,0]")
    assert "the form is NAME=VALUE" in refusal(path, tmp_path / "out", "--set", "scale")
    assert "not valid TOML" in refusal(path, tmp_path / "out", "--set", "mean=[0,")
    assert "scale is set twice" in refusal(path, tmp_path / "out", "--set", "scale=1", "--set", "scale=2")
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


def test_every_refusal_is_one_line(tmp_path: Path) -> None:
    path = saved(official_files.aim_clip(), tmp_path / "aim.safetensors")
    (tmp_path / "there" / "mine").mkdir(parents=True)
    assert "there is there already; remove it" in refusal(path, tmp_path / "there")
    assert "not of timesformer" in refusal(path, tmp_path / "out", "--from", "timesformer")
    assert "does not exist" in refusal(tmp_path / "none.pth", tmp_path / "out")
    assert "convert it first" in refusal(path, tmp_path / "out.pth", "--to", "aim")
    assert "--from says the format of a file" in refusal(tmp_path / "there", tmp_path / "out", "--from", "aim")
    assert "is neither a run with a checkpoint" in refusal(tmp_path / "there", tmp_path / "out")
    main([str(path), str(tmp_path / "folder")])
    assert "is converted already; --to aim" in refusal(tmp_path / "folder", tmp_path / "out")
    assert "not timesformer: say --to aim" in refusal(tmp_path / "folder", tmp_path / "o.pth", "--to", "timesformer")
    assert not (tmp_path / "out").exists() and not (tmp_path / "o.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "clip"], "invalid choice: 'clip'"),
        (["--from", "aim", "--to", "aim"], "give one of them"),
        (["--set", "scale=1", "--to", "aim"], "leave it out with --to"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["a.pth", str(tmp_path / "out"), *arguments])
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_as_a_program_a_damaged_file_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    path = saved(official_files.aim_clip(), tmp_path / "aim.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), str(path), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and "is not a whole .safetensors file" in run.stderr
    assert len(run.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
