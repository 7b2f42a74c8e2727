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
        near_one = len(shape) == 1 and name.endswith(("weight", "running_var"))
        state[name] = 1 + 0.1 * values if near_one else 0.05 * values
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


def dualpath(
    width: int = 128,
    layers: int = 2,
    classes: int | None = 5,
    embed_dim: int = 64,
    hidden: int = 32,
    grid: int = 2,
    patch: int = 16,
    paper: bool = False,
) -> Shapes:
    """DualPath's `CLIP_custom/clip/model.py` without the text tower; `paper`: as the same file would hold that form."""
    d, e, v = width, embed_dim, "visual."
    trunk = aim_clip(width, layers, None, None, (), grid=grid, patch=patch)
    shapes: Shapes = {v + name.removeprefix("backbone."): shape for name, shape in trunk.items()}
    if not paper:
        shapes[f"{v}spatial_positional_embedding"] = (grid * grid + 1, d)
    for i in range(layers):
        for adapter in ("t_adapter_attn_b", "s_adapter_attn", "t_adapter_attn", "s_adapter_mlp", "t_adapter_mlp"):
            if not (paper and adapter == "t_adapter_attn_b"):
                name = f"{v}transformer.resblocks.{i}.{adapter}."
                shapes |= _linear(f"{name}down_proj", hidden, d) | _linear(f"{name}up_proj", d, hidden)
    shapes |= {f"{v}proj": (d, e)} | _linear(f"{v}head.linear1", e, 2 * e)
    return shapes if classes is None else shapes | _linear(f"{v}head.linear2", classes, e)


def st_adapter(
    width: int = 128,
    layers: int = 2,
    classes: int | None = 5,
    adapters: tuple[str, ...] = ("adapter_pre_mlp",),
    hidden: int = 32,
    kernel: int = 3,
    blocks: tuple[int, ...] | None = None,
    grid: int = 2,
) -> Shapes:
    """ST-Adapter's `models_adapter.py`."""
    trunk = aim_clip(width, layers, None, None, (), grid=grid)
    shapes: Shapes = {name.removeprefix("backbone."): shape for name, shape in trunk.items()}
    for i in range(layers):
        for adapter in adapters if blocks is None or i in blocks else ():
            name = f"transformer.resblocks.{i}.{adapter}."
            shapes |= _linear(f"{name}fc1", hidden, width) | _linear(f"{name}fc2", width, hidden)
            shapes |= {f"{name}conv.weight": (hidden, 1, kernel, 1, 1), f"{name}conv.bias": (hidden,)}
    return shapes if classes is None else shapes | _linear("fc", classes, width)


def zero_i2v(
    width: int = 128,
    layers: int = 2,
    frames: int = 4,
    classes: int | None = 5,
    adapters: tuple[str, ...] = ("T_Adapter_in", "S_Adapter", "MLP_Adapter", "MLP_Adapter_out"),
    hidden: int = 32,
    grid: int = 2,
) -> Shapes:
    """ZeroI2V's `vit_zero_clip.py` in mmaction."""
    return aim_clip(width, layers, frames, classes, adapters, hidden, grid=grid)


def vpt(
    width: int = 128, layers: int = 2, classes: int | None = 5, prompts: int = 3, deep: bool = True, projected: int = 0
) -> Shapes:
    """VPT's `vit_prompt/vit.py`: a ViT whose queries, keys and values are layers of their own."""
    d, t, e = width, "transformer.", "transformer.embeddings."
    shapes: Shapes = {
        f"{t}prompt_embeddings": (1, prompts, projected or d),
        f"{e}position_embeddings": (1, 5, d),
        f"{e}cls_token": (1, 1, d),
        f"{e}patch_embeddings.weight": (d, 3, 16, 16),
        f"{e}patch_embeddings.bias": (d,),
        **_norm(f"{t}encoder.encoder_norm", d),
    }
    if deep:
        shapes[f"{t}deep_prompt_embeddings"] = (layers - 1, prompts, projected or d)
    if projected:
        shapes |= _linear(f"{t}prompt_proj", d, projected)
    for i in range(layers):
        block = f"{t}encoder.layer.{i}."
        shapes |= _norm(f"{block}attention_norm", d) | _norm(f"{block}ffn_norm", d)
        shapes |= _linear(f"{block}ffn.fc1", 4 * d, d) | _linear(f"{block}ffn.fc2", d, 4 * d)
        for part in ("query", "key", "value", "out"):
            shapes |= _linear(f"{block}attn.{part}", d, d)
    return shapes if classes is None else shapes | _linear("head", classes, d)


