"""ST-Adapter: parity with the published model, its counts, the adapter itself, and how a model starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import model
from model import official
from model.checkpoints import convert, count, write_folder
from model.flops import count_cost
from model.geometry import ImageTower
from model.methods import FORMATS, create
from model.methods.aim import Finetuned, SpaceOnlyOptions
from model.methods.st_adapter import Adapter, STAdapter, STAdapterOptions, TimeConvolution
from model.parameters import count_parameters
from tests import official_files
from tests.blank_models import CLIP_B, CLIP_L, blank_model
from tests.golden import load_golden
from tests.official_files import Shapes, saved
from tests.towers import CLIP, tower

FRAMES = 4


def clips(count: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def busy(**options: Any) -> STAdapter:
    """A small model away from its start: no tensor is zero."""
    torch.manual_seed(0)
    chosen = STAdapterOptions(**{"bottleneck": 24, **options})
    made = create("st_adapter", tower(), num_classes=5, num_frames=FRAMES, options=chosen).eval()
    assert isinstance(made, STAdapter)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "adapter_pre" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def test_equals_the_published_implementation(tmp_path: Path) -> None:
    state, clip, expected, facts = load_golden("st_adapter_12x384")
    save_file(state, tmp_path / "official.safetensors")
    converted = convert(tmp_path / "official.safetensors")
    assert count(converted) == (facts["total"], facts["trainable"])
    write_folder(converted, tmp_path / "out")
    loaded = model.load(tmp_path / "out")
    entry = FORMATS["st_adapter"]
    trained = {official.official_name(entry, name) for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == set(facts["trainable_names"])
    with torch.inference_mode():
        logits = loaded(clip.transpose(1, 2))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert round(count_cost(loaded).gmac * 1e9) == round(facts["gmac"] * 1e9)


@pytest.mark.parametrize(
    ("name", "classes", "frames", "adapters", "parameters", "gmac"),
    [
        (CLIP_B, 174, 8, "both", (100_153_518, 14_354_094), 162.7),
        (CLIP_L, 400, 32, "mlp", None, 2748),
    ],
)
def test_published_counts(
    name: str, classes: int, frames: int, adapters: str, parameters: tuple[int, int] | None, gmac: float
) -> None:
    blank = blank_model("st_adapter", name, classes, frames, adapters=adapters)
    assert parameters is None or count_parameters(blank) == parameters
    assert count_cost(blank).gmac == pytest.approx(gmac, rel=5e-4)


def test_an_adapter_is_the_published_one() -> None:
    """A Conv3d over the patches of one clip after another, and nothing for the class token (trap 28)."""
    adapter = busy().blocks[0].adapter_pre_mlp
    assert isinstance(adapter, Adapter)
    x = torch.randn(2, FRAMES, 17, 128)
    conv = nn.Conv3d(24, 24, (3, 1, 1), padding=(1, 0, 0), groups=24)
    conv.load_state_dict(adapter.conv.state_dict())
    expected = x.clone()
    with torch.no_grad():
        for clip in range(2):
            hidden = nn.functional.linear(x[clip, :, 1:], adapter.fc1.weight, adapter.fc1.bias)
            over_time = conv(hidden.permute(2, 0, 1)[None, :, :, :, None])[0, :, :, :, 0].permute(1, 2, 0)
            expected[clip, :, 1:] += nn.functional.linear(over_time, adapter.fc2.weight, adapter.fc2.bias)
        actual = adapter(x)
    assert torch.equal(actual[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [(3, torch.float32, 1e-6), (5, torch.bfloat16, 1e-2)])
def test_the_convolution_and_its_gradients_are_those_of_a_conv3d(
    kernel: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    ours, theirs = TimeConvolution(8, kernel), nn.Conv3d(8, 8, (kernel, 1, 1), padding=(kernel // 2, 0, 0), groups=8)
    ours.load_state_dict(theirs.state_dict())
    h = torch.randn(2, 6, 9, 8).to(dtype)
    mine, plain = h.clone().requires_grad_(), h.double().requires_grad_()
    expected = theirs.double()(plain.permute(0, 3, 1, 2)[..., None])[..., 0].permute(0, 2, 3, 1)
    actual = ours(mine)
    weights = torch.randn(actual.shape).to(dtype)
    (actual * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert actual.dtype == dtype and ours.weight.grad is not None and mine.grad is not None
    for a, b in (
        (actual, expected),
        (mine.grad, plain.grad),
        (ours.weight.grad, theirs.weight.grad),
        (ours.bias.grad, theirs.bias.grad),
    ):
        assert a is not None and b is not None
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_starts_as_the_image_model_pooled_before_its_last_norm() -> None:
    torch.manual_seed(0)
    image = Finetuned(tower(), None, FRAMES, SpaceOnlyOptions()).eval()
    start = create("st_adapter", tower(), num_classes=400, num_frames=FRAMES).eval()
    with torch.no_grad():
        image_norm, image.backbone.ln_post = image.backbone.ln_post, nn.Identity()
        class_tokens = image.classify(clips())[..., 0, 0]  # [B, D, T]
        expected = start.cls_head(image_norm(class_tokens.mean(-1)))
        torch.testing.assert_close(start.classify(clips()), expected, atol=1e-5, rtol=1e-5)
    adapter = start.blocks[0].adapter_pre_mlp
    assert not adapter.conv.weight.any() and not adapter.conv.bias.any()
    assert not adapter.fc1.bias.any() and not adapter.fc2.bias.any()
    for linear in (adapter.fc1, adapter.fc2):
        bound = linear.in_features**-0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert start.cls_head.fc_cls.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_order_counts_and_clips_do_not_meet() -> None:
    network, batch = busy(), clips()
    with torch.no_grad():
        logits = network(batch)
        assert (network(batch.flip(1)) - logits).abs().max() > 1e-3
        torch.testing.assert_close(network(batch[1:]), logits[1:], atol=1e-5, rtol=1e-5)
        assert network(clips(frames=6)).shape == (2, 5)  # nothing depends on the number of frames


def test_the_papers_activation_follows_the_convolution() -> None:
    plain, paper = busy(), busy(activation="gelu")
    adapter, x = paper.blocks[1].adapter_pre_mlp, torch.randn(1, FRAMES, 17, 128)
    with torch.no_grad():
        expected = adapter.fc2(nn.functional.gelu(adapter.conv(adapter.fc1(x[:, :, 1:]))))
        torch.testing.assert_close(adapter(x)[:, :, 1:] - x[:, :, 1:], expected, atol=1e-6, rtol=1e-4)
        assert (paper(clips()) - plain(clips())).abs().max() > 1e-3


def test_what_trains_and_what_is_decayed() -> None:
    network = busy(adapters="both")
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all("adapter_pre" in name or name.startswith("cls_head") for name in trained)
    assert len(trained) == CLIP.layers * 2 * 6 + 2
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {group["weight_decay"]: group["params"] for group in network.optimizer_groups(0.01)}
    assert {names[id(p)] for p in groups[0.0]} == {name for name in trained if name.endswith(".bias")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"adapters": "mlp", "positions": "all", "bottleneck": 32, "kernel": 3}),
        ({"adapters": ("adapter_pre_attn", "adapter_pre_mlp"), "hidden": 48}, {"adapters": "both", "bottleneck": 48}),
        ({"adapters": ("adapter_pre_attn",), "kernel": 5}, {"adapters": "attention", "kernel": 5}),
        ({"blocks": (1,)}, {"positions": (1,)}),
    ],
)
def test_options_are_read_off_the_tensors(arguments: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    converted = convert(saved(official_files.st_adapter(**arguments), tmp_path / "a.safetensors"))
    options = converted.description["options"]
    assert {name: options[name] for name in expected} == expected
    assert converted.assumed["num_frames"] == 8 and converted.assumed["activation"] == "none"
    assert converted.description["geometry"]["mean"][0] == 0.48145466


FIRST, SECOND = (f"transformer.resblocks.{block}.adapter_pre_" for block in (0, 1))
SPATIAL = (32, 1, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{SECOND}attn.conv.weight": (32, 1, 3, 1, 1)}, "the adapters of the blocks are"),
        ({f"{SECOND}mlp.conv.weight": (32, 1, 5, 1, 1)}, "convolutions have the shapes"),
        ({f"{SECOND}mlp.conv.weight": (32, 1, 3)}, "5 axes are needed"),
        ({f"{FIRST}mlp.conv.weight": SPATIAL, f"{SECOND}mlp.conv.weight": SPATIAL}, "the others ask for"),
    ],
)
def test_what_cannot_be_read_is_named(change: Shapes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        convert(saved(official_files.st_adapter() | change, tmp_path / "a.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("adapters", "all"),
        ("positions", "some"),
        ("bottleneck", 0),
        ("kernel", 2),
        ("activation", "relu"),
        ("head_dropout", 1.0),
    ],
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.{option} = .*; allowed is"):
        STAdapterOptions(**{option: value})
    assert STAdapter(ImageTower(CLIP, {}), 2, 2, STAdapterOptions(bottleneck=8, positions="top 1")).has_frozen_stem
