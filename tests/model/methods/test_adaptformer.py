"""AdaptFormer, both forms: parity and counts of the published ones, what the bottleneck reads, and where weights come
from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import model as project
from model.checkpoints import convert, count, lost_settings, read_folder, with_settings, write_folder, write_official
from model.flops import count_cost
from model.geometry import ImageTower, ViTGeometry
from model.methods.adaptformer import (
    AdaptFormer,
    AdaptFormerOptions,
    AdaptFormerVideo,
    AdaptFormerVideoOptions,
    AdaptMLP,
    spread,
)
from model.methods.aim import Finetuned, SpaceOnlyOptions
from model.parameters import count_parameters
from model.videomae import TubeletEmbedding, sinusoids
from tests import official_files
from tests.blank_models import CLIP_B, IN21K_B, blank_model
from tests.golden import load_golden
from tests.towers import CLIP, IMAGENET, tower

FRAMES = 4
SMALL = ViTGeometry(64, 2, 1, 16, 32, False, (0.5,) * 3, (0.5,) * 3, ln_pre=False, patch_bias=True, eps=1e-6)
both_geometries = pytest.mark.parametrize("geometry", [CLIP, IMAGENET], ids=["clip", "in21k"])


def image_form(
    geometry: ViTGeometry = IMAGENET, *, classes: int | None = None, busy: bool = True, **options: Any
) -> Any:
    made = AdaptFormer(tower(geometry), classes, FRAMES, AdaptFormerOptions(**{"bottleneck": 8, **options})).eval()
    return scatter(made) if busy else made


def video_form(*, classes: int | None = None, weights: dict[str, Tensor] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    chosen = AdaptFormerVideoOptions(**{"bottleneck": 8, **options})
    return scatter(AdaptFormerVideo(ImageTower(SMALL, weights or {}), classes, FRAMES, chosen).eval())


def scatter(model: Any) -> Any:
    """What trains, away from its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def clips(size: int = 64, count: int = 2) -> Tensor:
    return torch.randn(count, FRAMES, 3, size, size, generator=torch.Generator().manual_seed(5))


def test_the_published_video_model(tmp_path: Path) -> None:
    state, video, expected, facts = load_golden("adaptformer_video")
    state["head.0.num_batches_tracked"] = torch.tensor(7)
    save_file(state, tmp_path / "official.safetensors")
    converted = convert(tmp_path / "official.safetensors")
    assert (converted.source, *count(converted)) == ("adaptformer_video", facts["total"], facts["trainable"])
    assert [name for name, _ in converted.dropped] == ["head.0.num_batches_tracked"]
    write_folder(converted, tmp_path / "ours")
    loaded = project.load(tmp_path / "ours")
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(facts["trainable_names"])
    with torch.inference_mode():
        logits = loaded(video.transpose(1, 2))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert round(count_cost(loaded).gmac * 1e9) == round(facts["gmac"] * 1e9)


@pytest.mark.parametrize(
    ("method", "name", "options", "trainable"),
    [
        ("adaptformer", IN21K_B, {}, 12 * 99_136),
        ("adaptformer", CLIP_B, {"bottleneck": 1}, 12 * (2 * 768 + 1 + 768)),
        ("adaptformer_video", IN21K_B, {}, 12 * 99_136 + 1_536),
        ("adaptformer_video", IN21K_B, {"bottleneck": 0}, 1_536),
        ("adaptformer_video", IN21K_B, {"bottleneck": 0, "prompts": 8}, 73_728 + 1_536),
    ],
)
def test_counts(method: str, name: str, options: dict[str, Any], trainable: int) -> None:
    head = 174 * 769
    trunk = {("adaptformer", CLIP_B): 85_799_424, ("adaptformer", IN21K_B): 85_798_656}.get(
        (method, name), 87_550_638 - 1_324_974
    )
    model = blank_model(method, name, 174, 16, **options)
    assert count_parameters(model) == (trunk + trainable + head, trainable + head)
    assert trainable + head in (1_324_974, 135_342, 209_070) or method == "adaptformer"


def test_fewer_frames_cost_less_than_half() -> None:
    assert count_cost(blank_model("adaptformer_video", IN21K_B, 174, 8)).gmac == pytest.approx(79.8, abs=0.05)


@both_geometries
def test_it_starts_as_the_image_model(geometry: ViTGeometry) -> None:
    plain = Finetuned(tower(geometry), None, FRAMES, SpaceOnlyOptions()).eval()
    with torch.inference_mode():
        torch.testing.assert_close(image_form(geometry, busy=False).classify(clips()), plain.classify(clips()))


