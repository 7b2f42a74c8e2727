"""The video transformer that AdaptFormer adapts: VideoMAE's (Tong et al., NeurIPS 2022; official file
`models/vit_video.py` of ShoufaChen/AdaptFormer).

    clips ─ tubelets (t, p, p) ─▶ tokens + fixed sinusoids ─ blocks ─▶ mean over tokens ─ norm ─▶ features

All tokens of a clip attend to each other, over space and time at once; there is no class token. So a block of the image
transformer serves as it is (`model.vit.Block`), on clips that are one frame of all tokens. Keys have no bias.

Attention costs the square of N = (T / t) · (H / p)²: of 1,568 tokens for 16 frames of 224 × 224, where a frame by
itself has 197.

Legend of shapes: B clips, T frames, N tokens a clip (time first, then rows), D width, L layers; 1 for an axis of length
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import ViTGeometry
from model.layers import LayerNorm
from model.speed import call_block
from model.vit import Attention, BlockFactory, Transformer


class UnbiasedKeys(Attention):
    """Attention whose keys have no bias (which no softmax would notice)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.register_parameter("in_proj_bias", None)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def biases(self) -> Sequence[Tensor | None]:
        return self.q_bias, None, self.v_bias


class TubeletEmbedding(nn.Conv3d):
    """Blocks of t frames and p × p pixels to tokens: [B, T, 3, H, W] → [B, N, D]."""

    def __init__(self, width: int, tubelet: int, patch_size: int) -> None:
        kernel = (tubelet, patch_size, patch_size)
        super().__init__(3, width, kernel_size=kernel, stride=kernel)

    def forward(self, clips: Tensor) -> Tensor:
        # As one product: it leaves the channels last, where a convolution would want them permuted before and after.
        t, p, _ = self.kernel_size
        B, frames, channels, height, width = clips.shape
        cells = clips.reshape(B, frames // t, t, channels, height // p, p, width // p, p)
        tubelets = cells.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        assert self.bias is not None
        return F.linear(tubelets, self.weight.flatten(1).to(clips.dtype), self.bias.to(clips.dtype))


class VideoMAE(nn.Module):
    """Normalised clips [B, T, 3, H, W] → features [B, D]."""

    positions: Tensor
    stem_trains = False

    def __init__(
        self, geometry: ViTGeometry, make_block: BlockFactory, num_frames: int, tubelet: int, num_prompts: int = 0
    ) -> None:
        """Blocks are made with `UnbiasedKeys`. `num_prompts`: learned tokens of every block, which it gets besides the
        others; what it makes of them is dropped."""
        super().__init__()
        width = geometry.width
        self.conv1 = TubeletEmbedding(width, tubelet, geometry.patch_size)
        tokens = num_frames // tubelet * (geometry.image_size // geometry.patch_size) ** 2
        self.register_buffer("positions", sinusoids(tokens, width), persistent=False)
        self.transformer = Transformer(geometry.layers, make_block)
        self.fc_norm = LayerNorm(width, geometry.eps)
        prompts = [torch.empty(1, num_prompts, width) for _ in range(geometry.layers if num_prompts else 0)]
        self.embeddings = nn.ParameterList(map(nn.init.xavier_uniform_, prompts))

    @property
    def blocks(self) -> list[nn.Module]:
        """From the input on."""
        return list(self.transformer.resblocks)

    def stem(self, clips: Tensor) -> Tensor:
        """All before the first block: [B, T, 3, H, W] → [B, 1, N, D]."""
        tokens = self.conv1(clips)
        return (tokens + self.positions.to(tokens.dtype)).unsqueeze(1)

    def forward(self, clips: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """`masks["adapter_dropout"]`: masks of the blocks [B, L, …], absent for no drop. Instead of clips it takes what
        `stem` made of them."""
        x_B1ND = clips if clips.ndim == 4 else self.stem(clips)
        dropout, tokens = masks.get("adapter_dropout"), x_B1ND.shape[2]
        for layer, block in enumerate(self.blocks):
            if len(self.embeddings):
                prompts = self.embeddings[layer].to(x_B1ND.dtype).expand(x_B1ND.shape[0], 1, -1, -1)
                x_B1ND = torch.cat([x_B1ND[:, :, :tokens], prompts], dim=2)
            x_B1ND = call_block(block, x_B1ND, None if dropout is None else dropout[:, layer].to(x_B1ND.dtype))
        return self.fc_norm(x_B1ND[:, 0, :tokens].mean(dim=1))


def sinusoids(positions: int, width: int) -> Tensor:
    """Fixed positional embedding [positions, width]: sines at even, cosines at odd places, of wavelengths from 2π to
    2π · 10,000."""
    where = torch.arange(positions, dtype=torch.float64)
    speeds = 10_000 ** -(2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angles = where[:, None] * speeds
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float()
