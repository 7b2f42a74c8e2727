"""Pretrain the demo's tiny CLIP from nothing on drawn stills with captions (`make pretrain`).

How: every step draws a fresh batch (tools/parts/shapes.py), writes one caption per picture, and trains
open_clip's own model, tokenizer and contrastive loss on the pairs. Beside its whole caption every
picture has to find, attribute by attribute, its word among short captions: with whole captions
alone, colour and place tell a batch apart and orientation was at chance after 1,600 steps.
The last step is a zero-shot check on stills that no step has seen: of captions that differ in one
attribute only, the picture has to find its own.
Cost: 8 to 12 minutes and 1.3 GB of memory on two CPU cores; the weights it writes are 7 MB.

    python tools/pretrain_clip.py                     # writes model/tiny_clip/tiny-clip.safetensors
    python tools/pretrain_clip.py --steps 200 --weights /tmp/try.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from pipelines.cli import run_cli
from tools.parts.shapes import (
    COLOURS,
    RADIUS_RANGE,
    SHAPES,
    TEXTURES,
    Ints,
    Scenes,
    draw,
    generator,
    jitter_colours,
    random_backgrounds,
)

CONFIG_PATH = Path(__file__).resolve().parents[1] / "model" / "tiny_clip" / "tiny-clip.json"
TRAIN_STREAM, HELD_OUT_STREAM = 0, 1  # second integer of every random key: never the same scene

COLUMNS = ("far left", "left", "centre", "right", "far right")
ROWS = ("top", "upper", "middle", "lower", "bottom")
HOURS = "twelve one two three four five six seven eight nine ten eleven".split()
WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "place": tuple(f"{column} {row}" for row in ROWS for column in COLUMNS),
    "size": ("tiny", "small", "medium", "large", "huge"),
    "orientation": tuple(HOURS),
}
"""The words of each attribute; a caption names one of each."""
PHRASES: dict[str, str] = {
    "shape": "a {}",
    "colour": "{} colour",
    "texture": "{} texture",
    "place": "in the {}",
    "size": "{} size",
    "orientation": "pointing to {}",
}
"""Short captions that name one attribute."""

_PLACE_EDGES = (0.30, 0.43, 0.57, 0.70)  # of the picture's side
_CENTRE_RANGE = (0.16, 0.84)  # of the picture's side: where centres of shapes lie
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own bound


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the model's config and library versions."""

    steps: int = 1600
    batch: int = 256
    peak_lr: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.02
    seed: int = 0
    held_out: int = 1000
    """Stills of the zero-shot check."""


@dataclass(frozen=True)
class Stills:
    """n pictures and what their captions say of them."""

    pictures: NDArray[np.uint8]
    """[n, size, size, 3], RGB."""
    labels: dict[str, Ints]
    """Attribute name to [n], index into WORDS[attribute]."""

    def captions(self) -> list[str]:
        """One caption per picture."""
        return captions_of(self.labels)


def captions_of(labels: dict[str, Ints]) -> list[str]:
    """One caption per row of `labels` (attribute name to [n])."""
    words = {name: [WORDS[name][i] for i in rows] for name, rows in labels.items()}
    return [
        f"a {size} {texture} {colour} {shape}, {place}, pointing to {hour}"
        for size, texture, colour, shape, place, hour in zip(
            words["size"],
            words["texture"],
            words["colour"],
            words["shape"],
            words["place"],
            words["orientation"],
            strict=True,
        )
    ]


def draw_stills(key: tuple[int, ...], n: int, *, size: int) -> Stills:
    """n labelled pictures of size x size pixels, independent of each other: a pure function of `key`."""
    rng = generator(*key)
    return _draw(rng, _independent(rng, n), size)


def _independent(rng: np.random.Generator, n: int) -> dict[str, NDArray]:
    """What n unrelated pictures show; places and radii as fractions of the side, angles in degrees."""
    return {
        "shape": rng.integers(len(SHAPES), size=n),
        "colour": rng.integers(len(COLOURS), size=n),
        "texture": rng.integers(len(TEXTURES), size=n),
        "x": rng.uniform(*_CENTRE_RANGE, n),
        "y": rng.uniform(*_CENTRE_RANGE, n),
        "radius": rng.uniform(*RADIUS_RANGE, n),
        "angle": rng.uniform(0, 360, n),
    }


def _draw(rng: np.random.Generator, shown: dict[str, NDArray], size: int) -> Stills:
    """Pictures and labels of what `_independent` describes; colours vary and backgrounds are drawn here."""
    n = len(shown["shape"])
    scenes = Scenes(
        shape=shown["shape"],
        colour=jitter_colours(rng, shown["colour"]),
        texture=shown["texture"],
        texture_phase=rng.random(n, dtype=np.float32),
        background=random_backgrounds(rng, n),
        **{name: shown[name].astype(np.float32) for name in ("x", "y", "radius", "angle")},
    )
    size_edges = np.linspace(*RADIUS_RANGE, len(WORDS["size"]) + 1)[1:-1]
    labels = {
        "shape": shown["shape"],
        "colour": shown["colour"],
        "texture": shown["texture"],
        "place": np.digitize(scenes.y, _PLACE_EDGES) * len(COLUMNS) + np.digitize(scenes.x, _PLACE_EDGES),
        "size": np.digitize(scenes.radius, size_edges),
        "orientation": np.floor(scenes.angle / 30.0 + 0.5).astype(np.int64) % 12,
    }
    return Stills(draw(scenes, size), labels)


