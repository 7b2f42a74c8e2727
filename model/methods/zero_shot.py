"""CLIP's own zero-shot recognition, the baseline that learns nothing: each frame through the frozen image model, the
mean of their embeddings compared with those of the class names in sentences (Radford et al., "Learning Transferable
Visual Models From Natural Language Supervision", ICML 2021).

There is nothing to train. tools/evaluate.py takes a recipe of this method instead of a checkpoint:

    [model]                                  # zero_shot.toml
    method = "zero_shot"
    template = ["a video of {}.", "a photo of a person doing {}."]

    python tools/evaluate.py zero_shot.toml --shards SHARDS

Every frame counts alike, whatever the length of its vector; there may be any number of them, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch.nn.functional as F
from torch import Tensor

from model.geometry import CLIPGeometry, ImageTower
from model.image_text import ImageTextEncoder, ImageTextModel, clip_weights
from model.method import Method
from model.text import check_template
from model.video import load_tower_weights


@dataclass(frozen=True)
class ZeroShotOptions:
    """How classes become texts."""

    template: str | tuple[str, ...] = "a video of {}."
    """A sentence, {} standing for the class; of several the embeddings are averaged."""
    class_texts: str = ""
    """JSON file of words for classes, such as {"brush_hair": "brush hairs"}; empty: their names, spaces for
    underscores."""
    temperature: float = 0.0
    """Cosines are divided by it; 0: multiplied by what CLIP learned."""

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("model.template = []; allowed are one or more sentences with {}")
        for template in self.templates:
            check_template(template)
        if not 0 <= self.temperature < inf:
            raise ValueError(f"model.temperature = {self.temperature}; allowed is 0 (CLIP's own scale) or more")

    @property
    def templates(self) -> tuple[str, ...]:
        """One or more."""
        return (self.template,) if isinstance(self.template, str) else self.template


class EvenEncoder(ImageTextEncoder):
    """CLIP's towers, every frame with the same weight."""

    def join(self, features_BTE: Tensor) -> Tensor:
        return F.normalize(features_BTE.float(), dim=-1).mean(1)


class ZeroShot(ImageTextModel):
    """CLIP as it is; arguments as `model.methods.create` says."""

    any_frames = True

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: ZeroShotOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, CLIPGeometry)
        super().__init__(geometry, num_classes, num_frames)
        self.options = options
        self.templates, self.class_file = options.templates, options.class_texts
        self.backbone = EvenEncoder(geometry)
        load_tower_weights(self.backbone, clip_weights(tower), ())
        self.finish()

    @property
    def scale(self) -> Tensor | float:
        temperature = self.options.temperature
        return 1 / temperature if temperature else self.backbone.logit_scale.float().exp()


METHODS = (
    Method(
        "zero_shot",
        "CLIP as it is: videos compared with class names, nothing trains",
        ZeroShotOptions,
        {CLIPGeometry: ZeroShot},
        reads_texts=lambda _: True,
        trains=False,
        paper=('Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021'),
    ),
)
