"""Multiply-adds are the published ones, counted without weights; what training keeps is what autograd really keeps."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import flops
from model.flops import Cost, WithoutData, count_cost, device_peak
from model.geometry import ImageTower, SwinGeometry, ViTGeometry
from model.layers import Linear
from model.methods import METHODS, create
from model.speed import SpeedOptions, speed_up
from model.video import VideoModel
from tests.blank_models import CLIP_B, CLIP_L, IN21K_B, SWIN_B, blank_model

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
VIT = ViTGeometry(128, 3, 2, 16, 64, True, (0.5,) * 3, (0.5,) * 3)
SWIN = SwinGeometry(width=32, depths=(2, 2), heads=(1, 2), window=4, image_size=32)


@pytest.mark.parametrize(
    ("method", "name", "frames", "options", "gmac"),
    [
        ("aim", CLIP_B, 8, {}, 202.088),
        ("aim", CLIP_B, 16, {}, 404.641),
        ("aim", CLIP_B, 32, {}, 811.141),
        ("aim", CLIP_B, 8, {"temporal_adapters": 2}, 207.665),
        ("aim", CLIP_L, 8, {}, 933.479),
        ("aim", CLIP_L, 16, {}, 1868.6),
        ("aim", CLIP_L, 32, {}, 3743.6),
        ("timesformer", IN21K_B, 8, {}, 195.8),
        ("timesformer_clip", CLIP_B, 8, {}, 196.51),
        ("finetuned", IN21K_B, 8, {}, 140.5),
        ("frozen", IN21K_B, 8, {}, 140.5),
        ("video_swin", SWIN_B, 32, {}, 281.3),
    ],
)
def test_multiply_adds_are_the_published_ones(
    method: str, name: str, frames: int, options: dict[str, Any], gmac: float
) -> None:
    cost = count_cost(blank_model(method, name, 400, frames, **options))
    assert cost.gmac == pytest.approx(gmac, rel=2e-4)


@pytest.mark.parametrize(
    ("golden", "method", "name"),
    [("aim_clip_b16_k400", "aim", CLIP_B), ("timesformer_divided", "timesformer", IN21K_B)],
)
def test_multiply_adds_equal_the_parity_files(golden: str, method: str, name: str) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"parity files are not here: {GOLDEN}")
    facts = json.loads((GOLDEN / f"{golden}.json").read_text(encoding="utf-8"))
    assert round(count_cost(blank_model(method, name, 400, 8)).gmac * 1e9) == round(facts["gmac"] * 1e9)


def test_layer_norms_add_a_thousandth() -> None:
    """Three views of B/16 as for Something-Something V2 then cost 623.7, and three of L/14 2802.8."""
    for name, adapters, total in ((CLIP_B, 2, 623.7), (CLIP_L, 1, 2802.8)):
        cost = count_cost(blank_model("aim", name, 174, 8, temporal_adapters=adapters))
        assert 3 * (cost.gmac + cost.layer_norm) == pytest.approx(total, abs=0.06)


def small(method: str, geometry: ViTGeometry | SwinGeometry, **options: Any) -> VideoModel:
    torch.manual_seed(0)
    chosen = METHODS[method].options(**options)
    return create(method, ImageTower(geometry, {}), num_classes=7, num_frames=4, options=chosen)


SMALL = [("aim", VIT), ("timesformer", VIT), ("timesformer_clip", VIT), ("aim", SWIN), ("video_swin", SWIN)]


@pytest.mark.parametrize(("method", "geometry"), SMALL)
def test_a_real_forward_pass_has_as_many(method: str, geometry: ViTGeometry | SwinGeometry) -> None:
    """PyTorch's own counter, on data, with plain products for attention: it counts 2 a multiply-add."""
    model = small(method, geometry).eval()
    size = geometry.image_size
    frames = torch.zeros(1, 4, size, size, 3, dtype=torch.uint8)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(frames)
    assert round(count_cost(model).gmac * 1e9) == counter.get_total_flops() // 2


TRAINED = [
    *((method, geometry, {}) for method, geometry in SMALL),
    ("finetuned", VIT, {}),
    ("frozen", VIT, {}),
    ("aim", VIT, {"positions": "top 1"}),
    ("aim", VIT, {"positions": "top 1", "adapters": ("spatial", "joint")}),  # nothing trains below the last block
    ("aim", SWIN, {"adapters": ("joint",)}),
]


