"""TimeSformer, both forms: parity and counts of the published ones, how they start, and what meets what."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.methods.aim import Finetuned, SpaceOnlyOptions
from model.methods.timesformer import TimeSformer, TimeSformerCLIP, TimeSformerCLIPOptions, TimeSformerOptions

Form = type[TimeSformer] | type[TimeSformerCLIP]
HALF = (0.5, 0.5, 0.5)
CLIP = ViTGeometry(128, 3, 2, 16, 48, True, HALF, HALF)
IN21K = ViTGeometry(128, 3, 2, 16, 48, False, HALF, HALF, ln_pre=False, patch_bias=True, eps=1e-6)
CLIP_B16 = ViTGeometry(768, 12, 12, 16, 224, True, HALF, HALF)
IN21K_B16 = ViTGeometry(768, 12, 12, 16, 224, False, HALF, HALF, ln_pre=False, patch_bias=True, eps=1e-6)
FRAMES = 4

both_forms = pytest.mark.parametrize("form", [TimeSformer, TimeSformerCLIP])
both_geometries = pytest.mark.parametrize("geometry", [CLIP, IN21K], ids=["clip", "in21k"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def image_model(geometry: ViTGeometry, frames: int = FRAMES) -> Finetuned:
    """The image model frame by frame, no weight of it at a value that hides something (norms 1, biases 0)."""
    model = Finetuned(ImageTower(geometry, {}), None, frames, SpaceOnlyOptions()).eval()
    return scatter(model)


def scatter(model: Any, only: str = "") -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def start(form: Form, geometry: ViTGeometry, *, classes: int | None = None, frames: int = FRAMES) -> Any:
    """The model as it starts on `image_model`'s weights."""
    weights = image_model(geometry).backbone.state_dict()
    return form(ImageTower(geometry, weights), classes, frames, TimeSformerOptions()).eval()


def busy(form: Form, geometry: ViTGeometry, *, classes: int | None = None, frames: int = FRAMES) -> Any:
    """The model away from its start: nothing zero, nothing a copy."""
    return scatter(form(ImageTower(geometry, {}), classes, frames, TimeSformerOptions()).eval())


def clips(count: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, 3, 48, 48, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("form", "geometry", "classes", "count"),
    [
        (TimeSformer, IN21K_B16, 400, 121_566_352),
        (TimeSformer, IN21K_B16, 174, 121_392_558),
        (TimeSformerCLIP, CLIP_B16, 400, 121_567_120),
    ],
)
def test_published_parameter_counts(form: Form, geometry: ViTGeometry, classes: int, count: int) -> None:
    with torch.device("meta"):
        model = form(ImageTower(geometry, {}), classes, 8, TimeSformerOptions())
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert all(parameter.requires_grad for parameter in model.parameters())


