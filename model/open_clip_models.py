"""The door to open_clip: any plain CLIP ViT it knows, and the project's own tiny CLIP for machines without a network.

The only file that imports open_clip to load models. It hands on a plain state dict under CLIP's own parameter names
and the geometry that goes with it, so the video models need nothing of open_clip.

Weights are read without running anything that a file brings along: safetensors, or `torch.load` with weights_only.
The one exception are OpenAI's own archives. They are TorchScript, which is code, and are opened only after their
SHA-256 has been found to be the one that OpenAI publishes for the model.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from model.geometry import RANDOM_WEIGHTS, CLIPGeometry, ImageTower, ViTGeometry
from model.timm_models import FILE_ENDINGS, clip_names, differs_from_vit, fetching, quiet, read_geometry
from model.weight_files import read_tensors

TINY_CLIP = "tiny-clip"
TINY_CLIP_TAG = "shapes"
TINY_CLIP_FOLDER = Path(__file__).parent / "tiny_clip"
OPENAI_TAG = "openai"
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}
"""All that distinguishes the text towers of CLIP's kind in open_clip's configurations."""
_TEXT_NAMES = (
    "token_embedding.",
    "positional_embedding",
    "transformer.resblocks.",
    "ln_final.",
    "text_projection",
    "logit_scale",
)
START, END = 49406, 49407
"""Tokens that begin and end a text, the last of CLIP's vocabulary,"""
VOCABULARY = 49408
"""which has so many."""
EXAMPLES = "ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14 and their -quickgelu variants"


def names() -> list[str]:
    """Every model that open_clip knows, supported here or not, and the shipped one."""
    import open_clip

    return sorted({*open_clip.list_models(), TINY_CLIP})


def load_image_tower(name: str, pretrained: str, *, text_tower: bool = False) -> ImageTower:
    """Loads the image tower of an open_clip model.

    Args:
        name: an open_clip model name (`ViT-B-16-quickgelu`, …) or `tiny-clip`, which ships with the project.
        pretrained: a weight tag of that model (`openai`, …; needs a network the first time), the path of a weight
            file (`.safetensors`, a plain state dict in `.pt`, `.pth` or `.bin`, or OpenAI's archive of that model), or
            `none` for random weights.
        text_tower: also hands on the text tower: its weights, and a geometry that has its shape.

    Raises:
        ValueError: unknown name or tag, weights that cannot be had, an activation that does not fit the weights, or
            a tower that is not a plain CLIP ViT.
    """
    geometry = _geometry(name, pretrained)
    if text_tower:
        geometry = _with_texts(name, geometry)
    if pretrained == RANDOM_WEIGHTS:
        return ImageTower(geometry, {})
    model = load_clip(name, pretrained)
    projection = getattr(model.visual, "proj", None)
    return ImageTower(
        geometry,
        _image_weights(model.visual),
        None if projection is None else projection.detach(),
        _text_weights(name, model) if text_tower else None,
    )


