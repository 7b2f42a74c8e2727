"""The text side of a CLIP model: its frozen text tower, and class names as it reads them.

    class names ─ class_texts ─▶ texts ─ Prompts.of ─▶ token ids and places ─ TextTower ─▶ embeddings [C, E]

A text is its start token, its words' tokens and its end token, at whose place the tower's output is read. Attention is
causal: what stands after the end has no effect, and places after the longest text's end are not computed. Of CLIP's 77
places a name between 16 + 16 learned vectors takes about 38.

Legend of shapes: C texts, L places in a text, D width of the text tower, E width of the space shared with images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import CLIPGeometry, ViTGeometry
from model.layers import LayerNorm
from model.open_clip_models import END, START, VOCABULARY, word_tokens
from model.speed import call_block
from model.vit import Attention, Block

EPS = 1e-5
"""Of the text tower's layer norms."""
SLOT = "{}"
"""Where a template has the class."""
_MOST_BYTES = 4 * 2**20
_MOST_LETTERS = 1000


class CausalAttention(Attention):
    """Each place attends to itself and to those before it; PyTorch's SDPA computes it on every device."""

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, x_BTND: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(x_BTND.shape))


class Sequences(nn.Module):
    """A stack of CLIP's blocks on plain sequences: the places of texts, or the frames of videos."""

    def __init__(self, geometry: ViTGeometry, layers: int, attention: type[Attention] = Attention) -> None:
        """`geometry`: what blocks read of it."""
        super().__init__()
        self.resblocks = nn.ModuleList(Block(geometry, attention) for _ in range(layers))

    def forward(self, x_MLD: Tensor) -> Tensor:
        """M sequences of L places."""
        x = x_MLD.unsqueeze(1)
        for block in self.resblocks:
            x = call_block(block, x)
        return x.squeeze(1)


class TextTower(nn.Module):
    """CLIP's text transformer; its parameters bear CLIP's names."""

    def __init__(self, geometry: CLIPGeometry) -> None:
        super().__init__()
        width = geometry.text_width
        self.token_embedding = nn.Embedding(geometry.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(geometry.context_length, width))
        block = replace(geometry, width=width, heads=geometry.text_heads, eps=EPS, mlp_width=0)
        self.transformer = Sequences(block, geometry.text_layers, CausalAttention)
        self.ln_final = LayerNorm(width, EPS)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, geometry.embed_dim))

    def forward(self, x_CLD: Tensor, ends_C: Tensor) -> Tensor:
        """What stands at the places of C texts, words or vectors of a method, and the places of their ends →
        embeddings [C, E], not normalised."""
        x = self.transformer(x_CLD + self.positional_embedding[: x_CLD.shape[1]].to(x_CLD.dtype))
        last_CD = x[torch.arange(len(x), device=x.device), ends_C]
        return self.ln_final(last_CD) @ self.text_projection.to(x.dtype)


