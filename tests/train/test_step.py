"""A micro-batch from the loader to its loss, a stage at a time: each against what it is said to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.methods.aim import AIMOptions
from model.video import VideoModel
from pipelines.loader import ClipBatch
from pipelines.plan import ClipPlan, MixPlan, Turn, draw_masks
from train.build import build_model
from train.config import Config, ModelConfig, TrainConfig
from train.stem_cache import StemCache
from train.step import MicroBatch, Step

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c")
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, -2.0], [0.5, 0.0, 0.0]])
OPTIONS = AIMOptions(positions="top 2", temporal_embedding="adapters", drop_path=0.5, head_dropout=0.5)


class Recorder:
    """In place of the engine: keeps what it is given and answers with fixed logits."""

    def __init__(self) -> None:
        self.clips = torch.empty(0)
        self.masks: Mapping[str, Tensor] = {}

    def __call__(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        self.clips, self.masks = clips, masks
        return LOGITS[: len(clips)]


def is_given(engine: Recorder, batch: MicroBatch) -> bool:
    """Whether the model gets the batch's masks and its targets, which methods with many classes compare with."""
    expected = {**batch.masks, "targets": batch.targets}
    return engine.masks.keys() == expected.keys() and all(engine.masks[n] is given for n, given in expected.items())


@pytest.fixture(scope="module")
def model() -> VideoModel:
    section = ModelConfig(name="tiny-clip", pretrained="none", options=OPTIONS)
    return build_model(section, num_classes=3, num_frames=2, seed=0)


def step_of(
    model: VideoModel,
    *,
    engine: Recorder | None = None,
    multi_label: bool = False,
    seed: int = 0,
    smoothing: float = 0.0,
    cache: StemCache | None = None,
) -> Step:
    config = Config(train=TrainConfig(seed=seed, label_smoothing=smoothing))
    shards = SimpleNamespace(classes=CLASSES, multi_label=multi_label, split="train")
    return Step(config, model, cast(Any, engine), cast(Any, shards), CPU, cache)


def clips(samples: tuple[int, ...] = (0, 1, 2, 3), *, multi_label: bool = False, **plan: Any) -> ClipBatch:
    """Random pixels that depend on the sample alone; sample i is of class i mod 3, and if several, of class 0 too."""
    frames = [np.random.default_rng(i).integers(0, 256, (2, 48, 48, 3), np.uint8) for i in samples]
    labels = torch.tensor([i % 3 for i in samples])
    if multi_label:
        labels = F.one_hot(labels, 3).float().index_fill_(1, torch.tensor([0]), 1.0)
    plans = [ClipPlan(i, 0, (0, 1), (0, 1), box=(0, 0, 48, 48), flip=False, **plan) for i in samples]
    turns, keys = tuple(Turn(i, 0) for i in samples), tuple(map(str, samples))
    return ClipBatch(
        torch.from_numpy(np.stack(frames)),
        labels,
        torch.ones(len(samples), dtype=torch.bool),
        turns,
        tuple(plans),
        keys,
    )


def test_what_the_loader_gives_arrives_with_the_masks_of_its_turns(model: VideoModel) -> None:
    given = clips()
    batch = step_of(model, seed=5).to_device(given)
    assert torch.equal(batch.frames, given.frames) and batch.frames.dtype == torch.uint8
    assert torch.equal(batch.targets, given.labels) and batch.plans == given.plans
    wanted = {name: p.numpy() for name, p in model.random_masks.items()}
    assert batch.masks.keys() == wanted.keys() and "head_dropout" in wanted and len(wanted) > 1
    for name, expected in draw_masks(5, given.turns, wanted).items():
        assert batch.masks[name].dtype == torch.float32
        assert np.array_equal(batch.masks[name].numpy(), expected)
    assert set(batch.masks["head_dropout"].unique().tolist()) == {0.0, 2.0}


def test_a_clips_masks_are_its_own_in_any_batch_and_others_for_another_seed(model: VideoModel) -> None:
    whole = step_of(model).to_device(clips()).masks
    swapped = step_of(model).to_device(clips((3, 1))).masks
    other = step_of(model, seed=1).to_device(clips()).masks
    assert all(torch.equal(swapped[name], mask[[3, 1]]) for name, mask in whole.items())
    assert not torch.equal(whole["head_dropout"], other["head_dropout"])


