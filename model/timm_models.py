"""The door to timm: ImageNet's plain ViTs with a class token, CLIP's under timm's names, and Swin.

The only file that imports timm. Of timm it takes the structure of a model, built without memory for its weights, and
the list of published weights; these are fetched as safetensors only, and handed on under CLIP's names (a ViT) or the
official ones (Swin).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.geometry import RANDOM_WEIGHTS, Geometry, ImageTower, SwinGeometry, ViTGeometry
from model.weight_files import read_tensors

FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
EXAMPLES = "vit_base_patch16_224, vit_large_patch16_224, swin_base_patch4_window7_224"
CLIP_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of a ViT, within a block or without: timm's name → CLIP's, with or without `.weight` and `.bias`."""
LEADING_ONES = {"class_embedding": 2, "positional_embedding": 1}
"""How many axes of length 1 timm's tensors have before CLIP's."""
_ONLY_FOR_IMAGES = ("head.", "fc_norm.", "pre_logits.")
_CONSTRUCTED = ("attn_mask", "relative_position_index")


def names() -> list[str]:
    """Every model that timm knows, supported here or not."""
    import timm

    return list(timm.list_models())


def load_image_tower(name: str, pretrained: str) -> ImageTower:
    """Loads an image model of timm.

    Args:
        name: a plain ViT with a class token or a Swin (`vit_base_patch16_224`, `swin_base_patch4_window7_224`, …).
        pretrained: a weight tag of that model (`orig_in21k`, …; needs a network the first time), the path of a weight
            file (`.safetensors`, or a plain state dict in `.pt`, `.pth` or `.bin`) under timm's or the official names,
            or `none` for random weights.

    Raises:
        ValueError: unknown tag, weights that cannot be had or do not fit, or a structure that no method here can adapt.
    """
    import timm

    is_tag = pretrained != RANDOM_WEIGHTS and not pretrained.endswith(FILE_ENDINGS)
    config = _tag_config(name, pretrained) if is_tag else timm.models.get_pretrained_cfg(name)
    model = _structure(name)
    geometry = read_geometry(name, model, tuple(config.mean), tuple(config.std))
    if pretrained == RANDOM_WEIGHTS:
        return ImageTower(geometry, {})
    if is_tag and isinstance(geometry, ViTGeometry):
        _require_trained_activation(name, pretrained, config, geometry.quick_gelu)
    state = _read(_downloaded(name, pretrained, config) if is_tag else Path(pretrained))
    rename = clip_names if isinstance(geometry, ViTGeometry) else official_swin_names
    return ImageTower(geometry, _fitting(state, model.state_dict(), rename, f"weights {pretrained!r} of {name}"))


def hub_name(name: str, pretrained: str) -> str | None:
    """`owner/repository` of a tag's weights on the Hugging Face hub; None where there is none."""
    return _tag_config(name, pretrained).hf_hub_id or None


def image_size(name: str) -> int:
    """Side in pixels of the square frames that a model takes; ValueError where it takes others."""
    return _square(name, _structure(name))