def adaptformer_image(
    width: int = 128, layers: int = 2, classes: int | None = 5, hidden: int = 8, head: str = "head.1"
) -> Shapes:
    """AdaptFormer's `vit_image.py`; `head`: what its linear layer is called, "head" without the batch norm."""
    d = width
    shapes: Shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 5, d),
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
        **_norm("norm", d),
    }
    for i in range(layers):
        shapes |= _adaptformer_block(f"blocks.{i}.", d, hidden)
        shapes |= {f"blocks.{i}.attn.{part}_proj.bias": (d,) for part in "qkv"}
    return shapes | _normed_head(d, classes, head)


def adaptformer_video(
    width: int = 128,
    layers: int = 2,
    classes: int | None = 5,
    hidden: int = 8,
    tubelet: int = 2,
    patch: int = 32,
    prompts: int = 0,
) -> Shapes:
    """AdaptFormer's `vit_video.py`."""
    d = width
    shapes: Shapes = {
        "patch_embed.proj.weight": (d, 3, tubelet, patch, patch),
        "patch_embed.proj.bias": (d,),
        **_norm("fc_norm", d),
    }
    for i in range(layers):
        shapes |= _adaptformer_block(f"blocks.{i}.", d, hidden)
        shapes |= {f"blocks.{i}.attn.{part}_bias": (d,) for part in "qv"}
        if prompts:
            shapes[f"embeddings.{i}"] = (1, prompts, d)
    return shapes | _normed_head(d, classes, "head.1")


def _adaptformer_block(block: str, d: int, hidden: int) -> Shapes:
    shapes = _norm(f"{block}norm1", d) | _norm(f"{block}norm2", d) | _linear(f"{block}attn.proj", d, d)
    shapes |= {f"{block}attn.{part}_proj.weight": (d, d) for part in "qkv"}
    shapes |= _linear(f"{block}fc1", 4 * d, d) | _linear(f"{block}fc2", d, 4 * d)
    if hidden:
        name = f"{block}adaptmlp."
        shapes |= _linear(f"{name}down_proj", hidden, d) | _linear(f"{name}up_proj", d, hidden)
    return shapes


def _normed_head(d: int, classes: int | None, name: str) -> Shapes:
    """A linear layer behind a batch norm, of which running statistics are all that is kept; `head`: it alone."""
    if classes is None:
        return {}
    norm = {} if name == "head" else {"head.0.running_mean": (d,), "head.0.running_var": (d,)}
    return norm | _linear(name, classes, d)


def evl(
    width: int = 128,
    layers: int = 3,
    frames: int | None = 4,
    classes: int | None = 5,
    read: int = 2,
    inner: int = 0,
    hidden: int = 0,
    tables: bool = True,
    grid: int = 2,
    patch: int = 16,
) -> Shapes:
    """EVL's `model.py`, its image model included, which it writes only where that was finetuned; `read`: layers of the
    decoder."""
    d, b, c = width, "backbone.", "decoder."
    shapes: Shapes = {
        f"{b}cls_token": (d,),
        f"{b}pos_embed": (grid * grid + 1, d),
        **_linear(f"{b}patch_embed.proj", d, 3 * patch * patch),
        **_norm(f"{b}ln_pre", d),
        f"{c}cls_token": (d,),
    }
    for i in range(layers):
        block = f"{b}blocks.{i}."
        shapes |= _evl_layer(block, d, d, 4 * d) | _norm(f"{block}norm1", d) | _norm(f"{block}norm2", d)
    for i in range(read):
        layer = f"{c}decoder_layers.{i}."
        shapes |= _evl_layer(layer, d, inner or d, hidden or 4 * d)
        shapes |= _norm(f"{layer}norm1", d) | _norm(f"{layer}norm2", d) | _norm(f"{layer}norm3", d)
        shapes |= {f"{c}temporal_conv.{i}.weight": (d, 1, 3), f"{c}temporal_conv.{i}.bias": (d,)}
        if frames is not None:
            shapes[f"{c}temporal_pos_embed.{i}"] = (frames, d)
        if tables:
            shapes |= {f"{c}cross_attention.{i}.w{way}": ((2 * grid - 1) ** 2, d) for way in (1, 2)}
    shapes |= _norm("proj.0", d)
    return shapes if classes is None else shapes | _linear("proj.2", classes, d)


