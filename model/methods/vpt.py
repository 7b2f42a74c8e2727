"""VPT: learned tokens, prompts, stand among the tokens of a frozen image transformer (Jia et al., "Visual Prompt
Tuning", ECCV 2022; official file `src/models/vit_prompt/vit.py` of KMnP/vpt). They and the head are all that trains.

Every frame goes through the image model by itself, with the same prompts, and the class tokens' mean goes to the head:
the order of frames is not seen. Prompts bear no positional embedding, so where they stand makes no difference: the
official order is class token, prompts, patches; here they are last, where they are cut off by a view. On CLIP they come
after its first norm.

The official prompt dropout draws for every image; here for every clip.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), P prompts, D width, L layers, S sets of
prompts (1 or L), W width of a prompt before it is projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from model.geometry import ImageTower, ViTGeometry
from model.layers import Linear
from model.method import Method
from model.methods.aim import stands_on
from model.official import Format, Reading, Shapes, read_timm_vit, reading, shape_of
from model.speed import call_block
from model.timm_models import LEADING_ONES
from model.video import VideoModel, check_rates, load_tower_weights
from model.vit import Block, ViT, initialise


@dataclass(frozen=True)
class VPTOptions:
    """What can be set of VPT."""

    depth: str = "deep"
    """Where prompts enter: "shallow", before the first block, to go through all of them; "deep", new ones in every
    block, in place of what the last block made of its own; "prepended", the same with the start of AdaptFormer's and
    DualPath's comparisons (Xavier's, narrower)."""
    num_prompts: int = 10
    prompt_width: int = 0
    """Width in which prompts are learned, before one linear layer for all; 0: the model's, and no such layer."""
    prompt_dropout: float = 0.0
    """0.1 in the paper's runs."""
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.depth not in ("shallow", "deep", "prepended"):
            raise ValueError(f'model.depth = "{self.depth}"; allowed is shallow, deep or prepended')
        if self.num_prompts < 1:
            raise ValueError(f"model.num_prompts = {self.num_prompts}; allowed is 1 or more")
        if self.prompt_width < 0:
            raise ValueError(f"model.prompt_width = {self.prompt_width}; allowed is 0 (the model's) or more")
        check_rates(self, "prompt_dropout", "head_dropout")

    def start(self, geometry: ViTGeometry) -> float:
        """Prompts start uniform between this and its negative."""
        width = self.prompt_width or geometry.width
        fan = self.num_prompts * width if self.depth == "prepended" else 3 * geometry.patch_size**2
        return sqrt(6 / (fan + width))