@dataclass(frozen=True)
class Prompts:
    """C texts as the tower reads them, perhaps with places for vectors of a method's own around the words."""

    tokens: Tensor
    """int64 [C, L]; 0 where no token stands."""
    taken: Tensor
    """bool [C, L]: whether a token stands there (start, words, end)."""
    ends: Tensor
    """int64 [C]: places of the end tokens."""

    @classmethod
    def of(cls, texts: Sequence[str], geometry: CLIPGeometry, *, prefix: int = 0, postfix: int = 0) -> Prompts:
        """`prefix` and `postfix` places stay free before and after the words; ValueError for a text that does not fit.

        L is the longest text's length.
        """
        if geometry.vocab_size < VOCABULARY:
            raise ValueError(
                f"the text tower knows {geometry.vocab_size} tokens, and CLIP's tokeniser makes {VOCABULARY}"
            )
        words = [word_tokens(text) for text in texts]
        room = geometry.context_length - 2 - prefix - postfix
        for text, tokens in zip(texts, words, strict=True):
            if len(tokens) > room:
                learned = f", {prefix} + {postfix} learned ones" if prefix or postfix else ""
                raise ValueError(
                    f"the text {text!r:.80} has {len(tokens)} tokens; of the text tower's {geometry.context_length} "
                    f"places start, end{learned} leave {max(room, 0)}: shorten it (model.class_texts, model.template)"
                    + (", or lower model.prefix and model.postfix" if learned else "")
                )
        length = 2 + prefix + postfix + max(map(len, words))
        placed = torch.zeros(len(texts), length, dtype=torch.int64)
        taken = torch.zeros(len(texts), length, dtype=torch.bool)
        ends = torch.tensor([1 + prefix + len(tokens) + postfix for tokens in words])
        for row, (tokens, end) in enumerate(zip(words, ends.tolist(), strict=True)):
            places = [0, *range(1 + prefix, 1 + prefix + len(tokens)), end]
            placed[row, places] = torch.tensor([START, *tokens, END])
            taken[row, places] = True
        return cls(placed, taken, ends)

    def __getitem__(self, rows: Tensor) -> Prompts:
        """Some of the texts."""
        return Prompts(self.tokens[rows], self.taken[rows], self.ends[rows])

    def split(self, count: int) -> list[Prompts]:
        """The texts, `count` at a time."""
        parts = (tensor.split(count) for tensor in (self.tokens, self.taken, self.ends))
        return [Prompts(*part) for part in zip(*parts, strict=True)]

    def to(self, device: torch.device) -> Prompts:
        """There; these very texts if they are there already."""
        if self.tokens.device == device:
            return self
        return Prompts(self.tokens.to(device), self.taken.to(device), self.ends.to(device))


def class_texts(names: Sequence[str], path: str) -> list[str]:
    """What the texts call the classes: by the mapping file `path`, or where that is empty the names themselves, with
    spaces for underscores. ValueError or OSError names what is wrong with the file, or a class that it lacks."""
    mapping = read_class_texts(path) if path else {}
    missing = [name for name in names if name not in mapping] if path else []
    if missing:
        raise ValueError(
            f"model.class_texts = {path!r} has no class {missing[0]!r:.80} ({len(missing)} of {len(names)} are "
            "missing): add them, each with the words for it"
        )
    texts = [" ".join(mapping.get(name, name.replace("_", " ")).split()) for name in names]
    if "" in texts:
        raise ValueError("a class has an empty name; give it words with model.class_texts")
    return texts


def read_class_texts(path: str) -> dict[str, str]:
    """Class name → text, from a JSON file such as {"brush_hair": "brush hairs"}; ValueError or OSError names what is
    wrong with it."""
    name, file = f"model.class_texts = {path!r}", Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f'{name}: no such file; give its place with --set model.class_texts=PATH, or "" to read the names alone'
        )
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{name} is larger than {_MOST_BYTES} bytes; it is no list of class names")
    try:
        document = json.loads(file.read_bytes(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f'{name}: {reason}; a JSON object {{"class": "its text"}} is needed') from error
    if not isinstance(document, dict):
        raise ValueError(f'{name} holds a {type(document).__name__}; a JSON object {{"class": "its text"}} is needed')
    for key, value in document.items():
        if not isinstance(value, str) or not value.strip() or len(value) > _MOST_LETTERS:
            raise ValueError(
                f"{name}: {key[:80]!r} is {value!r:.80}; allowed is a text of up to {_MOST_LETTERS} letters"
            )
    return document


def _without_twins(pairs: Iterable[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:80]!r} stands there twice")
        found[key] = value
    return found


def check_template(template: str) -> None:
    """ValueError unless the class has exactly one place in it."""
    if template.count(SLOT) != 1:
        raise ValueError(
            f"model.template = {template!r:.80}; allowed is a text with one {SLOT}, the place of the class"
        )
