"""Loading image towers: geometry, refusals that name the way out, and the weights that ship with the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.open_clip_models import image_size, load_clip, load_image_tower


def test_geometry_comes_from_the_model() -> None:
    geometry = load_image_tower("ViT-B-32-quickgelu", "none").geometry
    assert (geometry.width, geometry.layers, geometry.heads, geometry.patch_size) == (768, 12, 12, 32)
    assert geometry.image_size == image_size("ViT-B-32-quickgelu") == 224
    assert geometry.num_tokens == 50 and geometry.quick_gelu
    assert not load_image_tower("ViT-B-32", "none").geometry.quick_gelu


def test_shipped_weights_load() -> None:
    shipped, again = load_image_tower("tiny-clip", "shapes"), load_image_tower("tiny-clip", "shapes")
    assert shipped.geometry.image_size == image_size("tiny-clip")
    assert "proj" not in shipped.state_dict
    assert all(torch.equal(v, again.state_dict[k]) for k, v in shipped.state_dict.items())
    random = load_image_tower("tiny-clip", "none")
    assert not torch.equal(shipped.state_dict["conv1.weight"], random.state_dict["conv1.weight"])


def test_weights_from_a_file(tmp_path: Path) -> None:
    model = load_clip("tiny-clip", "none")
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    tower = load_image_tower("tiny-clip", str(tmp_path / "own.safetensors"))
    assert all(torch.equal(tower.state_dict[k], v) for k, v in model.visual.state_dict().items() if k != "proj")


@pytest.mark.parametrize(
    ("name", "pretrained", "text"),
    [
        ("ViT-B-61", "openai", "unknown model.name 'ViT-B-61'; close names: .*ViT-B-16"),
        ("ViT-B-16", "openai", "use model.name = 'ViT-B-16-quickgelu'"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "no weights|use model.name = 'ViT-B-16'"),
        ("ViT-B-16", "nonsense", "has no weights 'nonsense'; allowed: .*openai"),
        ("tiny-clip", "openai", "allowed: shapes, a .safetensors file, or 'none'"),
        ("ViT-B-16", "/nowhere/x.safetensors", "no such weight file: /nowhere/x.safetensors"),
        ("RN50", "none", "RN50: its image tower is a ModifiedResNet; supported are plain CLIP ViTs"),
        ("ViT-B-16-SigLIP", "none", "ViT-B-16-SigLIP: its image tower is a TimmModel"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name: str, pretrained: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        load_image_tower(name, pretrained)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_weight_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match="cannot load weights"):
        load_image_tower("tiny-clip", str(bad))
