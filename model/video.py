"""What every method is to the trainer and the tools: clips in, class logits out, random masks from outside.

A method subclasses `VideoModel`: it sets `backbone` (clips [B, T, 3, H, W] and masks → the published implementation's
own output, [B, D] or [B, D, T, …]), says by name what trains and what is not decayed, and which random masks it wants.
The rest, the same for all methods, is here: normalisation, precision, pooling, head, optimizer groups.

Legend of shapes: B clips, T frames, H, W pixels, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.geometry import Geometry, ViTGeometry
from model.layers import Linear

BACKBONE = "backbone"  # the prefix of every parameter but the head's, as in the official checkpoints


class VideoModel(nn.Module):
    """Clips to class logits.

    `random_masks` tells the caller which random masks a training step wants: name → drop probabilities (any shape S).
    The caller draws one mask [B, *S] a clip, 0 where dropped and 1 / (1 - p) where kept, and passes them to `forward`;
    so randomness belongs to the data plan and not to a device's generator.
    """

    trained_names: ClassVar[tuple[str, ...] | None] = None
    """A parameter trains if its name contains one of these (a rule of the official code); None: all train."""
    undecayed_names: ClassVar[tuple[str, ...]] = ()
    """A parameter is not decayed if its name contains one of these."""
    biased_attention: ClassVar[bool] = False
    """Whether its attention adds a bias."""
    uses_projection: ClassVar[bool] = False
    """Whether it has CLIP's projection to the texts' space; without, its geometry's `embed_dim` is 0."""
    reads_class_names: ClassVar[bool] = False
    """Whether its logits are for whatever classes it is told of (`name_classes`)."""
    stem_axes: ClassVar[int] = 4
    """Axes of what `stem` returns, by which `forward` tells it from clips."""
    any_frames: ClassVar[bool] = False
    """Whether clips may have another number of frames than `num_frames`, for nothing in the model depends on it."""
    time_axes: ClassVar[Mapping[str, int]] = {"temporal_embedding": 1}
    """Part of a parameter's name → the axis along which it has a row a frame, so that it can be interpolated."""
    backbone: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, geometry: Geometry, features: int, num_classes: int | None, num_frames: int, head_dropout: float
    ) -> None:
        """A subclass sets `backbone` after this, then calls `freeze`. `features` is D; no classes: no head."""
        super().__init__()
        if isinstance(geometry, ViTGeometry) and not self.uses_projection:
            geometry = replace(geometry, embed_dim=0)
        self.geometry: Geometry = geometry
        self.features = features
        self.num_classes = num_classes
        self.num_frames = num_frames
        self.head_dropout = head_dropout
        self.compute_dtype = torch.float32
        self.register_buffer("pixel_mean", 255 * torch.tensor(geometry.mean), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(geometry.std), persistent=False)

    def finish(self) -> None:
        """Ends a subclass's construction: adds the head, after the backbone as in the official order of parameters, and
        freezes what does not train."""
        self.cls_head = None if self.num_classes is None else self.make_head(self.num_classes)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trains(name))

    def make_head(self, num_classes: int) -> nn.Module | None:
        """What makes logits [B, C] of features [B, D]; a subclass may have another one, or none but a `classify`."""
        return Head(self.features, num_classes)

    def name_classes(self, names: Sequence[str]) -> None:
        """Says what the classes are called; of effect only where `reads_class_names`."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """What training changes besides parameters, such as running statistics: buffers that a checkpoint keeps."""
        parameters = dict(self.named_parameters())
        return {name: tensor for name, tensor in self.state_dict().items() if name not in parameters}

    def merged(self) -> VideoModel:
        """A model with the same logits, in float32 on the CPU, whose trained parts are merged into the frozen weights
        where that can be done exactly; the model itself where nothing can."""
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """The stack that most of the work is done in, from the input on; every backbone names its own."""
        blocks: list[nn.Module] = self.backbone.blocks  # type: ignore[assignment]
        return blocks

    def trains(self, name: str) -> bool:
        """Whether a parameter of this name trains."""
        return self.trained_names is None or any(part in name for part in self.trained_names)

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """Drop probabilities by the name of the mask; a subclass adds its own to `head_dropout` [D]."""
        return {"head_dropout": torch.full((self.features,), self.head_dropout, dtype=torch.float64)}

    def optimizer_groups(self, weight_decay: float, backbone_lr: float = 1.0) -> list[dict[str, Any]]:
        """Trainable parameters in the official groups, each with its weight_decay and lr_scale.

        As in the official code (mmcv's `custom_keys`), the longest key found in a name decides alone: with a
        `backbone_lr` other than 1, "backbone" is such a key, so that norms with shorter names are decayed then.
        """
        keys = dict.fromkeys(self.undecayed_names, (1.0, 0.0))
        if backbone_lr != 1:
            keys[BACKBONE] = (backbone_lr, weight_decay)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                found = max((key for key in keys if key in name), key=len, default=None)
                setting = (1.0, weight_decay) if found is None else keys[found]
                groups.setdefault(setting, []).append(parameter)
        return [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ]

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Tokens are computed in `dtype`; frozen weights are stored in it, trainable ones stay float32."""
        self.compute_dtype = dtype
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def prepare(self, frames: Tensor) -> Tensor:
        """uint8 RGB frames [B, T, H, W, 3] as they come from the loader → normalised [B, T, 3, H, W]."""
        size, expected = self.geometry.image_size, self._frames_of(frames)
        if frames.shape[1] != expected or tuple(frames.shape[2:]) != (size, size, 3):
            raise ValueError(
                f"clips of shape {list(frames.shape)} do not fit the model, which takes [B, {expected}, {size}, "
                f"{size}, 3]: set data.num_frames to what the checkpoint was trained with"
            )
        normalised = frames.float().sub_(self.pixel_mean).div_(self.pixel_std)
        return normalised.to(self.compute_dtype).permute(0, 1, 4, 2, 3)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """uint8 frames [B, T, H, W, 3], or normalised float clips [B, T, 3, H, W] → float32 logits [B, C]; also what
        `stem` made of either.

        `masks` as `random_masks` says, None for evaluation. A model without a head returns what the published
        backbone returns: [B, D, T, …], or [B, D] where that has pooled by itself.
        """
        if clips.dtype != torch.uint8 and not clips.is_floating_point():
            raise ValueError(f"clips of {clips.dtype}; allowed are frames of torch.uint8, or normalised floating point")
        prepared = self.prepare(clips) if clips.dtype == torch.uint8 else clips
        return self.classify(prepared, masks)

    @property
    def has_frozen_stem(self) -> bool:
        """Whether `stem` computes something that no training changes."""
        return not getattr(self.backbone, "stem_trains", True)

    @property
    def feature_source(self) -> dict[str, Any] | None:
        """What made the frame features [B, T, D] that `forward` takes instead of clips (`model.image_text`), to be
        asked before weights change their precision; None: it takes none."""
        return None

    @torch.no_grad()
    def stem(self, frames: Tensor) -> Tensor:
        """uint8 frames [B, T, H, W, 3] → tokens [B, T, N, D] before the first weight that trains, which `forward` takes
        instead of the frames. Only where there is a frozen stem."""
        assert self.has_frozen_stem
        # Not compiled: what is new differs in number from batch to batch, and each would be another graph.
        with torch.autocast(frames.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            tokens: Tensor = self.backbone.stem(self.prepare(frames))  # type: ignore[operator]
        return tokens

    def classify(self, clips: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """Normalised clips [B, T, 3, H, W], or what `stem` made → float32 logits [B, C]: the mean of the features over
        time and space, then dropout and a linear layer (the official I3D head)."""
        if clips.ndim != self.stem_axes or not self.has_frozen_stem:
            self._require_shape(clips)
        masks = masks or {}
        with own_precision(clips.device):
            output = self.backbone(clips, masks).float()
            if self.cls_head is None:
                return output
            features = output.flatten(2).mean(dim=2) if output.ndim > 2 else output
            if "head_dropout" in masks:
                features = features * masks["head_dropout"]
            return self.cls_head(features)

    def _frames_of(self, clips: Tensor) -> int:
        """T that clips [B, T, …] must have."""
        return clips.shape[1] if self.any_frames and clips.ndim == 5 else self.num_frames

    def _require_shape(self, clips: Tensor) -> None:
        size, expected = self.geometry.image_size, self._frames_of(clips)
        if tuple(clips.shape[1:]) != (expected, 3, size, size):
            raise ValueError(
                f"clips of shape {list(clips.shape)} do not fit the model, which takes [B, {expected}, 3, "
                f"{size}, {size}]"
            )


class Head(nn.Module):
    """The linear classifier: features [B, D] → logits [B, C]."""

    def __init__(self, features: int, num_classes: int, std: float = 0.01) -> None:
        """`std`: of the weights' start."""
        super().__init__()
        self.fc_cls = Linear(features, num_classes)
        nn.init.normal_(self.fc_cls.weight, std=std)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_cls(x)


def own_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context in which layers choose their own precision, whatever autocast would choose."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # on meta autocast does not exist
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def drop_path_rates(rate: float, layers: int) -> Tensor:
    """Drop probability of each block [layers]: from 0 for the first, linearly, to `rate` for the last."""
    return rate * torch.arange(layers, dtype=torch.float64) / max(layers - 1, 1)


def check_rates(options: Any, *names: str) -> None:
    """ValueError unless these options are probabilities below 1."""
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"model.{name} = {getattr(options, name)}; allowed is 0 <= rate < 1")


def load_tower_weights(module: nn.Module, weights: Mapping[str, Tensor], added: tuple[str, ...]) -> None:
    """Puts an image model's weights into a video model's backbone; nothing to do if there are none.

    Every tensor must find its place, and every place but those whose names contain one of `added` must be filled: else
    a ValueError names what is amiss.
    """
    if not weights:
        return
    own = module.state_dict()
    for key, value in weights.items():
        if key in own and own[key].shape != value.shape:
            raise ValueError(
                f"weights do not fit the backbone: {key} is {list(value.shape)} instead of {list(own[key].shape)}"
            )
    missing, unexpected = module.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not any(part in key for part in added)]
    if missing or unexpected:
        raise ValueError(f"weights do not fit the backbone: missing {missing[:4]}, unexpected {unexpected[:4]}")