@both_geometries
def test_a_block_is_the_published_one(geometry: ViTGeometry) -> None:
    """The bottleneck reads what the MLP's norm reads, and not the norm."""
    model = image_form(geometry, adapter_scale=0.3)
    block, x = model.blocks[1], torch.randn(2, FRAMES, 17, 128)
    theirs = nn.MultiheadAttention(128, 2, batch_first=True)
    theirs.load_state_dict(block.attn.state_dict())
    down, up = block.adaptmlp.down_proj, block.adaptmlp.up_proj
    with torch.no_grad():
        flat = block.ln_1(x).flatten(0, 1)
        y = x + theirs(flat, flat, flat)[0].reshape(x.shape)
        added = F.linear(F.relu(F.linear(y, down.weight, down.bias)), up.weight, up.bias)
        expected = y + block.mlp(block.ln_2(y)) + 0.3 * added
        assert added.abs().max() > 0.5
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["image", "video"])
def test_dropout_scales_hidden_features_of_one_clip(form: str) -> None:
    model, size = (image_form(adapter_dropout=0.25), 64) if form == "image" else (video_form(adapter_dropout=0.25), 32)
    layers = len(model.blocks)
    assert model.random_masks["adapter_dropout"].tolist() == [[0.25] * 8] * layers
    masks = torch.ones(2, layers, 8)
    with torch.no_grad():
        before = model.classify(clips(size))
        torch.testing.assert_close(model.classify(clips(size), {"adapter_dropout": masks}), before)
        masks[0, 1, :3], masks[0, 1, 3:] = 0.0, 4 / 3
        dropped = model.classify(clips(size), {"adapter_dropout": masks})
        scaled = copy.deepcopy(model)
        scaled.blocks[1].adaptmlp.up_proj.weight.mul_(masks[0, 1])
        torch.testing.assert_close(dropped[0], scaled.classify(clips(size))[0], atol=1e-5, rtol=1e-5)
        assert (dropped[0] - before[0]).abs().max() > 1e-3
        torch.testing.assert_close(dropped[1], before[1])


def test_the_image_form_sees_frames_one_by_one() -> None:
    model, order = image_form(classes=5), [2, 0, 3, 1]
    with torch.inference_mode():
        torch.testing.assert_close(model(clips()[:, order]), model(clips()), atol=1e-5, rtol=1e-5)


def test_the_video_form_sees_the_order_of_tubelets_and_of_frames() -> None:
    model, batch = video_form(classes=5), clips(32)
    with torch.inference_mode():
        logits = model(batch)
        for order in ([2, 3, 0, 1], [1, 0, 3, 2]):
            assert (model(batch[:, order]) - logits).abs().max() > 1e-3
        torch.testing.assert_close(torch.cat([model(clip[None]) for clip in batch]), logits, atol=1e-5, rtol=1e-5)


