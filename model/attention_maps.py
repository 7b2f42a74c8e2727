"""Where a video model looks: the class token's attention over the patches of each frame.

The AIM paper shows such maps and does not define them; here they are the softmax of the attention over space in one
block, averaged over heads, the class token's row. TimeSformer has one class token a clip: of it, every frame's copy.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.geometry import ImageTower, ViTGeometry
from model.methods import create
from model.video import VideoModel


@torch.no_grad()
def class_attention(model: VideoModel, clips: Tensor, block: int) -> Tensor:
    """What `forward` takes → float32 [B, T, N]: shares, of each frame 1 in all, the class token's own first. Of a
    method with further tokens (VPT's prompts) without their shares.

    `block` counts from 0, or from -1 backwards. Raises ValueError for a model without class token or such a block, and
    for one whose frames do not each go through the blocks.
    """
    geometry = _require_class_token(model)
    layer = _block(model, block)
    inputs: list[Tensor] = []
    over_space = layer.attn.over_space

    def recorded(x_BTND: Tensor) -> Tensor:
        inputs.append(x_BTND)
        attended: Tensor = over_space(x_BTND)
        return attended

    layer.attn.over_space = recorded
    try:
        model(clips)
    finally:
        del layer.attn.over_space  # the class has it
    if not inputs or inputs[-1].shape[:2] != clips.shape[:2]:
        raise ValueError(
            "attention maps are drawn of models that send each frame by itself through the image model's own blocks, "
            "and this method does not (EVL, DualPath)"
        )
    q, k = layer.attn.queries_keys(inputs[-1])
    scores = torch.einsum("mhk,mnhk->mhn", q[:, 0].float(), k.float()) * q.shape[-1] ** -0.5
    shares = scores.softmax(-1).mean(1).unflatten(0, inputs[-1].shape[:2])
    return shares[..., : geometry.num_tokens]


def image_model(model: VideoModel) -> VideoModel:
    """The image model inside a video model: frame by frame, without what the method added, without a head."""
    geometry = _require_class_token(model)
    alone = create("frozen", ImageTower(geometry, {}), num_classes=None, num_frames=model.num_frames)
    own = model.backbone.state_dict()
    missing = [name for name in alone.backbone.state_dict() if name not in own]
    if missing:
        raise ValueError(
            f"attention maps are compared with the whole image model, and this method has no {missing[0]} (Side4Video)"
        )
    alone.backbone.load_state_dict({name: own[name] for name in alone.backbone.state_dict()})
    return alone.eval()


def image_model_trains(model: VideoModel) -> bool:
    """Whether training changes where the image model inside looks."""
    _require_class_token(model)
    backbone: Any = model.backbone
    return any(
        parameter.requires_grad for block in backbone.transformer.resblocks for parameter in block.attn.parameters()
    )


def _block(model: VideoModel, block: int) -> Any:
    geometry = _require_class_token(model)
    if not -geometry.layers <= block < geometry.layers:
        raise ValueError(
            f"block {block}: the model has {geometry.layers}; allowed is 0 to {geometry.layers - 1}, or -1 for the last"
        )
    backbone: Any = model.backbone
    return backbone.transformer.resblocks[block]


def _require_class_token(model: VideoModel) -> ViTGeometry:
    if not isinstance(model.geometry, ViTGeometry) or not hasattr(model.backbone, "class_embedding"):
        raise ValueError("attention maps are drawn of the class token, and this model has none (Swin, VideoMAE)")
    return model.geometry