def _evl_layer(name: str, d: int, inner: int, hidden: int) -> Shapes:
    shapes = _linear(f"{name}attn.out_proj", d, inner)
    for part in "qkv":
        shapes |= _linear(f"{name}attn.{part}_proj", inner, d)
    return shapes | _linear(f"{name}mlp.fc1", hidden, d) | _linear(f"{name}mlp.fc2", d, hidden)


def side4video(
    width: int = 128, layers: int = 2, classes: int | None = 5, side: int = 64, grid: int = 2, patch: int = 16
) -> Shapes:
    """Side4Video's `Recognition/clip/model.py`, without the counts of the batch norms' steps."""
    d, s, v = width, side, "visual."
    t = f"{v}transformer.side_"
    trunk = aim_clip(width, layers, None, None, (), grid=grid, patch=patch)
    shapes: Shapes = {
        v + name.removeprefix("backbone."): shape for name, shape in trunk.items() if "ln_post" not in name
    }
    shapes |= {f"{v}side_conv1.weight": (s, 3, 3, patch, patch), f"{v}side_conv1.bias": (s,)}
    shapes |= _batch_norm(f"{v}side_pre_bn3d", s) | _batch_norm(f"{v}side_post_bn", s)
    shapes[f"{t}spatial_position_embeddings"] = (grid * grid, s)
    for i in range(layers):
        block = f"{t}transformer.{i}."
        shapes |= _linear(f"{t}linears.{i}", s, d) | _norm(f"{t}lns.{i}", d)
        shapes |= _batch_norm(f"{block}bn_1", s) | _batch_norm(f"{block}bn_2", s) | _norm(f"{block}ln_1", s)
        for part, kernel in ((0, (s, s, 1, 1, 1)), (1, (s, 1, 3, 1, 1)), (2, (s, s, 1, 1, 1))):
            shapes |= {f"{block}conv.{part}.weight": kernel, f"{block}conv.{part}.bias": (s,)}
        shapes |= {f"{block}attn.in_proj_weight": (3 * s, s), f"{block}attn.in_proj_bias": (3 * s,)}
        shapes |= _linear(f"{block}attn.out_proj", s, s)
        shapes |= _linear(f"{block}mlp.fc1", 4 * s, s) | _linear(f"{block}mlp.fc2", s, 4 * s)
    return shapes if classes is None else shapes | _linear("fc", classes, s)


def _batch_norm(name: str, d: int) -> Shapes:
    return _norm(name, d) | {f"{name}.running_mean": (d,), f"{name}.running_var": (d,)}


def efficient_prompt(
    width: int = 128,
    layers: int = 2,
    frames: int = 4,
    classes: int | None = None,
    grid: int = 2,
    shared: int = 64,
    text_layers: int = 1,
    temporal_layers: int = 2,
    vocabulary: int = 100,
) -> Shapes:
    """Efficient-Prompt's `model.py` around OpenAI's `clip/model.py`; the classes are texts."""
    d, c, v = width, "clipmodel.", "clipmodel.visual."
    shapes: Shapes = {
        f"{v}class_embedding": (d,),
        f"{v}positional_embedding": (grid * grid + 1, d),
        f"{v}proj": (d, shared),
        f"{v}conv1.weight": (d, 3, 16, 16),
        **_norm(f"{v}ln_pre", d),
        **_norm(f"{v}ln_post", d),
        f"{c}positional_embedding": (77, 64),
        f"{c}text_projection": (64, shared),
        f"{c}logit_scale": (),
        f"{c}token_embedding.weight": (vocabulary, 64),
        **_norm(f"{c}ln_final", 64),
        "embedding.weight": (77, 64),
        "temporalEmbedding.weight": (frames, shared),
    }
    for stack, of, count in (
        (f"{v}transformer", d, layers),
        (f"{c}transformer", 64, text_layers),
        ("temporalModelling", shared, temporal_layers),
    ):
        for i in range(count):
            block = f"{stack}.resblocks.{i}."
            shapes |= {f"{block}attn.in_proj_weight": (3 * of, of), f"{block}attn.in_proj_bias": (3 * of,)}
            shapes |= _linear(f"{block}attn.out_proj", of, of) | _norm(f"{block}ln_1", of) | _norm(f"{block}ln_2", of)
            shapes |= _linear(f"{block}mlp.c_fc", 4 * of, of) | _linear(f"{block}mlp.c_proj", of, 4 * of)
    return shapes