class PromptedViT(ViT):
    """Normalised clips [B, T, 3, H, W] → class tokens [B, D, T, 1, 1]."""

    def __init__(self, geometry: ViTGeometry, options: VPTOptions) -> None:
        super().__init__(geometry, lambda _: Block(geometry), None)
        initialise(self)
        width, start = options.prompt_width or geometry.width, options.start(geometry)
        further = 0 if options.depth == "shallow" else geometry.layers - 1
        self.prompt_embeddings, self.deep_prompt_embeddings = (
            nn.Parameter(torch.empty(sets, options.num_prompts, width).uniform_(-start, start)) if sets else None
            for sets in (1, further)
        )
        self.prompt_proj = Linear(width, geometry.width) if options.prompt_width else None
        if self.prompt_proj is not None:
            nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks["prompt_dropout"]`: [B, S, P, D], absent for no drop. Instead of clips it takes what `stem` made of
        them."""
        x_BTND = clips if clips.ndim == 4 else self.stem(clips)
        B, T, N, _ = x_BTND.shape
        prompts_BSPD = self.prompts(x_BTND.dtype, masks.get("prompt_dropout")).expand(B, -1, -1, -1)
        for layer, block in enumerate(self.blocks):
            if layer < prompts_BSPD.shape[1]:
                prompts_BTPD = prompts_BSPD[:, layer, None].expand(-1, T, -1, -1)
                x_BTND = torch.cat([x_BTND[:, :, :N], prompts_BTPD], dim=2)
            x_BTND = call_block(block, x_BTND)
        return self.tail(x_BTND[:, :, 0])

    def prompts(self, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
        """Those of every block that gets some [B, S, P, D]; without a mask, which is of that shape, B is 1."""
        every = (self.prompt_embeddings, self.deep_prompt_embeddings)
        prompts_SPD = torch.cat(tuple(each for each in every if each is not None)).to(dtype)
        if self.prompt_proj is not None:
            prompts_SPD = self.prompt_proj(prompts_SPD)
        return prompts_SPD[None] if mask is None else prompts_SPD * mask.to(dtype)

    @property
    def _stem_blocks(self) -> int:
        return 0  # prompts enter before the first block


class VPT(VideoModel):
    """VPT on a ViT with a class token; arguments as `model.methods.create` says."""

    trained_names = ("prompt", "cls_head")
    undecayed_names = ("fc_cls.bias",)

    def __init__(self, tower: ImageTower, num_classes: int | None, num_frames: int, options: VPTOptions) -> None:
        geometry = tower.geometry
        assert isinstance(geometry, ViTGeometry)
        super().__init__(geometry, geometry.width, num_classes, num_frames, options.head_dropout)
        self.options = options
        self.backbone = PromptedViT(geometry, options)
        load_tower_weights(self.backbone, tower.state_dict, ("prompt",))
        self.finish()

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """`prompt_dropout` [S, P, D], if there is any; `head_dropout` [D]."""
        masks, rate = super().random_masks, self.options.prompt_dropout
        if rate:  # many numbers a clip
            assert isinstance(self.geometry, ViTGeometry)
            sets = 1 if self.options.depth == "shallow" else self.geometry.layers
            shape = (sets, self.options.num_prompts, self.geometry.width)
            masks["prompt_dropout"] = torch.full(shape, rate, dtype=torch.float64)
        return masks


def _read(entry: Format, shapes: Shapes) -> Reading:
    geometry = read_timm_vit(entry, shapes)
    _, prompts, width = shape_of(entry, shapes, "backbone.prompt_embeddings", 3)
    options = {
        "depth": "deep" if "backbone.deep_prompt_embeddings" in shapes else "shallow",
        "num_prompts": prompts,
        "prompt_width": width if "backbone.prompt_proj.weight" in shapes else 0,
    }
    assumed: dict[str, Any] = {"heads": geometry.heads, "quick_gelu": geometry.quick_gelu, "num_frames": 1}
    return reading(entry, shapes, geometry, 1, options, assumed)


METHODS = (
    Method(
        "vpt",
        "frozen image model with learned tokens",
        VPTOptions,
        {ViTGeometry: VPT},
        (
            Format(
                name="vpt",
                summary="VPT on ImageNet-21k's ViT",
                family="vpt",
                method="vpt",
                marks=(r"^transformer\.prompt_embeddings$",),
                read=_read,
                holds=lambda description: description["method"] == "vpt" and stands_on(description, ln_pre=False),
                names={
                    "transformer.prompt_embeddings": "prompt_embeddings",
                    "transformer.deep_prompt_embeddings": "deep_prompt_embeddings",
                    "transformer.prompt_proj": "prompt_proj",
                    "transformer.embeddings.cls_token": "class_embedding",
                    "transformer.embeddings.position_embeddings": "positional_embedding",
                    "transformer.embeddings.patch_embeddings": "conv1",
                    "transformer.encoder.encoder_norm": "ln_post",
                    "attention_norm": "ln_1",
                    "attn.out": "attn.out_proj",
                    "ffn_norm": "ln_2",
                    "ffn.fc1": "mlp.c_fc",
                    "ffn.fc2": "mlp.c_proj",
                },
                blocks="transformer.encoder.layer",
                outside={"head": "cls_head.fc_cls"},
                prefix="",
                fused={
                    f"attn.in_proj_{kind}": tuple(f"attn.{part}.{kind}" for part in ("query", "key", "value"))
                    for kind in ("weight", "bias")
                },
                leading_ones=LEADING_ONES,
            ),
        ),
        shown_options=("depth", "num_prompts", "prompt_width"),
        paper='Jia et al., "Visual Prompt Tuning", ECCV 2022',
    ),
)
