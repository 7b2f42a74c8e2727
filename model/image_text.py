"""What stands on a frozen CLIP model: one vector a frame, and classes that are texts.

`FrameEncoder` is the frozen image model alone, which feature sets are made with. `ImageTextModel` is what methods share
that compare a video's embedding with those of class names (PromptCLIP, CLIP's own zero-shot recognition), so that one
model answers for any classes (`name_classes`).

    clips ─ backbone.stem, no gradient ─▶ frame features [B, T, E] ─ backbone ─▶ embeddings [B, E] ─┐
    class names ─ model.text ─▶ Prompts ─ class_embeddings ─▶ [C, E] ──────────────────────────────┴▶ scale · cosine

Frame features may be given instead of clips, of a feature set or kept by `speed.cache_gb`. The image model runs without
autograd and leaves nothing for the backward pass. In evaluation the classes are encoded once and not again before
something changes; in training every micro-batch encodes them. That is what it costs: of ViT-B/16 1.5 GMAC forward for a
class of 37 places, a twelfth of a frame; with 400 classes twice as much as 16 frames. None of it has run on a GPU yet.

Legend of shapes: B clips, T frames, H, W pixels, C classes, E width of the space that images share with texts (of an
image model without such a space its own width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from model.backbone import load_image_tower
from model.geometry import CLIPGeometry, ImageTower, ViTGeometry
from model.text import SLOT, Prompts, TextTower, class_texts
from model.video import VideoModel, load_tower_weights, own_precision
from model.vit import Block, ViT

TEXTS_AT_ONCE = 256
"""In evaluation: of thousands of sentences no more are computed together."""
_IMAGE_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")
FIRST_SCALE = 1 / 0.07
"""What cosines are multiplied by before CLIP is trained."""


class ImageEncoder(ViT):
    """Normalised clips [B, T, 3, H, W] → frame features [B, T, E]: class tokens after the last norm, through CLIP's
    projection where there is one."""

    def __init__(self, geometry: ViTGeometry) -> None:
        super().__init__(geometry, lambda _: Block(geometry), None)
        width, shared = geometry.width, geometry.embed_dim
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, shared)) if shared else None

    @property
    def stem_trains(self) -> bool:
        """Nothing of it does."""
        return False

    @property
    def _stem_blocks(self) -> int:
        return len(self.blocks)

    def stem(self, clips: Tensor) -> Tensor:
        """The frame features."""
        class_tokens_BTD = self.ln_post(super().stem(clips)[:, :, 0])
        return class_tokens_BTD if self.proj is None else class_tokens_BTD @ self.proj.to(class_tokens_BTD.dtype)

    def checksum(self) -> str:
        """Of the image model's weights, as they were loaded: call it before their precision is changed."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.state_dict().items()):
            if name.partition(".")[0] in _IMAGE_PARTS:
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class FrameModel(VideoModel):
    """A video model that sees of a frame nothing but the frozen image model's one vector."""

    trained_names: ClassVar[tuple[str, ...] | None] = ()
    uses_projection = True
    stem_axes = 3
    backbone: ImageEncoder

    @property
    def feature_source(self) -> dict[str, Any]:
        """Width and checksum of the image model, and the preparation of its frames, as feature sets record them."""
        geometry = self.geometry
        return {
            "weights_xxh3": self.backbone.checksum(),
            "width": self.features,
            "size": geometry.image_size,
            "mean": list(geometry.mean),
            "std": list(geometry.std),
        }


class FrameEncoder(FrameModel):
    """The image model alone; `load_frame_encoder` makes one by name."""

    def __init__(self, tower: ImageTower, name: str) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.embed_dim or geometry.width, None, 1, 0.0)
        self.backbone = ImageEncoder(geometry)
        load_tower_weights(self.backbone, _image_weights(tower), ())
        self.finish()
        self.source = {"model": name, **self.feature_source}
        """What a feature set says of it."""

    def embed_frames(self, frames: Tensor) -> Tensor:
        """uint8 RGB frames [M, S, S, 3], anywhere → float32 features [M, E] on the model's device, not normalised and
        without gradients."""
        return self.stem(frames.to(self.pixel_mean.device).unsqueeze(1)).squeeze(1).float()


def load_frame_encoder(name: str, pretrained: str, *, normalisation: str = "") -> FrameEncoder:
    """The image model of a name as `model.backbone.load_image_tower` takes it, in eval mode, float32, on the CPU; its
    precision and device can be set as of any video model. Raises ValueError as that does, and for a Swin."""
    tower = load_image_tower(name, pretrained, normalisation=normalisation)
    if not isinstance(tower.geometry, ViTGeometry):
        raise ValueError(
            f"{name} has no class token, so no one vector a frame; choose a ViT such as ViT-B-16-quickgelu"
        )
    return FrameEncoder(tower, name).eval()


class ImageTextEncoder(ImageEncoder):
    """Both towers: frame features or clips → video embeddings [B, E], and texts → [C, E]; neither normalised."""

    def __init__(self, geometry: CLIPGeometry) -> None:
        super().__init__(geometry)
        self.text = TextTower(geometry)
        self.logit_scale = nn.Parameter(torch.tensor([FIRST_SCALE]).log())  # DeepSpeed sends nothing without an axis

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Clips [B, T, 3, H, W] or frame features [B, T, E] → [B, E]."""
        if clips.ndim == 3:
            return self.join(clips)
        with torch.no_grad():
            features_BTE = self.stem(clips)
        return self.join(features_BTE)

    def join(self, features_BTE: Tensor) -> Tensor:
        """The features of a video's frames → one vector [B, E]."""
        return features_BTE.mean(1)

    def encode(self, prompts: Prompts) -> Tensor:
        """Texts → [C, E]."""
        return self.text(self.place(prompts), prompts.ends)

    def place(self, prompts: Prompts) -> Tensor:
        """What stands at the places of the texts [C, L, D]."""
        words = self.text.token_embedding
        return F.embedding(prompts.tokens, words.weight)