def test_the_head_norms_by_the_batch_in_training_and_by_what_it_remembers_in_evaluation() -> None:
    head: Any = image_form(classes=5).cls_head
    theirs = nn.BatchNorm1d(128, affine=False, eps=1e-6)
    for _ in range(3):
        x = 3 + 2 * torch.randn(8, 128)
        torch.testing.assert_close(head.train()(x), head.fc_cls(theirs(x)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.eval()(x), head.fc_cls(theirs.eval()(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["head", "head.1"])
def test_a_head_without_its_batch_norm_is_read_too(head: str, tmp_path: Path) -> None:
    shapes = official_files.adaptformer_image(head=head)
    state = {name: tensor for name, tensor in official_files.filled(shapes).items() if "running" not in name}
    save_file(state, tmp_path / "official.safetensors")
    write_folder(convert(tmp_path / "official.safetensors"), tmp_path / "ours")
    loaded = project.load(tmp_path / "ours", num_frames=FRAMES)
    with torch.inference_mode():
        logits = loaded(clips(32))
        features = loaded.backbone(clips(32), {}).flatten(2).mean(2)
    expected = F.linear(features, state[f"{head}.weight"], state[f"{head}.bias"])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_image_files_equal_the_model_by_hand(tmp_path: Path) -> None:
    """timm's own ViT with a hook that adds the bottleneck; the file's names are the official ones."""
    from timm.models.vision_transformer import VisionTransformer

    state = official_files.filled(official_files.adaptformer_image())
    theirs = VisionTransformer(img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=0).eval()
    renamed = {name.replace(".fc", ".mlp.fc"): tensor for name, tensor in state.items() if ".adaptmlp." not in name}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"blocks.{i}.attn.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    theirs.load_state_dict({name: tensor for name, tensor in renamed.items() if not name.startswith("head.")})

    def beside(layer: int, x: Tensor) -> Tensor:
        down, up = (f"blocks.{layer}.adaptmlp.{part}_proj." for part in ("down", "up"))
        hidden = F.relu(F.linear(x, state[f"{down}weight"], state[f"{down}bias"]))
        return 0.1 * F.linear(hidden, state[f"{up}weight"], state[f"{up}bias"])

    with torch.inference_mode():
        x = theirs.pos_drop(theirs._pos_embed(theirs.patch_embed(clips(32).flatten(0, 1))))
        for layer, block in enumerate(theirs.blocks):
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x)) + beside(layer, x)
        features = theirs.norm(x)[:, 0].unflatten(0, (2, FRAMES)).mean(1)
        mean, var = state["head.0.running_mean"], state["head.0.running_var"]
        expected = F.linear((features - mean) / (var + 1e-6).sqrt(), state["head.1.weight"], state["head.1.bias"])
        save_file(state, tmp_path / "official.safetensors")
        write_folder(convert(tmp_path / "official.safetensors"), tmp_path / "ours")
        logits = project.load(tmp_path / "ours", num_frames=FRAMES)(clips(32))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_tubelets_are_a_convolution_over_time_and_space() -> None:
    embedding, batch = TubeletEmbedding(64, 2, 16), clips(32)
    expected = F.conv3d(batch.transpose(1, 2), embedding.weight, embedding.bias, stride=(2, 16, 16))
    torch.testing.assert_close(embedding(batch), expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_positions_are_the_published_sinusoids() -> None:
    width = 64
    angles = np.array([[at / np.power(10000, 2 * (i // 2) / width) for i in range(width)] for at in range(9)])
    expected = np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles))
    torch.testing.assert_close(sinusoids(9, width), torch.tensor(expected, dtype=torch.float32), atol=1e-7, rtol=0)


@pytest.mark.parametrize("start", ["random", "zero"])
def test_the_video_forms_bottlenecks_start_in_either_way(start: str) -> None:
    options = AdaptFormerVideoOptions(adapter_start=start)
    model = AdaptFormerVideo(ImageTower(SMALL, {}), 5, FRAMES, options)
    for module in model.modules():
        if isinstance(module, AdaptMLP):
            assert not module.down_proj.bias.any() and not module.up_proj.bias.any()
            std = {"random": 0.02, "zero": 1 / (3 * 64) ** 0.5}[start]
            assert module.down_proj.weight.std().item() == pytest.approx(std, rel=0.1)
            assert module.up_proj.weight.std().item() == pytest.approx({"random": 0.02, "zero": 0.0}[start], rel=0.1)


def test_prompts_stand_in_front_of_every_block_and_are_cut_off_after_it() -> None:
    model, prompted = video_form(bottleneck=0), video_form(bottleneck=0, prompts=3)
    assert prompted.random_masks.keys() == {"head_dropout"}
    vit = prompted.backbone
    assert [list(each.shape) for each in vit.embeddings] == [[1, 3, 64]] * 2
    with torch.no_grad():
        x = vit.stem(clips(32))
        for prompts, block in zip(vit.embeddings, vit.blocks, strict=True):
            x = block(torch.cat([prompts.expand(2, 1, -1, -1), x], dim=2))[:, :, 3:]
        expected = vit.fc_norm(x[:, 0].mean(1))
        torch.testing.assert_close(prompted.classify(clips(32)), expected, atol=1e-5, rtol=1e-5)
        assert (model.classify(clips(32)) - expected).abs().max() > 1e-3


def test_an_image_models_weights_are_spread_over_time() -> None:
    """Of a still clip every tubelet gives the image model's patch, and a block does what the image model's does."""
    geometry, image = IMAGENET, tower(IMAGENET)
    options = AdaptFormerVideoOptions(bottleneck=0)
    model: Any = AdaptFormerVideo(image, 5, FRAMES, options).eval()
    plain: Any = Finetuned(image, 5, FRAMES, SpaceOnlyOptions()).eval()
    still = clips()[:, :1].expand(-1, FRAMES, -1, -1, -1)
    with torch.inference_mode():
        patches = plain.backbone.conv1(still[:, 0])
        tokens = model.backbone.conv1(still).unflatten(1, (2, -1))
        torch.testing.assert_close(tokens, patches[:, None].expand_as(tokens), atol=1e-5, rtol=1e-5)
        x = torch.randn(2, 1, 17, geometry.width)
        torch.testing.assert_close(model.blocks[1](x), plain.blocks[1](x, None), atol=1e-5, rtol=1e-5)
    assert not spread(tower(CLIP).state_dict, 2)["conv1.bias"].any()
    assert spread({}, 2) == {}


def videomae_file(path: Path, *, pretraining: bool) -> dict[str, Tensor]:
    """A file as VideoMAE writes it, with queries, keys and values in one; returns its tensors without the prefix."""
    shapes = official_files.adaptformer_video(64, hidden=0, patch=16, classes=None)
    state = official_files.filled(shapes)
    for i in range(2):
        parts = [state.pop(f"blocks.{i}.attn.{part}_proj.weight") for part in "qkv"]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        for name in [name for name in state if name.startswith(f"blocks.{i}.fc")]:
            state[name.replace(".fc", ".mlp.fc")] = state.pop(name)
    prefix = "encoder." if pretraining else ""
    others = {"decoder.blocks.0.norm1.weight": torch.ones(3), "mask_token": torch.ones(1), "head.weight": torch.ones(3)}
    save_file({prefix + name: tensor for name, tensor in state.items()} | others, path)
    return state


@pytest.mark.parametrize("pretraining", [True, False])
def test_weights_of_videomae_are_read(pretraining: bool, tmp_path: Path) -> None:
    state = videomae_file(tmp_path / "mae.safetensors", pretraining=pretraining)
    options = AdaptFormerVideoOptions(video_weights=str(tmp_path / "mae.safetensors"))
    model: Any = AdaptFormerVideo(ImageTower(SMALL, {}), 5, FRAMES, options)
    assert model.options == AdaptFormerVideoOptions()  # the path is no part of the model
    block = model.blocks[1]
    assert block.attn.in_proj_weight.equal(state["blocks.1.attn.qkv.weight"])
    assert block.attn.v_bias.equal(state["blocks.1.attn.v_bias"])
    assert block.mlp.c_fc.weight.equal(state["blocks.1.mlp.fc1.weight"])
    assert model.backbone.conv1.weight.equal(state["patch_embed.proj.weight"])
    with pytest.raises(ValueError, match=r'the image model has weights too: set model.pretrained = "none"'):
        AdaptFormerVideo(tower(IMAGENET), 5, FRAMES, options)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    def made(path: Path) -> None:
        AdaptFormerVideo(ImageTower(SMALL, {}), 5, FRAMES, AdaptFormerVideoOptions(video_weights=str(path)))

    with pytest.raises(ValueError, match="no such weight file"):
        made(tmp_path / "none.pth")
    official_files.saved(official_files.timesformer(), tmp_path / "image.safetensors")
    with pytest.raises(ValueError, match="holds no video transformer of VideoMAE's"):
        made(tmp_path / "image.safetensors")


def test_what_no_tensor_of_the_video_form_shows_can_be_set(tmp_path: Path) -> None:
    """It has no class token, no table of positions and a tubelet of its own: size and frames are anyone's guess."""
    shapes = official_files.adaptformer_video(64, tubelet=4, patch=16, prompts=2)
    path = official_files.saved(shapes, tmp_path / "official.safetensors")
    write_folder(convert(path), tmp_path / "ours")
    loaded: Any = project.load(tmp_path / "ours", image_size=32, num_frames=8)
    assert (loaded.options.tubelet, loaded.options.prompts, loaded.options.bottleneck) == (4, 2, 8)
    assert loaded(torch.randn(2, 8, 3, 32, 32)).shape == (2, 5)
    known = with_settings(read_folder(tmp_path / "ours"), {"image_size": 32, "num_frames": 8})
    assert lost_settings(known) == {"num_frames": 8, "image_size": 32}
    write_official(known, tmp_path / "back.safetensors", "adaptformer")
    first, back = load_file(path), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys() and all(first[name].equal(back[name]) for name in first)


def test_a_clip_that_is_no_whole_number_of_tubelets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.num_frames = 5; allowed are multiples of model\.tubelet = 2"):
        AdaptFormerVideo(ImageTower(SMALL, {}), 5, 5, AdaptFormerVideoOptions())


@pytest.mark.parametrize("video", [False, True])
def test_what_is_frozen_holds_nothing_and_what_trains_gets_a_gradient(video: bool) -> None:
    model = video_form(classes=5) if video else image_form(classes=5)
    size = 32 if video else 64
    frames = torch.randint(0, 256, (4, FRAMES, size, size, 3), dtype=torch.uint8)
    assert model.has_frozen_stem
    with torch.no_grad():
        torch.testing.assert_close(model(model.stem(frames)), model(frames), atol=1e-5, rtol=1e-5)
    F.cross_entropy(model.train()(frames), torch.tensor([1, 4, 0, 2])).backward()
    for name, parameter in model.named_parameters():
        trains = any(part in name for part in ("adaptmlp", "fc_norm", "cls_head"))
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bottleneck": -1}, r"model\.bottleneck = -1; allowed is 0 \(none\) or more"),
        ({"adapter_scale": -0.1}, r"model\.adapter_scale = -0\.1; allowed is 0 or more"),
        ({"adapter_dropout": 1.0}, r"model\.adapter_dropout = 1\.0; allowed is 0 <= rate < 1"),
        ({"adapter_start": "ones"}, r'model\.adapter_start = "ones"; allowed is random or zero'),
        ({"tubelet": 0}, r"model\.tubelet = 0; allowed is 1 or more"),
        ({"prompts": -1}, r"model\.prompts = -1; allowed is 0"),
    ],
)
def test_impossible_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptFormerVideoOptions(**option)
