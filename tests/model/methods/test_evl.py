"""EVL: parity with the published implementation, counts, the decoder written out, and what the trunk does not keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import model
from model.checkpoints import convert, write_folder
from model.flops import count_cost
from model.geometry import ImageTower
from model.methods import FORMATS, create, format_of
from model.methods.evl import EVL, EVLOptions, QueryAttention, pair_weights, rows_of_pairs
from model.parameters import count_parameters
from tests import official_files
from tests.blank_models import CLIP_B, CLIP_L, blank_model
from tests.golden import load_golden
from tests.towers import CLIP, IMAGENET, tower

FRAMES = 4


def make(frames: int = FRAMES, **options: Any) -> EVL:
    """A small model in training, nothing of whose decoder is where it starts."""
    chosen = EVLOptions(**{"decoder_layers": 2, **options})
    made = create("evl", tower(), num_classes=5, num_frames=frames, options=chosen)
    assert isinstance(made, EVL)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "decoder." in name and "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return made.train()


def clips(count: int = 2, frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, frames, 64, 64, 3), dtype=torch.uint8, generator=generator)


def test_the_published_implementation_gives_these_logits(tmp_path: Path) -> None:
    state, published_clips, expected, facts = load_golden("evl_b16_k400")
    save_file(state, tmp_path / "evl.safetensors")
    converted = convert(tmp_path / "evl.safetensors")
    assert converted.source == "evl" and not converted.dropped
    write_folder(converted, tmp_path / "evl")
    loaded = model.load(tmp_path / "evl")
    assert count_parameters(loaded) == (facts["total"], facts["trainable"])
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    entry = FORMATS["evl"]
    assert {model.official.official_name(entry, name) for name in trained} == set(facts["trainable_names"])
    with torch.inference_mode():
        logits = loaded(published_clips.transpose(1, 2))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "frames", "total", "trainable"),
    [
        (CLIP_B, 8, 118_982_032, 33_183_376),
        (CLIP_L, 8, 361_906_576, 58_727_824),
        (CLIP_L, 32, 362_004_880, 58_826_128),
    ],
)
def test_counts_are_the_published_ones(name: str, frames: int, total: int, trainable: int) -> None:
    assert count_parameters(blank_model("evl", name, 400, frames)) == (total, trainable)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"width": 192, "layers": 5, "read": 3, "grid": 3, "patch": 14, "frames": 6}, {"decoder_layers": 3}),
        ({"inner": 64, "hidden": 200}, {"decoder_width": 64, "decoder_mlp_ratio": 200 / 128}),
        ({"frames": None, "tables": False}, {"temporal_positions": False, "temporal_attention": False}),
    ],
)
def test_sizes_are_read_off_the_tensors(arguments: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    path = official_files.saved(official_files.evl(**arguments), tmp_path / "evl.safetensors")
    converted = convert(path)
    read = converted.description
    assert {name: read["options"][name] for name in options} == options
    assert read["num_frames"] == (arguments.get("frames", 4) or 8)
    assert read["geometry"]["image_size"] == arguments.get("grid", 2) * arguments.get("patch", 16)
    assert read["geometry"]["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert format_of(read).name == "evl"


def test_what_patches_find_is_their_offsets_rows() -> None:
    """Written out: for each frame, patch and neighbouring frame, every patch there with the row of the offset."""
    torch.manual_seed(0)
    batch, frames, side, heads, width = 2, 3, 3, 2, 4
    q, k = (torch.randn(batch * frames, 1 + side * side, heads, width) for _ in range(2))
    tables = torch.randn(2, (2 * side - 1) ** 2, 5)
    found = rows_of_pairs(pair_weights(q, k, frames), tables, frames)
    expected = torch.zeros(batch, frames, side * side, 5)
    for clip in range(batch):
        for frame in range(frames):
            for direction, other in enumerate((frame - 1, frame + 1)):
                if not 0 <= other < frames:
                    continue
                queries, keys = q[clip * frames + frame, 1:], k[clip * frames + other, 1:]
                weights = torch.einsum("qhk,shk->hqs", queries, keys).div(width**0.5).softmax(-1).mean(0)
                for one in range(side * side):
                    for two in range(side * side):
                        rows, columns = one // side - two // side + side - 1, one % side - two % side + side - 1
                        row = tables[direction, rows * (2 * side - 1) + columns]
                        expected[clip, frame, one] += weights[one, two] * row
    torch.testing.assert_close(found, expected)


def test_one_frame_has_no_neighbours() -> None:
    q, k = torch.randn(2, 2, 1 + 4, 2, 4)
    assert not rows_of_pairs(pair_weights(q, k, 1), torch.randn(2, 9, 5), 1).any()
    made = make(frames=1)
    assert made(clips(frames=1)).isfinite().all()


def test_the_query_attends_as_torchs_attention_does() -> None:
    """Which multiplies every token by the matrices of keys and values; outputs and gradients are the same."""
    torch.manual_seed(0)
    ours = QueryAttention(32, 32, 4)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    for part in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj):
        nn.init.normal_(part.bias)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in (ours.q_proj, ours.k_proj, ours.v_proj)]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    query, tokens = torch.randn(3, 32), torch.randn(3, 11, 32, requires_grad=True)
    mine = ours(query, tokens)
    plain = theirs(query[:, None], tokens, tokens, need_weights=False)[0][:, 0]
    torch.testing.assert_close(mine, plain)
    weight = torch.randn(3, 32)
    (left,), (right,) = (torch.autograd.grad((out * weight).sum(), tokens, retain_graph=True) for out in (mine, plain))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
    (mine * weight).sum().backward()
    (plain * weight).sum().backward()
    whole = {"weight": theirs.in_proj_weight.grad, "bias": theirs.in_proj_bias.grad}
    for number, part in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(parameter.grad, whole[name].chunk(3)[number], atol=1e-4, rtol=1e-4)


def test_the_trunk_keeps_nothing_and_gets_no_gradient() -> None:
    """What is kept belongs to the four blocks that are read, however many there are below."""
    shallow, deep = (count_cost(_of_depth(layers), clips=2) for layers in (4, 12))
    assert deep.kept_bytes == shallow.kept_bytes and deep.copied_bytes == shallow.copied_bytes
    assert deep.training_gmac - deep.gmac == pytest.approx(shallow.training_gmac - shallow.gmac)
    whole = count_cost(blank_model("finetuned", CLIP_B, 400, 8))
    ours = count_cost(blank_model("evl", CLIP_B, 400, 8))
    assert ours.kept_bytes < 0.1 * whole.kept_bytes
    assert ours.training_gmac < 1.05 * ours.gmac
    made = make()
    made(clips()).sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {
        name for name, p in made.named_parameters() if p.requires_grad
    }


def _of_depth(layers: int) -> EVL:
    with torch.device("meta"):
        return EVL(ImageTower(replace(CLIP, layers=layers), {}), 5, FRAMES, EVLOptions())


def test_it_goes_on_from_what_comes_before_the_first_block_that_is_read() -> None:
    made = make()
    frames = clips()
    expected = made(frames)
    tokens = made.stem(frames)
    assert made.has_frozen_stem and tokens.shape == (2, FRAMES, CLIP.num_tokens, CLIP.width)
    calls: list[Any] = []
    made.backbone.transformer.resblocks[0].register_forward_hook(lambda *call: calls.append(call))
    torch.testing.assert_close(made(tokens), expected, rtol=0, atol=0)
    assert not calls


def test_dropout_drops_hidden_features_and_features_of_the_head() -> None:
    made = make(decoder_dropout=0.25, head_dropout=0.5)
    rates = made.random_masks
    assert rates["decoder_dropout"].shape == (2, 4 * 128) and rates["decoder_dropout"].unique().tolist() == [0.25]
    assert rates["head_dropout"].shape == (128,)
    ones = {name: torch.ones(2, *rate.shape) for name, rate in rates.items()}
    torch.testing.assert_close(made(clips(), ones), made(clips()))
    dropped = made(clips(), {**ones, "decoder_dropout": torch.zeros(2, 2, 512)})
    with torch.no_grad():
        for layer in made.backbone.decoder.decoder_layers:
            layer.mlp.fc2.weight.zero_()
    torch.testing.assert_close(dropped, made(clips()))


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    made = create("evl", tower(), num_classes=5, num_frames=FRAMES)
    state = made.state_dict()
    for name in ("decoder.cls_token", "decoder.temporal_pos_embed.0", "decoder.cross_attention.0.w1", "conv1.bias"):
        assert not state[f"backbone.{name}"].any()
    assert state["backbone.ln_post.weight"].eq(1).all() and not state["backbone.ln_post.bias"].any()
    assert state["backbone.ln_pre.weight"].equal(tower().state_dict["ln_pre.weight"])
    assert len(made.blocks) == 3 + 3  # of a trunk with three blocks all are read
    of_timm = tower(IMAGENET)
    bias = create("evl", of_timm, num_classes=5, num_frames=FRAMES).state_dict()["backbone.conv1.bias"]
    assert bias.equal(of_timm.state_dict["conv1.bias"])


def test_the_order_of_frames_is_seen_by_each_of_its_three_ways() -> None:
    """Without any of them frames are a set, for the query attends to all tokens alike."""
    ways = ("temporal_conv", "temporal_positions", "temporal_attention")
    for chosen in (None, *ways):
        made = make(**{way: way == chosen for way in ways}).eval()
        with torch.no_grad():
            there, back = made(clips()), made(clips().flip(1))
        changed = (there - back).abs().max() / there.abs().max()
        assert (changed > 1e-3) == (chosen is not None), chosen


def test_clips_of_a_batch_do_not_meet() -> None:
    made = make().eval()
    with torch.no_grad():
        together, alone = made(clips()), torch.cat([made(clip[None]) for clip in clips()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_more_frames_have_positions_between(tmp_path: Path) -> None:
    path = official_files.saved(official_files.evl(), tmp_path / "evl.safetensors")
    write_folder(convert(path), tmp_path / "evl")
    longer = model.load(tmp_path / "evl", num_frames=8)
    stored = model.load(tmp_path / "evl").state_dict()["backbone.decoder.temporal_pos_embed.1"]
    interpolated = F.interpolate(stored.t()[None], size=8, mode="linear")[0].t()
    torch.testing.assert_close(longer.state_dict()["backbone.decoder.temporal_pos_embed.1"], interpolated)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_layers": 0}, "model.decoder_layers = 0; allowed is 1 or more"),
        ({"decoder_width": 100}, "model.decoder_width = 100; allowed is a multiple of 64"),
        ({"decoder_mlp_ratio": 0.0}, "model.decoder_mlp_ratio = 0.0; allowed is 0 < ratio <= 16"),
        ({"decoder_dropout": 1.0}, "model.decoder_dropout = 1.0; allowed is 0 <= rate < 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EVLOptions(**options)
