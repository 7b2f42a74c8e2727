"""What a micro-batch goes through on its way to the weights, in order; the training loop and the profiler both call it.

    ClipBatch ─ to_device ─▶ MicroBatch ─ augment ─▶ the same ─ loss ─▶ Engine.backward ─▶ Engine.update

Frames travel to the device as bytes, frame features as float16. Nothing here waits for the device, unless a cache is
filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.video import VideoModel
from pipelines.augment import augment_clips, mix_clips
from pipelines.loader import ClipBatch
from pipelines.plan import ClipPlan, MixPlan, draw_masks
from pipelines.shards import ShardSet
from train.config import Config
from train.engine import Engine, to_device
from train.loss import clip_loss, soft_targets
from train.stem_cache import StemCache


@dataclass
class MicroBatch:
    """B clips on the training device, with all that the model is given."""

    frames: Tensor
    """uint8 RGB [B, T, S, S, 3]; of a set of frame features float16 [B, T, D], which no plan changes."""
    targets: Tensor
    """int64 [B]; multi-hot or mixed: float32 [B, C]."""
    masks: dict[str, Tensor]
    """Random masks by name, as `VideoModel.random_masks` wants them: [B, …]."""
    plans: Sequence[ClipPlan]
    """How the clips were cut, and what is still to be done to them."""


class Step:
    """The parts of a training step."""

    def __init__(
        self,
        config: Config,
        model: VideoModel,
        engine: Engine,
        shards: ShardSet,
        device: torch.device,
        cache: StemCache | None = None,
    ) -> None:
        """`shards`: the training split. `cache`: what the frozen part makes of clips, for training on fixed views."""
        self._config, self._model, self._engine = config, model, engine
        self._num_classes, self._multi_label = len(shards.classes), shards.multi_label
        self._device, self._split, self._cache = device, shards.split, cache
        self._probabilities = {name: p.numpy() for name, p in model.random_masks.items()}
        self._mean_colour = model.pixel_mean.round().to(device, torch.uint8)

    def to_device(self, clips: ClipBatch) -> MicroBatch:
        """Begins to copy a batch; its masks are drawn."""
        drawn = draw_masks(self._config.train.seed, clips.turns, self._probabilities)
        masks = {name: to_device(torch.from_numpy(mask), self._device) for name, mask in drawn.items()}
        frames, targets = to_device(clips.frames, self._device), to_device(clips.labels, self._device)
        return MicroBatch(frames, targets, masks, clips.plans)

    def augment(self, batch: MicroBatch, mix: MixPlan | None) -> None:
        """Does to the clips what was planned."""
        augment_clips(batch.frames, batch.plans, self._mean_colour)
        if mix is not None:
            targets = soft_targets(batch.targets, self._num_classes)
            batch.targets = mix_clips(batch.frames, targets, mix)

    def loss(self, batch: MicroBatch) -> Tensor:
        """The forward pass: a scalar. With the masks the model gets the targets: a method with many classes may compare
        with some of them only."""
        clips = batch.frames if self._cache is None else self._cache.tokens(self._split, batch.frames, batch.plans)
        logits = self._engine(clips, {**batch.masks, "targets": batch.targets})
        smoothing = self._config.train.label_smoothing
        return clip_loss(logits, batch.targets, multi_label=self._multi_label, label_smoothing=smoothing)
