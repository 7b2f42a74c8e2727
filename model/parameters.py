"""Where a model's parameters are and which of them train: the table printed at the start of every run, and the checksum
of those that do not."""

from __future__ import annotations

from collections import defaultdict

import xxhash
from torch import nn

from model.video import BACKBONE

_STACKS = ("resblocks", "layers", "blocks")  # lists of blocks or of stages


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of all parameters and of the trainable ones."""
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_table(model: nn.Module) -> str:
    """A text table: one row a kind of part (blocks joined), parameters and how many of them train."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        row = rows[_part(name)]
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
    total, trainable = count_parameters(model)
    rows[f"all ({100 * trainable / total:.1f} % trainable)"] = [total, trainable]
    width = max(map(len, rows))
    lines = [f"{'part':{width}}  {'parameters':>12}  {'trainable':>12}"]
    lines += [f"{name:{width}}  {count:>12,}  {trains:>12,}" for name, (count, trains) in rows.items()]
    return "\n".join(lines)


def backbone_checksum(model: nn.Module) -> str:
    """Checksum of the frozen weights as they were loaded: call it before their precision is changed."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _part(name: str) -> str:
    """The kind of part that a parameter belongs to; blocks and stages of one kind are one.

    `backbone.transformer.resblocks.3.attn.out_proj.weight` → `resblocks.*.attn`,
    `backbone.layers.2.blocks.5.mlp.fc1.weight` → `layers.*.blocks.*.mlp`,
    `backbone.text.transformer.resblocks.3.ln_1.weight` → `text.resblocks.*.ln_1`.
    """
    words = name.removeprefix(f"{BACKBONE}.").split(".")
    stacks = [at for at, word in enumerate(words) if word in _STACKS and words[at + 1].isdecimal()]
    if not stacks:
        return words[0]
    kind = ["*" if word.isdecimal() else word for word in words[: stacks[-1] + 3]]
    return ".".join(word for word in kind if word != "transformer")