def test_without_a_mix_only_what_is_planned_changes(model: VideoModel) -> None:
    given, step = clips(), step_of(model)
    batch = step.to_device(given)
    before = batch.frames.clone()
    step.augment(batch, None)
    assert torch.equal(batch.frames, before) and torch.equal(batch.targets, given.labels)
    erasing = [replace(plan, erase=(0.0, 0.5, 0.25, 1.0)) if plan.sample_id == 2 else plan for plan in given.plans]
    batch.plans = erasing
    step.augment(batch, None)
    mean = model.pixel_mean.round().to(torch.uint8)
    assert (batch.frames[2, :, 24:, :12] == mean).all()
    before[2, :, 24:, :12] = mean
    assert torch.equal(batch.frames, before)


def test_operations_come_before_erasing(model: VideoModel) -> None:
    step = step_of(model)
    batch = step.to_device(clips((0,), ops=(("invert", 0.0),), erase=(0.0, 0.0, 1.0, 0.5)))
    before = batch.frames.clone()
    step.augment(batch, None)
    assert torch.equal(batch.frames[:, :, 24:], 255 - before[:, :, 24:])
    assert (batch.frames[:, :, :24] == model.pixel_mean.round().to(torch.uint8)).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_mixing_makes_shares_of_labels(model: VideoModel, multi_label: bool) -> None:
    given, step = clips(multi_label=multi_label), step_of(model, multi_label=multi_label)
    own = given.labels if multi_label else F.one_hot(given.labels, 3).float()
    for plan, share in ((MixPlan(0.75, None), 0.75), (MixPlan(0.0, (0.0, 0.0, 0.5, 0.25)), 7 / 8)):
        batch = step.to_device(given)
        before = batch.frames.clone().float()
        batch.frames = batch.frames.clone()
        step.augment(batch, plan)
        torch.testing.assert_close(batch.targets, share * own + (1 - share) * own[[1, 0, 3, 2]])
        others = before[[1, 0, 3, 2]]
        if plan.region is None:
            assert (batch.frames - (share * before + (1 - share) * others)).abs().max() <= 0.51
        else:
            assert torch.equal(batch.frames[:, :, :12, :24].float(), others[:, :, :12, :24])
            assert torch.equal(batch.frames[:, :, 12:].float(), before[:, :, 12:])


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_the_loss_of_one_label_a_video(model: VideoModel, smoothing: float) -> None:
    engine = Recorder()
    step = step_of(model, engine=engine, smoothing=smoothing)
    batch = step.to_device(clips())
    targets = (1 - smoothing) * F.one_hot(batch.targets, 3) + smoothing / 3
    expected = -(targets * LOGITS.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(step.loss(batch), expected)
    assert engine.clips is batch.frames and is_given(engine, batch)
    batch.targets = F.one_hot(batch.targets, 3).float()  # as mixing leaves them
    torch.testing.assert_close(step.loss(batch), expected)


def test_the_loss_of_several_labels_a_video(model: VideoModel) -> None:
    step = step_of(model, engine=Recorder(), multi_label=True)
    batch = step.to_device(clips(multi_label=True))
    chance = LOGITS.sigmoid()
    expected = -(batch.targets * chance.log() + (1 - batch.targets) * (1 - chance).log()).mean()
    torch.testing.assert_close(step.loss(batch), expected)


def test_a_cache_hands_on_tokens_in_place_of_frames(model: VideoModel) -> None:
    engine, cache = Recorder(), StemCache(model, 1.0)
    step = step_of(model, engine=engine, cache=cache)
    batch = step.to_device(clips())
    first = step.loss(batch)
    tokens = engine.clips
    torch.testing.assert_close(tokens, model.stem(batch.frames))
    assert cache.hits == 0 and all(cache.known("train", plan) for plan in batch.plans)
    again = MicroBatch(torch.zeros_like(batch.frames), batch.targets, batch.masks, batch.plans)
    assert torch.equal(step.loss(again), first)
    assert torch.equal(engine.clips, tokens) and is_given(engine, again) and cache.hits == 4
