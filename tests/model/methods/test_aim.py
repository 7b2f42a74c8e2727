"""AIM and its space-only baselines: parity with the published implementation, counts, invariants, what trains."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model.backbone import load_image_tower
from model.geometry import ImageTower, ViTGeometry
from model.methods.aim import AIM, AIMOptions, Block, Finetuned, Frozen, SpaceOnlyOptions, adapted_layers
from model.open_clip_models import load_clip
from model.parameters import count_parameters
from model.video import VideoModel
from tests.towers import CLIP, IMAGENET, tower

ROOT = Path(__file__).resolve().parents[3]
LADDER: dict[str, tuple[str, ...]] = {
    "frozen": (),
    "spatial": ("spatial",),
    "temporal": ("spatial", "temporal"),
    "joint": ("spatial", "temporal", "joint"),
}
B16 = replace(CLIP, width=768, layers=12, heads=12, image_size=224)
L14 = replace(CLIP, width=1024, layers=24, heads=16, image_size=224, patch_size=14)
IMAGENET_B16 = replace(IMAGENET, width=768, layers=12, heads=12, image_size=224)
GEOMETRIES = {"clip": CLIP, "imagenet": IMAGENET}


def options(**changes: object) -> AIMOptions:
    return AIMOptions(**changes)  # type: ignore[arg-type]


def busy(model: AIM) -> AIM:
    """Nothing that trains is where it starts: adapters, temporal embedding, head."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "Adapter" in name or "temporal_embedding" in name or "fc_cls" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def clips(count: int = 2, frames: int = 4, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, frames, size, size, 3), dtype=torch.uint8, generator=generator)


def on_meta(geometry: ViTGeometry, classes: int, frames: int, changed: AIMOptions) -> AIM:
    with torch.device("meta"):
        return AIM(ImageTower(geometry, {}), classes, frames, changed)


TWO = AIMOptions(temporal_adapters=2, adapter_scale=1.0)


@pytest.mark.parametrize(
    ("geometry", "classes", "frames", "changed", "total", "trainable"),
    [
        pytest.param(*row, id=name)
        for name, *row in [
            ("B/16 K400 8f", B16, 400, 8, AIMOptions(), 96_764_560, 10_966_672),
            ("B/16 K400 16f", B16, 400, 16, AIMOptions(), 96_770_704, 10_972_816),
            ("B/16 K400 32f", B16, 400, 32, AIMOptions(), 96_782_992, 10_985_104),
            ("B/16 K700 8f", B16, 700, 8, AIMOptions(), 96_995_260, 11_197_372),
            ("B/16 K700 32f", B16, 700, 32, AIMOptions(), 97_013_692, 11_215_804),
            ("B/16 Diving48 32f", B16, 48, 32, AIMOptions(), 96_512_304, 10_714_416),
            ("B/16 SSv2 8f", B16, 174, 8, TWO, 100_141_230, 14_343_342),
            ("B/16 SSv2 32f", B16, 174, 32, TWO, 100_159_662, 14_361_774),
            ("L/14 K400 8f", L14, 400, 8, AIMOptions(), 341_438_864, 38_261_136),
            ("L/14 K400 16f", L14, 400, 16, AIMOptions(), 341_447_056, 38_269_328),
            ("L/14 K400 32f", L14, 400, 32, AIMOptions(), 341_463_440, 38_285_712),
            ("L/14 K700 32f", L14, 700, 32, AIMOptions(), 341_770_940, 38_593_212),
            ("L/14 Diving48 32f", L14, 48, 32, AIMOptions(), 341_102_640, 37_924_912),
            ("L/14 SSv2 8f shipped", L14, 174, 8, AIMOptions(), 341_207_214, 38_029_486),
            ("L/14 SSv2 8f", L14, 174, 8, TWO, 353_820_846, 50_643_118),
            ("IN-21k K400 8f", IMAGENET_B16, 400, 8, AIMOptions(), 96_763_792, 10_966_672),
            ("IN-21k SSv2 8f", IMAGENET_B16, 174, 8, TWO, 100_140_462, 14_343_342),
            ("ladder: nothing", IMAGENET_B16, 174, 8, options(adapters=()), 85_932_462, 135_342),
            (
                "ladder: + spatial",
                IMAGENET_B16,
                174,
                8,
                replace(TWO, adapters=LADDER["spatial"]),
                89_482_926,
                3_685_806,
            ),
            (
                "ladder: + temporal",
                IMAGENET_B16,
                174,
                8,
                replace(TWO, adapters=LADDER["temporal"]),
                96_589_998,
                10_792_878,
            ),
        ]
    ],
)
def test_counts_are_the_published_ones(
    geometry: ViTGeometry, classes: int, frames: int, changed: AIMOptions, total: int, trainable: int
) -> None:
    model = on_meta(geometry, classes, frames, changed)
    assert count_parameters(model) == (total, trainable)


