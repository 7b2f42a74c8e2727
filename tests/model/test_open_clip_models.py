"""CLIP's image towers: geometry, weights of every kind of file, and refusals that name the way out."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import open_clip_models
from model.methods.aim import AIM, AIMOptions, Frozen, SpaceOnlyOptions
from model.open_clip_models import image_size, load_clip, load_image_tower, published_sha256
from model.timm_models import names as timm_names


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "patch", "size", "quick_gelu"),
    [
        ("ViT-B-32-quickgelu", 768, 12, 12, 32, 224, True),
        ("ViT-B-16", 768, 12, 12, 16, 224, False),
        ("ViT-L-14-quickgelu", 1024, 24, 16, 14, 224, True),
        ("ViT-L-14-336", 1024, 24, 16, 14, 336, False),
        ("ViT-H-14", 1280, 32, 16, 14, 224, False),  # heads are 80 wide
        ("ViT-S-16", 384, 12, 6, 16, 224, False),
        ("xlm-roberta-large-ViT-H-14", 1280, 32, 16, 14, 224, False),  # its text tower would need a network
        ("MobileCLIP2-L-14", 1024, 24, 16, 14, 224, False),  # a plain ViT that open_clip takes from timm
        ("tiny-clip", 128, 4, 2, 12, 48, True),
    ],
)
def test_geometry_comes_from_the_model(
    name: str, width: int, layers: int, heads: int, patch: int, size: int, quick_gelu: bool
) -> None:
    tower = load_image_tower(name, "none")
    geometry = tower.geometry
    assert (geometry.width, geometry.layers, geometry.heads) == (width, layers, heads)  # type: ignore[union-attr]
    assert (geometry.patch_size, geometry.image_size, image_size(name)) == (patch, size, size)
    assert geometry.quick_gelu == quick_gelu and geometry.ln_pre and geometry.eps == 1e-5  # type: ignore[union-attr]
    assert tower.state_dict == {}


def test_feed_forward_layers_of_another_width() -> None:
    tower = load_image_tower("ViT-g-14", "none")
    assert tower.geometry.mlp_width == 6144 and tower.geometry.width == 1408  # type: ignore[union-attr]
    with torch.device("meta"):
        backbone = Frozen(tower, None, 8, SpaceOnlyOptions()).backbone
        theirs = open_clip.model._build_vision_tower(1024, open_clip.get_model_config("ViT-g-14")["vision_cfg"])
    ours = {key: value.shape for key, value in backbone.state_dict().items()}
    assert ours == {key: value.shape for key, value in theirs.state_dict().items() if key != "proj"}
    assert load_image_tower("ViT-B-16", "none").geometry.mlp_width == 0  # type: ignore[union-attr]


def test_every_kind_of_tower_is_taken_or_refused_in_one_line() -> None:
    """Of each kind of configuration the narrowest model that open_clip has."""
    kinds: dict[object, str] = {}
    for name in sorted(set(open_clip.list_models()) - set(timm_names()), key=vision_width):
        vision = open_clip.get_model_config(name)["vision_cfg"]
        family = vision.get("timm_model_name", "")[:8] or isinstance(vision["layers"], list)
        kinds.setdefault((family, *sorted(vision.keys() - {"head_width"})), name)
    taken = set()
    for name in kinds.values():
        try:
            load_image_tower(name, "none")
            taken.add(name)
        except ValueError as error:
            assert f"model {name}: it" in str(error) and "supported are" in str(error) and "\n" not in str(error)
    assert taken and len(taken) < len(kinds) and len(kinds) >= 10


def vision_width(name: str) -> tuple[int, str]:
    return open_clip.get_model_config(name)["vision_cfg"].get("width", 10_000), name


def test_shipped_weights_load() -> None:
    shipped, again = load_image_tower("tiny-clip", "shapes"), load_image_tower("tiny-clip", "shapes")
    assert "proj" not in shipped.state_dict
    assert all(torch.equal(v, again.state_dict[k]) for k, v in shipped.state_dict.items())
    file = load_file(open_clip_models.TINY_CLIP_FOLDER / "tiny-clip.safetensors")
    assert all(torch.equal(v, file[f"visual.{k}"].float()) for k, v in shipped.state_dict.items())


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin"])
def test_weights_from_a_file(ending: str, tmp_path: Path) -> None:
    model = load_clip("tiny-clip", "none")
    path = tmp_path / f"own{ending}"
    if ending == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    tower = load_image_tower("tiny-clip", str(path))
    assert all(torch.equal(tower.state_dict[k], v) for k, v in model.visual.state_dict().items() if k != "proj")


@pytest.mark.parametrize(
    ("name", "pretrained", "text"),
    [
        ("ViT-B-61", "openai", "unknown model.name 'ViT-B-61'; close names: .*ViT-B-16"),
        ("ViT-B-16", "openai", "trained with QuickGELU: use model.name = 'ViT-B-16-quickgelu'"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "has no weights 'laion2b_s34b_b88k'; allowed: openai"),
        ("ViT-B-16", "nonsense", "has no weights 'nonsense'; allowed: .*openai"),
        ("tiny-clip", "openai", r"allowed: shapes \(--set model.pretrained=shapes\), a .safetensors file, or 'none'"),
        ("ViT-B-16", "/nowhere/x.safetensors", "no such weight file: /nowhere/x.safetensors"),
        ("RN50", "none", "RN50: its image tower is a ModifiedResNet; supported are plain CLIP ViTs"),
        ("ViT-B-16-SigLIP", "none", "SigLIP: its image tower comes from timm, and it has no class token; supported"),
        ("EVA02-B-16", "none", "EVA02-B-16: .* it is a timm Eva with rotary positions; supported"),
        ("coca_ViT-B-32", "none", "coca_ViT-B-32: it pools by attention; supported"),
        ("ViT-L-14-CLIPA", "none", "it pools over its patches instead of its class token; supported"),
        ("ViT-M-16-alt", "none", r"it scales its layers \(layer scale\); supported"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name: str, pretrained: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        load_image_tower(name, pretrained)
    assert "\n" not in str(error.value)


def test_without_a_network_a_tag_says_so_before_and_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> nn.Module:
        said.append(capsys.readouterr().err)
        try:
            raise OSError("no route\nto host")
        except OSError as error:
            raise RuntimeError("at length: " + 300 * "long ") from error

    said: list[str] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(open_clip, "create_model", offline)
    remedy = r"--set model.pretrained=FILE.safetensors, or --set model.name=tiny-clip --set model.pretrained=shapes$"
    with pytest.raises(
        ValueError, match=r"^cannot load weights 'openai' of ViT-B-16-quickgelu: no route to host\. A.*" + remedy
    ):
        load_clip("ViT-B-16-quickgelu", "openai")
    assert said == ["fetching weights openai of ViT-B-16-quickgelu (without a network this fails after a minute)\n"]
    cached = tmp_path / "models--timm--vit_base_patch16_clip_224.openai" / "snapshots" / "1" / "weights"
    cached.parent.mkdir(parents=True)
    cached.touch()
    with pytest.raises(ValueError, match="cannot load"):
        load_clip("ViT-B-16-quickgelu", "openai")
    assert said[1] == ""


def test_every_tag_of_the_wrong_activation_is_refused() -> None:
    wrong = 0
    for name, tag in open_clip.list_pretrained():
        quick = bool(open_clip.get_model_config(name).get("quick_gelu", False))
        if quick == bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)):
            continue
        wrong += 1
        with pytest.raises(ValueError, match=r"were trained with (QuickGELU|erf GELU): use ") as error:
            load_clip(name, tag)
        _, named, right = str(error.value).partition("model.name = ")
        assert not named or tag in open_clip.list_pretrained_tags_by_model(right.strip("'"))
    assert wrong > 20


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_file_that_is_no_weight_file(ending: str, tmp_path: Path) -> None:
    bad = tmp_path / f"bad{ending}"
    bad.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match=r"is not a whole|holds pickled Python objects|is no weight file") as error:
        load_image_tower("tiny-clip", str(bad))
    assert "\n" not in str(error.value)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "trap.pt"
    path.write_bytes(pickle.dumps(Trap(touched), protocol=2))
    with pytest.raises(ValueError, match=r"is not a whole|holds pickled Python objects|is no weight file"):
        load_image_tower("tiny-clip", str(path))
    torch.save({"weight": Trap(touched)}, path)
    with pytest.raises(ValueError, match=r"is not a whole|holds pickled Python objects|is no weight file"):
        load_image_tower("tiny-clip", str(path))
    assert not touched.exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    state = load_clip("tiny-clip", "none").state_dict()
    save_file({k: v for k, v in state.items() if k != "visual.ln_post.weight"}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"cannot load weights .*visual\.ln_post.weight") as error:
        load_image_tower("tiny-clip", str(tmp_path / "part.safetensors"))
    assert "\n" not in str(error.value)


class Archive(nn.Module):
    """As OpenAI's archives: CLIP's parameters in half precision, and three constants among them."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(1))
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    clip = load_clip("tiny-clip", "none")
    path = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.trace(Archive(clip), torch.zeros(1)), path)
    return path


