"""Small checkpoints as the official repositories write them: their names and shapes, written down from there."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
ALL_ADAPTERS = ("S_Adapter", "T_Adapter", "MLP_Adapter")


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values that depend on name and shape alone."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        values = torch.randn(shape, generator=generator)
        state[name] = 1 + 0.1 * values if len(shape) == 1 and name.endswith("weight") else 0.05 * values
    return state


def saved(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    save_file(filled(shapes), path)
    return path


def aim_clip(
    width: int = 128,
    layers: int = 2,
    frames: int | None = 4,
    classes: int | None = 5,
    adapters: tuple[str, ...] = ALL_ADAPTERS,
    hidden: int = 32,
    blocks: tuple[int, ...] | None = None,
    grid: int = 2,
    patch: int = 16,
) -> Shapes:
    """AIM's `vit_clip.py` in mmaction."""
    d, b = width, "backbone."
    shapes: Shapes = {
        f"{b}class_embedding": (d,),
        f"{b}positional_embedding": (grid * grid + 1, d),
        f"{b}conv1.weight": (d, 3, patch, patch),
        **_norm(f"{b}ln_pre", d),
        **_norm(f"{b}ln_post", d),
    }
    if frames is not None:
        shapes[f"{b}temporal_embedding"] = (1, frames, d)
    for i in range(layers):
        block = f"{b}transformer.resblocks.{i}."
        shapes |= {f"{block}attn.in_proj_weight": (3 * d, d), f"{block}attn.in_proj_bias": (3 * d,)}
        shapes |= _linear(f"{block}attn.out_proj", d, d) | _norm(f"{block}ln_1", d) | _norm(f"{block}ln_2", d)
        shapes |= _linear(f"{block}mlp.c_fc", 4 * d, d) | _linear(f"{block}mlp.c_proj", d, 4 * d)
        if blocks is None or i in blocks:
            for adapter in adapters:
                shapes |= _adapter(f"{block}{adapter}", d, hidden)
    return shapes | _head(d, classes)


def aim_in21k(
    width: int = 128,
    layers: int = 2,
    frames: int = 4,
    classes: int | None = 5,
    adapters: tuple[str, ...] = ALL_ADAPTERS,
    grid: int = 2,
) -> Shapes:
    """AIM's `vit_imagenet.py`: timm's names."""
    d, b = width, "backbone."
    shapes: Shapes = {
        f"{b}cls_token": (1, 1, d),
        f"{b}pos_embed": (1, grid * grid + 1, d),
        f"{b}temporal_embedding": (1, frames, d),
        f"{b}patch_embed.proj.weight": (d, 3, 16, 16),
        f"{b}patch_embed.proj.bias": (d,),
        **_norm(f"{b}ln_post", d),
    }
    for i in range(layers):
        block = f"{b}blocks.{i}."
        shapes |= _timm_block(block, d)
        for adapter in adapters:
            shapes |= _adapter(f"{block}{adapter}", d, d // 4)
    return shapes | _head(d, classes)


def timesformer(width: int = 128, layers: int = 2, frames: int = 4, classes: int | None = 5) -> Shapes:
    """facebookresearch/TimeSformer, divided space-time attention."""
    d = width
    shapes: Shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 5, d),
        "time_embed": (1, frames, d),
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
        **_norm("norm", d),
    }
    for i in range(layers):
        block = f"blocks.{i}."
        shapes |= _timm_block(block, d) | _norm(f"{block}temporal_norm1", d) | _linear(f"{block}temporal_fc", d, d)
        shapes |= _linear(f"{block}temporal_attn.qkv", 3 * d, d) | _linear(f"{block}temporal_attn.proj", d, d)
    return shapes if classes is None else shapes | _linear("head", classes, d)


def timesformer_clip(
    width: int = 128, layers: int = 2, frames: int = 4, classes: int | None = 5, grid: int = 2
) -> Shapes:
    """AIM's `timesformer.py` in mmaction."""
    shapes = aim_clip(width, layers, frames, classes, adapters=(), grid=grid)
    for i in range(layers):
        block = f"backbone.transformer.resblocks.{i}."
        shapes |= {f"{block}t_attn.in_proj_weight": (3 * width, width), f"{block}t_attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}t_attn.out_proj", width, width) | _norm(f"{block}t_norm", width)
        shapes |= _linear(f"{block}T_Adapter", width, width)
    return shapes


def aim_swin(
    width: int = 32,
    depths: tuple[int, ...] = (2, 2),
    frames: int = 4,
    classes: int | None = 5,
    adapters: tuple[str, ...] = ("S_Adapter", "S_Adapter2", "T_Adapter"),
    buffers: bool = False,
) -> Shapes:
    """AIM's `swin2d_adapter.py`: window 7, heads of width 32, temporal attention in every stage's even blocks."""
    shapes = _swin(width, depths, 13 * 13)
    for stage, depth in enumerate(depths):
        d, heads = width * 2**stage, width * 2**stage // 32
        for j in range(depth):
            block = f"backbone.layers.{stage}.blocks.{j}."
            for adapter in adapters:
                if adapter != "T_Adapter" or j % 2 == 0:
                    shapes |= _adapter(f"{block}{adapter}", d, d // 4)
            if "T_Adapter" in adapters and j % 2 == 0:
                shapes[f"{block}attn.temporal_position_bias_table"] = (frames - 1, heads)
            if buffers:
                shapes[f"{block}attn.relative_position_index"] = (49, 49)
            if buffers and j % 2 and stage < len(depths) - 1:
                shapes[f"{block}attn_mask"] = (4, 49, 49)
    return shapes | _head(width * 2 ** (len(depths) - 1), classes)


def video_swin(width: int = 32, depths: tuple[int, ...] = (2, 2), window: int = 2, classes: int | None = 5) -> Shapes:
    """Video Swin's `swin_transformer.py` in mmaction."""
    return _swin(width, depths, (2 * window - 1) * 13 * 13) | _head(width * 2 ** (len(depths) - 1), classes)


def _swin(width: int, depths: tuple[int, ...], rows: int) -> Shapes:
    b = "backbone."
    shapes: Shapes = {f"{b}patch_embed.proj.weight": (width, 3, 2, 4, 4), f"{b}patch_embed.proj.bias": (width,)}
    shapes |= _norm(f"{b}patch_embed.norm", width) | _norm(f"{b}norm", width * 2 ** (len(depths) - 1))
    for stage, depth in enumerate(depths):
        d = width * 2**stage
        for j in range(depth):
            block = f"{b}layers.{stage}.blocks.{j}."
            shapes |= _timm_block(block, d)
            shapes[f"{block}attn.relative_position_bias_table"] = (rows, d // 32)
        if stage < len(depths) - 1:
            down = f"{b}layers.{stage}.downsample."
            shapes |= {f"{down}reduction.weight": (2 * d, 4 * d)} | _norm(f"{down}norm", 4 * d)
    return shapes


def _timm_block(block: str, d: int) -> Shapes:
    shapes = _norm(f"{block}norm1", d) | _norm(f"{block}norm2", d)
    shapes |= _linear(f"{block}attn.qkv", 3 * d, d) | _linear(f"{block}attn.proj", d, d)
    return shapes | _linear(f"{block}mlp.fc1", 4 * d, d) | _linear(f"{block}mlp.fc2", d, 4 * d)


def _adapter(name: str, d: int, hidden: int) -> Shapes:
    return _linear(f"{name}.D_fc1", hidden, d) | _linear(f"{name}.D_fc2", d, hidden)


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def _head(d: int, classes: int | None) -> Shapes:
    return {} if classes is None else _linear("cls_head.fc_cls", classes, d)
