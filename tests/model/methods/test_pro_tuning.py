"""The Pro-tuning-style baseline: starts as the image model, sees no order, and nothing of it trains in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.methods import create
from model.methods.aim import Finetuned, SpaceOnlyOptions
from model.methods.pro_tuning import PromptedBlock, ProTuning, ProTuningOptions
from model.parameters import count_parameters
from model.vit import Block
from tests.blank_models import CLIP_B, blank_model
from tests.towers import CLIP, tower

FRAMES = 3


def clips() -> Tensor:
    return torch.randn(2, FRAMES, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def made(*, classes: int | None = 5, busy: bool = True) -> ProTuning:
    torch.manual_seed(0)
    network = create("pro_tuning", tower(), num_classes=classes, num_frames=FRAMES).eval()
    assert isinstance(network, ProTuning)
    for block in network.blocks:
        assert isinstance(block, PromptedBlock)
        if busy and block.prompt is not None:
            nn.init.normal_(block.prompt.up.weight, std=0.1)
    return network


def test_starts_as_the_image_model() -> None:
    image = Finetuned(tower(), None, FRAMES, SpaceOnlyOptions()).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(classes=None, busy=False)(clips()), image(clips()), atol=1e-5, rtol=1e-5)


def test_a_prompt_is_convolutions_over_the_patches_of_a_frame() -> None:
    block: Any = made().blocks[0]
    x = torch.randn(2, FRAMES, 17, CLIP.width)
    prompt = block.prompt
    with torch.no_grad():
        plain = Block.forward(block, x)
        frames = plain[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, (4, 4))
        hidden = F.gelu(F.conv2d(frames, prompt.down.weight[..., None, None], prompt.down.bias))
        hidden = F.gelu(prompt.conv(hidden))
        added = F.conv2d(hidden, prompt.up.weight[..., None, None], prompt.up.bias).flatten(2).transpose(1, 2)
        prompted = block(x)
    assert torch.equal(prompted[:, :, 0], plain[:, :, 0])
    torch.testing.assert_close(prompted[:, :, 1:], plain[:, :, 1:] + added.unflatten(0, (2, FRAMES)))


def test_order_of_frames_does_not_count() -> None:
    network = made()
    with torch.no_grad():
        logits = network(clips())
        torch.testing.assert_close(network(clips()[:, [2, 0, 1]]), logits, atol=1e-5, rtol=1e-5)
        image = Finetuned(tower(), None, FRAMES, SpaceOnlyOptions()).eval()
        expected = network.cls_head(image(clips()).flatten(2).mean(2))
        assert (logits - expected).abs().max() > 1e-3


def test_everything_that_trains_has_a_gradient() -> None:
    network = made()
    network(clips()).square().sum().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == (CLIP.layers - 1) * 6 + 2
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("prompt" in name or name.startswith("cls_head"))
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_parameters_are_those_of_eleven_prompt_blocks_and_a_head() -> None:
    width, hidden = 768, 192
    prompt = 2 * width * hidden + hidden + width + hidden * 26
    total, trained = count_parameters(blank_model("pro_tuning", CLIP_B, 400, 8))
    assert trained == 11 * prompt + 400 * (width + 1)
    assert total - trained == 85_799_424  # CLIP's image tower


@pytest.mark.parametrize(("option", "value"), [("prompt_ratio", 0.0), ("kernel", 4), ("head_dropout", 1.0)])
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.{option} = .*; allowed is"):
        ProTuningOptions(**{option: value})