@pytest.mark.parametrize(("method", "trainable"), [(Frozen, 135_342), (Finetuned, 85_932_462)])
def test_counts_of_the_space_only_baselines(method: type[Finetuned], trainable: int) -> None:
    with torch.device("meta"):
        model = method(ImageTower(IMAGENET_B16, {}), 174, 8, SpaceOnlyOptions())
    assert count_parameters(model) == (85_932_462, trainable)


@pytest.mark.parametrize("positions", ["bottom 6", "top 6", "every 2", (0, 1, 4, 5, 8, 11)])
def test_tunable_counts_of_the_positions(positions: str | tuple[int, ...]) -> None:
    assert count_parameters(on_meta(B16, 400, 8, options(positions=positions)))[1] == 5_640_976


@pytest.mark.parametrize(
    ("ratio", "trainable"), [(0.0625, 2_998_864), (0.125, 5_654_800), (0.25, 10_966_672), (0.5, 21_590_416)]
)
def test_tunable_counts_of_the_ratios(ratio: float, trainable: int) -> None:
    assert count_parameters(on_meta(B16, 400, 8, options(adapter_ratio=ratio)))[1] == trainable


@pytest.mark.parametrize(
    ("geometry", "temporal_adapters", "tensors"), [(B16, 1, 144), (B16, 2, 192), (L14, 1, 288), (L14, 2, 384)]
)
def test_number_of_adapter_tensors(geometry: ViTGeometry, temporal_adapters: int, tensors: int) -> None:
    model = on_meta(geometry, 400, 8, options(temporal_adapters=temporal_adapters))
    assert sum("Adapter" in name for name, _ in model.named_parameters()) == tensors


@pytest.mark.parametrize(
    ("positions", "adapted"),
    [
        ("all", range(12)),
        ("bottom 6", range(6)),
        ("top 6", range(6, 12)),
        ("every 2", (1, 3, 5, 7, 9, 11)),
        ("every 5", (4, 9)),
        ((3, 0), (0, 3)),
    ],
)
def test_positions(positions: str | tuple[int, ...], adapted: tuple[int, ...]) -> None:
    assert adapted_layers(positions, 12) == frozenset(adapted)


@pytest.mark.parametrize("positions", ["", "bottom", "top 13", "every 0", "middle 3", (), (12,), (-1,), (1, 1), ("a",)])
def test_positions_that_are_none(positions: str | tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r'model\.positions = .*allowed is "all", "bottom K".*; the model has 12 blocks'
    ):
        adapted_layers(positions, 12)


