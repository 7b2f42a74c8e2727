"""A model as a file that runs without this project: torch.export's .pt2 for PyTorch, .onnx for onnxruntime.

    uint8 RGB frames [batch, T, S, S, 3] ─ normalisation, model ─▶ float32 logits [batch, C]

Any number of clips at once, of as many frames as the model was trained with. Frames come as a decoder gives them:
normalisation is part of the file, so nobody can do it in another way. Computed in float32 with PyTorch's own operators,
in evaluation; nothing of xformers, Triton or ours gets in. Of a model that reads class names the classes are encoded
once, and its text tower is left out.

A file is loaded again and compared with the model at 1, 2 and 5 clips of noise before it counts. That is most of what
it costs: seconds of processor time on the tiny CLIP, two minutes and 2.8 GB of AIM on ViT-B/16 with 8 frames. Models of
every method can be written, but for those without classes; tools/check_exports.py says how exactly they answer.

PyTorch's loader unpickles whatever a .pt2 marks as pickled (torch 2.11, `torch.export.load`), and so runs a stranger's
code. Ours mark nothing so. An .onnx file holds no code.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.image_text import ImageTextModel
from model.video import VideoModel

Run = Callable[[Tensor], Tensor]
"""uint8 frames → logits, as a written file computes them."""

INPUT, OUTPUT = "frames", "logits"
TOLERANCE = 1e-3
"""How far the file's logits may be off, of the largest; rounding in float32 makes 1e-6."""
CHECKED_BATCHES = (1, 2, 5)
OPSET = 20
"""Version of ONNX's operators; onnxruntime knows it since 1.17."""
LARGEST_ONNX = 2**31 - 2**26
"""Bytes of weights that go into the .onnx file; it cannot have 2 GiB. More go to a second file beside it."""
_TRACED_BATCH = 2  # 1 would be taken for a constant
_CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")


class Answering(nn.Module):
    """uint8 frames [B, T, S, S, 3] → logits [B, C], of a model in eval mode on the CPU."""

    def __init__(self, model: VideoModel) -> None:
        """Raises ValueError for a model without classes."""
        super().__init__()
        self.classes: Tensor | None
        if isinstance(model, ImageTextModel) and model.num_classes is not None:
            with torch.no_grad():
                self.register_buffer("classes", model.class_embeddings().detach().clone())
            model = copy.deepcopy(model)
            del model.backbone.text
        elif model.num_classes is None:
            raise ValueError("the model has no classes to answer with; train it, or tell it their names")
        else:
            self.register_buffer("classes", None)
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        if self.classes is None:
            logits: Tensor = self.model(frames)
            return logits
        assert isinstance(self.model, ImageTextModel)
        return self.model.scale * self.model.embed(frames) @ self.classes.T


def exported(model: VideoModel) -> ExportedProgram:
    """The model's operations on any number of clips, which both formats are made of."""
    size = model.geometry.image_size
    frames = torch.zeros((_TRACED_BATCH, model.num_frames, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(
            Answering(model).eval(), (frames,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
        )


def write_torch_export(model: VideoModel, path: Path) -> dict[str, Any]:
    """Writes model.pt2; what is to be known of it. Raises ValueError where the file answers otherwise."""
    program = exported(model)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    program.example_inputs = None
    torch.export.save(program, path)
    with _quiet():
        run = torch.export.load(path).module()
    return {"format": "torch_export", "torch": torch.__version__, "largest_error": compare(model, run, path.name)}


def write_onnx(model: VideoModel, path: Path) -> dict[str, Any]:
    """Writes model.onnx, and model.onnx.data of a large model; what is to be known of it. Raises ValueError where the
    file answers otherwise."""
    import onnxruntime

    with _quiet(), torch.no_grad():  # with gradients attention would be taken apart in another way
        names = {"input_names": [INPUT], "output_names": [OUTPUT]}
        onnx = torch.onnx.export(exported(model), opset_version=OPSET, verbose=False, **names)  # type: ignore[arg-type]
    assert onnx is not None
    for node in onnx.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    onnx.save(path, external_data=weights > LARGEST_ONNX)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(frames: Tensor) -> Tensor:
        answer: NDArray[np.float32] = session.run([OUTPUT], {INPUT: frames.numpy()})[0]
        return torch.from_numpy(answer)

    return {"format": "onnx", "opset": OPSET, "largest_error": compare(model, run, path.name)}


WRITERS: dict[str, tuple[str, Callable[[VideoModel, Path], dict[str, Any]]]] = {
    "torch_export": ("model.pt2", write_torch_export),
    "onnx": ("model.onnx", write_onnx),
}
"""Format → the file's name, and what writes it."""


def compare(model: VideoModel, run: Run, what: str) -> float:
    """How far `run` is off the model at most, as a share of the largest logit; ValueError where that is too far."""
    size, generator = model.geometry.image_size, torch.Generator().manual_seed(0)
    worst = 0.0
    for clips in CHECKED_BATCHES:
        shape = (clips, model.num_frames, size, size, 3)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            expected, logits = model(frames), run(frames)
        off = ((logits - expected).abs().max() / expected.abs().max()).item()
        if logits.shape != expected.shape or not off <= TOLERANCE:
            raise ValueError(
                f"{what} answers {clips} clips of noise otherwise than the model: it is off by {off:.1e} of the "
                f"largest logit, allowed is {TOLERANCE}; nothing is written"
            )
        worst = max(worst, off)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what converter and loader say of their own passes."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
