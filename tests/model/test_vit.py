"""The parts of the image transformer that the methods share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.layers import PatchEmbedding
from model.methods.aim import Finetuned, SpaceOnlyOptions
from model.vit import MLP, Attention
from tests.towers import CLIP, IMAGENET, tower


def test_patches_are_numbered_by_rows() -> None:
    embed = PatchEmbedding(1, 4)
    torch.nn.init.constant_(embed.weight, 1 / 48)
    image = torch.arange(6.0).view(1, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(1, 3, 8, 12)
    torch.testing.assert_close(embed(image).flatten(), torch.arange(6.0))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_activation(quick_gelu: bool) -> None:
    mlp, x = MLP(64, quick_gelu), torch.randn(5, 64)
    hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    hidden = hidden * torch.sigmoid(1.702 * hidden) if quick_gelu else 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias))


def test_attention_maps_are_those_that_attention_uses() -> None:
    torch.manual_seed(0)
    attention, x = Attention(128, 2), torch.randn(2, 3, 7, 128)
    q, k = attention.queries_keys(x)
    assert q.shape == k.shape == (6, 7, 2, 64)
    maps = torch.einsum("mqhk,mnhk->mhqn", q, k).mul(64**-0.5).softmax(-1)
    v = F.linear(x, attention.in_proj_weight[256:], attention.in_proj_bias[256:]).view(6, 7, 2, 64)
    out = attention.out_proj(torch.einsum("mhqn,mnhk->mqhk", maps, v).reshape(2, 3, 7, 128))
    torch.testing.assert_close(attention.over_space(x), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", [CLIP, IMAGENET])
def test_a_vit_has_the_norms_and_biases_of_its_kind(geometry: object) -> None:
    backbone = Finetuned(tower(geometry), None, 2, SpaceOnlyOptions()).backbone  # type: ignore[arg-type]
    keys = backbone.state_dict().keys()
    assert ("ln_pre.weight" in keys) == (geometry is CLIP) and ("conv1.bias" in keys) == (geometry is IMAGENET)
    norms = [part for part in backbone.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5 if geometry is CLIP else 1e-6}
    assert backbone(torch.zeros(2, 2, 3, 64, 64), {}).shape == (2, 128, 2, 1, 1)
