"""PromptCLIP: frozen CLIP towers, learned vectors around the class names, a small transformer over frame features (Ju
et al., "Prompting Visual-Language Models for Efficient Video Understanding", ECCV 2022; official files `src/model.py`
and `src/train.py` of ju-chen/Efficient-Prompt).

    frame features [B, T, E] + temporal embedding ─ temporal blocks ─ mean over T ─▶ [B, E] ─┐
    start, `prefix` vectors, name, `postfix` vectors, end ─ frozen text tower ─▶ [C, E] ─────┴▶ cosine / temperature

Three things train: the table of vectors `prompts` [places of a text, D], the temporal embedding and the temporal
blocks. Gradients reach the table through the frozen text tower. Its rows belong to places, not to the prompt: names of
different length have different rows after them. Without temporal blocks frames are averaged and their order is lost.

The loss compares a clip with all classes, or, to spare the text tower, with `num_candidates` of them: those of the
micro-batch and others drawn for it; the rest have no chance (`NO_CHANCE`), and neither loss nor gradient.

On purpose otherwise than published: clips are cut by this project's rule (the published one thins a video by a random
rate, at validation too: `data.intervals`), frames are RGB (published features were made of BGR, it seems: a feature set
can have that), and places after a text's end, which have no effect, are left out. Features of other than the trained
number of frames have the temporal embedding interpolated.

Legend of shapes: B clips, T frames, C classes, L places in a text, D width of the text tower, E width of the space that
images share with texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import NORMALISATIONS
from model.geometry import CLIPGeometry, ImageTower
from model.image_text import ImageTextEncoder, ImageTextModel, clip_weights
from model.method import Method
from model.official import (
    CLIP_MARK,
    HEAD_WIDTH,
    Format,
    Reading,
    Shapes,
    official_name,
    read_clip_vit,
    reading,
    shape_of,
)
from model.text import EPS, SLOT, Prompts, Sequences, check_template
from model.video import load_tower_weights

PUBLISHED_FRAMES = 16
START_STD = 0.01
"""Of the table and the temporal embedding before training."""
NO_CHANCE = -1e4
"""Logit of a class that is no candidate: its probability is 0, and no loss becomes infinite by it."""
_BITS = 16
"""By which candidates are drawn."""


@dataclass(frozen=True)
class PromptCLIPOptions:
    """What of PromptCLIP is built; the defaults are the published Kinetics-400 settings (16 + X + 16, A7)."""

    prefix: int = 16
    """Learned vectors before the name,"""
    postfix: int = 16
    """and after it; a name of CLIP's 77 places then has up to 43 tokens."""
    temporal_layers: int = 2
    """Blocks over the frames (published for HMDB-51: 1); 0: none, and no temporal embedding: frames are averaged."""
    temperature: float = 0.07
    num_candidates: int = 0
    """Classes that a training step compares with, no fewer than the micro-batch has clips (published: up to 400); 0:
    all. Only where a clip has one class: neither mixing nor sets with several labels. Label smoothing then makes the
    loss that is shown meaningless."""
    class_texts: str = ""
    """JSON file of words for classes, such as {"brush_hair": "brush hairs"}; empty: their names, spaces for
    underscores."""
    template: str = SLOT
    """What stands between the learned vectors; {} is the class."""

    def __post_init__(self) -> None:
        for name in ("prefix", "postfix", "temporal_layers", "num_candidates"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} = {getattr(self, name)}; allowed is 0 or more")
        if not 0 < self.temperature < inf:
            raise ValueError(f"model.temperature = {self.temperature}; allowed is more than 0")
        check_template(self.template)


