"""Attention maps: what the model's own softmax says, and the image model found again inside the video model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_maps import class_attention, image_model, image_model_trains
from model.geometry import ImageTower, ViTGeometry
from model.methods import create
from model.video import VideoModel

GEOMETRY = ViTGeometry(
    width=32, layers=3, heads=2, patch_size=8, image_size=32, quick_gelu=True, mean=(0.5,) * 3, std=(0.25,) * 3
)
METHODS = ("aim", "frozen", "finetuned", "timesformer", "timesformer_clip")


def make(method: str, *, frames: int = 3) -> VideoModel:
    torch.manual_seed(0)
    return create(method, ImageTower(GEOMETRY, {}), num_classes=4, num_frames=frames).eval()


def trained(method: str) -> VideoModel:
    """As after a training that changed all that trains."""
    model = make(method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def clips() -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [0, -1])
def test_shares_of_every_frame_sum_to_one(method: str, block: int, clips: Tensor) -> None:
    shares = class_attention(trained(method), clips, block)
    assert shares.shape == (2, 3, 17) and shares.dtype == torch.float32
    assert (shares > 0).all() and torch.allclose(shares.sum(-1), torch.ones(2, 3))
    assert shares.std(-1).min() > 1e-4, "not the same everywhere"


@pytest.mark.parametrize("method", ["aim", "timesformer", "timesformer_clip"])
def test_it_is_the_softmax_of_the_attention_over_space(
    method: str, clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every block time comes first; the second call of the door to attention has the q and k of space."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *rest: Tensor, **more: object) -> Tensor:
        seen.append((q, k))
        return real(q, k, *rest, **more)  # type: ignore[arg-type]

    model = trained(method)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    shares = class_attention(model, clips, 1)
    assert len(seen) == 2 * GEOMETRY.layers
    q, k = seen[3]  # [frames, H, N, K]
    expected = (q @ k.transpose(-1, -2) / 4).softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(shares, expected.view(2, 3, 17))


def test_at_initialisation_a_video_model_looks_where_the_image_model_looks(clips: Tensor) -> None:
    """AIM's adapters and TimeSformer's temporal branch then add nothing."""
    names = make("frozen").backbone.state_dict().keys()
    for method, blocks in (("aim", 3), ("timesformer", 1)):  # which averages class tokens after the first
        model = make(method)
        weights = {name: model.backbone.state_dict()[name] for name in names}
        alone = create("frozen", ImageTower(GEOMETRY, weights), num_classes=None, num_frames=3)
        for block in range(blocks):
            torch.testing.assert_close(class_attention(model, clips, block), class_attention(alone, clips, block))


def test_the_image_model_inside_is_the_one_before_training(clips: Tensor) -> None:
    before, model = make("aim"), trained("aim")
    alone = image_model(model)
    assert alone.cls_head is None and not image_model_trains(model)
    for block in range(3):
        frozen = class_attention(alone, clips, block)
        torch.testing.assert_close(frozen, class_attention(before, clips, block))
        assert (class_attention(model, clips, block) - frozen).abs().max() > 1e-3
    for method in ("finetuned", "timesformer", "timesformer_clip"):
        assert image_model_trains(make(method))


@pytest.mark.parametrize("block", [3, -4])
def test_blocks_that_are_not_there(block: int, clips: Tensor) -> None:
    with pytest.raises(ValueError, match=f"block {block}: the model has 3; allowed is 0 to 2, or -1"):
        class_attention(make("frozen"), clips, block)


def test_prompts_are_left_out_of_the_shares(clips: Tensor) -> None:
    """They stand behind the patches."""
    model = trained("vpt")
    layer: Any = model.backbone.transformer.resblocks[0].attn
    real, seen = layer.queries_keys, []
    layer.queries_keys = lambda x: seen.append(real(x)) or seen[-1]
    shares, (q, k) = class_attention(model, clips, 0), seen[-1]
    whole = (torch.einsum("mhk,mnhk->mhn", q[:, 0], k) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    assert whole.shape == (6, 27) and (shares.sum(-1) < 1).all()
    torch.testing.assert_close(shares, whole[:, :17].unflatten(0, (2, 3)))


@pytest.mark.parametrize(
    ("method", "message"), [("evl", "EVL, DualPath"), ("dualpath", "EVL, DualPath"), ("side4video", "Side4Video")]
)
def test_methods_of_another_build_are_refused(method: str, message: str) -> None:
    model = make(method, frames=8)
    clips = torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        class_attention(image_model(model), clips, -1), class_attention(model, clips, -1)