def hub_name(name: str, pretrained: str) -> str | None:
    """`owner/repository` of a tag's weights on the Hugging Face hub; None where there is none."""
    import open_clip

    owner, _, rest = str(open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub", "")).partition("/")
    repository = rest.partition("/")[0]
    return f"{owner}/{repository}" if owner and repository else None


def image_size(name: str) -> int:
    """Side in pixels of the square frames that a model takes, without building it; ValueError for unknown names."""
    return int(_known_config(name)["vision_cfg"]["image_size"])


def load_clip(name: str, pretrained: str) -> nn.Module:
    """The whole open_clip model in eval mode and float32, both towers; arguments and errors as `load_image_tower`."""
    import open_clip

    source = _weight_source(name, pretrained)
    archive = None
    is_file = pretrained.endswith(FILE_ENDINGS)
    if is_file and _is_torchscript(Path(pretrained)):
        archive, source = _openai_archive(name, Path(pretrained)), None
    elif is_file:
        read_tensors(Path(pretrained))  # it says better what is wrong with a file than open_clip does
    is_tag = source == pretrained and not is_file
    try:
        with fetching(name, pretrained, hub_name(name, pretrained)) if is_tag else quiet():
            model = open_clip.create_model(name, pretrained=source, precision="fp32", weights_only=True).eval()
            if archive is not None:
                model.load_state_dict(archive)
            return model
    except Exception as error:  # open_clip raises many kinds for a file that does not fit
        if not is_file:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load weights {pretrained!r} of {name}: {reason}") from error


def word_tokens(text: str) -> list[int]:
    """CLIP's tokens of a text, without those that begin and end it; needs no network."""
    tokens: list[int] = _tokeniser().encode(text)
    return tokens


@cache
def _tokeniser() -> Any:
    """CLIP's own, whose vocabulary ships with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def published_sha256(name: str) -> str | None:
    """The SHA-256, 64 hexadecimal digits, that OpenAI's download address gives for its archive of a model; None if
    OpenAI published no such model."""
    import open_clip

    match = re.search(r"/([0-9a-f]{64})/[^/]+\.pt$", open_clip.get_pretrained_url(name, OPENAI_TAG))
    return match[1] if match else None


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


def _weight_source(name: str, pretrained: str) -> str | None:
    """What open_clip calls `pretrained`: a tag, a file or None; raises ValueError when it cannot fit the model."""
    import open_clip

    quick_gelu = bool(_known_config(name).get("quick_gelu", False))
    if pretrained == RANDOM_WEIGHTS:
        return None
    if name == TINY_CLIP and pretrained == TINY_CLIP_TAG:
        return str(TINY_CLIP_FOLDER / f"{TINY_CLIP}.safetensors")
    if pretrained.endswith(FILE_ENDINGS):
        if not Path(pretrained).is_file():
            raise ValueError(f"no such weight file: {pretrained}")
        return pretrained
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        if name == TINY_CLIP:
            allowed = f"{TINY_CLIP_TAG} (--set model.pretrained={TINY_CLIP_TAG})"
        else:
            allowed = ", ".join(tags) or "no tag"
        raise ValueError(
            f"model {name} has no weights {pretrained!r}; allowed: {allowed}, a .safetensors file, or "
            f"{RANDOM_WEIGHTS!r} for random weights"
        )
    trained_with_quick_gelu = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    if trained_with_quick_gelu != quick_gelu:
        raise _wrong_activation(name, pretrained, trained_with_quick_gelu)
    return pretrained


def _wrong_activation(name: str, pretrained: str, trained_with_quick_gelu: bool) -> ValueError:
    import open_clip

    right = f"{name}-quickgelu" if trained_with_quick_gelu else name.removesuffix("-quickgelu")
    known = right != name and right in open_clip.list_models()
    return ValueError(
        f"weights {pretrained!r} of {name} were trained with "
        f"{'QuickGELU' if trained_with_quick_gelu else 'erf GELU'}: use "
        + (
            f"model.name = {right!r}"
            if known
            else "other weights, for open_clip has no such model with that activation"
        )
    )


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip that holds code beside its constants."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") or "/code/" in entry for entry in archive.namelist())


def _openai_archive(name: str, path: Path) -> dict[str, Tensor]:
    """The weights in OpenAI's archive of a model; ValueError for any other TorchScript, before any of it is opened."""
    expected = published_sha256(name)
    with path.open("rb") as file:
        found = _sha256(file)
        if expected is None or found != expected:
            raise ValueError(
                f"{path} is a TorchScript archive, which is code, and its SHA-256 {found} is not the one that OpenAI "
                f"publishes for {name} ({expected or 'none'}); if you trust it, convert it by safetensors.torch"
                ".save_file(torch.jit.load(PATH, 'cpu').state_dict(), 'weights.safetensors') and give that file"
            )
        if not _known_config(name).get("quick_gelu", False):
            raise _wrong_activation(name, str(path), True)
        file.seek(0)
        state: dict[str, Tensor] = torch.jit.load(file, map_location="cpu").state_dict()
    constants = ("input_resolution", "context_length", "vocab_size")
    return {key: value.float() for key, value in state.items() if key not in constants}


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _image_weights(tower: Any) -> dict[str, Tensor]:
    """The image tower's weights under CLIP's names, without the projection into the space shared with text."""
    if hasattr(tower, "trunk"):  # a plain ViT that open_clip takes from timm
        return clip_names(tower.trunk.state_dict())
    return {key: value for key, value in tower.state_dict().items() if key != "proj"}


def _with_texts(name: str, geometry: ViTGeometry) -> CLIPGeometry:
    """The geometry with that of the text tower; ValueError unless that is CLIP's."""
    from open_clip.model import CLIPTextCfg

    given = _known_config(name)["text_cfg"]
    if not set(given) <= _TEXT_KEYS or not geometry.embed_dim:
        raise _foreign_text_tower(name)
    config = CLIPTextCfg(**given)
    return CLIPGeometry(
        **dataclasses.asdict(geometry),
        text_width=config.width,
        text_layers=config.layers,
        text_heads=config.heads,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
    )


def _text_weights(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The text tower's weights under CLIP's names."""
    state = {key.removeprefix("text."): value for key, value in model.state_dict().items()}
    weights = {key: value for key, value in state.items() if key.startswith(_TEXT_NAMES)}
    if any(not any(key.startswith(wanted) for key in weights) for wanted in _TEXT_NAMES):
        raise _foreign_text_tower(name)
    return weights


def _foreign_text_tower(name: str) -> ValueError:
    return ValueError(
        f"the text tower of {name} is not CLIP's, and this method, or this option of it, needs one; choose a CLIP "
        f"model such as {EXAMPLES}"
    )


def _geometry(name: str, pretrained: str) -> ViTGeometry:
    """Reads the geometry off an open_clip tower, refusing what is not a plain CLIP ViT."""
    import open_clip
    from open_clip.transformer import QuickGELU

    tower = _structure(name)
    what = _differs_from_clip(tower)
    if what is not None:
        raise ValueError(f"model {name}: {what}; supported are plain CLIP ViTs such as {EXAMPLES}")
    published = open_clip.get_pretrained_cfg(name, pretrained)
    mean = tuple(published.get("mean", open_clip.OPENAI_DATASET_MEAN))
    std = tuple(published.get("std", open_clip.OPENAI_DATASET_STD))
    if hasattr(tower, "trunk"):
        geometry = read_geometry(name, tower.trunk, mean, std)
        assert isinstance(geometry, ViTGeometry)
        return geometry
    block = tower.transformer.resblocks[0]
    hidden = block.mlp.c_fc.out_features
    return ViTGeometry(
        width=tower.conv1.out_channels,
        layers=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        patch_size=tower.patch_size[0],
        image_size=tower.image_size[0],
        quick_gelu=isinstance(block.mlp.gelu, QuickGELU),
        mean=mean,
        std=std,
        ln_pre=not isinstance(tower.ln_pre, nn.Identity),
        eps=tower.ln_post.eps,
        mlp_width=0 if hidden == 4 * tower.conv1.out_channels else hidden,
        embed_dim=0 if tower.proj is None else tower.proj.shape[1],
    )


def _structure(name: str) -> Any:
    """A model's image tower, its weights on the meta device; the text tower, which may need a network, is not built."""
    from open_clip.model import _build_vision_tower

    config = _known_config(name)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    with torch.device("meta"):
        return _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))