@pytest.mark.parametrize(("method", "geometry", "options"), TRAINED)
def test_a_real_training_step_has_as_many(
    method: str, geometry: ViTGeometry | SwinGeometry, options: dict[str, Any]
) -> None:
    model = small(method, geometry, **options).train()
    size = geometry.image_size
    frames = torch.zeros(1, 4, size, size, 3, dtype=torch.uint8)
    masks = {name: torch.ones(1, *p.shape) for name, p in model.random_masks.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(frames, masks).sum().backward()
    assert round(count_cost(model).training_gmac * 1e9) == counter.get_total_flops() // 2


def test_frozen_weights_and_what_lies_below_the_lowest_adapter_cost_no_gradients() -> None:
    """By the geometry: per token a block has 12 D² multiply-adds of frozen layers, an adapter 2 D · D/4."""
    classes, frames, tokens, width, layers = 7, 4, 17, 128, 3
    head = classes * width
    frozen = count_cost(small("frozen", VIT))
    assert round((frozen.training_gmac - frozen.gmac) * 1e9) == 2 * head  # to its weights, and to the norm below
    tuned = count_cost(small("finetuned", VIT))
    stem = frames * (tokens - 1) * width * 3 * 16**2
    assert round((tuned.training_gmac - 3 * tuned.gmac) * 1e9) == -stem  # pixels need no gradient
    one_adapter = {"adapters": ("joint",)}
    everywhere, top = (count_cost(small("aim", VIT, **one_adapter, positions=p)) for p in ("all", "top 1"))
    adapter = frames * tokens * width**2 // 2
    assert round((top.training_gmac - top.gmac) * 1e9) == 2 * adapter + 2 * head - adapter // 2  # frozen is its input
    block = frames * tokens * (12 * width**2 + 2 * tokens * width)
    backward = round((everywhere.training_gmac - everywhere.gmac) * 1e9)
    below = layers - 1  # gradients go through all of these but to the input of the lowest adapter
    attention_again = frames * tokens**2 * 2 * width  # both products have two inputs that need a gradient
    assert backward == 2 * head + 2 * layers * adapter - adapter // 2 + below * (block + attention_again)


@pytest.mark.parametrize(("method", "geometry"), SMALL)
def test_shapes_worked_out_once_are_those_worked_out_every_time(
    method: str, geometry: ViTGeometry | SwinGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(method, geometry)
    quick = count_cost(model)
    monkeypatch.setattr(flops, "_makes_new", lambda func: False)
    assert count_cost(model) == quick


class TwoLayers(VideoModel):
    """A method with nothing of a transformer: pixels → 16 → GELU → 8 features."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__(VIT, 8, 5, 2, head_dropout=0.5)
        self.backbone = TwoLayers.Backbone()
        self.trained_names = ("cls_head",) if frozen else None  # type: ignore[misc]
        self.finish()

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Linear(3 * 64 * 64, 16), Linear(16, 8)

        def forward(self, clips: Tensor, masks: dict[str, Tensor]) -> Tensor:
            frames = F.gelu(self.first(clips.flatten(2)))  # [B, 2, 16]
            return self.second(frames).transpose(1, 2)


def test_any_method_is_counted_to_the_last_byte() -> None:
    pixels, clips = 3 * 64 * 64, 3
    cost = count_cost(TwoLayers(), clips)
    assert round(cost.gmac * 1e9) == clips * (2 * (pixels * 16 + 16 * 8) + 8 * 5)
    assert cost.layer_norm == 0
    in_bfloat16 = clips * 2 * (pixels + 16 + 16)  # pixels, GELU's input, the second layer's input
    in_float32 = clips * (8 + 8)  # the head's dropout mask and its input
    assert cost.kept_bytes == 2 * in_bfloat16 + 4 * in_float32
    assert cost.copied_bytes == 2 * 16 * 8  # the second layer's weight, through which the gradient goes
    frozen = count_cost(TwoLayers(frozen=True), clips)
    assert frozen == Cost(
        cost.gmac, 0, 4 * clips * 8, 0, cost.gmac + clips * 8 * 5 / 1e9
    )  # the head's input: nothing below it needs a gradient


def test_memory_grows_with_the_clips_and_copies_do_not() -> None:
    one, three = (count_cost(small("aim", VIT), clips) for clips in (1, 3))
    assert three.kept_bytes == pytest.approx(3 * one.kept_bytes, rel=1e-3)
    assert three.copied_bytes == one.copied_bytes > 0
    assert three.gmac == pytest.approx(3 * one.gmac)


def test_attention_keeps_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products would keep every one, a quarter of a million for each frame of 257 tokens and each head."""
    geometry = ViTGeometry(128, 2, 2, 4, 64, True, (0.5,) * 3, (0.5,) * 3)
    model = small("finetuned", geometry)
    fused = count_cost(model)
    monkeypatch.setattr(flops, "_FusedAttention", nullcontext)
    plain = count_cost(model)
    layers, frames, heads, tokens = 2, 4, 2, 257
    assert plain.kept_bytes - fused.kept_bytes > 0.9 * layers * frames * heads * tokens**2 * 2
    assert plain.gmac == fused.gmac


@pytest.mark.parametrize("method", ["aim", "timesformer", "timesformer_clip"])
def test_a_real_training_step_keeps_as_much(method: str) -> None:
    """On data in float32. Not Swin: with a bias, the CPU keeps every attention weight and a GPU does not."""
    model = small(method, VIT).train()
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    masks = {name: torch.ones(2, *p.shape) for name, p in model.random_masks.items()}
    size = VIT.image_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(2, 4, size, size, 3, dtype=torch.uint8), masks)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    measured = sum(size for storage, size in kept.items() if storage not in own)
    cost = count_cost(model, 2, torch.float32)
    assert cost.copied_bytes == 0
    assert cost.kept_bytes == pytest.approx(measured, rel=0.002)


def test_adapters_save_weights_and_not_activations() -> None:
    """The temporal embedding trains below the first block, so even adapters at the top keep what is below them."""
    costs = {method: count_cost(blank_model(method, CLIP_B, 400, 8)) for method in ("aim", "finetuned", "frozen")}
    assert costs["aim"].kept_bytes > 0.9 * costs["finetuned"].kept_bytes
    assert costs["frozen"].kept_bytes < 0.01 * costs["finetuned"].kept_bytes
    assert costs["aim"].copied_bytes < 0.2 * costs["finetuned"].copied_bytes
    top, bottom = (count_cost(blank_model("aim", CLIP_B, 400, 8, positions=p)) for p in ("top 6", "bottom 6"))
    assert top.kept_bytes == bottom.kept_bytes


def test_what_is_counted_is_the_model_however_it_is_sped_up() -> None:
    model = small("aim", VIT)
    plain = count_cost(model)
    model.set_compute_dtype(torch.bfloat16)
    speed_up(model, SpeedOptions(attention="sdpa", checkpoint_blocks=-1, compile="off", fp8=True), torch.device("cpu"))
    recorded = model.blocks[0].graphed = Recorded()
    assert count_cost(model) == plain
    assert model.blocks[0].graphed is recorded and model.blocks[1].checkpointed


class Recorded:
    """Stands for a CUDA graph, which cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorded:
        raise AssertionError("a recorded graph is copied")


def test_counting_leaves_the_model_as_it_was() -> None:
    model = small("aim", VIT).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    count_cost(model)
    assert not model.training and model.compute_dtype == torch.float32
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and tensor.equal(before[name])


def test_models_without_data_are_the_same_models() -> None:
    with WithoutData():
        blank = small("aim", SWIN)
    model = small("aim", SWIN)
    assert {p.device.type for p in (*blank.parameters(), *blank.buffers())} == {"meta"}
    shapes = [[(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (blank, model)]
    assert shapes[0] == shapes[1]
    assert count_cost(blank) == count_cost(model)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H200", 989, 1979),
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100 80GB PCIe", 312, None),
        ("NVIDIA L4", 121, 242),
        ("NVIDIA L40S", 362, 733),
        ("NVIDIA GeForce RTX 4090", 165, 330),
        ("Tesla V100-SXM2-16GB", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(
    name: str, bf16: int | None, fp8: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    stated = [device_peak(cuda, dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    assert stated == [None if tera is None else tera * 1e12 for tera in (bf16, fp8)]
    assert device_peak(cuda, torch.float32) is None
    assert device_peak(torch.device("cpu"), torch.bfloat16) is None
