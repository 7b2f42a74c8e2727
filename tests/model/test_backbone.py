"""Image models by name: which library has one, whose normalisation holds, and what is said of names that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from model.backbone import NORMALISATIONS, image_size, load_image_tower
from model.geometry import SwinGeometry, ViTGeometry
from model.open_clip_models import load_clip


@pytest.mark.parametrize(
    ("name", "kind", "size", "ln_pre"),
    [
        ("tiny-clip", ViTGeometry, 48, True),
        ("ViT-L-14-336-quickgelu", ViTGeometry, 336, True),
        ("vit_base_patch16_224", ViTGeometry, 224, False),
        ("swin_base_patch4_window12_384", SwinGeometry, 384, None),
        ("swin_base_patch4_window7_224", SwinGeometry, 224, None),  # a name that open_clip knows too
    ],
)
def test_a_name_finds_its_library(name: str, kind: type, size: int, ln_pre: bool | None) -> None:
    geometry = load_image_tower(name, "none").geometry
    assert type(geometry) is kind and geometry.image_size == image_size(name) == size
    assert getattr(geometry, "ln_pre", None) == ln_pre


@pytest.mark.parametrize("door", [lambda name: load_image_tower(name, "none"), image_size])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ViT-B-61", "unknown model.name 'ViT-B-61'; close names: .*ViT-B-16"),
        ("vit_base_patch61_224", "unknown model.name 'vit_base_patch61_224'; close names: .*vit_base_patch16_224"),
        ("swin_base_patch4_window7", "close names: .*swin_base_patch4_window7_224"),
        ("???", "close names: ViT-B-16-quickgelu, .*vit_base_patch16_224"),
        (
            "vit_base_patch16_224.orig_in21k",
            "write model.name = 'vit_base_patch16_224' and model.pretrained = 'orig_in21k'",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones_of_both(door: object, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        door(name)  # type: ignore[operator]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "vit_base_patch16_224"])
def test_the_shipped_weights_name_their_model(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model {name} has no weights 'shapes'.*: add --set model\.name=tiny-clip"):
        load_image_tower(name, "shapes")


def test_normalisation_is_that_of_the_weights_unless_asked_otherwise() -> None:
    clip, imagenet = load_image_tower("tiny-clip", "none").geometry, load_image_tower("vit_tiny_patch16_224", "none")
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073) and clip.std == (0.26862954, 0.26130258, 0.27577711)
    assert imagenet.geometry.mean == imagenet.geometry.std == (0.5, 0.5, 0.5)
    assert load_image_tower("swin_tiny_patch4_window7_224", "none").geometry.mean == (0.485, 0.456, 0.406)
    for key, (mean, std) in NORMALISATIONS.items():
        geometry = load_image_tower("tiny-clip", "none", normalisation=key).geometry
        assert (geometry.mean, geometry.std) == (mean, std)


def test_normalisations_are_the_published_ones() -> None:
    """On the 0-255 scale of the official configs; those of CLIP are rounded there."""
    published = {
        "openai_clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
        "aim_clip": ((122.769, 116.74, 104.04), (68.493, 66.63, 70.321)),
        "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        "half": ((127.5,) * 3, (127.5,) * 3),
        "timesformer": ((114.75,) * 3, (57.375,) * 3),
    }
    assert published.keys() == NORMALISATIONS.keys()
    for key, pair in published.items():
        for ours, theirs in zip(NORMALISATIONS[key], pair, strict=True):
            assert [255 * value for value in ours] == pytest.approx(theirs, abs=1e-9)


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.normalisation = 'clip'; allowed is openai_clip, aim_clip, imagenet"):
        load_image_tower("tiny-clip", "none", normalisation="clip")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    weights = load_clip("tiny-clip", "shapes").state_dict()
    weights["visual.ln_pre.weight"][3] = float("nan")
    save_file(weights, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"own.safetensors' of tiny-clip: ln_pre.weight holds NaN"):
        load_image_tower("tiny-clip", str(tmp_path / "own.safetensors"))


def test_only_clip_has_a_text_tower() -> None:
    text = load_image_tower("tiny-clip", "shapes", text_tower=True).text_state
    assert text is not None and text["transformer.resblocks.1.ln_1.weight"].shape == (48,)
    assert load_image_tower("tiny-clip", "shapes").text_state is None
    with pytest.raises(ValueError, match="needs a text tower, and vit_base_patch16_224 has none"):
        load_image_tower("vit_base_patch16_224", "none", text_tower=True)
    with pytest.raises(ValueError, match="the text tower of roberta-ViT-B-32 is not CLIP's"):
        load_image_tower("roberta-ViT-B-32", "none", text_tower=True)