def test_other_torchscript_is_refused_unopened(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the archive was opened")

    monkeypatch.setattr(torch.jit, "load", never)
    for name, published in (("tiny-clip", "none"), ("ViT-B-16-quickgelu", "5806e77cd80f8b59")):
        with pytest.raises(ValueError, match=f"is not the one that OpenAI publishes for {name} .{published}") as error:
            load_image_tower(name, str(archive))
        assert "\n" not in str(error.value)
        assert hashlib.sha256(archive.read_bytes()).hexdigest() in str(error.value)
        assert "torch.jit.load(PATH, 'cpu').state_dict()" in str(error.value)


def test_openais_archive_is_taken_for_its_model_alone(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"tiny-clip": hashlib.sha256(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr(open_clip_models, "published_sha256", table.get)
    tower = load_image_tower("tiny-clip", str(archive))
    expected = torch.jit.load(archive).state_dict()
    for key, value in tower.state_dict.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[f"visual.{key}"].float())
    with pytest.raises(ValueError, match=r"OpenAI publishes for ViT-B-32-quickgelu .none"):
        load_image_tower("ViT-B-32-quickgelu", str(archive))
    table["ViT-B-32"] = table["tiny-clip"]
    with pytest.raises(ValueError, match=r"use model\.name = 'ViT-B-32-quickgelu'"):
        load_image_tower("ViT-B-32", str(archive))


def test_openais_checksums_are_whole() -> None:
    digests = {name: published_sha256(name) for name in open_clip.list_pretrained_models_by_tag("openai")}
    assert len(digests) == 18 and len(set(digests.values())) == 9
    assert all(digest is not None and len(digest) == 64 for digest in digests.values())
    assert published_sha256("ViT-H-14") is None and published_sha256("tiny-clip") is None


def test_text_tower_of_a_model_whose_towers_agree(tmp_path: Path) -> None:
    config = (open_clip_models.TINY_CLIP_FOLDER / "tiny-clip.json").read_text()
    (tmp_path / "twin-clip.json").write_text(
        config.replace('"width": 48', '"width": 128')
        .replace('"heads": 3', '"heads": 2')
        .replace('"layers": 2', '"layers": 4')
    )
    open_clip.add_model_config(tmp_path / "twin-clip.json")
    weights = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("twin-clip").state_dict(), weights)
    tower = load_image_tower("twin-clip", str(weights), text_tower=True)
    model = AIM(tower, 5, 2, AIMOptions(temporal_weights="text"))
    assert tower.text_state is not None
    for layer, block in enumerate(model.backbone.transformer.resblocks):
        expected = tower.text_state[f"transformer.resblocks.{layer}.attn.in_proj_weight"]
        assert torch.equal(block.text_attn.in_proj_weight, expected)


def test_text_tower_of_another_width_is_refused() -> None:
    tower = load_image_tower("tiny-clip", "shapes", text_tower=True)
    with pytest.raises(ValueError, match=r"needs .*resblocks.0.ln_1.weight of shape \[128\].* has \[48\]") as error:
        AIM(tower, 5, 2, AIMOptions(temporal_weights="text"))
    assert "\n" not in str(error.value)