class ImageTextModel(FrameModel):
    """Clips or frame features → scale · cosine of the video's embedding with those of the classes [B, C].

    Without classes (`num_classes` None) it returns the video's embedding as `embed` does.
    """

    reads_class_names: ClassVar[bool] = True
    backbone: ImageTextEncoder
    templates: tuple[str, ...]
    """The texts of a class, `{}` standing for its words; their embeddings are averaged."""
    class_file: str
    """Of words for class names (`model.text.class_texts`)."""
    class_prompts: Prompts | None = None
    """Of every class in turn, one for each template."""

    def __init__(self, geometry: CLIPGeometry, num_classes: int | None, num_frames: int) -> None:
        """A subclass sets `backbone`, loads its weights (`clip_weights`) and calls `finish`."""
        if not geometry.embed_dim:
            raise ValueError(
                "model.geometry.embed_dim = 0; allowed is the width that images and texts share, 1 or more"
            )
        super().__init__(geometry, geometry.embed_dim, num_classes, num_frames, 0.0)
        self._encoded: tuple[Any, Tensor] | None = None

    def make_head(self, num_classes: int) -> None:
        """None: class embeddings stand for it."""

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """None but a subclass's: there is no head to drop features of."""
        return {}

    @property
    def blocks(self) -> list[nn.Module]:
        """The image model's, then the text tower's."""
        return [*self.backbone.blocks, *self.backbone.text.transformer.resblocks]

    @property
    def scale(self) -> Tensor | float:
        """What cosines are multiplied by."""
        raise NotImplementedError

    def read_classes(self, texts: Sequence[str]) -> Prompts:
        """The texts as the model reads them."""
        assert isinstance(self.geometry, CLIPGeometry)
        return Prompts.of(texts, self.geometry)

    def name_classes(self, names: Sequence[str]) -> None:
        """Says what the classes are from now on, any and any number of them; ValueError for a text too long, or where
        the file of `model.class_texts` does not know one of them."""
        words = class_texts(names, self.class_file)
        texts = [template.replace(SLOT, words_of_class) for words_of_class in words for template in self.templates]
        if not texts:
            raise ValueError("name_classes: no names; give one or more")
        self.class_prompts = self.read_classes(texts)
        self.num_classes, self._encoded = len(names), None

    def embed(self, clips: Tensor) -> Tensor:
        """uint8 frames [B, T, H, W, 3], normalised float clips [B, T, 3, H, W] or frame features [B, T, E] → float32
        embeddings [B, E] of length 1."""
        prepared = self.prepare(clips) if clips.dtype == torch.uint8 else clips
        if prepared.ndim != self.stem_axes:
            self._require_shape(prepared)
        elif prepared.shape[2] != self.features or not prepared.shape[1]:
            raise ValueError(
                f"frame features of shape {list(prepared.shape)} do not fit the model, which takes [B, T, "
                f"{self.features}]: extract them with the image model of the recipe"
            )
        with own_precision(clips.device):
            return F.normalize(self.backbone(prepared.to(self.compute_dtype), {}).float(), dim=-1)

    def class_embeddings(self) -> Tensor:
        """float32 [C, E] of length 1. Computed anew where gradients may be wanted, else only when something changed."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self._encode(self._named())
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in self.parameters()]
        if self._encoded is None or self._encoded[0] != state:
            with torch.no_grad():
                parts = self._named().split(TEXTS_AT_ONCE * len(self.templates))
                self._encoded = state, torch.cat([self._encode(part) for part in parts])
        return self._encoded[1]

    def classify(self, clips: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """As of any video model; with frame features for clips."""
        embeddings = self.embed(clips)
        if self.num_classes is None:
            return embeddings
        return self.scale * embeddings @ self.class_embeddings().T

    def _named(self) -> Prompts:
        """The classes' texts on the model's device; ValueError if they have not been named."""
        if self.class_prompts is None:
            raise ValueError(
                f"the model has {self.num_classes} classes and no names for them: call name_classes, or give "
                "class_names where it is made"
            )
        self.class_prompts = self.class_prompts.to(self.pixel_mean.device)
        return self.class_prompts

    def _encode(self, prompts: Prompts) -> Tensor:
        """The embeddings of classes, each the mean over its templates."""
        with own_precision(self.pixel_mean.device):
            embeddings = F.normalize(self.backbone.encode(prompts).float(), dim=-1)
        if len(self.templates) == 1:
            return embeddings
        return F.normalize(embeddings.unflatten(0, (-1, len(self.templates))).mean(1), dim=-1)


def clip_weights(tower: ImageTower) -> dict[str, Tensor]:
    """A CLIP model's weights as an `ImageTextEncoder` names them; none if the tower has none."""
    if not tower.state_dict:
        return {}
    texts = {f"text.{name}": tensor for name, tensor in (tower.text_state or {}).items()}
    scale = texts.pop("text.logit_scale").reshape(1)
    return {**_image_weights(tower), **texts, "logit_scale": scale}


def _image_weights(tower: ImageTower) -> dict[str, Tensor]:
    return {**tower.state_dict, **({} if tower.projection is None else {"proj": tower.projection})}
