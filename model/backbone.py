"""The image model behind a video model, by name: from open_clip (`ViT-B-16-quickgelu`, …, and the shipped `tiny-clip`)
or from timm (`vit_base_patch16_224`, `swin_base_patch4_window7_224`, …)."""

from __future__ import annotations

import dataclasses
import difflib

import torch

from model import open_clip_models, timm_models
from model.geometry import RANDOM_WEIGHTS, ImageTower

EXAMPLES = ("ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "tiny-clip", "vit_base_patch16_224")
NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "openai_clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "aim_clip": ((122.769 / 255, 116.74 / 255, 104.04 / 255), (68.493 / 255, 66.63 / 255, 70.321 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "timesformer": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
}
"""Mean and standard deviation of RGB in 0..1. `aim_clip`: `openai_clip`, as rounded in the official AIM configs;
`imagenet`: also what those use with ImageNet-21k's ViT, whose weights were made with `half`."""


def load_image_tower(name: str, pretrained: str, *, normalisation: str = "", text_tower: bool = False) -> ImageTower:
    """Loads an image model.

    Args:
        name: of open_clip or of timm.
        pretrained: a weight tag of that model, the path of a weight file (`.safetensors`, a plain state dict in `.pt`,
            `.pth` or `.bin`, or OpenAI's archive of that model), or `none` for random weights: then the tower has no
            tensors, and what is built on it keeps the values it was constructed with.
        normalisation: a key of NORMALISATIONS; empty: what the weights were made with.
        text_tower: also loads the text tower's weights and geometry; of a model without one, a ValueError.

    Raises:
        ValueError: unknown name or tag, weights that cannot be had, an activation that does not fit the weights, or a
            structure that no method here can adapt.
    """
    mean_std, of_timm = _normalisation(normalisation), _is_of_timm(name)
    tiny, shapes = open_clip_models.TINY_CLIP, open_clip_models.TINY_CLIP_TAG
    if pretrained == shapes and name != tiny:
        raise ValueError(
            f"model {name} has no weights {shapes!r}, which are those of {tiny}: add --set model.name={tiny}, or name "
            f"weights of {name} by --set model.pretrained=…"
        )
    if of_timm:
        if text_tower:
            raise ValueError(
                f"this method, or this option of it, needs a text tower, and {name} has none; choose a CLIP model such "
                f"as {EXAMPLES[0]}"
            )
        tower = timm_models.load_image_tower(name, pretrained)
    else:
        tower = open_clip_models.load_image_tower(name, pretrained, text_tower=text_tower)
    for key, tensor in tower.state_dict.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weights {pretrained!r} of {name}: {key} holds NaN or an infinite number; get them anew")
    if mean_std is None:
        return tower
    mean, std = mean_std
    return dataclasses.replace(tower, geometry=dataclasses.replace(tower.geometry, mean=mean, std=std))


def is_weight_file(pretrained: str) -> bool:
    """Whether it is the path of a file and no tag."""
    return pretrained.endswith(timm_models.FILE_ENDINGS)


def hub_name(name: str, pretrained: str) -> str | None:
    """`owner/repository` under which the weights are published on the Hugging Face hub; None where they are not, or
    come from a file."""
    if pretrained == RANDOM_WEIGHTS or is_weight_file(pretrained):
        return None
    return (timm_models if _is_of_timm(name) else open_clip_models).hub_name(name, pretrained)


def image_size(name: str) -> int:
    """Side in pixels of the square frames that a model takes, without building it; ValueError for unknown names."""
    return timm_models.image_size(name) if _is_of_timm(name) else open_clip_models.image_size(name)


def _is_of_timm(name: str) -> bool:
    """Whether timm has the model, else open_clip has it; ValueError with close names if neither does.

    The few names that both know are towers that open_clip itself takes from timm.
    """
    of_timm, of_open_clip = timm_models.names(), open_clip_models.names()
    if name in of_timm or name in of_open_clip:
        return name in of_timm
    base, _, tag = name.partition(".")
    if base in of_timm:
        raise ValueError(f"model.name = {name!r}: write model.name = {base!r} and model.pretrained = {tag!r}")
    close = difflib.get_close_matches(name, of_open_clip, n=4) + difflib.get_close_matches(name, of_timm, n=4)
    raise ValueError(f"unknown model.name {name!r}; close names: {', '.join(close or EXAMPLES)}")


def _normalisation(key: str) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    if not key:
        return None
    if key not in NORMALISATIONS:
        raise ValueError(
            f'model.normalisation = {key!r}; allowed is {", ".join(NORMALISATIONS)}, or "" for the weights\' own'
        )
    return NORMALISATIONS[key]