@both_geometries
def test_the_form_with_a_class_token_a_frame_is_plain_attention_of_torch(geometry: ViTGeometry) -> None:
    model, batch = busy(TimeSformerCLIP, geometry), clips()
    vit = model.backbone
    with torch.no_grad():
        x = torch.stack([vit.add_time(vit.stem(clip[None]))[0] for clip in batch])  # [B, T, N, D]
        for block in vit.transformer.resblocks:
            over_time = torch_attention(block.t_attn, block.t_norm(x).transpose(1, 2)).transpose(1, 2)
            x = x + block.T_Adapter(over_time)
            x = x + torch_attention(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        expected = vit.ln_post(x[:, :, 0]).transpose(1, 2)[..., None, None]
        torch.testing.assert_close(model.classify(batch), expected, atol=1e-5, rtol=1e-5)


@both_geometries
def test_the_form_with_one_class_token_is_plain_attention_of_torch(geometry: ViTGeometry) -> None:
    model, batch = busy(TimeSformer, geometry), clips()
    with torch.no_grad():
        expected = torch.stack([one_clip_after_the_paper(model.backbone, clip) for clip in batch])
        torch.testing.assert_close(model.classify(batch), expected, atol=1e-5, rtol=1e-5)


def one_clip_after_the_paper(vit: Any, clip: Tensor) -> Tensor:
    """Class token of one clip [T, 3, H, W] → [D]."""
    x = vit.conv1(clip) + vit.positional_embedding[1:] + vit.temporal_embedding[0, :, None]  # [T, P, D]
    class_token = vit.class_embedding + vit.positional_embedding[0]
    if vit.ln_pre is not None:
        x, class_token = vit.ln_pre(x), vit.ln_pre(class_token)
    for block in vit.transformer.resblocks:
        over_time = torch_attention(block.t_attn, block.t_norm(x).transpose(0, 1)[None])[0].transpose(0, 1)
        x = x + block.T_Adapter(over_time)
        frames = torch.stack([torch.cat([class_token[None], patches]) for patches in x])
        over_space = torch_attention(block.attn, block.ln_1(frames)[None])[0]
        class_token, x = class_token + over_space[:, 0].mean(dim=0), x + over_space[:, 1:]
        class_token, x = class_token + block.mlp(block.ln_2(class_token)), x + block.mlp(block.ln_2(x))
    return vit.ln_post(class_token)


def torch_attention(ours: nn.Module, x: Tensor) -> Tensor:
    """The same weights in torch's own layer, along the last but one axis of x."""
    theirs = nn.MultiheadAttention(x.shape[-1], ours.heads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    flat = x.flatten(0, 1)
    return theirs(flat, flat, flat)[0].reshape(x.shape)


@both_geometries
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_a_still_clip_starts_as_the_image_model(geometry: ViTGeometry, frames: int) -> None:
    torch.manual_seed(0)
    model = start(TimeSformer, geometry, frames=frames)
    torch.manual_seed(0)
    plain = image_model(geometry, frames)
    still = clips()[:, :1].expand(-1, frames, -1, -1, -1)
    with torch.inference_mode():
        features = plain.classify(still)[:, :, 0, 0, 0]
        assert model.classify(still).shape == (2, 128)
        torch.testing.assert_close(model.classify(still), features, atol=1e-5, rtol=1e-5)


@both_geometries
def test_without_its_random_linear_layers_the_other_form_is_the_image_model_frame_by_frame(
    geometry: ViTGeometry,
) -> None:
    torch.manual_seed(0)
    model = start(TimeSformerCLIP, geometry)
    torch.manual_seed(0)
    plain, batch = image_model(geometry), clips()
    with torch.inference_mode():
        features = plain.classify(batch)
        assert features.shape == (2, 128, FRAMES, 1, 1)
        assert (model.classify(batch) - features).abs().max() > 1e-2  # as published, they start at random
        for block in model.backbone.transformer.resblocks:
            block.T_Adapter.weight.zero_()
        torch.testing.assert_close(model.classify(batch), features, atol=1e-5, rtol=1e-5)


@both_forms
@both_geometries
def test_attention_over_time_starts_as_a_copy_of_the_image_models(form: Form, geometry: ViTGeometry) -> None:
    model = start(form, geometry)
    for block in model.backbone.transformer.resblocks:
        for copied, original in ((block.t_attn, block.attn), (block.t_norm, block.ln_1)):
            pairs = list(zip(copied.parameters(), original.parameters(), strict=True))
            assert pairs and all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
        assert (block.T_Adapter.weight == 0).all() == (form is TimeSformer)
        assert (block.T_Adapter.bias == 0).all()
    assert (model.backbone.temporal_embedding == 0).all()


@both_forms
def test_weights_that_lack_something_are_refused(form: Form) -> None:
    weights = image_model(CLIP).backbone.state_dict()
    del weights["transformer.resblocks.1.attn.out_proj.bias"]
    with pytest.raises(ValueError, match=r"missing \['transformer.resblocks.1.*attn.out_proj.bias"):
        form(ImageTower(CLIP, weights), 5, FRAMES, TimeSformerOptions())


@both_forms
@both_geometries
def test_order_is_seen_through_the_temporal_embedding_alone(form: Form, geometry: ViTGeometry) -> None:
    model, batch, order = busy(form, geometry, classes=6), clips(), [2, 0, 3, 1]
    embedding = model.backbone.temporal_embedding
    with torch.inference_mode():
        before = model(batch)
        assert (model(batch[:, order]) - before).abs().max() > 1e-3
        embedding.copy_(embedding[:, order].clone())
        torch.testing.assert_close(model(batch[:, order]), before, atol=1e-5, rtol=1e-5)
        embedding.zero_()
        torch.testing.assert_close(model(batch[:, order]), model(batch), atol=1e-5, rtol=1e-5)


@both_forms
def test_clips_of_a_batch_do_not_meet(form: Form) -> None:
    model, batch = busy(form, IN21K, classes=6), clips(3)
    with torch.inference_mode():
        alone = torch.cat([model(clip[None]) for clip in batch])
        torch.testing.assert_close(model(batch), alone, atol=1e-5, rtol=1e-5)


@both_forms
@pytest.mark.parametrize(("branch", "column"), [("t_attn.out_proj", 0), ("attn.out_proj", 1), ("mlp.c_proj", 2)])
@pytest.mark.parametrize("mask", [0.0, 2.0])
def test_masks_scale_one_branch_of_one_clip(form: Form, branch: str, column: int, mask: float) -> None:
    model, batch = busy(form, CLIP), clips()
    masks = torch.ones(2, 3, 3)
    scaled = copy.deepcopy(model)
    with torch.inference_mode():
        before = model.classify(batch)
        torch.testing.assert_close(model.classify(batch, {"drop_path": masks}), before)
        masks[0, 1, column] = mask
        for parameter in scaled.backbone.transformer.resblocks[1].get_submodule(branch).parameters():
            parameter *= mask
        expected = torch.cat([scaled.classify(batch[:1]), before[1:]])
        assert (expected[0] - before[0]).abs().max() > 1e-3
        torch.testing.assert_close(model.classify(batch, {"drop_path": masks}), expected, atol=1e-5, rtol=1e-5)


def test_drop_rates_grow_with_depth() -> None:
    tower = ImageTower(CLIP, {})
    model = TimeSformer(tower, 6, FRAMES, TimeSformerOptions(drop_path=0.5))
    assert model.random_masks["drop_path"].tolist() == [[0.0] * 3, [0.25] * 3, [0.5] * 3]
    assert not model.random_masks["head_dropout"].any()
    masks = TimeSformerCLIP(tower, 6, FRAMES, TimeSformerCLIPOptions()).random_masks
    assert masks["drop_path"][-1].tolist() == [0.1] * 3
    assert masks["head_dropout"].tolist() == [0.5] * 128


@both_forms
@pytest.mark.parametrize("name", ["drop_path", "head_dropout"])
def test_impossible_rates_are_refused(form: Form, name: str) -> None:
    options = TimeSformerOptions if form is TimeSformer else TimeSformerCLIPOptions
    with pytest.raises(ValueError, match=rf"model\.{name} = 1\.0; allowed is 0 <= rate < 1"):
        options(**{name: 1.0})


@both_forms
@both_geometries
def test_bf16_keeps_the_trained_weights_in_float32(form: Form, geometry: ViTGeometry) -> None:
    model = busy(form, geometry, classes=6)
    frames = (255 * torch.rand(2, FRAMES, 48, 48, 3)).to(torch.uint8)
    masks = {"drop_path": torch.ones(2, 3, 3), "head_dropout": torch.ones(2, 128)}
    with torch.inference_mode():
        reference = model(frames)
        model.set_compute_dtype(torch.bfloat16)
        logits = model(frames, masks)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert logits.dtype == torch.float32
    assert 0 < (logits - reference).abs().max() < 0.05 * reference.abs().max()


@both_forms
def test_everything_trains(form: Form) -> None:
    model = start(form, CLIP, classes=6)
    F.cross_entropy(model(clips()), torch.tensor([1, 4])).backward()
    still = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    if form is TimeSformerCLIP:
        assert not still
    else:  # behind the zero layers, and trained from the second step on
        assert still and all("t_attn" in name or "t_norm" in name for name in still)


def test_what_is_decayed() -> None:
    model = busy(TimeSformer, CLIP, classes=6)
    (group,) = model.optimizer_groups(1e-4)
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len(list(model.parameters()))
    model = busy(TimeSformerCLIP, CLIP, classes=6)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in model.optimizer_groups(5e-6)}
    kept = {"backbone.class_embedding", "backbone.positional_embedding"}
    kept |= {
        name for name in names.values() if any(f".{norm}." in name for norm in ("ln_pre", "ln_1", "ln_2", "ln_post"))
    }
    assert groups[0.0] == kept and set(groups) == {0.0, 5e-6}
