"""timm's image models: geometry, weights under CLIP's and Swin's official names, and refusals."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from model.geometry import SwinGeometry, ViTGeometry
from model.methods.aim import Frozen, SpaceOnlyOptions
from model.timm_models import clip_names, image_size, load_image_tower, names, official_swin_names

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def structure(name: str) -> dict[str, torch.Tensor]:
    """A timm model's state dict without memory for it."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False).state_dict()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vit_base_patch16_224",
            ViTGeometry(768, 12, 12, 16, 224, False, HALF, HALF, ln_pre=False, patch_bias=True, eps=1e-6),
        ),
        (
            "vit_large_patch16_224",
            ViTGeometry(1024, 24, 16, 16, 224, False, HALF, HALF, ln_pre=False, patch_bias=True, eps=1e-6),
        ),
        (
            "vit_tiny_patch16_384",
            ViTGeometry(192, 12, 3, 16, 384, False, HALF, HALF, ln_pre=False, patch_bias=True, eps=1e-6),
        ),
        ("swin_base_patch4_window7_224", SwinGeometry()),
        ("swin_tiny_patch4_window7_224", SwinGeometry(96, (2, 2, 6, 2), (3, 6, 12, 24))),
        ("swin_large_patch4_window12_384", SwinGeometry(192, heads=(6, 12, 24, 48), window=12, image_size=384)),
    ],
)
def test_geometry_comes_from_the_model(name: str, expected: ViTGeometry | SwinGeometry) -> None:
    tower = load_image_tower(name, "none")
    assert tower.geometry == expected and tower.state_dict == {}
    assert image_size(name) == expected.image_size


@pytest.mark.parametrize(
    ("name", "quick_gelu"), [("vit_base_patch16_clip_224", False), ("vit_base_patch16_clip_quickgelu_224", True)]
)
def test_clip_under_timms_names(name: str, quick_gelu: bool) -> None:
    geometry = load_image_tower(name, "none").geometry
    assert isinstance(geometry, ViTGeometry)
    assert (geometry.ln_pre, geometry.patch_bias, geometry.eps) == (True, False, 1e-5)
    assert geometry.quick_gelu == quick_gelu and geometry.mean[0] == 0.48145466


def test_every_tag_of_the_wrong_activation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other: what is asked of the hub then is told by an error of this test's own."""

    def offline(**_: str) -> str:
        raise OSError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for name in ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"):
        other = name.replace("_quickgelu", "") if "quickgelu" in name else name.replace("_224", "_quickgelu_224")
        for tag in (full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")):
            quick = tag in ("openai", "metaclip_400m", "metaclip_2pt5b")
            right = quick == ("quickgelu" in name)
            with pytest.raises(ValueError, match="asked the hub" if right else f"use model.name = '{other}'"):
                load_image_tower(name, tag)


def test_a_vits_names_are_exactly_those_of_our_backbone() -> None:
    for name in ("vit_base_patch16_224", "vit_base_patch16_clip_quickgelu_224"):
        tower = load_image_tower(name, "none")
        with torch.device("meta"):
            ours = Frozen(tower, None, 8, SpaceOnlyOptions()).backbone.state_dict()
        theirs = clip_names(structure(name))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_swins_stages_end_with_their_downsampling() -> None:
    official = official_swin_names(structure("swin_base_patch4_window7_224"))
    reductions = {key: list(value.shape) for key, value in official.items() if key.endswith("reduction.weight")}
    assert reductions == {f"layers.{i}.downsample.reduction.weight": [256 * 2**i, 512 * 2**i] for i in range(3)}
    assert not any("head" in key or "attn_mask" in key or "relative_position_index" in key for key in official)
    assert "norm.weight" in official
    assert official_swin_names(official) == official


@pytest.mark.parametrize("layout", ["timm", "official", "official .pth"])
def test_swin_weights_from_a_file_of_either_layout(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).state_dict()
    path = tmp_path / ("swin.pth" if layout.endswith(".pth") else "swin.safetensors")
    if layout.startswith("official"):
        constructed = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49), "head.weight": torch.zeros(1000, 768)}
        state_dict = {**official_swin_names(state), **constructed}
        torch.save({"model": state_dict}, path) if path.suffix == ".pth" else save_file(state_dict, path)
    else:
        save_file(state, path)
    tower = load_image_tower("swin_tiny_patch4_window7_224", str(path))
    expected = official_swin_names(state)
    assert tower.state_dict.keys() == expected.keys()
    assert all(torch.equal(tower.state_dict[key], value) for key, value in expected.items())