def read_geometry(name: str, model: Any, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Geometry:
    """Reads the geometry off a timm model, refusing in one line what differs from a plain ViT or Swin."""
    from timm.models.swin_transformer import SwinTransformer

    is_swin = type(model) is SwinTransformer
    what = _differs_from_swin(model) if is_swin else differs_from_vit(model)
    if what is not None:
        raise ValueError(
            f"model {name}: {what}; supported are plain ViTs with a class token and Swin, such as {EXAMPLES}"
        )
    size, patch = _square(name, model), model.patch_embed.patch_size[0]
    if is_swin:
        blocks = [stage.blocks for stage in model.layers]
        return SwinGeometry(
            width=model.patch_embed.proj.out_channels,
            depths=tuple(len(stage) for stage in blocks),
            heads=tuple(stage[0].attn.num_heads for stage in blocks),
            window=blocks[0][0].window_size[0],
            patch_size=patch,
            image_size=size,
            mean=mean,
            std=std,
        )
    hidden = model.blocks[0].mlp.fc1.out_features
    return ViTGeometry(
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=model.blocks[0].attn.num_heads,
        patch_size=patch,
        image_size=size,
        quick_gelu=type(model.blocks[0].mlp.act).__name__ == "QuickGELU",
        mean=mean,
        std=std,
        ln_pre=isinstance(model.norm_pre, nn.LayerNorm),
        patch_bias=model.patch_embed.proj.bias is not None,
        eps=model.norm.eps,
        mlp_width=0 if hidden == 4 * model.embed_dim else hidden,
    )


def differs_from_vit(model: Any) -> str | None:
    """What keeps a timm model from being a plain ViT with a class token, in words; None if nothing does."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) is not VisionTransformer:
        rotary = getattr(model, "rope", None) is not None
        return f"it is a timm {type(model).__name__}{' with rotary positions' if rotary else ''}"
    if model.cls_token is None:
        return "it has no class token"
    if model.num_prefix_tokens != 1:
        return "it has register tokens"
    if model.global_pool != "token" or not _absent(model.fc_norm):
        return f"it pools with {model.global_pool!r} instead of its class token"
    if model.pos_embed is None or model.no_embed_class:
        return "its class token has no position"
    if type(model.patch_embed) is not PatchEmbed or not _absent(model.patch_embed.norm):
        return f"its patches come from {type(model.patch_embed).__name__}, not from one convolution"
    if any(type(block) is not Block for block in model.blocks):
        return f"its blocks are {type(model.blocks[0]).__name__}"
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    norms += [] if _absent(model.norm_pre) else [model.norm_pre]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) != 1:
        return "its norms are not all layer norms of one epsilon"
    return _differs_from_plain_block(model.blocks[0], model.embed_dim)


def _differs_from_plain_block(block: Any, width: int) -> str | None:
    """As `differs_from_vit`, of one block."""
    from timm.layers import Attention, Mlp

    if not _absent(block.ls1) or not _absent(block.ls2):
        return "it scales its layers (layer scale)"
    if type(block.attn) is not Attention or block.attn.gate is not None or not _absent(block.attn.norm):
        return f"its attention is a gated, normalised or other {type(block.attn).__name__}"
    if not _absent(block.attn.q_norm):
        return "it normalises queries and keys"
    if block.attn.qkv.bias is None or block.attn.attn_dim != width:
        return "its queries, keys and values have no bias or another width"
    if type(block.mlp) is not Mlp or not _absent(block.mlp.norm):
        return f"its MLP is a {type(block.mlp).__name__}"
    activation = type(block.mlp.act).__name__
    if activation not in ("GELU", "QuickGELU"):
        return f"its activation is {activation}"
    return None


def _absent(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)


def clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain timm ViT's state dict under CLIP's names and shapes, without its classifier."""
    renamed = {}
    for key, value in state.items():
        if not key.startswith(_ONLY_FOR_IMAGES):
            block, part = _split(key)
            stem, dot, kind = part.rpartition(".")
            name = block + (CLIP_NAMES.get(part) or CLIP_NAMES.get(stem, stem) + dot + kind)
            renamed[name] = value.reshape(value.shape[LEADING_ONES.get(name, 0) :])
    return renamed


def _split(key: str) -> tuple[str, str]:
    """`blocks.3.norm1.weight` → CLIP's prefix of that block, and the part within it; outside of blocks no prefix."""
    match = re.match(r"blocks\.(\d+)\.", key)
    return (f"transformer.resblocks.{match[1]}.", key[match.end() :]) if match else ("", key)


def official_swin_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin's state dict under the names of the official repository, without its classifier and constructed buffers.

    There a stage ends with its down-sampling; since timm 0.9 the next one begins with it. Official names stay.
    """
    shift = 0 if any(key.startswith("layers.0.downsample.") for key in state) else 1
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - shift}.downsample", key): value
        for key, value in state.items()
        if not key.startswith(_ONLY_FOR_IMAGES) and not key.endswith(_CONSTRUCTED)
    }


def _differs_from_swin(model: Any) -> str | None:
    """What keeps a timm Swin from being an official one, in words; None if nothing does."""
    blocks = [block for stage in model.layers for block in stage.blocks]
    widths = [stage.blocks[0].norm1.normalized_shape[0] for stage in model.layers]
    if len({tuple(block.window_size) for block in blocks}) != 1:
        return "its stages have different windows"
    if widths != [widths[0] * 2**stage for stage in range(len(widths))]:
        return "its stages do not double in width"
    if any(block.attn.proj.in_features != block.attn.proj.out_features for block in blocks):
        return "its heads do not split its width"
    four = all(block.mlp.fc1.out_features == 4 * block.mlp.fc1.in_features for block in blocks)
    return None if four else "its MLP is not four times as wide"


def _structure(name: str) -> Any:
    """The model with weights on the meta device."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def _square(name: str, model: Any) -> int:
    embed = getattr(model, "patch_embed", None)
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if size is None or patch is None or size[0] != size[1] or patch[0] != patch[1]:
        raise ValueError(f"model {name} takes no square images of a fixed size; supported are such as {EXAMPLES}")
    return int(size[0])


def _tag_config(name: str, tag: str) -> Any:
    """timm's record of a weight tag; ValueError for an unknown tag."""
    import timm

    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag not in tags:
        raise ValueError(
            f"model {name} has no weights {tag!r}; allowed: {', '.join(tags) or 'no tag'}, a .safetensors file, or "
            f"{RANDOM_WEIGHTS!r} for random weights"
        )
    return timm.models.get_pretrained_cfg(f"{name}.{tag}")


def _require_trained_activation(name: str, tag: str, config: Any, quick_gelu: bool) -> None:
    """timm has CLIP's models in both forms and lets any weights load into either; its notes tell which is right."""
    trained_with_quick_gelu = "natively QuickGELU" in " ".join(config.notes or ())
    if trained_with_quick_gelu != quick_gelu:
        right = name.replace("_quickgelu", "") if quick_gelu else name.replace("_clip_", "_clip_quickgelu_")
        activation = "QuickGELU" if trained_with_quick_gelu else "erf GELU"
        raise ValueError(f"weights {tag!r} of {name} were trained with {activation}: use model.name = {right!r}")


def _downloaded(name: str, tag: str, config: Any) -> Path:
    """The weight file of a tag, from the hub or its cache."""
    from huggingface_hub import hf_hub_download

    with fetching(name, tag, config.hf_hub_id):
        return Path(hf_hub_download(repo_id=config.hf_hub_id, filename="model.safetensors"))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no such weight file: {path}")
    try:
        return read_tensors(path)[0]
    except OSError as error:
        raise ValueError(f"cannot load weights {path}: {error}") from error


def _fitting(
    state: Mapping[str, Tensor],
    structure: Mapping[str, Tensor],
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    what: str,
) -> dict[str, Tensor]:
    """The renamed weights in float32; ValueError unless they are exactly the model's tensors, of their shapes."""
    given, wanted = rename(state), rename(structure)
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    if missing or unexpected:
        raise ValueError(f"{what} do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for key, value in given.items():
        if value.shape != wanted[key].shape:
            raise ValueError(f"{what} do not fit: {key} is {list(value.shape)} instead of {list(wanted[key].shape)}")
    return {key: value.float() for key, value in given.items()}


@contextlib.contextmanager
def fetching(name: str, tag: str, repository: str | None) -> Iterator[None]:
    """Around what loads the weights of a tag from the Hugging Face hub or its cache: tells that they are fetched, for
    without a network the hub's client tries for long; ValueError with what to type instead where they cannot be had."""
    from huggingface_hub.constants import HF_HUB_CACHE

    files = Path(HF_HUB_CACHE, f"models--{str(repository).replace('/', '--')}", "snapshots")
    if not any(files.glob("*/*")) and os.environ.get("RANK", "0") == "0":
        told = f"fetching weights {tag} of {name} (without a network this fails after a minute)"
        print(told, file=sys.stderr, flush=True)
    try:
        with quiet():
            yield
    except Exception as error:  # open_clip, the hub's client and its HTTP library each raise their own kinds
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:  # the others tell it again, at length
            cause = deeper
        reason = textwrap.shorten(str(cause), 200, placeholder=" …").rstrip(".") or type(cause).__name__
        raise ValueError(
            f"cannot load weights {tag!r} of {name}: {reason}. A tag needs a network the first time; without one: "
            "--set model.pretrained=FILE.safetensors, or --set model.name=tiny-clip --set model.pretrained=shapes"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip and the hub's client log every step and retry of loading; a failure is reported by our own error."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
