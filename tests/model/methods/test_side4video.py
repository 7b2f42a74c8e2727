"""Side4Video: equal to its published form written in PyTorch's layers, counts, and what is kept of the image model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import model
from model import speed
from model.checkpoints import convert, write_folder
from model.flops import count_cost
from model.methods import METHODS, create
from model.methods.side4video import Side4Video, Side4VideoOptions
from model.parameters import count_parameters
from model.speed import SpeedOptions, speed_up
from tests import official_files
from tests.blank_models import CLIP_B, blank_model
from tests.official_files import filled
from tests.towers import CLIP, tower

FRAMES, SIDE = 3, 128


def make() -> Side4Video:
    """A small model in training, no bias and no norm of whose side network is where it starts."""
    made = create("side4video", tower(), num_classes=5, num_frames=FRAMES, options=Side4VideoOptions(SIDE))
    assert isinstance(made, Side4Video)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "side_" in name and parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    return made.train()


def clips(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, FRAMES, 3, 64, 64, generator=generator)


def published(made: Side4Video, video_BTCHW: Tensor, training: bool) -> Tensor:
    """Its features as the published code computes them: 3-D convolutions of [B, S, T, H, W], nn.MultiheadAttention of
    [P, B·T, S], batch norms of PyTorch. The image model's tokens are those of ours."""
    state = made.state_dict()
    batch, side = len(video_BTCHW), 4

    def of(name: str) -> tuple[Tensor, Tensor]:
        return state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"]

    def batch_norm(name: str, x: Tensor) -> Tensor:
        mean, variance = (state[f"backbone.{name}.running_{kind}"].clone() for kind in ("mean", "var"))
        return F.batch_norm(x, mean, variance, *of(name), training=training)

    def as_tokens(x_BSTHW: Tensor) -> Tensor:
        return x_BSTHW.permute(3, 4, 0, 2, 1).reshape(side * side, batch * FRAMES, SIDE)

    def as_video(x_PMS: Tensor) -> Tensor:
        return x_PMS.view(side, side, batch, FRAMES, SIDE).permute(2, 4, 3, 0, 1)

    stem = F.conv3d(video_BTCHW.transpose(1, 2), *of("side_conv1"), stride=(1, 16, 16), padding=(1, 0, 0))
    s = as_tokens(batch_norm("side_pre_bn3d", stem))
    tokens = made.backbone.stem(video_BTCHW)
    positions = state["backbone.side_spatial_position_embeddings"][:, None]
    for layer, block in enumerate(made.backbone.transformer.resblocks):
        tokens = block(tokens, None)
        here = f"side_transformer.{layer}"
        read = F.linear(F.layer_norm(tokens, (CLIP.width,), *of(f"side_lns.{layer}")), *of(f"side_linears.{layer}"))
        read = read.flatten(0, 1).transpose(0, 1)
        s = 0.5 * s + 0.5 * read[1:]
        x = F.conv3d(batch_norm(f"{here}.bn_1", as_video(s)), *of(f"{here}.conv.0"))
        x = F.conv3d(x, *of(f"{here}.conv.1"), padding=(1, 0, 0), groups=SIDE)
        s = s + as_tokens(F.conv3d(x, *of(f"{here}.conv.2")))
        class_token = read[0].view(batch, FRAMES, SIDE)
        shifted = torch.zeros_like(class_token)
        shifted[:, :-1, : SIDE // 2] = class_token[:, 1:, : SIDE // 2]
        shifted[:, 1:, SIDE // 2 :] = class_token[:, :-1, SIDE // 2 :]
        all_tokens = torch.cat([shifted.view(1, -1, SIDE), s + positions])
        attention = nn.MultiheadAttention(SIDE, SIDE // 64)
        parts = {n.removeprefix(f"backbone.{here}.attn."): t for n, t in state.items() if f"{here}.attn." in n}
        attention.load_state_dict(parts)
        y = F.layer_norm(all_tokens, (SIDE,), *of(f"{here}.ln_1"))
        s = s + attention(y[1:], y, y, need_weights=False)[0]
        z = as_tokens(batch_norm(f"{here}.bn_2", as_video(s)))
        s = s + F.linear(F.gelu(F.linear(z, *of(f"{here}.mlp.fc1"))), *of(f"{here}.mlp.fc2"))
    return batch_norm("side_post_bn", as_video(s)).flatten(2).mean(-1)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_published_network(training: bool) -> None:
    made = make().train(training)
    expected = published(made, clips(), training).detach()
    torch.testing.assert_close(made.backbone(clips(), {}), expected, atol=1e-4, rtol=1e-4)


def test_counts_and_multiply_adds_are_the_published_ones() -> None:
    """21.06 million parameters of the side network; 175.7 · 10⁹ multiply-adds a view of 8 frames."""
    blank = blank_model("side4video", CLIP_B, 400, 8)
    head = 400 * 320 + 400
    assert count_parameters(blank)[1] == 21_056_832 + head
    assert count_cost(blank).gmac == pytest.approx(175.7, abs=0.05)


def test_the_trunk_gets_no_gradient_and_one_tensor_a_block_is_kept_of_it() -> None:
    kept = {method: count_cost(blank_model(method, CLIP_B, 400, 8)).kept_bytes for method in ("side4video", "aim")}
    assert kept["side4video"] < 0.6 * kept["aim"]
    made = create("side4video", tower(), num_classes=5, num_frames=FRAMES, options=Side4VideoOptions(64)).train()
    stored: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(clips()).sum().backward()
    as_wide_as_the_trunk = 4 * 2 * FRAMES * CLIP.num_tokens * CLIP.width
    assert list(stored.values()).count(as_wide_as_the_trunk) == CLIP.layers
    missing = {name for name, p in made.named_parameters() if p.requires_grad != (p.grad is not None)}
    assert not missing


def test_statistics_are_learned_once_where_blocks_are_computed_twice() -> None:
    """And are part of a checkpoint, with the parameters."""
    twice, once = make(), make()
    speed_up(twice, SpeedOptions(checkpoint_blocks=speed.ALL_BLOCKS), torch.device("cpu"))
    for made in (twice, once):
        before = {name: tensor.clone() for name, tensor in made.extra_tensors().items()}
        made(clips()).sum().backward()
        assert all(not tensor.equal(before[name]) for name, tensor in made.extra_tensors().items())
    assert len(once.extra_tensors()) == 2 * (2 + 2 * CLIP.layers)
    for name, tensor in once.extra_tensors().items():
        assert tensor.equal(twice.extra_tensors()[name]), name


def test_clips_of_a_batch_meet_in_training_alone() -> None:
    made = make().eval()
    with torch.no_grad():
        together, alone = made(clips()), torch.cat([made(clip[None]) for clip in clips()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_published_file_of_another_size_is_read_with_its_statistics(tmp_path: Path) -> None:
    shapes = official_files.side4video(width=192, layers=3, side=128, grid=3, patch=14)
    counter = "visual.side_post_bn.num_batches_tracked"
    save_file(filled(shapes) | {counter: torch.tensor(7)}, tmp_path / "side.safetensors")
    converted = convert(tmp_path / "side.safetensors")
    assert [name for name, _ in converted.dropped] == [counter] and "steps" in converted.dropped[0][1]
    read = converted.description
    assert read["options"] == {"side_width": 128, "head_dropout": 0.0} and read["geometry"]["image_size"] == 42
    assert read["geometry"]["mean"] == (0.48145466, 0.4578275, 0.40821073)
    write_folder(converted, tmp_path / "side")
    loaded = model.load(tmp_path / "side", num_frames=2)
    mean = filled(shapes)["visual.transformer.side_transformer.2.bn_1.running_mean"]
    assert loaded.state_dict()["backbone.side_transformer.2.bn_1.running_mean"].equal(mean)


def test_it_has_no_stem_to_keep() -> None:
    """For the side network reads pixels."""
    assert not make().has_frozen_stem
    assert METHODS["side4video"].formats[0].holds(model.methods.describe(make()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side_width": 100}, "model.side_width = 100; allowed is a multiple of 64"),
        ({"head_dropout": 1.0}, "model.head_dropout = 1.0; allowed is 0 <= rate < 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Side4VideoOptions(**options)
