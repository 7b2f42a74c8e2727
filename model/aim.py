"""AIM: a frozen CLIP ViT that understands video through adapters (Yang et al., "AIM: Adapting Image Models for
Efficient Video Action Recognition", ICLR 2023; official file `mmaction/models/backbones/vit_clip.py`).

Every block attends twice with the same frozen weights: over time, then over space. Small bottleneck adapters stand
after each attention (temporal, spatial) and beside the MLP (joint); they, a temporal embedding, the last layer norm
and the head are all that trains. With zero-initialised adapters the network starts as CLIP applied frame by frame.

Parameters bear the names of the official checkpoints. Tokens are held as x_BTND from stem to head and never permuted.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), D width, H heads, K head width, C classes.
Official DropPath drops a token position for the whole batch (a sequence-first tensor); here it drops a clip's branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.backbone import ImageTower, ViTGeometry
from model.layers import LayerNorm, Linear, PatchEmbedding

ADAPTERS = ("spatial", "temporal", "joint")
TRAINED_NAMES = ("temporal_embedding", "ln_post", "cls_head", "Adapter")  # official tools/train.py
UNDECAYED_NAMES = ("class_embedding", "positional_embedding", "ln_1", "ln_2", "ln_pre", "ln_post")


@dataclass(frozen=True)
class AIMOptions:
    """What of AIM is built; the defaults are the published Kinetics-400 settings."""

    adapters: tuple[str, ...] = ADAPTERS
    """Which adapters stand in each block: the paper's ladder is (), spatial, spatial + temporal, all three. Without
    the temporal one no temporal attention runs and there is no temporal embedding: the model is space-only."""
    temporal_adapters: int = 1
    """2 adds one before the temporal attention (Something-Something V2)."""
    adapter_ratio: float = 0.25
    adapter_scale: float = 0.5
    """s, the weight of the joint adapter's branch."""
    drop_path: float = 0.2
    """Drop rate of the last block's temporal and joint branches; block i of L has drop_path · i / (L - 1)."""
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.adapters if name not in ADAPTERS]
        if unknown:
            raise ValueError(f"model.adapters: {unknown[0]!r} is none of {', '.join(ADAPTERS)}")
        if self.temporal_adapters not in (1, 2):
            raise ValueError(f"model.temporal_adapters = {self.temporal_adapters}; allowed are 1 and 2")
        if not 0 < self.adapter_ratio <= 4:
            raise ValueError(f"model.adapter_ratio = {self.adapter_ratio}; allowed is 0 < ratio <= 4")
        for name in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}; allowed is 0 <= rate < 1")


