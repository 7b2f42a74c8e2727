"""ZeroI2V: counts of the published model, its block in plain torch, and adapters that fold away to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model
from model.checkpoints import convert, of_model, read_folder, write_folder
from model.flops import count_cost
from model.methods import FORMATS, create, format_of
from model.methods.aim import Finetuned, SpaceOnlyOptions
from model.methods.zero_i2v import ZeroI2V, ZeroI2VOptions, channel_shifts
from model.parameters import count_parameters
from tests import official_files
from tests.blank_models import CLIP_B, blank_model
from tests.official_files import saved
from tests.towers import CLIP, tower

FRAMES = 5
TWO_EACH_WAY: dict[str, Any] = {"shift_back": (6, 12), "shift_ahead": (6, 12)}


def clips(count: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def busy(classes: int | None = 5, **options: Any) -> ZeroI2V:
    """A small model away from its start."""
    torch.manual_seed(0)
    chosen = ZeroI2VOptions(**options)
    made = create("zero_i2v", tower(), num_classes=classes, num_frames=FRAMES, options=chosen).eval()
    assert isinstance(made, ZeroI2V)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "Adapter" in name or "temporal" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize(
    ("options", "parameters", "gmac"),
    [({}, (100_007_424, 14_209_536), 162.8), ({"folded": True}, (85_805_568, 7_680), 140.5)],
)
def test_published_counts(options: dict[str, Any], parameters: tuple[int, int], gmac: float) -> None:
    blank = blank_model("zero_i2v", CLIP_B, None, 8, **options)
    assert count_parameters(blank) == parameters
    assert count_cost(blank).gmac == pytest.approx(gmac, rel=2e-4)


@pytest.mark.parametrize("options", [{}, {"mlp_adapters": 1, "adapter_scale": 1.0}, TWO_EACH_WAY])
def test_the_model_is_plain_attention_of_torch_with_shifted_channels(options: dict[str, Any]) -> None:
    network, batch = busy(classes=None, **options), clips()
    with torch.no_grad():
        expected = torch.stack([after_the_paper(network, clip) for clip in batch])
        torch.testing.assert_close(network(batch)[..., 0, 0], expected, atol=2e-5, rtol=1e-5)


def after_the_paper(network: ZeroI2V, clip: Tensor) -> Tensor:
    """The normed class tokens of one clip [T, 3, H, W] → [D, T], token by token and channel by channel."""
    vit: Any = network.backbone
    x = torch.cat([vit.class_embedding.expand(len(clip), 1, -1), vit.conv1(clip)], dim=1)
    x = vit.ln_pre(x + vit.positional_embedding + vit.temporal_embedding[0, :, None])
    for block in vit.transformer.resblocks:
        y = adapted(network, block.T_Adapter_in, block.ln_1(x))
        q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        heads = [
            part.unflatten(-1, (CLIP.heads, -1)).transpose(1, 2)
            for part in (q, from_other_frames(network.options, k), from_other_frames(network.options, v))
        ]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + adapted(network, block.S_Adapter, block.attn.out_proj(attended))
        x = x + adapted(network, block.MLP_Adapter_out, block.mlp(adapted(network, block.MLP_Adapter, block.ln_2(x))))
    return vit.ln_post(x[:, 0]).T


def adapted(network: ZeroI2V, adapter: Any, x: Tensor) -> Tensor:
    if adapter is None:
        return x
    return x + network.options.adapter_scale * adapter.D_fc2(adapter.D_fc1(x))


def from_other_frames(options: ZeroI2VOptions, x_TND: Tensor) -> Tensor:
    """Channel by channel; the groups stand in the order one back, one ahead, two back, two ahead."""
    out, first, width = x_TND.clone(), 0, x_TND.shape[-1]
    for step, parts in enumerate(zip(options.shift_back, options.shift_ahead, strict=True), start=1):
        for part, source in zip(parts, (-step, step), strict=True):
            channels = slice(first, first + width // part)
            for t in range(len(x_TND)):
                if 0 <= t + source < len(x_TND):
                    out[t, :, channels] = x_TND[t + source, :, channels]
            first += width // part
    return out


def test_shifted_channels_are_the_published_ones() -> None:
    """One head of ViT-B each way, two of ViT-L; on Something-Something V2 further ones."""
    assert channel_shifts(ZeroI2VOptions(), 768) == ((64, 1), (64, -1))
    ssv2 = ZeroI2VOptions(shift_back=(12, 12), shift_ahead=(12, 12))
    assert channel_shifts(ssv2, 768) == ((64, 1), (64, -1), (64, 2), (64, -2))
    large = ZeroI2VOptions(shift_back=(8, 16, 16), shift_ahead=(8, 16))
    assert channel_shifts(large, 1024) == ((128, 1), (128, -1), (64, 2), (64, -2), (64, 3))
    for wrong in (ZeroI2VOptions(shift_back=(1,)), ZeroI2VOptions(shift_back=(129,))):
        with pytest.raises(ValueError, match=r"model\.shift_back = .*; allowed is at least 1 in each and 128"):
            channel_shifts(wrong, 128)


def test_starts_as_the_image_model_where_frames_are_alike() -> None:
    image = Finetuned(tower(), None, FRAMES, SpaceOnlyOptions()).eval()
    start = create("zero_i2v", tower(), num_classes=None, num_frames=FRAMES).eval()
    still = clips()[:, :1].expand(-1, FRAMES, -1, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(start(still), image(still), atol=1e-5, rtol=1e-5)
        assert (start(clips()) - image(clips())).abs().max() > 1e-3


def test_order_counts_and_clips_do_not_meet() -> None:
    network, batch = busy(**TWO_EACH_WAY), clips()
    torch.nn.init.zeros_(network.backbone.temporal_embedding)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = network(batch)
        assert (network(batch[:, [1, 0, 2, 4, 3]]) - logits).abs().max() > 1e-3
        torch.testing.assert_close(network(batch[1:]), logits[1:], atol=1e-5, rtol=1e-5)
        short = create("zero_i2v", tower(), num_classes=2, num_frames=1, options=network.options).eval()
        assert short(clips(frames=1)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"mlp_adapters": 1, "adapter_scale": 1.0, **TWO_EACH_WAY}])
def test_folding_changes_no_logits_and_leaves_the_image_models_size(options: dict[str, Any]) -> None:
    network, batch = busy(**options), clips()
    state = torch.random.get_rng_state()
    folded = network.merged()
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        logits = network(batch)
        assert (folded(batch) - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert isinstance(folded, ZeroI2V) and folded.options.folded and folded.merged() is folded
    image = Finetuned(tower(), 5, FRAMES, SpaceOnlyOptions())
    assert count_parameters(folded)[0] == count_parameters(image)[0] + FRAMES * CLIP.width
    assert count_cost(folded).gmac == count_cost(image).gmac < count_cost(network).gmac
    assert image.merged() is image and set(folded.random_masks) == {"head_dropout"}


def test_a_folded_model_is_kept_as_a_folder_and_has_no_official_names(tmp_path: Path) -> None:
    folded = busy().merged()
    write_folder(of_model(folded), tmp_path / "out")
    loaded = model.load(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(clips()), folded(clips()))
    with pytest.raises(ValueError, match="no published format"):
        format_of(read_folder(tmp_path / "out").description)


def test_what_trains_and_what_is_decayed() -> None:
    network = busy()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == CLIP.layers * 4 * 4 + 1 + 2 + 2  # adapters, temporal embedding, ln_post, head
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {group["weight_decay"]: group["params"] for group in network.optimizer_groups(0.05)}
    kept = {"backbone.temporal_embedding", "backbone.ln_post.weight", "backbone.ln_post.bias"}
    assert {names[id(p)] for p in groups[0.0]} == kept


def test_dropout_takes_hidden_features_of_one_clip() -> None:
    network, batch = busy(), clips()
    shape = network.random_masks["adapter_dropout"].shape
    assert shape == (CLIP.layers, 4, 32) and (network.random_masks["adapter_dropout"] == 0.1).all()
    masks = torch.ones(2, *shape)
    with torch.no_grad():
        logits = network(batch)
        torch.testing.assert_close(network(batch, {"adapter_dropout": masks}), logits)
        masks[1, 2, 3, 7] = 0
        dropped = network(batch, {"adapter_dropout": masks})
        network.blocks[2].MLP_Adapter_out.D_fc2.weight[:, 7] = 0
        without = network(batch)
        network.blocks[2].MLP_Adapter_out.D_fc1.bias[7] = 1e3
        torch.testing.assert_close(network(batch), without)  # the whole feature is gone
    torch.testing.assert_close(dropped[0], logits[0])
    torch.testing.assert_close(dropped[1], without[1], atol=1e-5, rtol=1e-5)
    assert (dropped[1] - logits[1]).abs().max() > 1e-4
    assert set(busy(adapter_dropout=0.0).random_masks) == {"head_dropout"}


def test_options_are_read_off_the_tensors(tmp_path: Path) -> None:
    one = ("T_Adapter_in", "S_Adapter", "MLP_Adapter")
    converted = convert(saved(official_files.zero_i2v(adapters=one, hidden=48), tmp_path / "a.safetensors"))
    options = converted.description["options"]
    assert (options["mlp_adapters"], options["adapter_ratio"], options["folded"]) == (1, 48 / 128, False)
    assert converted.description["num_frames"] == 4
    assumed = converted.assumed
    assert (assumed["adapter_scale"], assumed["shift_back"], assumed["shift_ahead"]) == (0.5, (12,), (12,))
    write_folder(converted, tmp_path / "out")
    ssv2 = model.load(tmp_path / "out", scale=1, shift_back=[12, 12], shift_ahead=[12, 12])
    assert isinstance(ssv2, ZeroI2V)
    assert ssv2.options == ZeroI2VOptions((12, 12), (12, 12), 1, 48 / 128, 1.0)
    entry = FORMATS["zero_i2v"]
    large = entry.read(entry, official_files.zero_i2v(width=1024))  # whose names are ours
    assert large.description["options"]["shift_back"] == (8,)
    both = official_files.zero_i2v() | official_files.aim_clip(adapters=("T_Adapter",))
    assert convert(saved({n: s for n, s in both.items() if "_out" not in n}, tmp_path / "b.safetensors")).source == (
        "aim_clip"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shift_back", (0,)),
        ("shift_ahead", (20000,)),
        ("mlp_adapters", 3),
        ("adapter_ratio", 0.0),
        ("adapter_scale", -1.0),
        ("adapter_dropout", 1.0),
        ("head_dropout", -0.1),
    ],
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.{option} = .*; allowed"):
        ZeroI2VOptions(**{option: value})
