"""The one door to DALI: a stateless executor that crops, resizes and flips images, decoding JPEGs on the way.

DALI is given everything that was decided elsewhere (bytes, boxes, flips) as tensors and holds no random state and no
position, so an executor can be thrown away and built again (2 ms) at any time; after an error it is. `image_slice`
decodes only the rows that the crop needs.

On the CPU it runs inside decode workers; on CUDA in the trainer's process, with nvJPEG. The CUDA path has not been run
on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

Boxes = NDArray[np.int32]
"""[M, 4] left, top, width, height in pixels."""


class CropExecutor:
    """Images to crops of one size: uint8 RGB [M, size, size, 3], bilinear with antialiasing.

    The result is a NumPy array on the CPU and a torch tensor on CUDA, valid until the next call.
    """

    def __init__(self, size: int, *, gpu: int | None = None, max_images: int = 256) -> None:
        """`size` in pixels; `gpu` is the number of a CUDA device, None for the CPU."""
        self.size = size
        self.gpu = gpu
        self.max_images = max_images
        self._pipelines: dict[str, Any] = {}

    def crop_jpegs(self, jpegs: Sequence[bytes], boxes: Boxes, flips: NDArray[np.bool_]) -> Any:
        """Decodes M JPEGs, each only inside its box. Raises ValueError when one of them cannot be decoded."""
        return self._run("jpeg", [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs], boxes, flips)

    def crop_frames(self, frames: Sequence[NDArray[np.uint8]], boxes: Boxes, flips: NDArray[np.bool_]) -> Any:
        """The same for M decoded frames [H, W, 3], each of any size."""
        return self._run("frame", list(frames), boxes, flips)

    def _run(self, kind: str, images: list[NDArray[np.uint8]], boxes: Boxes, flips: NDArray[np.bool_]) -> Any:
        assert 0 < len(images) <= self.max_images, len(images)
        if kind not in self._pipelines:
            self._pipelines[kind] = self._build(kind)
        pipeline = self._pipelines[kind]
        try:
            pipeline.feed_input("image", images)
            pipeline.feed_input("anchor", list(np.ascontiguousarray(boxes[:, [1, 0]], np.int32)))
            pipeline.feed_input("shape", list(np.ascontiguousarray(boxes[:, [3, 2]], np.int32)))
            pipeline.feed_input("flip", list(flips.astype(np.int32)))
            (crops,) = pipeline.run()
        except RuntimeError as error:
            del self._pipelines[kind]  # DALI calls a pipeline invalid after an error; the next call builds another
            raise ValueError(f"DALI cannot decode: {_reason(error)}") from error
        if self.gpu is None:
            return crops.as_array()
        import torch  # only where the crops stay on the GPU; decode workers do without

        return torch.from_dlpack(crops.as_tensor())

    def _build(self, kind: str) -> Any:
        pipeline = _crop_pipeline(
            kind,
            self.size,
            self.gpu is not None,
            batch_size=self.max_images,
            num_threads=1 if self.gpu is None else 4,
            device_id=self.gpu,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


@pipeline_def
def _crop_pipeline(kind: str, size: int, on_gpu: bool) -> Any:
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)  # top, left
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)  # height, width
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    if kind == "jpeg":
        data = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
        decoder = "mixed" if on_gpu else "cpu"
        image = fn.decoders.image_slice(data, anchor, shape, axes=[0, 1], output_type=types.RGB, device=decoder)
    else:
        data = fn.external_source(name="image", dtype=types.UINT8, ndim=3, layout="HWC")
        image = fn.slice(data.gpu() if on_gpu else data, anchor, shape, axes=[0, 1])
    image = fn.resize(image, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(image, horizontal=flip)


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's report that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if line.startswith("encountered")), -1)
    return (lines[at + 1] if at + 1 < len(lines) else lines[-1])[:300] if lines else "unknown error"