def _differs_from_clip(tower: Any) -> str | None:
    """What keeps an open_clip tower from being a plain ViT with a class token, in words; None if nothing does."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    if isinstance(tower, TimmModel):
        what = differs_from_vit(tower.trunk)
        return None if what is None else f"its image tower comes from timm, and {what}"
    if type(tower) is not VisionTransformer:
        return f"its image tower is a {type(tower).__name__}"
    if tower.attn_pool is not None:
        return "it pools by attention"
    if tower.pool_type != "tok":
        return "it pools over its patches instead of its class token"
    if len(set(tower.image_size)) != 1 or len(set(tower.patch_size)) != 1:
        return f"its images {tower.image_size} or patches {tower.patch_size} are not square"
    blocks = tower.transformer.resblocks
    block = blocks[0]
    if (
        any(type(part) is not ResidualAttentionBlock for part in blocks)
        or type(block.attn) is not nn.MultiheadAttention
    ):
        return f"its blocks are {type(block).__name__} with {type(block.attn).__name__}"
    if not isinstance(block.ls_1, nn.Identity) or not isinstance(block.ls_2, nn.Identity):
        return "it scales its layers (layer scale)"
    norms = [tower.ln_post, *(norm for part in blocks for norm in (part.ln_1, part.ln_2))]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) != 1:
        return "its norms are not all layer norms of one epsilon"
    if type(block.mlp.gelu) not in (nn.GELU, QuickGELU):
        return f"its activation is {type(block.mlp.gelu).__name__}"
    return None
