"""AIM: parity with the published implementation, its invariants, and what trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from model import aim as aim_module
from model.aim import AIM, AIMOptions
from model.backbone import ImageTower, ViTGeometry, load_image_tower
from model.parameters import count_parameters, parameter_table

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
LADDER = {
    "frozen": (),
    "spatial": ("spatial",),
    "temporal": ("spatial", "temporal"),
    "joint": ("spatial", "temporal", "joint"),
}


def tiny_tower(width: int = 128, layers: int = 3, size: int = 64, patch: int = 16) -> ImageTower:
    geometry = ViTGeometry(width, layers, width // 64, patch, size, True, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    blank = ImageTower(geometry, {})
    model = aim_module.AdaptedViT(geometry, 1, AIMOptions(adapters=()))
    return ImageTower(blank.geometry, {k: v.detach().clone() for k, v in model.state_dict().items()})


def busy(model: AIM) -> AIM:
    """Adapters and temporal embedding away from their zero initialisation."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "D_fc2" in name or "temporal_embedding" in name or "fc_cls" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def clips(count: int = 2, frames: int = 4, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, frames, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ["aim_clip_tiny", "aim_clip_b16_k400"])
def test_equals_the_published_implementation(name: str) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"parity files are not here: {GOLDEN}")
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    assert spec and spec.loader
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    state, x, expected, facts = fill.load(GOLDEN / f"{name}.json")
    frames, size = facts["input"][2], facts["input"][3]
    width = facts["keys"]["backbone.class_embedding"][0]
    patch = facts["keys"]["backbone.conv1.weight"][-1]
    layers = sum(key.endswith("ln_1.weight") for key in facts["keys"])
    classes = facts["keys"]["cls_head.fc_cls.bias"][0]
    model = AIM(tiny_tower(width, layers, size, patch), classes, frames, AIMOptions(adapter_scale=0.5)).eval()
    assert count_parameters(model) == (facts["total"], facts["trainable"])
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        logits = model.classify(x.transpose(1, 2))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "frames", "classes", "options", "total", "trainable"),
    [
        ("ViT-B-16-quickgelu", 8, 400, AIMOptions(), 96_764_560, 10_966_672),
        ("ViT-B-16-quickgelu", 8, 174, AIMOptions(temporal_adapters=2), 100_141_230, 14_343_342),
        ("ViT-L-14-quickgelu", 32, 400, AIMOptions(), 341_463_440, 38_285_712),
    ],
)
def test_parameter_counts_of_the_paper(
    name: str, frames: int, classes: int, options: AIMOptions, total: int, trainable: int
) -> None:
    tower = load_image_tower(name, "none")
    model = AIM(tower, classes, frames, options)
    assert count_parameters(model) == (total, trainable)
    layers = tower.geometry.layers
    assert sum("Adapter" in key for key in model.state_dict()) == layers * (4 * (2 + options.temporal_adapters))


