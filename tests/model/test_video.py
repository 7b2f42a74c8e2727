"""What all methods share: normalisation, pooling, head, masks, precision, optimizer groups, an image's weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from model.layers import Linear
from model.video import VideoModel, drop_path_rates, load_tower_weights
from tests.towers import CLIP


class Pixels(nn.Module):
    """A backbone that returns the clip itself in the shape asked for."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.ones(()))
        self.norm_scale = nn.Parameter(torch.ones(()))

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        features = clips.transpose(1, 2) * self.weight.to(clips.dtype)
        return {"BD": features.mean((2, 3, 4)), "BDT": features.mean((3, 4)), "BDTHW": features}[self.shape]


class Probe(VideoModel):
    """The smallest method: three features, the mean colours."""

    undecayed_names = ("norm_scale",)

    def __init__(
        self, shape: str = "BDTHW", num_classes: int | None = 5, trained: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(CLIP, 3, num_classes, 2, 0.25)
        self.trained_names = trained  # type: ignore[misc]
        self.backbone = Pixels(shape)
        self.finish()


def frames(count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_uint8_frames_are_normalised_rgb() -> None:
    model = Probe()
    expected = ((frames().double() / 255 - 0.5) / 0.25).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(model.prepare(frames()), expected.float())
    torch.testing.assert_close(model(frames()), model(expected.float()))


@pytest.mark.parametrize("shape", ["BD", "BDT", "BDTHW"])
def test_features_are_averaged_before_the_head(shape: str) -> None:
    model, headless = Probe(shape), Probe(shape, None)
    x = torch.randn(2, 2, 3, 64, 64)
    mean = x.mean((1, 3, 4))
    assert model.cls_head is not None and headless.cls_head is None
    torch.testing.assert_close(model(x), model.cls_head.fc_cls(mean))
    assert headless(x).shape == {"BD": (2, 3), "BDT": (2, 3, 2), "BDTHW": (2, 3, 2, 64, 64)}[shape]
    assert not any("cls_head" in key for key in headless.state_dict())


def test_head_dropout_is_a_mask_of_the_features() -> None:
    model = Probe("BD")
    assert model.cls_head is not None
    assert model.random_masks["head_dropout"].tolist() == [0.25] * 3
    x, mask = torch.randn(2, 2, 3, 64, 64), torch.tensor([[0, 2.0, 0], [2.0, 2.0, 0]])
    expected = model.cls_head.fc_cls(x.mean((1, 3, 4)) * mask)
    torch.testing.assert_close(model(x, {"head_dropout": mask}), expected)


@pytest.mark.parametrize(
    ("clips", "text"),
    [
        (torch.zeros(1, 3, 64, 64, 3, dtype=torch.uint8), r"\[1, 3, 64, 64, 3\].*data.num_frames"),
        (torch.zeros(1, 2, 32, 64, 3, dtype=torch.uint8), r"\[1, 2, 32, 64, 3\]"),
        (torch.zeros(1, 3, 3, 64, 64), r"\[1, 3, 3, 64, 64\].*\[B, 2, 3, 64, 64\]"),
        (torch.zeros(1, 3, 2, 64, 64), r"\[1, 3, 2, 64, 64\]"),
    ],
)
def test_clips_of_another_shape_are_named(clips: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        Probe()(clips)
    assert "\n" not in str(error.value)


def test_whole_numbers_other_than_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.int64; allowed are frames of torch.uint8"):
        Probe()(torch.zeros(1, 4, 64, 64, 3, dtype=torch.int64))


def test_frozen_weights_are_stored_in_the_compute_dtype() -> None:
    model = Probe(trained=("cls_head",))
    model.set_compute_dtype(torch.bfloat16)
    assert model.backbone.weight.dtype == torch.bfloat16 and not model.backbone.weight.requires_grad
    assert model.cls_head is not None and model.cls_head.fc_cls.weight.dtype == torch.float32
    assert model.prepare(frames()).dtype == torch.bfloat16 and model(frames()).dtype == torch.float32


def test_optimizer_groups() -> None:
    groups = {(g["lr_scale"], g["weight_decay"]): len(g["params"]) for g in Probe().optimizer_groups(0.05)}
    assert groups == {(1.0, 0.05): 3, (1.0, 0.0): 1}  # weight and the head; norm_scale
    groups = {(g["lr_scale"], g["weight_decay"]): len(g["params"]) for g in Probe().optimizer_groups(0.05, 0.1)}
    assert groups == {(0.1, 0.05): 1, (1.0, 0.0): 1, (1.0, 0.05): 2}  # "norm_scale" is longer than "backbone"
    frozen = Probe(trained=("cls_head",)).optimizer_groups(0.05)
    assert [len(group["params"]) for group in frozen] == [2]


def test_drop_path_rates() -> None:
    assert drop_path_rates(0.2, 5).tolist() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.2, 1).tolist() == [0]


def test_every_weight_must_find_its_place() -> None:
    """Loading tolerates missing names; a misspelt one must not pass for that."""
    module = nn.ModuleDict({"trunk": Linear(2, 2), "Adapter": Linear(2, 2)})
    load_tower_weights(module, {}, ())
    weights = {"trunk.weight": torch.ones(2, 2), "trunk.bias": torch.ones(2)}
    load_tower_weights(module, weights, ("Adapter",))
    assert torch.equal(module["trunk"].weight, weights["trunk.weight"])
    for wrong, text in (
        ({**weights, "trunk.wieght": torch.ones(2, 2)}, "unexpected .'trunk.wieght'"),
        ({"trunk.weight": torch.ones(2, 2)}, "missing .'trunk.bias'"),
        ({**weights, "trunk.bias": torch.ones(3)}, r"trunk.bias is \[3\] instead of \[2\]"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            load_tower_weights(module, wrong, ("Adapter",))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"missing .'Adapter.weight', 'Adapter.bias'"):
        load_tower_weights(module, weights, ())