def build_model(config: dict) -> open_clip.CLIP:
    """open_clip's CLIP of the config, weights at random."""
    return open_clip.CLIP(**config)


def normalise(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, 3, h, w] with CLIP's mean and deviation."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255.0 - mean) / std


def pretrain(config: dict, recipe: Recipe) -> tuple[open_clip.CLIP, list[float]]:
    """Train a model of `config`; returns it with the loss (nats) of every step."""
    torch.manual_seed(recipe.seed)
    model = build_model(config).train()
    tokenizer = SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), fused=True, betas=(0.9, 0.98))
    contrastive = open_clip.ClipLoss()
    image_size = config["vision_cfg"]["image_size"]
    word_texts = tokenizer([PHRASES[name].format(word) for name, words in WORDS.items() for word in words])
    losses: list[float] = []
    bar = tqdm(range(recipe.steps), desc="pretrain", unit="step", mininterval=1.0)
    for step in bar:
        stills = draw_stills((recipe.seed, TRAIN_STREAM, step), recipe.batch, size=image_size)
        texts = tokenizer(stills.captions())
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = learning_rate(recipe, step)

        # For 17 tokens the fused CPU attention's backward costs 4 times the plain products.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image_features = model.encode_image(normalise(stills.pictures), normalize=True).float()
            text_features = model.encode_text(texts, normalize=True).float()
            word_features = model.encode_text(word_texts, normalize=True).float()
        scale = model.logit_scale.exp()
        loss = contrastive(image_features, text_features, scale)
        loss = loss + word_loss(scale * image_features @ word_features.T, stills.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)

        losses.append(loss.item())
        if step % 100 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
    return model.eval(), losses


def word_loss(logits: Tensor, labels: dict[str, Ints]) -> Tensor:
    """Sum over attributes of the cross-entropy (nats) of finding a picture's word among all words of the attribute.

    `logits` [n, words of all attributes in the order of WORDS].
    """
    parts = logits.split([len(words) for words in WORDS.values()], dim=1)
    losses = [F.cross_entropy(part, torch.from_numpy(labels[name])) for name, part in zip(WORDS, parts, strict=True)]
    return torch.stack(losses).sum()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def _parameter_groups(model: open_clip.CLIP, recipe: Recipe) -> list[dict]:
    """Weight decay for matrices only, as in CLIP."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@torch.inference_mode()
def zero_shot_accuracy(model: open_clip.CLIP, stills: Stills) -> dict[str, float]:
    """Share of pictures (0 to 1), per attribute, that pick their own among captions that differ
    from it in this attribute only."""
    tokenizer = SimpleTokenizer(context_length=model.context_length)
    image_features = model.encode_image(normalise(stills.pictures), normalize=True)
    accuracies = {}
    for attribute, words in WORDS.items():
        scores = []
        for word in range(len(words)):
            labels = {**stills.labels, attribute: np.full_like(stills.labels[attribute], word)}
            text_features = model.encode_text(tokenizer(captions_of(labels)), normalize=True)
            scores.append((image_features * text_features).sum(dim=-1))
        chosen = torch.stack(scores, dim=1).argmax(dim=1).numpy()
        accuracies[attribute] = float((chosen == stills.labels[attribute]).mean())
    return accuracies


def save_weights(model: open_clip.CLIP, path: Path, metadata: dict[str, str]) -> None:
    """Write both towers in bf16 under open_clip's names; `path` is there whole or not at all."""
    tensors = {k: v.detach().bfloat16().contiguous() for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(path.name + ".tmp")
    save_file(tensors, half_written, metadata)
    os.replace(half_written, path)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG_PATH, help="open_clip model config")
    parser.add_argument("--weights", type=Path, help="default: beside the config, .safetensors")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="pictures per step")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--held-out", type=int, default=Recipe.held_out, help="stills of the check")
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    weights = args.weights or args.config.with_suffix(".safetensors")
    config = json.loads(args.config.read_text())
    recipe = Recipe(steps=args.steps, batch=args.batch, seed=args.seed, held_out=args.held_out)

    began = time.perf_counter()
    model, losses = pretrain(config, recipe)
    seconds = time.perf_counter() - began
    held_out = draw_stills((recipe.seed, HELD_OUT_STREAM), recipe.held_out, size=config["vision_cfg"]["image_size"])
    # Measured on the weights as they are stored, not on the finer ones they are rounded from.
    accuracies = zero_shot_accuracy(model.bfloat16().float(), held_out)
    metadata = {
        "recipe": json.dumps(recipe.__dict__),
        "config": json.dumps(config),
        "zero_shot_accuracy": json.dumps({k: round(v, 4) for k, v in accuracies.items()}),
        "last_loss": f"{np.mean(losses[-100:]):.4f}",
    }
    save_weights(model, weights, metadata)
    print(f"{recipe.steps} steps in {seconds:.0f} s, loss {metadata['last_loss']}")
    for attribute, accuracy in accuracies.items():
        chance = 1 / len(WORDS[attribute])
        print(f"  {attribute:12s} {accuracy:6.1%}  (chance {chance:.1%})")
    print(f"wrote {weights} ({weights.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run_cli(main)
