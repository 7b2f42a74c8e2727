"""What is kept of the frozen part stands for the clip: same loss, same answers, nothing decoded or computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.methods.aim import AIMOptions
from model.video import VideoModel
from pipelines.loader import NO_PLAN, ClipLoader
from pipelines.plan import ClipOptions, ClipPlan, Turn, plan_clip
from pipelines.shards import ShardSet
from tests.train.runs import FP32, metrics, run_here, trace
from train import start
from train.build import build_model
from train.config import ModelConfig
from train.stem_cache import StemCache

TOP = ("model.positions=top 2", "model.temporal_embedding=adapters", "data.fixed_views=true", FP32)
OPTIONS = ClipOptions(num_frames=2, sampling="uniform", fixed_views=True)


@pytest.fixture
def model() -> VideoModel:
    options = AIMOptions(positions="top 2", temporal_embedding="adapters")
    return build_model(
        ModelConfig(name="tiny-clip", pretrained="none", options=options), num_classes=3, num_frames=2, seed=0
    )


def plan(sample: int) -> ClipPlan:
    return ClipPlan(sample, 0, frames=(0, 1), stored=(0, 1), box=(0, 0, 48, 48), flip=False)


def test_known_clips_are_taken_from_memory(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (3, 2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cache, stem, computed = StemCache(model, 1.0), model.stem, []

    def counting(given: torch.Tensor) -> torch.Tensor:
        computed.append(len(given))
        return stem(given)

    monkeypatch.setattr(model, "stem", counting)
    first = cache.tokens("train", frames[:2], [plan(0), plan(1)])
    torch.testing.assert_close(first, stem(frames[:2]))
    nonsense = torch.zeros_like(frames)
    nonsense[1] = frames[2]
    again = cache.tokens("train", nonsense, [plan(1), plan(2), plan(0)])
    torch.testing.assert_close(again, torch.stack([first[1], stem(frames[2:])[0], first[0]]))
    assert computed == [2, 1] and cache.hits == 2
    assert cache.known("train", plan(2)) and not cache.known("val", plan(2)) and not cache.known("train", plan(3))


def test_what_does_not_fit_is_computed_each_time(model: VideoModel) -> None:
    frames = torch.randint(0, 256, (3, 2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    size = model.stem(frames[:1]).nbytes
    cache, plans = StemCache(model, 2.5 * size / 1e9), [plan(0), plan(1), plan(2)]
    for _ in range(2):
        torch.testing.assert_close(cache.tokens("train", frames, plans), model.stem(frames))
    assert [cache.known("train", each) for each in plans] == [True, True, False]


def test_rows_without_a_sample_are_not_kept(model: VideoModel) -> None:
    cache = StemCache(model, 1.0)
    cache.tokens("val", torch.zeros((1, 2, 48, 48, 3), dtype=torch.uint8), [NO_PLAN])
    assert not cache.known("val", NO_PLAN)


def test_known_clips_are_not_decoded(packed: Path) -> None:
    shards = ShardSet.open(packed, "train")
    turns = [[Turn(0, 0), Turn(1, 0)], [Turn(2, 0), Turn(0, 1)]]
    wanted = plan_clip(shards[0], Turn(0, 0), 0, OPTIONS)
    with ClipLoader(
        shards, turns, micro_batch=2, size=48, options=OPTIONS, known=lambda plan: plan.sample_id == 0
    ) as loader:
        loader._clips.fill_(7)
        batches = [(batch.frames.clone(), batch.labels, batch.valid, batch.plans) for batch in loader]
    assert [b[1].tolist() for b in batches] == [[shards[0].label, shards[1].label], [shards[2].label, shards[0].label]]
    assert all(valid.all() for _, _, valid, _ in batches) and not loader.bad
    assert (batches[0][0][0] == 7).all() and (batches[1][0][1] == 7).all()
    assert (batches[0][0][1] != 7).any() and (batches[1][0][0] != 7).any()
    assert batches[0][3][0].stored == wanted.stored


def test_fixed_views_are_those_of_evaluation(packed: Path) -> None:
    shards = ShardSet.open(packed, "train")
    options = ClipOptions(num_frames=4, sampling="uniform", fixed_views=True, flip=1.0, test_clips=3)
    fixed = plan_clip(shards[3], Turn(3, -1), 0, replace(options, test_clips=1))
    for epoch in (0, 5):
        ours = plan_clip(shards[3], Turn(3, epoch), 1, options)
        assert (ours.stored, ours.box, ours.flip, ours.ops) == (fixed.stored, fixed.box, False, ())
    for change in ({"mixup_alpha": 0.2}, {"rand_augment": (4.0, 7.0)}, {"color_jitter": (0.0, 0.4, 0.0, 0.0)}):
        with pytest.raises(
            ValueError, match=rf"data\.fixed_views = true leaves clips as they are, and data\.{next(iter(change))}"
        ):
            ClipOptions(fixed_views=True, **change)  # type: ignore[arg-type]


def test_a_run_learns_the_same_from_memory(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each clip is computed once in all epochs and evaluations, and the losses are the same."""
    caches: list[StemCache] = []

    def make(model: VideoModel, gigabytes: float) -> StemCache:
        caches.append(StemCache(model, gigabytes))
        return caches[-1]

    monkeypatch.setattr(start, "StemCache", make)
    settings = (*TOP, "train.eval_every=1", "ds.train_batch_size=4", "ds.train_micro_batch_size_per_gpu=4")
    run_here(packed, tmp_path / "plain", *settings)
    run_here(packed, tmp_path / "cached", *settings, "speed.cache_gb=1")
    (cache,) = caches
    assert len(cache._kept) == 2 * 26 and cache.hits > 2 * 26
    plain, cached = trace(tmp_path / "plain"), trace(tmp_path / "cached")
    assert [entry["samples"] for entry in plain] == [entry["samples"] for entry in cached]
    np.testing.assert_allclose([e["loss"] for e in cached], [e["loss"] for e in plain], rtol=1e-5)
    for ours, theirs in zip(metrics(tmp_path / "cached", "eval"), metrics(tmp_path / "plain", "eval"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
