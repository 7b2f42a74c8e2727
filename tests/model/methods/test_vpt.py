"""VPT: parity and counts of the published one, where prompts go and how they start, and what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import model as project
from model.checkpoints import convert, count, write_folder
from model.geometry import ImageTower, ViTGeometry
from model.methods import create
from model.methods.vpt import VPT, VPTOptions
from model.parameters import count_parameters
from tests import official_files
from tests.blank_models import IN21K_B, blank_model
from tests.golden import load_golden
from tests.towers import CLIP, IMAGENET, tower

FRAMES = 3
both_geometries = pytest.mark.parametrize("geometry", [CLIP, IMAGENET], ids=["clip", "in21k"])


def small(geometry: ViTGeometry = IMAGENET, *, classes: int | None = None, **options: Any) -> VPT:
    """Prompts far from zero, so that they are seen."""
    chosen = VPTOptions(**{"num_prompts": 2, **options})
    made = VPT(tower(geometry), classes, FRAMES, chosen).eval()
    for name, parameter in made.named_parameters():
        if "prompt" in name or "fc_cls" in name:
            nn.init.normal_(parameter, std=0.5)
    return made


def clips(count: int = 2) -> Tensor:
    return torch.randn(count, FRAMES, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def test_the_published_model(tmp_path: Path) -> None:
    state, image, expected, facts = load_golden("vpt_deep")
    save_file(state, tmp_path / "official.safetensors")
    converted = convert(tmp_path / "official.safetensors")
    assert (converted.source, *count(converted)) == ("vpt", facts["total"], facts["trainable"])
    write_folder(converted, tmp_path / "ours")
    loaded = project.load(tmp_path / "ours")
    assert isinstance(loaded, VPT) and loaded.options == VPTOptions()
    with torch.inference_mode():
        logits = loaded(image[:, None])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@both_geometries
@pytest.mark.parametrize("depth", ["shallow", "deep", "prepended"])
def test_prompts_stand_where_they_are_published(geometry: ViTGeometry, depth: str) -> None:
    """By hand, a frame at a time, with torch's own attention: class token, prompts, patches, or prompts in front."""
    model = small(geometry, depth=depth)
    vit: Any = model.backbone
    expected = []
    with torch.no_grad():
        for frame in vit.stem(clips()).flatten(0, 1):
            later = [] if depth == "shallow" else vit.deep_prompt_embeddings
            prompts = dict(enumerate([vit.prompt_embeddings[0], *later]))
            x = frame
            for layer, block in enumerate(vit.blocks):
                if depth == "prepended":
                    x = torch.cat([prompts[layer], x])
                elif layer in prompts:
                    x = torch.cat([x[:1], prompts[layer], x[1 if layer == 0 else 3 :]])
                x = x + torch_attention(block.attn, block.ln_1(x))
                x = x + block.mlp(block.ln_2(x))
                x = x[2:] if depth == "prepended" else x
            expected.append(vit.ln_post(x[0]))
        features = torch.stack(expected).unflatten(0, (2, FRAMES)).transpose(1, 2)[..., None, None]
        torch.testing.assert_close(model.classify(clips()), features, atol=2e-5, rtol=1e-4)


def torch_attention(ours: nn.Module, x: Tensor) -> Tensor:
    theirs = nn.MultiheadAttention(x.shape[-1], ours.heads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return theirs(x[None], x[None], x[None])[0][0]


@pytest.mark.parametrize(
    ("options", "trainable"),
    [
        ({}, 92_160),
        ({"depth": "shallow"}, 7_680),
        ({"depth": "prepended", "num_prompts": 8}, 73_728),
        ({"prompt_width": 16}, 12 * 10 * 16 + 17 * 768),
    ],
)
def test_counts(options: dict[str, Any], trainable: int) -> None:
    model = blank_model("vpt", IN21K_B, 200, 1, **options)
    assert count_parameters(model) == (85_798_656 + trainable + 153_800, trainable + 153_800)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("prompt" in name or name.startswith("cls_head") for name in names)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, (6 / (3 * 16 * 16 + 128)) ** 0.5),
        ({"prompt_width": 8}, (6 / (3 * 16 * 16 + 8)) ** 0.5),
        ({"depth": "shallow"}, (6 / (3 * 16 * 16 + 128)) ** 0.5),
        ({"depth": "prepended", "num_prompts": 8}, (6 / (8 * 128 + 128)) ** 0.5),
    ],
)
def test_how_prompts_start(options: dict[str, Any], most: float) -> None:
    torch.manual_seed(0)
    vit: Any = VPT(tower(IMAGENET), 5, 1, VPTOptions(**options)).backbone
    sets = [vit.prompt_embeddings] + ([] if vit.deep_prompt_embeddings is None else [vit.deep_prompt_embeddings])
    assert sum(map(len, sets)) == (1 if options.get("depth") == "shallow" else 3)
    assert all(0.95 * most < prompts.abs().max() <= most for prompts in sets)
    if options.get("prompt_width"):
        assert vit.prompt_proj.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