def test_starts_as_clip_frame_by_frame() -> None:
    from model.backbone import load_clip

    torch.manual_seed(0)
    clip = load_clip("tiny-clip", "none")
    tower = ImageTower(
        load_image_tower("tiny-clip", "none").geometry,
        {k: v for k, v in clip.visual.state_dict().items() if k != "proj"},
    )
    model = AIM(tower, 5, 3, AIMOptions()).eval()
    prepared = model.prepare(clips(2, 3, tower.geometry.image_size))
    with torch.inference_mode():
        ours = model.backbone(prepared, None) @ clip.visual.proj
        theirs = clip.encode_image(prepared.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rung", ["frozen", "spatial"])
def test_space_only_rungs_cannot_see_the_order_of_frames(rung: str) -> None:
    model = busy(AIM(tiny_tower(), 6, 4, AIMOptions(adapters=LADDER[rung])))
    batch = clips()
    with torch.inference_mode():
        torch.testing.assert_close(model(batch), model(batch[:, [2, 0, 3, 1]]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(batch), model(batch.flip(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rung", ["temporal", "joint"])
def test_temporal_rungs_see_the_order_only_through_the_temporal_embedding(rung: str) -> None:
    model = busy(AIM(tiny_tower(), 6, 4, AIMOptions(adapters=LADDER[rung])))
    batch, order = clips(), [2, 0, 3, 1]
    with torch.inference_mode():
        before = model(batch)
        assert (model(batch[:, order]) - before).abs().max() > 1e-2
        model.backbone.temporal_embedding.data = model.backbone.temporal_embedding.data[:, order]
        torch.testing.assert_close(model(batch[:, order]), before, atol=1e-5, rtol=1e-5)


def test_clips_of_a_batch_do_not_meet() -> None:
    model = busy(AIM(tiny_tower(), 6, 4, AIMOptions()))
    batch = clips(3)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rung", LADDER)
def test_what_trains(rung: str) -> None:
    model = AIM(tiny_tower(), 6, 4, AIMOptions(adapters=LADDER[rung], temporal_adapters=2))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {
        "S_Adapter": "spatial",
        "T_Adapter.": "temporal",
        "T_Adapter_in": "temporal",
        "MLP_Adapter": "joint",
    }
    for part, adapter in parts.items():
        assert any(part in name for name in trains) == (adapter in LADDER[rung])
    assert ("backbone.temporal_embedding" in trains) == ("temporal" in LADDER[rung])
    base = {
        "backbone.ln_post.weight",
        "backbone.ln_post.bias",
        "cls_head.fc_cls.weight",
        "cls_head.fc_cls.bias",
    }
    assert base <= trains
    assert all(any(p in n for p in ("Adapter", "temporal_embedding")) for n in trains - base)
    groups = model.optimizer_groups(0.05)
    assert sum(len(g["params"]) for g in groups) == len(trains)  # type: ignore[arg-type]
    assert len(groups[1]["params"]) == 2 and groups[1]["weight_decay"] == 0.0  # type: ignore[arg-type]


def test_masks_drop_a_clips_branches_and_nothing_else() -> None:
    model = busy(AIM(tiny_tower(), 6, 4, AIMOptions(drop_path=0.5)))
    batch = clips()
    ones = {"drop_path": torch.ones(2, 3, 2), "head_dropout": torch.ones(2, 128)}
    with torch.inference_mode():
        torch.testing.assert_close(model(batch, ones), model(batch))
        dropped = {**ones, "drop_path": ones["drop_path"].clone()}
        dropped["drop_path"][0] = 0
        out = model(batch, dropped)
    torch.testing.assert_close(out[1], model(batch)[1], atol=1e-5, rtol=1e-5)
    assert (out[0] - model(batch)[0]).abs().max() > 1e-3
    rates = model.random_masks["drop_path"]
    assert rates[:, 0].tolist() == [0.0, 0.25, 0.5] and torch.equal(rates[:, 0], rates[:, 1])


def test_bf16_keeps_trainable_weights_in_float32() -> None:
    model = busy(AIM(tiny_tower(), 6, 4, AIMOptions()))
    with torch.inference_mode():
        reference = model(clips())
        model.set_compute_dtype(torch.bfloat16)
        logits = model(clips())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert (logits - reference).abs().max() < 0.05 * reference.abs().max()


def test_wrong_number_of_frames_is_named() -> None:
    model = AIM(tiny_tower(), 6, 4, AIMOptions())
    with pytest.raises(ValueError, match=r"\[2, 8, 64, 64, 3\].*data.num_frames"):
        model(clips(frames=8))


def test_parameter_table_adds_up() -> None:
    model = AIM(tiny_tower(), 7, 4, AIMOptions())
    total, trainable = count_parameters(model)
    last = parameter_table(model).splitlines()[-1]
    assert f"{total:,}" in last and f"{trainable:,}" in last
