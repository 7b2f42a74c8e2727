"""Maps of attention over frames: their scale, their colours, and both models' beside one another."""

from __future__ import annotations

import numpy as np
import torch

from train.build import build_model
from train.config import Config, ModelConfig
from train.looks import looks_of, overlay, patch_maps
from train.trained import Trained


def test_maps_are_scaled_over_the_clip_without_the_class_token() -> None:
    shares = torch.tensor([[[0.9, 0.1, 0.2, 0.3, 0.4], [0.0, 0.2, 0.2, 0.2, 0.5]]])
    maps = patch_maps(shares)
    expected = [[[0, 0.25], [0.5, 0.75]], [[0.25, 0.25], [0.25, 1]]]
    torch.testing.assert_close(maps, torch.tensor([expected]))
    assert patch_maps(torch.full((1, 2, 5), 0.2)).tolist() == [[[[0.0] * 2] * 2] * 2], "even attention is no error"


def test_overlay_is_hot_where_attention_is() -> None:
    heat = np.zeros((1, 2, 2), np.float32)
    heat[0, 0, 1] = 1
    mixed = overlay(np.full((1, 32, 32, 3), 128, np.uint8), heat).astype(int)
    assert mixed.shape == (1, 32, 32, 3)
    assert mixed[0, 0, -1, 0] > mixed[0, 0, -1, 2] and mixed[0, -1, 0, 0] < mixed[0, 0, -1, 0]


def test_clips_are_looked_at_together_and_a_changed_model_looks_elsewhere() -> None:
    config = Config(model=ModelConfig(name="tiny-clip", pretrained="none"))
    model = build_model(config.model, num_classes=2, num_frames=2, seed=0).eval()
    trained = Trained(model, config, None, 1, None, 1)  # type: ignore[arg-type]
    clips = np.random.default_rng(0).integers(0, 256, (3, 2, 48, 48, 3), np.uint8)
    before = looks_of(trained, clips)
    assert len(before) == 3 and all(look.alike and np.array_equal(look.image_model, look.trained) for look in before)
    assert np.array_equal(before[1].frames, clips[1]) and before[0].trained.shape == clips[0].shape
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    after = looks_of(trained, clips)
    assert not any(look.alike for look in after)
    assert all(np.array_equal(a.image_model, b.image_model) for a, b in zip(before, after, strict=True))