class PromptedEncoder(ImageTextEncoder):
    """CLIP's towers with what PromptCLIP adds to them."""

    def __init__(self, geometry: CLIPGeometry, num_frames: int, options: PromptCLIPOptions) -> None:
        super().__init__(geometry)
        width = geometry.embed_dim
        self.prompts = _table(geometry.context_length, geometry.text_width)
        self.temporalEmbedding = _table(num_frames, width) if options.temporal_layers else None
        # Heads are as wide as published, or there is one.
        heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        block = replace(geometry, width=width, heads=heads, quick_gelu=True, eps=EPS, mlp_width=0)
        self.temporalModelling = Sequences(block, options.temporal_layers) if options.temporal_layers else None

    def join(self, features_BTE: Tensor) -> Tensor:
        if self.temporalModelling is None or self.temporalEmbedding is None:
            return features_BTE.float().mean(1)
        when_TE = self.temporalEmbedding.weight
        if len(when_TE) != features_BTE.shape[1]:
            when_TE = F.interpolate(when_TE.T[None], size=features_BTE.shape[1], mode="linear")[0].T
        x_BTE = features_BTE + when_TE.to(features_BTE.dtype)
        return self.temporalModelling(x_BTE).float().mean(1)

    def place(self, prompts: Prompts) -> Tensor:
        words_CLD = super().place(prompts)
        learned_LD = self.prompts.weight[: words_CLD.shape[1]].to(words_CLD.dtype)
        return torch.where(prompts.taken.unsqueeze(2), words_CLD, learned_LD)


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=START_STD)
    return table


