"""DualPath: the published form against PyTorch's own layers, counts, what each path sees, what trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Resize

import model
from model.checkpoints import convert, write_folder
from model.flops import count_cost
from model.geometry import ImageTower, ViTGeometry
from model.methods.dualpath import DualPath, DualPathOptions, make_framesets
from model.parameters import count_parameters
from tests import official_files
from tests.blank_models import CLIP_B, CLIP_L, blank_model
from tests.towers import CLIP, IMAGENET, tower

CODE = "published_code"
TINY = replace(CLIP, layers=2, image_size=32, patch_size=8)
both_forms = pytest.mark.parametrize("form", ["paper", CODE])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def start(geometry: ViTGeometry = TINY, frames: int = 8, classes: int | None = 5, **options: Any) -> Any:
    images = tower(geometry)
    if geometry.embed_dim:
        images = replace(images, projection=0.1 * torch.randn(geometry.width, geometry.embed_dim))
    return DualPath(images, classes, frames, DualPathOptions(**options)).eval()


def busy(*arguments: Any, **options: Any) -> Any:
    """Nothing that trains is where it starts."""
    made = start(*arguments, **options)
    for name, parameter in made.named_parameters():
        if made.trains(name):
            nn.init.normal_(parameter, std=0.1)
    return made


def clips(frames: int = 8, size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, frames, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "classes", "options", "counts"),
    [
        (CLIP_B, 400, {}, (96_402_832, 10_210_192)),
        (CLIP_B, 400, {"form": CODE}, (104_826_256, 18_785_680)),
        (CLIP_B, 174, {"form": CODE}, (104_710_318, 18_669_742)),
        (CLIP_L, 400, {"form": CODE}, (368_785_552, 65_083_536)),
    ],
)
def test_published_parameter_counts(name: str, classes: int, options: dict[str, Any], counts: tuple[int, int]) -> None:
    assert count_parameters(blank_model("dualpath", name, classes, 16, **options)) == counts


@pytest.mark.parametrize(("frames", "gmac"), [(16, 171.3), (32, 191.0), (48, 210.6)])
def test_published_multiply_adds(frames: int, gmac: float) -> None:
    assert count_cost(blank_model("dualpath", CLIP_B, 400, frames, form=CODE)).gmac == pytest.approx(gmac, abs=0.05)


def after_the_official_file(state: dict[str, Tensor], clip: Tensor) -> Tensor:
    """One clip [T, 3, H, W] and the official tensors → logits [C], by torch's and torchvision's layers alone."""
    s = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    size, width, framesets = clip.shape[-1], len(s["class_embedding"]), len(clip) // 16
    numbers = torch.arange(1.0, len(clip) + 1)
    side = isqrt(len(s["positional_embedding"]) - 1)
    code = []
    images = []
    for k in range(framesets):
        tiles = clip[16 * k : 16 * k + 16]
        mosaic = torch.cat([torch.cat(list(tiles[4 * row : 4 * row + 4]), dim=2) for row in range(4)], dim=1)
        images.append(Resize((size, size))(mosaic))
        cells = torch.kron(numbers[16 * k : 16 * k + 16].view(4, 4), torch.ones(4, 4))
        where = torch.cat([torch.zeros(1), Resize((side, side))(cells[None]).flatten()])
        angles = where[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        code.append(torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))
    images += list(clip[:: len(clip) // 8])
    features = []
    for number, image in enumerate(images):
        temporal = number < framesets
        x = F.conv2d(image[None], s["conv1.weight"], stride=s["conv1.weight"].shape[-1]).flatten(2)[0].T
        x = torch.cat([s["class_embedding"][None], x])
        x = x + (code[number] + s["spatial_positional_embedding"] if temporal else s["positional_embedding"])
        x = norm(s, "ln_pre", x)
        for block in range(1 + max(int(name.split(".")[2]) for name in s if name.startswith("transformer"))):
            b = f"transformer.resblocks.{block}."
            y = norm(s, f"{b}ln_1", x)
            if temporal:
                y = attend(s, f"{b}attn.", adapt(s, f"{b}t_adapter_attn_b.", y))
                x = x + adapt(s, f"{b}t_adapter_attn.", y)
                x = x + adapt(s, f"{b}t_adapter_mlp.", feed(s, f"{b}mlp.", norm(s, f"{b}ln_2", x)))
            else:
                x = x + attend(s, f"{b}attn.", y) + adapt(s, f"{b}s_adapter_attn.", y)
                y = norm(s, f"{b}ln_2", x)
                x = x + feed(s, f"{b}mlp.", y) + adapt(s, f"{b}s_adapter_mlp.", y)
        features.append(norm(s, "ln_post", x[0]) @ s["proj"])
    both = torch.cat([torch.stack(path).mean(0) for path in (features[:framesets], features[framesets:])])
    return linear(s, "head.linear2.", F.gelu(linear(s, "head.linear1.", both)))


def linear(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}weight"], s[f"{name}bias"])


def norm(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"])


def adapt(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(s, f"{name}up_proj.", F.gelu(linear(s, f"{name}down_proj.", x)))


def feed(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = linear(s, f"{name}c_fc.", x)
    return linear(s, f"{name}c_proj.", hidden * torch.sigmoid(1.702 * hidden))


def attend(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    layer = nn.MultiheadAttention(x.shape[-1], x.shape[-1] // 64, batch_first=True)
    layer.load_state_dict({key.removeprefix(name): tensor for key, tensor in s.items() if key.startswith(name)})
    return layer(x[None], x[None], x[None], need_weights=False)[0][0]


@pytest.mark.parametrize(("frames", "grid", "rooted"), [(16, 7, True), (32, 3, False)])
def test_a_published_checkpoint_computes_what_the_official_file_does(
    frames: int, grid: int, rooted: bool, tmp_path: Path
) -> None:
    """A grid of 7 tokens under a grid of 4 frames: fractions. With the text tower, and as the visual tower alone."""
    state = official_files.filled(official_files.dualpath(grid=grid, hidden=40, classes=6))
    state = {name: 3 * tensor if "adapter" in name else tensor for name, tensor in state.items()}
    text = official_files.filled(
        {"transformer.resblocks.0.ln_1.weight": (8,), "positional_embedding": (7, 8), "logit_scale": (1,)}
    )
    root = "" if rooted else "visual."
    file = {name.removeprefix(root): tensor for name, tensor in state.items()} | (text if rooted else {})
    save_file(file, tmp_path / "official.safetensors")
    converted = convert(tmp_path / "official.safetensors")
    assert {name for name, reason in converted.dropped if "text tower" in reason} == (text.keys() if rooted else set())
    write_folder(converted, tmp_path / "folder")
    loaded, batch = model.load(tmp_path / "folder", num_frames=frames), clips(frames, grid * 16)
    with torch.inference_mode():
        expected = torch.stack([after_the_official_file(state, clip) for clip in batch])
        logits = loaded(batch)
    assert (loaded.options.form, loaded.options.bottleneck, loaded.geometry.embed_dim) == (CODE, 40, 64)
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_the_papers_form_under_the_official_names_is_read_as_such(tmp_path: Path) -> None:
    path = official_files.saved(official_files.dualpath(paper=True, hidden=24), tmp_path / "a.safetensors")
    description = convert(path).description
    assert (description["options"]["form"], description["options"]["bottleneck"]) == ("paper", 24)


@pytest.mark.parametrize("geometry", [replace(TINY, embed_dim=48), replace(IMAGENET, layers=2, image_size=32)])
def test_the_papers_form_by_its_equations(geometry: ViTGeometry) -> None:
    """One image at a time, every sum written out."""
    ours, batch = busy(geometry, grid=2, spatial_frames=4), clips(count=1)
    vit = ours.backbone
    with torch.inference_mode():
        tokens = vit.stem(batch)[0]
        features = []
        for number, x in enumerate(tokens):
            temporal, x = number < 2, x[None, None]
            for block in vit.transformer.resblocks:
                y = block.ln_1(x)
                z = block.attn.over_space(y)
                x = x + (block.t_adapter_attn(z) if temporal else z + block.s_adapter_attn(y))
                y = block.ln_2(x)
                z = block.mlp(y)
                x = x + (block.t_adapter_mlp(z) if temporal else z + block.s_adapter_mlp(y))
            feature = vit.ln_post(x[0, 0, 0])
            features.append(feature if vit.proj is None else feature @ vit.proj)
        both = torch.cat([torch.stack(features[:2]).mean(0), torch.stack(features[2:]).mean(0)])
        expected = ours.cls_head(F.gelu(vit.head.linear1(both)))
        torch.testing.assert_close(ours(batch)[0], expected, atol=1e-5, rtol=1e-5)
        assert len(both) == 2 * (geometry.embed_dim or geometry.width)


@both_forms
def test_the_spatial_path_starts_as_the_image_model(form: str) -> None:
    """And in the published code the temporal one as nothing but what its tokens are."""
    ours, batch = start(TINY, form=form, spatial_frames=8), clips()
    plain = model.methods.create("frozen", tower(TINY), num_classes=None, num_frames=8).eval()
    seen: list[Tensor] = []
    ours.backbone.head.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    with torch.inference_mode():
        ours(batch)
        features = plain(batch)[..., 0, 0].mean(2)
        torch.testing.assert_close(seen[0][:, 128:], features, atol=1e-5, rtol=1e-5)
        untouched = ours.backbone.ln_post(ours.backbone.stem(batch)[:, :2, 0]).mean(1)
        torch.testing.assert_close(seen[0][:, :128], untouched, atol=1e-5, rtol=1e-5)


def test_framesets_are_frames_in_the_order_of_time_row_by_row() -> None:
    shades = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(2, 8, 3, 32, 32)
    framesets = make_framesets(shades, 2, antialias=True)
    assert framesets.shape == (2, 2, 3, 32, 32)
    middles = framesets[1, :, 2, 8::16, 8::16]
    assert middles.flatten().tolist() == list(range(8))
    batch = clips(4)
    sharp, smooth = (make_framesets(batch, 2, antialias=antialias) for antialias in (False, True))
    torch.testing.assert_close(sharp[:, 0, :, :16, :16], F.avg_pool2d(batch[:, 0], 2))
    assert smooth.std() < sharp.std()


@both_forms
def test_order_is_seen_and_only_by_the_temporal_path(form: str) -> None:
    ours, batch, order = busy(form=form, spatial_frames=8), clips(), [1, 0, 2, 3, 4, 6, 5, 7]
    seen: list[Tensor] = []
    ours.backbone.head.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    with torch.inference_mode():
        ours(batch)
        ours(batch[:, order])
    temporal, spatial = (seen[1] - seen[0]).abs().split(128, dim=1)
    assert temporal.max() > 1e-3 and spatial.max() < 1e-5


def test_every_token_of_the_papers_form_has_a_place_of_its_own() -> None:
    positions = start(replace(TINY, image_size=48), frames=8, grid=2).backbone.positions  # 6 tokens a side, 3 a frame
    assert positions.shape == (2, 37, 128)
    tokens = positions[:, 1:].flatten(0, 1)
    assert (torch.cdist(tokens, tokens) + torch.eye(72)).min() > 0.1
    first, second = positions[0, 1:].view(6, 6, 128)[:3, :3], positions[1, 1:].view(6, 6, 128)[3:, :3]
    torch.testing.assert_close(first[..., -84:], second[..., -84:])  # the same places in frames 1 and 7
    assert (first[..., :44] - second[..., :44]).abs().max() > 0.5


def test_fixed_positions_may_be_added_to_the_image_models_in_their_size() -> None:
    plain, added = (start(frames=8, grid=2, positions=where).backbone for where in ("instead", "added"))
    own, code = plain.positional_embedding, plain.positions
    torch.testing.assert_close(plain.place()[:2], code)
    difference = (added.place()[:2] - own).detach()
    torch.testing.assert_close(difference.square().mean(), own.square().mean())
    torch.testing.assert_close(difference / difference.norm(), code / code.norm())
    assert torch.equal(plain.place()[2:], added.place()[2:])


@both_forms
def test_clips_of_a_batch_do_not_meet(form: str) -> None:
    ours, batch = busy(form=form), clips(count=3)
    with torch.inference_mode():
        alone = torch.cat([ours(clip[None]) for clip in batch])
        torch.testing.assert_close(ours(batch), alone, atol=1e-5, rtol=1e-5)


@both_forms
def test_masks_drop_hidden_features_of_one_adapter_of_one_clip(form: str) -> None:
    ours, batch = busy(form=form, bottleneck=16, adapter_dropout=0.25), clips()
    rates = ours.random_masks["adapter_dropout"]
    assert rates.shape == (2, 4 + (form == CODE), 16) and (rates == 0.25).all()
    names = ("t_adapter_attn", "s_adapter_attn", "t_adapter_mlp", "s_adapter_mlp", "t_adapter_attn_b")
    with torch.inference_mode():
        before = ours(batch)
        ones = torch.ones(2, *rates.shape)
        torch.testing.assert_close(ours(batch, {"adapter_dropout": ones}), before)
        for column, name in enumerate(names[: rates.shape[1]]):
            masks = ones.clone()
            masks[0, 1, column, 3] = 2.0
            weight = ours.backbone.blocks[1].get_submodule(name).up_proj.weight
            weight[:, 3] *= 2
            expected = torch.cat([ours(batch[:1]), before[1:]])
            weight[:, 3] /= 2
            assert (expected[0] - before[0]).abs().max() > 1e-4, name
            torch.testing.assert_close(ours(batch, {"adapter_dropout": masks}), expected, atol=1e-5, rtol=1e-5)


@both_forms
def test_what_trains_and_is_decayed(form: str) -> None:
    ours = busy(replace(TINY, embed_dim=48), form=form)
    F.cross_entropy(ours(clips()), torch.tensor([1, 4])).backward()
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    embeddings = {f"backbone.{name}" for name in ("class_embedding", "positional_embedding")}
    embeddings.add("backbone.spatial_positional_embedding")
    assert {name for name in trained if "_adapter_" not in name and "head" not in name} == (
        embeddings if form == CODE else set()
    )
    assert all(parameter.grad.any() for parameter in ours.parameters() if parameter.requires_grad)
    assert "backbone.proj" not in trained
    (group,) = ours.optimizer_groups(0.05)
    assert group["weight_decay"] == 0.05 and len(group["params"]) == len(trained)
    assert ours.has_frozen_stem == (form == "paper")


def test_the_model_goes_on_from_its_stem() -> None:
    ours = busy()
    frames = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        tokens = ours.stem(frames)
        assert tokens.shape == (2, 2 + 8, TINY.num_tokens, TINY.width)
        assert torch.equal(ours(tokens), ours(frames))


@both_forms
def test_bf16_keeps_the_trained_weights_in_float32(form: str) -> None:
    ours = busy(replace(TINY, embed_dim=48), form=form)
    frames = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        reference = ours(frames)
        ours.set_compute_dtype(torch.bfloat16)
        logits = ours(frames)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert ours.backbone.proj.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert 0 < (logits - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize(
    ("frames", "paths"),
    [
        (16, (4, 1, 8)),
        (32, (4, 2, 8)),
        (48, (4, 3, 8)),
        (8, (2, 2, 8)),
        (4, (2, 1, 4)),
        (12, (2, 3, 6)),
        (1, (1, 1, 1)),
    ],
)
def test_paths_by_the_number_of_frames(frames: int, paths: tuple[int, int, int]) -> None:
    assert DualPathOptions().paths(frames) == paths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "code"}, "model.form = 'code'; allowed is paper or published_code"),
        ({"positions": "own"}, "model.positions = 'own' with this form; allowed is instead or added"),
        ({"form": CODE, "positions": "added"}, "model.positions = 'added' with this form; allowed is instead"),
        ({"grid": -1}, "model.grid = -1; allowed is 1 or more, or 0"),
        ({"grid": 4}, "model.grid = 4 needs 16, or a multiple, of data.num_frames, not 8"),
        ({"spatial_frames": 3}, "model.spatial_frames = 3; allowed is a divisor of data.num_frames = 8"),
        ({"adapter_dropout": 1.0}, r"model.adapter_dropout = 1.0; allowed is 0 <= rate < 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_a_tower_with_a_projection_must_bring_it() -> None:
    bare = tower(TINY)
    weights = ImageTower(replace(TINY, embed_dim=48), bare.state_dict, torch.ones(128, 48))
    assert (DualPath(weights, 5, 8, DualPathOptions()).backbone.proj == 1).all()
    with pytest.raises(ValueError, match=r"missing \['proj'\]"):
        DualPath(replace(weights, projection=None), 5, 8, DualPathOptions())
