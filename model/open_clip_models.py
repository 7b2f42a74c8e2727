"""The door to open_clip: any CLIP ViT it knows, and the project's own tiny CLIP for machines without a network.

The only file that imports open_clip to load models. It hands on a plain state dict under CLIP's own parameter names
and the geometry that goes with it, so the video models need nothing of open_clip.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from model.geometry import ImageTower, ViTGeometry

TINY_CLIP = "tiny-clip"
TINY_CLIP_TAG = "shapes"
TINY_CLIP_FOLDER = Path(__file__).parent / "tiny_clip"
RANDOM_WEIGHTS = "none"


def load_image_tower(name: str, pretrained: str) -> ImageTower:
    """Loads the image tower of an open_clip model.

    Args:
        name: an open_clip model name (`ViT-B-16-quickgelu`, …) or `tiny-clip`, which ships with the project.
        pretrained: a weight tag of that model (`openai`, …; needs a network the first time), the path of a
            `.safetensors` file, or `none` for random weights.

    Raises:
        ValueError: unknown name or tag, weights that cannot be had, an activation that does not fit the weights, or
            a tower that is not a plain CLIP ViT.
    """
    model = load_clip(name, pretrained)
    tower: nn.Module | None = getattr(model, "visual", None)
    geometry = _geometry(name, tower)
    assert tower is not None
    state = {key: value.float() for key, value in tower.state_dict().items() if key != "proj"}
    return ImageTower(geometry, state)


def image_size(name: str) -> int:
    """Side in pixels of the square frames that a model takes, without building it; ValueError for unknown names."""
    return int(_known_config(name)["vision_cfg"]["image_size"])


def load_clip(name: str, pretrained: str) -> nn.Module:
    """The whole open_clip model in eval mode and float32, both towers; arguments and errors as `load_image_tower`."""
    import open_clip

    source = _weight_source(name, pretrained, bool(_known_config(name).get("quick_gelu", False)))
    try:
        with _quiet():
            return open_clip.create_model(name, pretrained=source, precision="fp32", weights_only=True).eval()
    except Exception as error:  # open_clip, the hub client and urllib each raise their own kinds
        if source is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load weights {pretrained!r} of {name}: {reason}. A tag needs a network the first time; without "
            f"one give a local .safetensors file, or the shipped model name={TINY_CLIP!r} pretrained={TINY_CLIP_TAG!r}"
        ) from error


def _known_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model; ValueError with close names where there is none."""
    import open_clip

    if name == TINY_CLIP:
        open_clip.add_model_config(TINY_CLIP_FOLDER / f"{TINY_CLIP}.json")
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4) or ["ViT-B-16-quickgelu", "ViT-L-14-quickgelu", TINY_CLIP]
        raise ValueError(f"unknown model.name {name!r}; close names: {', '.join(close)}")
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def _weight_source(name: str, pretrained: str, quick_gelu: bool) -> str | None:
    """What open_clip calls `pretrained`: a tag, a file or None; raises ValueError when it cannot fit the model."""
    import open_clip

    if pretrained == RANDOM_WEIGHTS:
        return None
    if name == TINY_CLIP and pretrained == TINY_CLIP_TAG:
        return str(TINY_CLIP_FOLDER / f"{TINY_CLIP}.safetensors")
    if pretrained.endswith(".safetensors"):
        if not Path(pretrained).is_file():
            raise ValueError(f"no such weight file: {pretrained}")
        return pretrained
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        shipped = [TINY_CLIP_TAG] if name == TINY_CLIP else tags
        raise ValueError(
            f"model {name} has no weights {pretrained!r}; allowed: {', '.join(shipped) or 'no tag'}, a .safetensors "
            f"file, or {RANDOM_WEIGHTS!r} for random weights"
        )
    trained_with_quick_gelu = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    if trained_with_quick_gelu != quick_gelu:
        right = f"{name}-quickgelu" if trained_with_quick_gelu else name.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {pretrained!r} of {name} were trained with "
            f"{'QuickGELU' if trained_with_quick_gelu else 'erf GELU'}: use model.name = {right!r}"
        )
    return pretrained


def _geometry(name: str, tower: Any) -> ViTGeometry:
    """Reads the geometry off an open_clip tower, refusing what is not a plain CLIP ViT."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    def refuse(what: str) -> ValueError:
        return ValueError(f"model {name}: {what}; supported are plain CLIP ViTs such as ViT-B-32, ViT-B-16, ViT-L-14")

    if not isinstance(tower, VisionTransformer):
        raise refuse(f"its image tower is a {type(tower).__name__}")
    block = tower.transformer.resblocks[0]
    expected = {"ln_1", "ln_2", "attn", "mlp", "ls_1", "ls_2"}
    parts = {part for part, _ in block.named_children()}
    plain = parts <= expected and isinstance(getattr(block, "ls_1", nn.Identity()), nn.Identity)
    plain = plain and isinstance(block.attn, nn.MultiheadAttention) and not isinstance(tower.ln_pre, nn.Identity)
    plain = plain and tower.attn_pool is None and tower.pool_type == "tok"
    if not plain:
        raise refuse("its blocks or its pooling differ from CLIP's")
    if tower.image_size[0] != tower.image_size[1] or tower.patch_size[0] != tower.patch_size[1]:
        raise refuse(f"image {tower.image_size} or patch {tower.patch_size} is not square")
    return ViTGeometry(
        width=tower.conv1.out_channels,
        layers=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        patch_size=tower.patch_size[0],
        image_size=tower.image_size[0],
        quick_gelu=isinstance(block.mlp.gelu, QuickGELU),
        mean=tuple(tower.preprocess_cfg["mean"]),
        std=tuple(tower.preprocess_cfg["std"]),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs every step of loading on the root logger; a failure is reported by our own error."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
