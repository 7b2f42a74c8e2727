"""The one door to DALI: it decodes JPEGs, each only inside its box; on CUDA it decodes video too, resizes and flips.

DALI is given everything that was decided elsewhere (bytes, frame numbers, boxes, flips) as tensors and holds no random
state and no position, so a pipeline can be thrown away and built again (3 ms) at any time; after an error it is.

On the CPU, inside decode workers, it decodes and no more: its resize costs twice the decode, OpenCV's a quarter of it
(`decode.py`). On CUDA, in the trainer's process, nvJPEG or NVDEC decodes and the whole graph stays on the device. Never
run on a GPU yet: tests run the same graphs with the CPU's operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

Box = tuple[int, int, int, int]
"""left, top, width, height in pixels."""
Bytes = bytes | memoryview


class JpegSlicer:
    """Cut-outs of JPEGs, on the CPU, in one thread."""

    def __init__(self, max_images: int) -> None:
        """`max_images` a run; a run costs 0.2 ms besides the images."""
        self._run = _Runner(_slice_pipeline, max_images)

    def slice(self, jpegs: Sequence[Bytes], boxes: Sequence[Box]) -> list[NDArray[np.uint8] | ValueError]:
        """uint8 RGB [height, width, 3] for every JPEG's box, or why it cannot be decoded. Valid as long as held."""
        try:
            slices = self._run(jpegs, boxes)
        except ValueError as error:
            if len(jpegs) == 1:
                return [error]
            return [self.slice([jpeg], [box])[0] for jpeg, box in zip(jpegs, boxes, strict=True)]  # who was it?
        return [np.asarray(slices[i]) for i in range(len(jpegs))]


class JpegCropper:
    """JPEGs to crops of one size on a CUDA device."""

    def __init__(self, size: int, max_images: int, *, gpu: int | None) -> None:
        """`size` in pixels; `gpu` is the number of the device. None runs the same graph on the CPU, for tests."""
        self._size = size
        self._run = _Runner(_jpeg_pipeline, max_images, gpu=gpu, size=size)

    def crop(self, jpegs: Sequence[Bytes], boxes: Sequence[Box], flips: Sequence[bool]) -> Any:
        """uint8 RGB [M, size, size, 3], a torch tensor (NumPy array without a GPU), valid until the next call.

        Linear interpolation, as on the CPU; of a box that shrinks to less than half, antialiased. Raises ValueError
        when one of the images cannot be decoded.
        """
        crops = self._run(jpegs, boxes, **_resizing(boxes, flips, self._size))
        return self._run.array(crops.as_tensor())


class VideoCropper:
    """Frames of short videos to crops of one size on a CUDA device, decoded by NVDEC.

    DALI decodes a video from its first frame to the last one wanted, a repeated frame from the first one again, and a
    bad one fails with its whole batch; so what it gets is cut to the packets needed (`mp4.py`), each frame asked once.
    It honours the full-range flag, takes BT.601 and centred chroma: what our h264 and hevc profiles store.
    """

    def __init__(self, size: int, max_videos: int, *, gpu: int | None) -> None:
        """As of `JpegCropper`; DALI's CPU decoder knows Motion-JPEG, not H.264."""
        self._size = size
        self._run = _Runner(_video_pipeline, max_videos, gpu=gpu, size=size)

    def crop(
        self, videos: Sequence[Bytes], frames: Sequence[Sequence[int]], boxes: Sequence[Box], flips: Sequence[bool]
    ) -> list[Any]:
        """Of every video its `frames` (ascending, each once): uint8 RGB [n, size, size, 3], else as `JpegCropper`."""
        numbers = [np.array(wanted, np.int32) for wanted in frames]
        crops = self._run(videos, boxes, frames=numbers, **_resizing(boxes, flips, self._size))
        return [self._run.array(crops[i]) for i in range(len(videos))]


def shrinks(box: Box, size: int) -> bool:
    """Whether a box becomes less than half as wide or high at `size`: then pixels are averaged, not interpolated."""
    return max(box[2], box[3]) > 2 * size


def _resizing(boxes: Sequence[Box], flips: Sequence[bool], size: int) -> dict[str, NDArray[Any]]:
    """The inputs of `_resize`."""
    return {"shrunk": np.array([shrinks(box, size) for box in boxes]), "flip": np.array(flips, np.int32)}


class _Runner:
    """One pipeline, built when it is needed and again after an error."""

    def __init__(self, definition: Any, max_samples: int, *, gpu: int | None = None, **arguments: Any) -> None:
        self._definition = definition
        self._max_samples = max_samples
        self._gpu = gpu
        self._arguments = arguments
        self._pipeline: Any = None

    def __call__(self, encoded: Sequence[Bytes], boxes: Sequence[Box], **inputs: Any) -> Any:
        """The pipeline's one output, a list of M samples. Raises ValueError with DALI's reason."""
        assert 0 < len(encoded) <= self._max_samples, len(encoded)
        if self._pipeline is None:
            self._pipeline = self._build()
        corners = np.array(boxes, np.int32)
        inputs["encoded"] = [np.frombuffer(data, np.uint8) for data in encoded]
        inputs["anchor"] = np.ascontiguousarray(corners[:, 1::-1])
        inputs["shape"] = np.ascontiguousarray(corners[:, :1:-1])
        try:
            for name, values in inputs.items():
                self._pipeline.feed_input(name, values)
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # DALI calls it invalid after an error
            raise ValueError(f"DALI cannot decode: {_reason(error)}") from error
        return output

    def array(self, tensor: Any) -> Any:
        """A DALI tensor as one of torch, or of NumPy where it is in the CPU's memory; no copy."""
        if self._gpu is None:
            return np.asarray(tensor)
        import torch  # only where the crops stay on the GPU; decode workers do without

        return torch.from_dlpack(tensor)

    def _build(self) -> Any:
        pipeline = self._definition(
            on_gpu=self._gpu is not None,
            **self._arguments,
            batch_size=self._max_samples,
            num_threads=1 if self._gpu is None else 4,
            device_id=self._gpu,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # its outputs need no copy
        )
        pipeline.build()
        return pipeline


@pipeline_def
def _slice_pipeline(on_gpu: bool) -> Any:
    return _decode_jpegs(on_gpu)


@pipeline_def(enable_conditionals=True)
def _jpeg_pipeline(on_gpu: bool, size: int) -> Any:
    return _resize(_decode_jpegs(on_gpu), size)


@pipeline_def(enable_conditionals=True)
def _video_pipeline(on_gpu: bool, size: int) -> Any:
    wanted = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
    frames = fn.decoders.video(_encoded(), frames=wanted, pad_mode="none", device="mixed" if on_gpu else "cpu")
    return _resize(fn.slice(frames, *_box(), axes=[1, 2]), size)


def _decode_jpegs(on_gpu: bool) -> Any:
    return fn.decoders.image_slice(
        _encoded(),
        *_box(),
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        device="mixed" if on_gpu else "cpu",
    )


def _encoded() -> Any:
    return fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)


def _box() -> tuple[Any, Any]:
    """Anchor (top, left) and shape (height, width)."""
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    return anchor, fn.external_source(name="shape", dtype=types.INT32, ndim=1)


def _resize(images: Any, size: int) -> Any:
    if fn.external_source(name="shrunk", dtype=types.BOOL, ndim=0):
        images = fn.resize(images, size=[size, size], antialias=True)
    else:
        images = fn.resize(images, size=[size, size], antialias=False)
    return fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's report that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if line.startswith("encountered")), -1)
    return (lines[at + 1] if at + 1 < len(lines) else lines[-1])[:300] if lines else "unknown error"
