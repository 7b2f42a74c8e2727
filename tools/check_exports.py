"""Tries tools/export.py's formats on every method, and writes down how far the files are from the model.

    python tools/check_exports.py export.json                                         all methods on the tiny CLIP
    python tools/check_exports.py b16.json --model ViT-B-16-quickgelu --methods aim   one of full size

Each method stands on the image model (--model, with random weights if it is not the shipped one; of methods on a Swin a
small Swin), what trains is moved away from its start at random, and every format is written to a temporary folder,
loaded again and compared at 1, 2 and 5 clips of noise. Writes OUT: by method, image model and format the largest error
as a share of the largest logit, bytes and seconds, with versions and processor. A format that cannot be written is an
error of the whole check. All methods on the tiny CLIP take four minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from model.geometry import RANDOM_WEIGHTS, CLIPGeometry, ImageTower, SwinGeometry
from model.graphs import CHECKED_BATCHES, TOLERANCE, WRITERS
from model.methods import METHODS, create, load_tower
from model.open_clip_models import TINY_CLIP, TINY_CLIP_TAG
from model.parameters import count_parameters
from model.video import VideoModel
from pipelines.cli import run_cli, writable
from pipelines.machine import installed_versions, processor_name

SMALL_SWIN = SwinGeometry(width=32, depths=(2, 2), heads=(1, 2), window=4, image_size=32)
PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime")
_NUM_CLASSES = 5


def main(argv: Sequence[str] | None = None) -> None:
    """One check. Raises ValueError for a method that there is not, or that a format cannot hold."""
    arguments = parse_arguments(argv)
    out = writable(arguments.out, "OUT")
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {unknown[0]}; allowed is {', '.join(METHODS)}")
    methods: dict[str, Any] = {}
    for method in tqdm(arguments.methods, desc="methods", disable=None):
        for where, model in models(method, arguments.model, arguments.frames):
            methods.setdefault(method, {})[where] = measure(model)
    document = {
        "what": "largest difference of a written file's logits from the model's, as a share of the largest logit",
        "command": shlex.join(["python", "tools/check_exports.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "packages": installed_versions(PACKAGES),
        "clips_at_once": list(CHECKED_BATCHES),
        "frames": arguments.frames,
        "allowed": TOLERANCE,
        "methods": methods,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    worst = {
        name: max(row[name]["largest_error"] for rows in methods.values() for row in rows.values()) for name in WRITERS
    }
    errors = ", ".join(f"{name} {off:.1g}" for name, off in worst.items())
    print(f"{out}: {len(methods)} methods; largest error {errors}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="file to write")
    add("--model", default=TINY_CLIP, metavar="NAME", help=f"image model (default: {TINY_CLIP})")
    add(
        "--methods",
        type=lambda text: text.split(","),
        default=list(METHODS),
        metavar="A,B,…",
        help="only these (default: all)",
    )
    add("--frames", type=int, default=8, metavar="T", help="frames of a clip (default: 8)")
    return parser.parse_args(argv)


def models(method: str, name: str, frames: int) -> Iterator[tuple[str, VideoModel]]:
    """Name of an image model, and a method on it in eval mode: on each kind that the method takes; and merged, where
    that is another model."""
    kinds = list(METHODS[method].models)
    made = {}
    if kinds != [SwinGeometry]:
        pretrained = TINY_CLIP_TAG if name == TINY_CLIP else RANDOM_WEIGHTS
        made[name] = _moved(method, load_tower(method, name, pretrained), frames)
    if SwinGeometry in kinds:
        made["small Swin"] = _moved(method, ImageTower(SMALL_SWIN, {}), frames)
    for where, model in made.items():
        yield where, model
        if (merged := model.merged()) is not model:
            yield f"{where}, merged", merged


def measure(model: VideoModel) -> dict[str, Any]:
    """By format: largest error, bytes, seconds; and the model's parameters."""
    row: dict[str, Any] = {"parameters": count_parameters(model)[0]}
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, write) in WRITERS.items():
            started = time.perf_counter()
            said = write(model, Path(folder) / file)
            seconds = round(time.perf_counter() - started, 1)
            size = sum(path.stat().st_size for path in Path(folder).glob(f"{file}*"))
            row[name] = {**said, "bytes": size, "seconds": seconds}
    return row


def _moved(method: str, tower: ImageTower, frames: int) -> VideoModel:
    """The model with trained parts that do something, which at their start many do not."""
    torch.manual_seed(0)
    geometry, options = tower.geometry, None
    if method == "prompt_clip" and isinstance(geometry, CLIPGeometry):  # texts of the tiny CLIP have few places
        places = min(16, (geometry.context_length - 3) // 3)
        options = METHODS[method].options(prefix=places, postfix=places)
    model = create(method, tower, num_classes=_NUM_CLASSES, num_frames=frames, options=options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if model.reads_class_names:
        model.name_classes([f"class {number}" for number in range(_NUM_CLASSES)])
    return model.eval()


if __name__ == "__main__":
    run_cli(main)