def test_weights_by_tag_come_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False).half().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    asked: list[dict[str, str]] = []

    def download(**arguments: str) -> str:
        asked.append(arguments)
        return str(tmp_path / arguments["filename"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tower = load_image_tower("vit_tiny_patch16_224", "augreg_in21k")
    assert asked == [{"repo_id": "timm/vit_tiny_patch16_224.augreg_in21k", "filename": "model.safetensors"}]
    weight = tower.state_dict["transformer.resblocks.3.attn.in_proj_weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, state["blocks.3.attn.qkv.weight"].float())


@pytest.mark.parametrize(
    ("tag", "mean_std"),
    [
        ("orig_in21k", (HALF, HALF)),
        ("orig_in21k_ft_in1k", (HALF, HALF)),
        ("augreg_in21k", (HALF, HALF)),
        ("dino", IMAGENET),
    ],
)
def test_normalisation_is_that_of_the_tag(
    tag: str, mean_std: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def state(path: Path) -> dict[str, torch.Tensor]:
        read.append(path)
        return structure("vit_base_patch16_224")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: str(tmp_path / tag))
    monkeypatch.setattr("model.timm_models._read", state)
    geometry = load_image_tower("vit_base_patch16_224", tag).geometry
    assert (geometry.mean, geometry.std) == mean_std and read == [tmp_path / tag]


def test_without_a_network_a_tag_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: str) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError,
        match=r"cannot load weights 'orig_in21k' of vit_base_patch16_224: no route to host.*FILE.safetensors, or",
    ) as error:
        load_image_tower("vit_base_patch16_224", "orig_in21k")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "text"),
    [
        ("vit_base_patch16_224", "orig", "has no weights 'orig'; allowed: .*orig_in21k_ft_in1k, .*or 'none'"),
        ("vit_base_patch16_224", "/nowhere/x.safetensors", "no such weight file: /nowhere/x.safetensors"),
        ("vit_base_patch16_clip_224", "openai", "use model.name = 'vit_base_patch16_clip_quickgelu_224'"),
        ("resnet50", "none", "resnet50: it is a timm ResNet; supported are plain ViTs with a class token and Swin"),
        ("deit_base_distilled_patch16_224", "none", "it is a timm VisionTransformerDistilled"),
        ("deit3_base_patch16_224", "none", "its class token has no position"),
        ("vit_base_patch14_dinov2", "none", r"it scales its layers \(layer scale\)"),
        ("vit_base_patch14_reg4_dinov2", "none", "it has register tokens"),
        ("vit_base_patch16_siglip_224", "none", "it has no class token"),
        ("eva_large_patch14_196", "none", "it pools with 'avg' instead of its class token"),
        ("vit_base_patch16_rope_224", "none", "it is a timm Eva with rotary positions"),
        ("vit_giant_patch14_dinov2", "none", "it scales its layers|its MLP"),
        ("vit_base_patch16_18x2_224", "none", "its blocks are Parallel"),
        ("swin_s3_base_224", "none", "its stages have different windows"),
        ("swinv2_base_window8_256", "none", "it is a timm SwinTransformerV2"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name: str, pretrained: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        load_image_tower(name, pretrained)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("test_")])
def test_timms_own_test_models_are_taken_or_refused_in_one_line(name: str) -> None:
    """They are small, and one of every structure that timm has."""
    try:
        assert load_image_tower(name, "none").geometry.image_size == image_size(name)
    except ValueError as error:
        assert "supported are" in str(error) and "\n" not in str(error)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict()
    path = tmp_path / "vit.safetensors"
    for changed, text in (
        ({k: v for k, v in state.items() if k != "norm.bias"}, r"missing \['ln_post.bias'\]"),
        ({**state, "blocks.0.ls1.gamma": torch.ones(192)}, r"unexpected \['transformer.resblocks.0.ls1.gamma'\]"),
        (
            {**state, "pos_embed": torch.zeros(1, 50, 192)},
            r"positional_embedding is \[50, 192\] instead of \[197, 192\]",
        ),
    ):
        save_file(changed, path)
        with pytest.raises(
            ValueError, match=f"weights .*vit.safetensors' of vit_tiny_patch16_224 do not fit: .*{text}"
        ):
            load_image_tower("vit_tiny_patch16_224", str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"vit\.safetensors is no weight file"):
        load_image_tower("vit_tiny_patch16_224", str(path))


def test_a_program_among_weights_is_not_opened(tmp_path: Path) -> None:
    """Neither pickled objects nor TorchScript."""
    torch.save({"model": Path("x")}, tmp_path / "objects.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, text in (("objects.pth", "pickled Python objects"), ("script.pt", "TorchScript archive")):
        with pytest.raises(ValueError, match=text) as error:
            load_image_tower("vit_tiny_patch16_224", str(tmp_path / name))
        assert "\n" not in str(error.value)