class PromptCLIP(ImageTextModel):
    """PromptCLIP; arguments as `model.methods.create` says."""

    trained_names = ("backbone.prompts.", "temporalEmbedding", "temporalModelling")
    time_axes: ClassVar[Mapping[str, int]] = {"temporalEmbedding": 0}
    backbone: PromptedEncoder

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: PromptCLIPOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, CLIPGeometry)
        room = geometry.context_length - 3
        if options.prefix + options.postfix > room:
            raise ValueError(
                f"model.prefix + model.postfix = {options.prefix} + {options.postfix}: texts of this CLIP model have "
                f"{geometry.context_length} places, two of them for start and end, and names need some; allowed is up "
                f"to {room} together, such as {room // 3} and {room // 3}"
            )
        super().__init__(geometry, num_classes, num_frames)
        self.options = options
        self.templates, self.class_file = (options.template,), options.class_texts
        self.backbone = PromptedEncoder(geometry, num_frames, options)
        load_tower_weights(self.backbone, clip_weights(tower), ("prompts.", "temporal"))
        self.finish()

    @property
    def blocks(self) -> list[nn.Module]:
        """The image model's, the text tower's, then those over time."""
        over_time = self.backbone.temporalModelling
        return super().blocks + ([] if over_time is None else list(over_time.resblocks))

    @property
    def scale(self) -> float:
        return 1 / self.options.temperature

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`candidates` [C, 16]: a micro-batch draws its negatives by the bits of its first clip's."""
        if not self._draws:
            return {}
        assert self.num_classes is not None
        return {"candidates": torch.full((self.num_classes, _BITS), 0.5, dtype=torch.float64)}

    @property
    def _draws(self) -> bool:
        """Whether a training step does not compare with all classes."""
        return 0 < self.options.num_candidates < (self.num_classes or 0)

    def read_classes(self, texts: Sequence[str]) -> Prompts:
        assert isinstance(self.geometry, CLIPGeometry)
        return Prompts.of(texts, self.geometry, prefix=self.options.prefix, postfix=self.options.postfix)

    def classify(self, clips: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """As of any video model. With the mask `candidates` some classes alone are compared with; `targets` [B], the
        clips' classes, are among them."""
        if masks is None or "candidates" not in masks:
            return super().classify(clips)
        rows = self._candidates(masks["candidates"][0], masks.get("targets"))
        embeddings = self.embed(clips)
        logits = self.scale * embeddings @ self._encode(self._named()[rows]).T
        nowhere = logits.new_full((len(logits), self.num_classes or 0), NO_CHANCE)
        return nowhere.index_copy(1, rows, logits)

    def _candidates(self, bits: Tensor, targets: Tensor | None) -> Tensor:
        """Numbers of the classes to compare with: those of the clips, and others by random bits [C, 16]."""
        count = self.options.num_candidates
        places = torch.arange(1, _BITS + 1, device=bits.device)
        order = ((bits > 0).double() * 0.5**places).sum(1) + 2.0**-40 * torch.arange(len(bits), device=bits.device)
        if targets is not None:
            if targets.ndim != 1:
                raise ValueError(
                    f"model.num_candidates = {count} is for clips of one class each; set it to 0 for sets with several "
                    "labels, and for mixup and cutmix"
                )
            if len(targets) > count:
                raise ValueError(
                    f"model.num_candidates = {count} is less than the {len(targets)} clips of a micro-batch, which may "
                    "all be of different classes: raise it, or lower ds.train_micro_batch_size_per_gpu"
                )
            order = order.index_fill(0, targets, 2.0)
        return order.topk(count).indices


def _read(entry: Format, shapes: Shapes) -> Reading:
    openai = NORMALISATIONS["openai_clip"]
    vit = replace(read_clip_vit(entry, shapes), mean=openai[0], std=openai[1])
    _, shared = shape_of(entry, shapes, "backbone.proj", 2)
    vocabulary, width = shape_of(entry, shapes, "backbone.text.token_embedding.weight", 2)
    context, _ = shape_of(entry, shapes, "backbone.text.positional_embedding", 2)
    layers, when = _layers(shapes, "backbone.temporalModelling"), "backbone.temporalEmbedding.weight"
    if when in shapes and not layers:
        raise ValueError(
            f"{official_name(entry, when)} is there and no temporalModelling, without which nothing reads it; remove it"
        )
    frames = shape_of(entry, shapes, when, 2)[0] if layers else PUBLISHED_FRAMES
    if width % HEAD_WIDTH:
        raise ValueError(
            f"the texts' width {width} is no multiple of {HEAD_WIDTH}, the width of a head in {entry.name}"
        )
    published = PromptCLIPOptions()
    geometry = CLIPGeometry(
        **{**vars(vit), "embed_dim": shared},
        text_width=width,
        text_layers=_layers(shapes, "backbone.text.transformer"),
        text_heads=width // HEAD_WIDTH,
        context_length=context,
        vocab_size=vocabulary,
    )
    assumed: dict[str, Any] = {"heads": geometry.heads, "text_heads": geometry.text_heads, "quick_gelu": True}
    assumed |= {name: getattr(published, name) for name in ("prefix", "postfix", "temperature")}
    if not layers:
        assumed["num_frames"] = frames
    return reading(entry, shapes, geometry, frames, {"temporal_layers": layers}, assumed)


def _layers(shapes: Shapes, stack: str) -> int:
    """How many blocks a stack has."""
    start = f"{stack}.resblocks."
    numbers = {name.removeprefix(start).partition(".")[0] for name in shapes if name.startswith(start)}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


METHODS = (
    Method(
        "prompt_clip",
        "frozen CLIP, learned vectors around class names, temporal transformer",
        PromptCLIPOptions,
        {CLIPGeometry: PromptCLIP},
        (
            Format(
                name="efficient_prompt",
                summary="Efficient-Prompt (PromptCLIP) on CLIP's ViT",
                family="efficient_prompt",
                method="prompt_clip",
                marks=(CLIP_MARK, r"^clipmodel\.visual\.", r"^embedding\.weight$"),
                read=_read,
                holds=lambda description: description["method"] == "prompt_clip",
                outside={
                    "clipmodel.visual": "backbone",
                    "clipmodel.transformer": "backbone.text.transformer",
                    "clipmodel.token_embedding": "backbone.text.token_embedding",
                    "clipmodel.positional_embedding": "backbone.text.positional_embedding",
                    "clipmodel.ln_final": "backbone.text.ln_final",
                    "clipmodel.text_projection": "backbone.text.text_projection",
                    "clipmodel.logit_scale": "backbone.logit_scale",
                    "embedding": "backbone.prompts",
                    "temporalEmbedding": "backbone.temporalEmbedding",
                    "temporalModelling": "backbone.temporalModelling",
                },
                prefix="",
                scalars=("logit_scale",),
            ),
        ),
        shown_options=("temporal_layers",),
        reads_texts=lambda _: True,
        paper='Ju et al., "Prompting Visual-Language Models for Efficient Video Understanding", ECCV 2022',
    ),
)