def test_dropout_scales_the_prompts_of_one_clip() -> None:
    model, batch = small(prompt_dropout=0.25, prompt_width=8), clips()
    assert model.random_masks["prompt_dropout"].tolist() == torch.full((3, 2, 128), 0.25).tolist()
    assert "prompt_dropout" not in small().random_masks
    masks = torch.ones(2, 3, 2, 128)
    with torch.no_grad():
        before = model.classify(batch)
        torch.testing.assert_close(model.classify(batch, {"prompt_dropout": masks}), before)
        masks[1, 1:] = 0.0
        dropped = model.classify(batch, {"prompt_dropout": masks})
        vit: Any = model.backbone
        vit.deep_prompt_embeddings.zero_()
        vit.prompt_embeddings.zero_()
        vit.prompt_proj.weight.zero_()
        vit.prompt_proj.bias.zero_()
        masks[1, 0] = 0.0
        zero = model.classify(batch)
    torch.testing.assert_close(dropped[0], before[0])
    assert (dropped[1] - before[1]).abs().max() > 1e-3 and (dropped[1] - zero[1]).abs().max() > 1e-3


@both_geometries
def test_frames_are_seen_one_by_one(geometry: ViTGeometry) -> None:
    model, batch = small(geometry, classes=5), clips()
    with torch.inference_mode():
        logits = model(batch)
        torch.testing.assert_close(model(batch[:, [2, 0, 1]]), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([model(clip[None]) for clip in batch]), logits, atol=1e-5, rtol=1e-5)


def test_nothing_before_the_prompts_trains() -> None:
    model, frames = small(classes=5), torch.randint(0, 256, (2, FRAMES, 64, 64, 3), dtype=torch.uint8)
    assert model.has_frozen_stem
    with torch.no_grad():
        torch.testing.assert_close(model(model.stem(frames)), model(frames))
    F.cross_entropy(model(frames), torch.tensor([1, 4])).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    prompts = {"backbone.prompt_embeddings", "backbone.deep_prompt_embeddings"}
    assert moved == prompts | {"cls_head.fc_cls.weight", "cls_head.fc_cls.bias"}
    assert all(parameter.grad.flatten(2).any(2).all() for n, parameter in model.named_parameters() if n in prompts)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"depth": "deep", "num_prompts": 3, "prompt_width": 0}),
        ({"deep": False, "prompts": 7}, {"depth": "shallow", "num_prompts": 7, "prompt_width": 0}),
        ({"projected": 24}, {"depth": "deep", "num_prompts": 3, "prompt_width": 24}),
    ],
)
def test_options_are_read_off_the_tensors(arguments: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    path = official_files.saved(official_files.vpt(**arguments), tmp_path / "official.safetensors")
    converted = convert(path)
    assert {name: converted.description["options"][name] for name in options} == options
    write_folder(converted, tmp_path / "ours")
    assert project.load(tmp_path / "ours", num_frames=6).num_frames == 6


def test_the_heads_bias_alone_is_not_decayed() -> None:
    model = small(classes=5)
    kept = [p for group in model.optimizer_groups(0.1) if group["weight_decay"] == 0 for p in group["params"]]
    assert model.cls_head is not None and len(kept) == 1 and kept[0] is model.cls_head.fc_cls.bias


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"depth": "middle"}, r'model\.depth = "middle"; allowed is shallow, deep or prepended'),
        ({"num_prompts": 0}, r"model\.num_prompts = 0; allowed is 1 or more"),
        ({"prompt_width": -1}, r"model\.prompt_width = -1; allowed is 0"),
        ({"prompt_dropout": 1.0}, r"model\.prompt_dropout = 1\.0; allowed is 0 <= rate < 1"),
    ],
)
def test_impossible_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPTOptions(**option)


def test_a_model_of_one_block_has_no_deep_prompts() -> None:
    geometry = ViTGeometry(64, 1, 1, 16, 32, False, (0.5,) * 3, (0.5,) * 3, ln_pre=False, patch_bias=True)
    model = create("vpt", ImageTower(geometry, {}), num_classes=3, num_frames=1)
    assert model.backbone.deep_prompt_embeddings is None
    assert model(torch.randn(1, 1, 3, 32, 32)).shape == (1, 3)
