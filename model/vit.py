"""The image transformer that AIM, TimeSformer on CLIP and the space-only baselines share: stem, parts of blocks, norm.

Parameters bear CLIP's names, which are the official AIM's. Tokens are held as x_BTND from stem to head and never
permuted.

Legend of shapes: B clips, T frames, N tokens a frame (class token first), D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.fp8 import FP8Weight, can_be_fp8
from model.geometry import ViTGeometry
from model.layers import LayerNorm, Linear, PatchEmbedding, linear
from model.speed import call_block

BlockFactory = Callable[[int], nn.Module]
"""Layer number → a block that takes x_BTND and its masks, and returns x_BTND."""


class ViT(nn.Module):
    """Normalised clips [B, T, 3, H, W] → class tokens [B, D, T, 1, 1], as the official backbone returns them."""

    block_masks: ClassVar[str] = "drop_path"
    """The random masks [B, layers, …] that its blocks take."""

    def __init__(
        self,
        geometry: ViTGeometry,
        make_block: BlockFactory,
        temporal_frames: int | None,
        *,
        time_enters: int | None = None,
    ) -> None:
        """`temporal_frames`: length of the temporal embedding; None where there is none. `time_enters`: the block
        before which it is added; None: to the input, before the first norm, as published."""
        super().__init__()
        width = geometry.width
        self.conv1 = PatchEmbedding(width, geometry.patch_size, geometry.patch_bias)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(geometry.num_tokens, width))
        frames = temporal_frames
        self.temporal_embedding = None if frames is None else nn.Parameter(torch.zeros(1, frames, width))
        self.time_enters = time_enters
        self.ln_pre = LayerNorm(width, geometry.eps) if geometry.ln_pre else None
        self.transformer = Transformer(geometry.layers, make_block)
        self.ln_post = LayerNorm(width, geometry.eps)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks[block_masks]`: scaled keep masks [B, layers, …], absent for no drop. Instead of clips it takes what
        `stem` made of them."""
        x_BTND = self.add_time(clips if clips.ndim == 4 else self.stem(clips))
        x_BTND = self.transformer(x_BTND, masks.get(self.block_masks), range(self._stem_blocks, len(self.blocks)))
        return self.tail(x_BTND[:, :, 0])

    def tail(self, class_tokens_BTD: Tensor) -> Tensor:
        """What it returns, of the last block's class tokens; a subclass may pool them in another way."""
        return self.ln_post(class_tokens_BTD).transpose(1, 2)[..., None, None]

    @property
    def blocks(self) -> list[nn.Module]:
        """From the input on."""
        return list(self.transformer.resblocks)

    @property
    def stem_trains(self) -> bool:
        """Whether something does in what `stem` computes."""
        parts = (self.conv1.weight, self.class_embedding, self.positional_embedding)
        return any(parameter.requires_grad for parameter in parts)

    def stem(self, clips: Tensor) -> Tensor:
        """All that comes before the first weight that AIM trains: [B, T, 3, H, W] → x_BTND."""
        patches = self.conv1(clips.flatten(0, 1))
        # Not len(): torch.export would take the number of clips for a constant.
        class_tokens = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x_MND = torch.cat([class_tokens, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x_BTND = x_MND.unflatten(0, clips.shape[:2])
        if not self._time_at_input and self.ln_pre is not None:
            x_BTND = self.ln_pre(x_BTND)
        return self.transformer(x_BTND, None, range(self._stem_blocks))

    def add_time(self, x_BTND: Tensor) -> Tensor:
        """Adds the temporal embedding, if there is one, to what the stem returned; norms what is normed after it."""
        if self.temporal_embedding is not None:
            x_BTND = x_BTND + self.temporal_embedding.to(x_BTND.dtype).unsqueeze(2)
        return self.ln_pre(x_BTND) if self._time_at_input and self.ln_pre is not None else x_BTND

    @property
    def _time_at_input(self) -> bool:
        return self.temporal_embedding is not None and self.time_enters is None

    @property
    def _stem_blocks(self) -> int:
        """How many blocks belong to the stem: those before the first that trains, if time enters no earlier."""
        if self.temporal_embedding is not None:
            return self.time_enters or 0
        trained = (any(p.requires_grad for p in block.parameters()) for block in self.blocks)
        return next((number for number, trains in enumerate(trained) if trains), len(self.blocks))


class Transformer(nn.Module):
    """The stack of blocks."""

    def __init__(self, layers: int, make_block: BlockFactory) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(make_block(layer) for layer in range(layers))

    def forward(self, x_BTND: Tensor, masks: Tensor | None, layers: range) -> Tensor:
        """Through the blocks of these numbers."""
        for layer in layers:
            block_masks = None if masks is None else masks[:, layer].to(x_BTND.dtype)
            x_BTND = call_block(self.resblocks[layer], x_BTND, block_masks)
        return x_BTND


class Attention(nn.Module):
    """Multi-head self-attention, over space or over time with the same weights.

    The three projections are three products, so that q, k and v are plain views of contiguous [B, T, N, D] tensors;
    a fused one would make the temporal view impossible without a copy.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_backend = "auto"
        self.in_proj_fp8: tuple[FP8Weight, ...] | None = None
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

    def biases(self) -> Sequence[Tensor | None]:
        """Of q, k and v [D] each; None where there is none."""
        return self.in_proj_bias.chunk(3)

    def queries_keys(self, x_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """q and k over space [B·T, N, H, K]: what attention maps are made of."""
        B, T, N, D = x_BTND.shape
        q, k, _ = self._project(x_BTND, (B * T, N, self.heads, D // self.heads))
        return q, k

    def over_space_with_parts(self, x_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `over_space` returns, and the q and k [B·T, N, H, K] that it was made of."""
        B, T, N, D = x_BTND.shape
        q, k, v = self._project(x_BTND, (B * T, N, self.heads, D // self.heads))
        return self._mixed(q, k, v, x_BTND), q, k

    def use_fp8(self) -> int:
        """Called by `model.fp8.use_fp8`: how many weights multiply in 8 bits from now on, 0 or 3."""
        if not can_be_fp8(self.in_proj_weight, self.in_proj_bias):
            return 0
        self.in_proj_fp8 = tuple(map(FP8Weight.of, self.in_proj_weight.chunk(3)))
        return 3

    def _attend(self, x_BTND: Tensor, view: tuple[int, int, int, int]) -> Tensor:
        q, k, v = self._project(x_BTND, view)
        return self._mixed(q, k, v, x_BTND)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, x_BTND: Tensor) -> Tensor:
        return self.out_proj(attention(q, k, v, backend=self.attention_backend).reshape(x_BTND.shape))

    def _project(self, x_BTND: Tensor, view: tuple[int, int, int, int]) -> list[Tensor]:
        weights: Sequence[Tensor | FP8Weight] = self.in_proj_weight.to(x_BTND.dtype).chunk(3)
        if self.in_proj_fp8 is not None:
            weights = self.in_proj_fp8
        return [linear(x_BTND, w, b).view(view) for w, b in zip(weights, self.biases(), strict=True)]


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, width: int, quick_gelu: bool, hidden: int = 0) -> None:
        """`hidden`: its width within; 0: four times the width."""
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = Linear(width, hidden or 4 * width)
        self.c_proj = Linear(hidden or 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quick_gelu:
            return self.c_proj(F.gelu(self.c_fc(x)))
        # x · sigmoid(1.702 x) is silu(1.702 x) / 1.702, and products take a factor at no cost: one pass over the hidden
        # features instead of three, of which nothing but silu's input is kept.
        return self.c_proj(F.silu(self.c_fc(x, output_factor=1.702)), input_factor=1 / 1.702)


def add_to_patches(x_BTND: Tensor, y_BTPD: Tensor) -> Tensor:
    """x + y, where y [B, T, N - 1, D] is of the patches alone and class tokens stay as they are."""
    return x_BTND + F.pad(y_BTPD, (0, 0, 1, 0))


class Block(nn.Module):
    """A block of the image model as it is, frame by frame."""

    def __init__(self, geometry: ViTGeometry, attention: type[Attention] = Attention) -> None:
        super().__init__()
        width = geometry.width
        self.ln_1 = LayerNorm(width, geometry.eps)
        self.attn = attention(width, geometry.heads)
        self.ln_2 = LayerNorm(width, geometry.eps)
        self.mlp = MLP(width, geometry.quick_gelu, geometry.mlp_width)

    def forward(self, x_BTND: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks`: unused; what is added to a block may have some."""
        x = x_BTND + self.attn.over_space(self.ln_1(x_BTND))
        return x + self.mlp(self.ln_2(x))


def initialise(module: nn.Module) -> None:
    """The official start, before pretrained weights: every linear layer truncated normal of std 0.02 with bias 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.is_meta:  # on meta it would only take time
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