class AIM(nn.Module):
    """Clips to class logits.

    `random_masks` tells the caller which random masks a training step wants: name → drop probabilities (any shape S).
    The caller draws one mask [B, *S] a clip, 0 where dropped and 1 / (1 - p) where kept, and passes them to `forward`;
    so randomness belongs to the data plan and not to a device's generator.
    """

    def __init__(self, tower: ImageTower, num_classes: int, num_frames: int, options: AIMOptions) -> None:
        super().__init__()
        self.geometry = tower.geometry
        self.num_frames = num_frames
        self.options = options
        self.compute_dtype = torch.float32
        self.backbone = AdaptedViT(tower.geometry, num_frames, options)
        self.cls_head = Head(tower.geometry.width, num_classes)
        self._initialise(tower)
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINED_NAMES))
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", 255 * torch.tensor(tower.geometry.mean), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(tower.geometry.std), persistent=False)

    @property
    def random_masks(self) -> dict[str, Tensor]:
        """Drop probabilities: `drop_path` [layers, 2] (temporal, joint) and `head_dropout` [D]."""
        layers = self.geometry.layers
        rates = self.options.drop_path * torch.arange(layers, dtype=torch.float64) / max(layers - 1, 1)
        return {
            "drop_path": rates[:, None].expand(layers, 2),
            "head_dropout": torch.full((self.geometry.width,), self.options.head_dropout, dtype=torch.float64),
        }

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Trainable parameters in the official groups: everything is decayed but the last layer norm."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        kept = [p for name, p in named if any(part in name for part in UNDECAYED_NAMES)]
        decayed = [p for name, p in named if not any(part in name for part in UNDECAYED_NAMES)]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Tokens are computed in `dtype`; frozen weights are stored in it, trainable ones stay float32."""
        self.compute_dtype = dtype
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def prepare(self, frames: Tensor) -> Tensor:
        """uint8 RGB frames [B, T, H, W, 3] as they come from the loader → normalised [B, T, 3, H, W]."""
        size, expected = self.geometry.image_size, self.num_frames
        if frames.shape[1] != expected or tuple(frames.shape[2:]) != (size, size, 3):
            raise ValueError(
                f"clips of shape {list(frames.shape)} do not fit the model, which takes [B, {expected}, {size}, "
                f"{size}, 3]: set data.num_frames to what the checkpoint was trained with"
            )
        normalised = (frames.float() - self.pixel_mean) / self.pixel_std
        return normalised.to(self.compute_dtype).permute(0, 1, 4, 2, 3)

    def forward(self, frames: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """uint8 frames [B, T, H, W, 3] → float32 logits [B, C]; `masks` as `random_masks` says, None for evaluation."""
        return self.classify(self.prepare(frames), masks)

    def classify(self, clips: Tensor, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """Normalised clips [B, T, 3, H, W] → float32 logits [B, C]: the mean over frames of the class tokens, then
        dropout and a linear layer (the official I3D head)."""
        masks = masks or {}
        with torch.autocast(clips.device.type, enabled=False):  # layers choose their own precision
            features = self.backbone(clips, masks.get("drop_path")).mean(dim=1).float()
            if "head_dropout" in masks:
                features = features * masks["head_dropout"]
            return self.cls_head(features)

    def _initialise(self, tower: ImageTower) -> None:
        """The official order: truncated normal everywhere, pretrained weights over it, then zero every fc2."""
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        missing, unexpected = self.backbone.load_state_dict(tower.state_dict, strict=False)
        ours = ("temporal_embedding", "Adapter")
        missing = [key for key in missing if not any(part in key for part in ours)]
        if missing or unexpected:
            raise ValueError(f"weights do not fit the backbone: missing {missing[:4]}, unexpected {unexpected[:4]}")
        for module in self.backbone.modules():
            if isinstance(module, Adapter):
                nn.init.zeros_(module.D_fc2.weight)
                nn.init.zeros_(module.D_fc2.bias)


class AdaptedViT(nn.Module):
    """The image tower with adapters: normalised clips [B, T, 3, H, W] → class tokens [B, T, D]."""

    def __init__(self, geometry: ViTGeometry, num_frames: int, options: AIMOptions) -> None:
        super().__init__()
        width = geometry.width
        self.conv1 = PatchEmbedding(width, geometry.patch_size)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(geometry.num_tokens, width))
        sees_time = "temporal" in options.adapters
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, width)) if sees_time else None
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(geometry, options)
        self.ln_post = LayerNorm(width)

    def forward(self, clips: Tensor, drop_path: Tensor | None) -> Tensor:
        """`drop_path`: scaled keep masks [B, layers, 2], or None for no drop."""
        num_clips, num_frames = clips.shape[:2]
        patches = self.conv1(clips.flatten(0, 1))
        class_tokens = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x_MND = torch.cat([class_tokens, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x_BTND = x_MND.unflatten(0, (num_clips, num_frames))
        if self.temporal_embedding is not None:
            x_BTND = x_BTND + self.temporal_embedding.to(x_BTND.dtype).unsqueeze(2)
        x_BTND = self.ln_pre(x_BTND)
        x_BTND = self.transformer(x_BTND, drop_path)
        return self.ln_post(x_BTND[:, :, 0])


class Transformer(nn.Module):
    """The stack of blocks."""

    def __init__(self, geometry: ViTGeometry, options: AIMOptions) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(geometry, options) for _ in range(geometry.layers))

    def forward(self, x_BTND: Tensor, drop_path: Tensor | None) -> Tensor:
        for layer, block in enumerate(self.resblocks):
            masks = None if drop_path is None else drop_path[:, layer].to(x_BTND.dtype)
            x_BTND = block(x_BTND, masks)
        return x_BTND


class Block(nn.Module):
    """One transformer block of section 3 of the paper; which adapters it has decides what it does."""

    def __init__(self, geometry: ViTGeometry, options: AIMOptions) -> None:
        super().__init__()
        width = geometry.width
        hidden = int(width * options.adapter_ratio)
        self.scale = options.adapter_scale
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, geometry.heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, geometry.quick_gelu)
        has = options.adapters.__contains__
        self.S_Adapter = Adapter(width, hidden) if has("spatial") else None
        self.T_Adapter = Adapter(width, hidden) if has("temporal") else None
        self.T_Adapter_in = Adapter(width, hidden) if has("temporal") and options.temporal_adapters == 2 else None
        self.MLP_Adapter = Adapter(width, hidden) if has("joint") else None

    def forward(self, x_BTND: Tensor, masks: Tensor | None) -> Tensor:
        """`masks`: scaled keep masks [B, 2] of the temporal and the joint branch, or None."""
        x = x_BTND
        if self.T_Adapter is not None:
            y = self.ln_1(x)
            if self.T_Adapter_in is not None:
                y = y + self.T_Adapter_in(y)
            x = x + _masked(self.T_Adapter(self.attn.over_time(y)), masks, 0)
        y = self.attn.over_space(self.ln_1(x))
        x = x + (y if self.S_Adapter is None else y + self.S_Adapter(y))
        y = self.ln_2(x)
        if self.MLP_Adapter is None:
            return x + self.mlp(y)
        return x + self.mlp(y) + _masked(self.scale * self.MLP_Adapter(y), masks, 1)


class Attention(nn.Module):
    """CLIP's multi-head self-attention, used over space and over time with the same weights.

    The three projections are three products, so that q, k and v are plain views of contiguous [B, T, N, D] tensors;
    a fused one would make the temporal view impossible without a copy.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def over_space(self, x_BTND: Tensor) -> Tensor:
        """Every frame's tokens attend to each other."""
        B, T, N, D = x_BTND.shape
        return self._attend(x_BTND, (B * T, N, self.heads, D // self.heads))

    def over_time(self, x_BTND: Tensor) -> Tensor:
        """Every token attends to the same token of the other frames, the class token included."""
        B, T, N, D = x_BTND.shape
        return self._attend(x_BTND, (B, T, N * self.heads, D // self.heads))

    def _attend(self, x_BTND: Tensor, view: tuple[int, int, int, int]) -> Tensor:
        weights = self.in_proj_weight.to(x_BTND.dtype).chunk(3)
        biases = self.in_proj_bias.to(x_BTND.dtype).chunk(3)
        q, k, v = (F.linear(x_BTND, w, b).view(view) for w, b in zip(weights, biases, strict=True))
        return self.out_proj(attention(q, k, v).reshape(x_BTND.shape))


class MLP(nn.Module):
    """CLIP's feed-forward layer, four times the width."""

    def __init__(self, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class Adapter(nn.Module):
    """Bottleneck D → hidden → D with GELU between; the caller adds the skip connection where the paper has one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.D_fc1 = Linear(width, hidden)
        self.D_fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.D_fc2(F.gelu(self.D_fc1(x)))


class Head(nn.Module):
    """The linear classifier: features [B, D] → logits [B, C]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc_cls = Linear(width, num_classes)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_cls(x)


def _masked(branch_BTND: Tensor, masks: Tensor | None, column: int) -> Tensor:
    """A clip's branch times its scaled keep mask (DropPath); unchanged without masks."""
    return branch_BTND if masks is None else branch_BTND * masks[:, column, None, None, None]
