"""A merged model through the program and `model.load` answers as the trained one did, and keeps what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import model
from model.checkpoints import convert, read_folder, write_folder
from model.methods.zero_i2v import ZeroI2V
from tests import official_files
from tests.official_files import saved
from tests.tools.test_convert_checkpoint import make_run
from tools.export import main
from train.trained import open_trained

CLIP_SHAPE = (1, 4, 3, 48, 48)


def logits(network: nn.Module, shape: tuple[int, ...] = CLIP_SHAPE) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = network(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    return answer


def test_a_run_is_merged_and_keeps_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = make_run(tmp_path / "run", method="zero_i2v")
    main([str(tmp_path / "run"), str(tmp_path / "out")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("merged: ") and said[-1].startswith(f"{tmp_path / 'out'}: written; open it with")
    merged = model.load(tmp_path / "out")
    expected = logits(trained)
    assert not any("Adapter" in name for name, _ in merged.named_parameters())
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = open_trained(tmp_path / "out")
    assert again.classes == ("a", "b", "c")
    assert (again.config.data.sampling, again.config.data.interval, again.assumed) == ("uniform", 3, "")


def test_a_converted_checkpoint_is_merged_with_its_settings(tmp_path: Path) -> None:
    write_folder(convert(saved(official_files.zero_i2v(), tmp_path / "a.safetensors")), tmp_path / "a")
    main([str(tmp_path / "a"), str(tmp_path / "out"), "--set", "model.adapter_scale=1.0"])
    shape = (1, 4, 3, 32, 32)
    expected = logits(model.load(tmp_path / "a", scale=1), shape)
    assert (logits(model.load(tmp_path / "out"), shape) - expected).abs().max() <= 1e-5 * expected.abs().max()
    stored = read_folder(tmp_path / "out")
    assert (stored.source, stored.classes, stored.sampling) == ("zero_i2v", None, None)


def test_a_model_with_nothing_to_merge_is_written_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(convert(saved(official_files.aim_clip(), tmp_path / "a.safetensors")), tmp_path / "a")
    main([str(tmp_path / "a"), str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("nothing to merge")
    first, second = read_folder(tmp_path / "a"), read_folder(tmp_path / "out")
    assert first.description == second.description
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    with pytest.raises(ValueError, match="is there already"):
        main([str(tmp_path / "a"), str(tmp_path / "out")])


def test_a_merged_model_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(convert(saved(official_files.zero_i2v(), tmp_path / "a.safetensors")), tmp_path / "a")
    merge = ZeroI2V.merged

    def wrong(network: ZeroI2V) -> Any:
        merged = merge(network)
        nn.init.zeros_(next(iter(merged.parameters())))
        return merged

    monkeypatch.setattr(ZeroI2V, "merged", wrong)
    with pytest.raises(ValueError, match=r"is off by .* of the largest logit, allowed is"):
        main([str(tmp_path / "a"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