def test_blocks_without_adapters_are_blocks_of_the_image_model() -> None:
    """The first block has none: what it does must not depend on the other frames, whatever the temporal embedding."""
    model = busy(AIM(tower(), 6, 4, options(positions="top 2")))
    plain, adapted = model.backbone.transformer.resblocks[0], model.backbone.transformer.resblocks[1]
    x = torch.randn(2, 4, 17, 128)
    other = torch.cat([x[:, :1], torch.randn(2, 3, 17, 128)], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(plain(x, None)[:, 0], plain(other, None)[:, 0])
        assert (adapted(x, None)[:, 0] - adapted(other, None)[:, 0]).abs().max() > 1e-3
    assert not any("Adapter" in name for name, _ in plain.named_parameters())


def published_block(block: Block, x_BTND: Tensor, masks: Tensor | None, sequence_first: bool, scale: float) -> Tensor:
    """The official block, written after section 1.4 with PyTorch's own attention: DropPath acts on the first axis of
    [N, B·T, D] (CLIP) or of [B·T, N, D] (ImageNet)."""
    B, T, N, D = x_BTND.shape
    attention = nn.MultiheadAttention(D, block.attn.heads, batch_first=True)
    attention.load_state_dict(block.attn.state_dict())

    def attend(x: Tensor) -> Tensor:
        return attention(x, x, x, need_weights=False)[0]

    def norm(x: Tensor, layer: nn.Module) -> Tensor:
        return F.layer_norm(x, (D,), layer.weight, layer.bias, layer.eps)  # type: ignore[arg-type]

    def adapter(x: Tensor, layer: nn.Module) -> Tensor:
        weights = layer.state_dict()
        hidden = F.gelu(F.linear(x, weights["D_fc1.weight"], weights["D_fc1.bias"]))
        return F.linear(hidden, weights["D_fc2.weight"], weights["D_fc2.bias"])

    def dropped(branch_BTND: Tensor, column: int) -> Tensor:
        if masks is None:
            return branch_BTND
        mask = masks[0, column].view(1, 1, N, 1) if sequence_first else masks[:, column].view(B, T, 1, 1)
        return branch_BTND * mask

    def mlp(x: Tensor) -> Tensor:
        hidden = F.linear(x, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if block.mlp.quick_gelu else F.gelu(hidden)
        return F.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)

    assert block.S_Adapter and block.T_Adapter and block.MLP_Adapter
    x = x_BTND
    over_time = norm(x.transpose(1, 2).reshape(B * N, T, D), block.ln_1)
    if block.T_Adapter_in is not None:
        over_time = over_time + adapter(over_time, block.T_Adapter_in)
    branch = adapter(attend(over_time), block.T_Adapter).view(B, N, T, D).transpose(1, 2)
    x = x + dropped(branch, 0)
    spatial = attend(norm(x.reshape(B * T, N, D), block.ln_1)).view(B, T, N, D)
    x = x + spatial + adapter(spatial, block.S_Adapter)
    y = norm(x, block.ln_2)
    return x + mlp(y) + dropped(scale * adapter(y, block.MLP_Adapter), 1)


@pytest.mark.parametrize(("kind", "temporal_adapters", "drops"), itertools.product(GEOMETRIES, (1, 2), (False, True)))
def test_a_block_is_the_published_one(kind: str, temporal_adapters: int, drops: bool) -> None:
    geometry = GEOMETRIES[kind]
    changed = options(temporal_adapters=temporal_adapters, adapter_scale=0.7, drop_path=0.5, drop_path_axis="official")
    model = busy(AIM(tower(geometry), 6, 4, changed))
    size = geometry.num_tokens if kind == "clip" else 4
    assert model.random_masks["drop_path"].shape == (3, 2, size)
    torch.manual_seed(5)
    x, masks = torch.randn(2, 4, 17, 128), 2.0 * torch.randint(0, 2, (2, 2, size)) if drops else None
    block = model.backbone.transformer.resblocks[1]
    with torch.inference_mode():
        expected = published_block(block, x, masks, kind == "clip", 0.7)
        torch.testing.assert_close(block(x, masks), expected, atol=1e-5, rtol=1e-5)


def test_drop_path_rates_grow_with_depth() -> None:
    rates = AIM(tower(), 6, 4, options(drop_path=0.5)).random_masks["drop_path"]
    assert rates.shape == (3, 2) and rates.tolist() == [[0, 0], [0.25, 0.25], [0.5, 0.5]]
    by_frame = AIM(tower(IMAGENET), 6, 4, options(drop_path=0.5, drop_path_axis="official")).random_masks["drop_path"]
    assert by_frame.shape == (3, 2, 4) and by_frame[1].unique().tolist() == [0.25]


def test_masks_drop_a_clips_branches_and_nothing_else() -> None:
    model = busy(AIM(tower(), 6, 4, options(drop_path=0.5)))
    batch = clips()
    ones = {"drop_path": torch.ones(2, 3, 2), "head_dropout": torch.ones(2, 128)}
    with torch.inference_mode():
        torch.testing.assert_close(model(batch, ones), model(batch))
        dropped = {**ones, "drop_path": ones["drop_path"].clone()}
        dropped["drop_path"][0] = 0
        out = model(batch, dropped)
        torch.testing.assert_close(out[1], model(batch)[1], atol=1e-5, rtol=1e-5)
        spatial = busy(AIM(tower(), 6, 4, options(adapters=("spatial",))))
        spatial.load_state_dict(model.state_dict(), strict=False)
        model.backbone.temporal_embedding.data.zero_()
        torch.testing.assert_close(model(batch, dropped)[0], spatial(batch)[0], atol=1e-5, rtol=1e-5)


def test_starts_as_clip_frame_by_frame() -> None:
    clip = load_clip("tiny-clip", "shapes")
    image_tower = load_image_tower("tiny-clip", "shapes")
    model = AIM(image_tower, None, 3, options(temporal_adapters=2)).eval()
    prepared = model.prepare(clips(2, 3, image_tower.geometry.image_size))
    with torch.inference_mode():
        ours = model(prepared).flatten(2).transpose(1, 2) @ clip.visual.proj
        theirs = clip.encode_image(prepared.flatten(0, 1)).unflatten(0, (2, 3))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_xsmall_patch16_clip_224"])
def test_starts_as_timms_vit_frame_by_frame(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False).eval()
    for key, parameter in theirs.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    image_tower = load_image_tower(name, str(tmp_path / "vit.safetensors"))
    model = AIM(image_tower, None, 2, AIMOptions()).eval()
    prepared = model.prepare(clips(1, 2, 224))
    with torch.inference_mode():
        expected = theirs.forward_features(prepared.flatten(0, 1))[:, 0]
        ours = model(prepared).flatten(2).transpose(1, 2)[0]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_space_only_baselines_are_the_image_model_frame_by_frame(kind: str) -> None:
    image_tower = tower(GEOMETRIES[kind])
    frozen, finetuned = (m(image_tower, None, 4, SpaceOnlyOptions()).eval() for m in (Frozen, Finetuned))
    single = Frozen(image_tower, None, 1, SpaceOnlyOptions()).eval()
    rung = AIM(image_tower, None, 4, options(adapters=())).eval()
    with torch.inference_mode():
        out = frozen(clips())
        frames = [single(clips()[:, t : t + 1])[:, :, 0] for t in range(4)]
        torch.testing.assert_close(out, torch.stack(frames, dim=2), atol=1e-5, rtol=1e-5)
        assert torch.equal(out, finetuned(clips())) and torch.equal(out, rung(clips()))
    assert out.shape == (2, 128, 4, 1, 1)


@pytest.mark.parametrize("rung", ["frozen", "spatial"])
def test_space_only_rungs_cannot_see_the_order_of_frames(rung: str) -> None:
    model = busy(AIM(tower(), 6, 4, options(adapters=LADDER[rung])))
    batch = clips()
    with torch.inference_mode():
        for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
            torch.testing.assert_close(model(batch), model(batch[:, order]), atol=1e-5, rtol=1e-5)


def test_space_only_rungs_run_no_temporal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("temporal attention ran")

    monkeypatch.setattr("model.vit.Attention.over_time", never)
    for rung in ("frozen", "spatial"):
        model = AIM(tower(), 6, 4, options(adapters=LADDER[rung]))
        model(clips())
        assert model.backbone.temporal_embedding is None
    with pytest.raises(AssertionError, match="ran"):
        AIM(tower(), 6, 4, options(adapters=LADDER["temporal"]))(clips())


@pytest.mark.parametrize("rung", ["temporal", "joint"])
def test_temporal_rungs_see_the_order_only_through_the_temporal_embedding(rung: str) -> None:
    model = busy(AIM(tower(), 6, 4, options(adapters=LADDER[rung])))
    headless = AIM(tower(), None, 4, options(adapters=LADDER[rung])).eval()
    headless.load_state_dict(model.state_dict(), strict=False)
    batch, order = clips(), [2, 0, 3, 1]
    with torch.inference_mode():
        before, frames = model(batch), headless(batch)
        assert (model(batch[:, order]) - before).abs().max() > 1e-2
        for part in (model, headless):
            part.backbone.temporal_embedding.data = part.backbone.temporal_embedding.data[:, order]
        torch.testing.assert_close(model(batch[:, order]), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(headless(batch[:, order]), frames[:, :, order], atol=1e-5, rtol=1e-4)


def test_one_frame_attends_to_itself() -> None:
    """Over a single token attention is the projection of its value."""
    attention = busy(AIM(tower(), 6, 1, AIMOptions())).backbone.transformer.resblocks[0].attn
    x = torch.randn(2, 1, 17, 128)
    with torch.inference_mode():
        value = F.linear(x, attention.in_proj_weight[256:], attention.in_proj_bias[256:])
        torch.testing.assert_close(attention.over_time(x), attention.out_proj(value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_clips_of_a_batch_do_not_meet(kind: str) -> None:
    model = busy(AIM(tower(GEOMETRIES[kind]), 6, 4, AIMOptions()))
    batch = clips(3)
    with torch.inference_mode():
        together = model(batch)
        for clip in range(3):
            torch.testing.assert_close(together[clip], model(batch[clip : clip + 1])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_temporal_embedding_comes_before_ln_pre_on_every_token(kind: str) -> None:
    backbone = busy(AIM(tower(GEOMETRIES[kind]), 6, 4, AIMOptions())).backbone
    frames = torch.randn(2, 4, 3, 64, 64)
    with torch.inference_mode():
        patches = F.conv2d(frames.flatten(0, 1), backbone.conv1.weight, backbone.conv1.bias, stride=16)
        tokens = torch.cat([backbone.class_embedding.expand(8, 1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = (tokens + backbone.positional_embedding).view(2, 4, 17, 128)
        tokens = tokens + backbone.temporal_embedding.view(1, 4, 1, 128)
        if kind == "clip":
            tokens = F.layer_norm(tokens, (128,), backbone.ln_pre.weight, backbone.ln_pre.bias, 1e-5)
        torch.testing.assert_close(backbone.add_time(backbone.stem(frames)), tokens, atol=1e-5, rtol=1e-5)


def test_head_takes_the_mean_of_normed_class_tokens() -> None:
    model = busy(AIM(tower(), 6, 4, AIMOptions()))
    headless = AIM(tower(), None, 4, AIMOptions()).eval()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if "cls_head" not in k})
    last: list[Tensor] = []
    headless.backbone.transformer.register_forward_hook(lambda *call: last.append(call[2]))
    mask = 2.0 * torch.randint(0, 2, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output, norm = headless(clips()), model.backbone.ln_post
        normed = F.layer_norm(last[-1][:, :, 0], (128,), norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(output, normed.transpose(1, 2)[..., None, None])
        features = normed.mean(dim=1)
        assert model.cls_head is not None
        torch.testing.assert_close(model(clips()), model.cls_head.fc_cls(features), atol=1e-5, rtol=1e-5)
        dropped = model(clips(), {"head_dropout": mask})
        torch.testing.assert_close(dropped, model.cls_head.fc_cls(features * mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "rung"), itertools.product(GEOMETRIES, LADDER))
def test_what_trains_is_the_published_rule(kind: str, rung: str) -> None:
    """By name, exactly: the adapters, the temporal embedding, the last norm and the head; nothing besides."""
    model = AIM(tower(GEOMETRIES[kind]), 6, 4, options(adapters=LADDER[rung], temporal_adapters=2))
    adapters = {"spatial": ["S_Adapter"], "temporal": ["T_Adapter", "T_Adapter_in"], "joint": ["MLP_Adapter"]}
    expected = {f"backbone.ln_post.{part}" for part in ("weight", "bias")}
    expected |= {f"cls_head.fc_cls.{part}" for part in ("weight", "bias")}
    expected |= {
        f"backbone.transformer.resblocks.{block}.{adapter}.{layer}.{part}"
        for block in range(3)
        for rung_part in LADDER[rung]
        for adapter in adapters[rung_part]
        for layer in ("D_fc1", "D_fc2")
        for part in ("weight", "bias")
    }
    expected |= {"backbone.temporal_embedding"} if "temporal" in LADDER[rung] else set()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


def test_finetuned_trains_everything() -> None:
    finetuned, frozen = (method(tower(), 6, 4, SpaceOnlyOptions()) for method in (Finetuned, Frozen))
    assert all(parameter.requires_grad for parameter in finetuned.parameters())
    trains = [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]
    assert trains == [
        f"{part}.{kind}" for part in ("backbone.ln_post", "cls_head.fc_cls") for kind in ("weight", "bias")
    ]


def test_only_what_trains_gets_gradients() -> None:
    """At the start the second layer of every adapter is zero, so that the first one's gradient is; that is no fault."""
    model = AIM(tower(), 6, 4, options(temporal_adapters=2))
    F.cross_entropy(model(clips()), torch.tensor([1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if "D_fc1" in name:
            assert parameter.grad is not None and not parameter.grad.any(), name
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for adapter in ("S_Adapter", "T_Adapter", "MLP_Adapter"):
        assert grads[f"backbone.transformer.resblocks.0.{adapter}.D_fc2.weight"].any()


def test_initialisation_is_the_published_one() -> None:
    model = AIM(ImageTower(replace(CLIP, width=256, heads=4), {}), 6, 4, options(temporal_adapters=2))
    for name, parameter in model.named_parameters():
        if "D_fc2" in name or "temporal_embedding" in name or (name.endswith("bias") and "ln_" not in name):
            assert not parameter.any(), name
        elif "D_fc1" in name or "out_proj" in name or "mlp.c_" in name:
            assert parameter.abs().max() <= 2 and abs(parameter.std().item() - 0.02) < 1e-3, name
    assert model.cls_head is not None and abs(model.cls_head.fc_cls.weight.std().item() - 0.01) < 1e-3


def group_names(model: VideoModel, weight_decay: float, backbone_lr: float) -> dict[tuple[float, float], set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        (group["lr_scale"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in model.optimizer_groups(weight_decay, backbone_lr)
    }


@pytest.mark.parametrize("method", ["aim", "finetuned"])
def test_optimizer_groups_follow_the_longest_key(method: str) -> None:
    model: VideoModel = (
        AIM(tower(), 6, 4, AIMOptions()) if method == "aim" else Finetuned(tower(), 6, 4, SpaceOnlyOptions())
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {"cls_head.fc_cls.weight", "cls_head.fc_cls.bias"}
    spared = {n for n in trained if any(part in n for part in ("ln_", "class_embedding", "positional_embedding"))}
    embeddings = {n for n in spared if "_embedding" in n}
    groups = group_names(model, 0.05, 1.0)
    assert groups == {(1.0, 0.05): trained - spared, (1.0, 0.0): spared}
    slow = group_names(model, 0.05, 0.1)  # "backbone" is longer than "ln_post", shorter than "class_embedding"
    expected = {(0.1, 0.05): trained - head - embeddings, (1.0, 0.05): head}
    assert slow == (expected | {(1.0, 0.0): embeddings} if embeddings else expected)


def test_bf16_keeps_trainable_weights_in_float32() -> None:
    model = busy(AIM(tower(), 6, 4, AIMOptions()))
    with torch.inference_mode():
        reference = model(clips())
        model.set_compute_dtype(torch.bfloat16)
        logits = model(clips())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert (logits - reference).abs().max() < 0.05 * reference.abs().max()


def test_wrong_number_of_frames_is_named() -> None:
    model = AIM(tower(), 6, 4, AIMOptions())
    with pytest.raises(ValueError, match=r"\[2, 8, 64, 64, 3\].*data.num_frames"):
        model(clips(frames=8))
    with pytest.raises(ValueError, match=r"\[1, 8, 3, 64, 64\].*\[B, 4, 3, 64, 64\]"):
        model(torch.zeros(1, 8, 3, 64, 64))


def text_blocks(width: int = 128, layers: int = 3, heads: int = 2) -> dict[str, Tensor]:
    """The blocks of a CLIP text tower."""
    state = tower(replace(CLIP, width=width, layers=layers, heads=heads), seed=7).state_dict
    return {key: value for key, value in state.items() if key.startswith("transformer.")}


def test_temporal_attention_from_the_text_tower() -> None:
    text = text_blocks()
    image_tower = replace(tower(), text_state=text)
    by_text = busy(AIM(image_tower, 6, 4, options(temporal_weights="text", temporal_adapters=2)))
    reuse = busy(AIM(image_tower, 6, 4, options(temporal_adapters=2)))
    for layer, block in enumerate(by_text.backbone.transformer.resblocks):
        for ours, theirs in ((block.text_ln, "ln_1"), (block.text_attn, "attn")):
            for name, value in ours.state_dict().items():
                assert torch.equal(value, text[f"transformer.resblocks.{layer}.{theirs}.{name}"])
    trains = {n for n, p in by_text.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in reuse.named_parameters() if p.requires_grad}
    with torch.inference_mode():
        block = by_text.backbone.transformer.resblocks[0]
        assert block.text_ln is not None and block.text_attn is not None
        x = torch.randn(2, 4, 17, 128)
        y = block.text_ln(x)
        branch = block.T_Adapter(block.text_attn.over_time(y + block.T_Adapter_in(y)))
        own = reuse.backbone.transformer.resblocks[0]
        own.T_Adapter = None
        torch.testing.assert_close(block(x, None), own(x + branch, None), atol=1e-5, rtol=1e-5)


def test_text_weights_start_as_the_image_model_too() -> None:
    image_tower = replace(tower(), text_state=text_blocks())
    by_text, plain = (
        method(image_tower, None, 4, changed).eval()  # type: ignore[arg-type]
        for method, changed in ((AIM, options(temporal_weights="text")), (Frozen, SpaceOnlyOptions()))
    )
    with torch.inference_mode():
        torch.testing.assert_close(by_text(clips()), plain(clips()), atol=1e-5, rtol=1e-5)


def test_a_text_tower_of_another_width_is_refused() -> None:
    """As for ViT-B/16: its text tower is 512 wide, the image tower 768."""
    for text, there in ((text_blocks(width=64, heads=1), r"has \[64\]"), (text_blocks(layers=2), "has nothing")):
        with pytest.raises(ValueError, match=f'model.temporal_weights = "text".*{there}.*or "reuse"') as error:
            AIM(replace(tower(), text_state=text), 6, 4, options(temporal_weights="text"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("adapters", ("spatial", "time"), "model.adapters: 'time' is none of spatial, temporal, joint"),
        ("adapters", ("joint", "joint"), "model.adapters = ['joint', 'joint']; each may be named once"),
        ("temporal_adapters", 3, "model.temporal_adapters = 3; allowed are 1 and 2"),
        ("adapter_ratio", 0.0, "model.adapter_ratio = 0.0; allowed is 0 < ratio <= 4"),
        ("adapter_scale", -1.0, "model.adapter_scale = -1.0"),
        ("adapter_scale", float("nan"), "model.adapter_scale = nan"),
        ("drop_path", 1.0, "model.drop_path = 1.0; allowed is 0 <= rate < 1"),
        ("head_dropout", -0.1, "model.head_dropout = -0.1"),
        ("temporal_weights", "own", "model.temporal_weights = 'own'; allowed is reuse or text"),
        ("drop_path_axis", "token", "model.drop_path_axis = 'token'; allowed is clip or official"),
        ("positions", "bottom six", 'model.positions = "bottom six"; allowed is "all"'),
    ],
)
def test_options_that_cannot_be(name: str, value: object, text: str) -> None:
    with pytest.raises(ValueError) as error:
        options(**{name: value})
    assert text in str(error.value) and "\n" not in str(error.value)
