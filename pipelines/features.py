"""Sets of frame features: what a frozen image model makes of every stored frame, computed once and read ever after.

    KEY.npy     float16 [n, D] in NumPy's format 1.0: a row for each stored frame; beside it KEY.cls and KEY.json
    index       as of videos: where each row lies, its checksum, the number of its frame in the source
    manifest    profile `features`, and which image model, with which preprocessing, made them of which set

Only methods whose image model is frozen, and that read nothing of it but one vector a frame, can train from them. Keys,
labels, splits and frame numbers are those of the set of videos, so a clip has the frames that it would have there, in
the same order of samples; crop and flip are frozen, and whatever changes pixels is refused. The loader reads just the
rows that a clip uses (of 512 features: 1 kB each), in the same worker processes, which for this load no decoder.

Nothing of an array is believed: rows come by the index, each is checked against its checksum and for NaN, and the
header, which the index holds too, must be the one that NumPy writes for float16 [n, D]; so nothing is parsed.

`extract.py` makes such sets.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.plan import PIXEL_CHANGES, ClipOptions
from pipelines.read import ClipRequest, Packet, ShardReader
from pipelines.shards import EncodedVideo, FeatureSource, FrameTable, Sample, checksum

DTYPE = np.dtype("<f2")
_EXPONENT = np.uint16(0x7C00)  # all ones in an infinite number and in NaN
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': False, 'shape': \(\d{1,9}, (\d{1,9})\), \} *\n", re.DOTALL
)


def store_features(features: NDArray[np.float16], sample: Sample, rows: slice) -> EncodedVideo:
    """The features [n, D] of those stored frames of a video, ready to be written."""
    num, width = features.shape
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(features, DTYPE), version=(1, 0), allow_pickle=False)
    data = sink.getvalue()
    row_bytes = width * DTYPE.itemsize
    start = len(data) - num * row_bytes
    offsets = start + row_bytes * np.arange(num, dtype=np.int64)
    frames = FrameTable(
        offset=offsets,
        num_bytes=np.full(num, row_bytes, np.int32),
        checksum=np.array([checksum(data[at : at + row_bytes]) for at in offsets.tolist()], np.uint64),
        source_frame=sample.frames.source_frame[rows],
        keyframe=np.ones(num, np.uint8),
    )
    return EncodedVideo(
        data=data,
        suffix="npy",
        frames=frames,
        width=width,
        height=1,
        source_frames=sample.source_frames,
        fps=sample.fps,
        extradata=data[:start],
    )


class FeatureDecoder:
    """Reads clips of a feature set: what `ClipDecoder` is to videos. Holds open files; not for several threads."""

    def __init__(self, width: int, *, on_progress: Callable[[], None]) -> None:
        """Of `width` features a frame. `on_progress` is called after every clip."""
        self._width = width
        self._reader = ShardReader()
        self._on_progress = on_progress

    def decode_into(self, requests: Sequence[ClipRequest], rows: NDArray[np.uint8]) -> list[tuple[int, str]]:
        """Reads requests[i] into rows[i], contiguous bytes of any shape that hold float16 [T, D].

        Returns (i, reason) of the clips that failed; their rows hold anything.
        """
        failures = []
        for i, request in enumerate(requests):
            try:
                features = self._read(request)
                features.take(request.order, axis=0, out=rows[i].reshape(-1).view(DTYPE).reshape(-1, self._width))
            except (ValueError, OSError) as error:
                failures.append((i, f"{type(error).__name__}: {error}"))
            self._on_progress()
        return failures

    def _read(self, request: ClipRequest) -> NDArray[np.float16]:
        """The distinct rows [k, D] of a clip."""
        check_header(request.extradata, self._width)
        return _read_rows(self._reader, request.shard, request.packets, self._width)


def read_video(sample: Sample, reader: ShardReader) -> NDArray[np.float16]:
    """All features of one video, float16 [n, D]; `sample.frames.source_frame` says of which of its frames.

    Raises ValueError where the stored bytes are not those that were written, or are no features.
    """
    check_header(sample.extradata, sample.width)
    frames = sample.frames
    columns = ((sample.video_offset + frames.offset).tolist(), frames.num_bytes.tolist(), frames.checksum.tolist())
    return _read_rows(reader, sample.shard, list(zip(*columns, strict=True)), sample.width)


def _read_rows(reader: ShardReader, shard: Path, packets: Sequence[Packet], width: int) -> NDArray[np.float16]:
    row_bytes = width * DTYPE.itemsize
    for _, num_bytes, _ in packets:
        if num_bytes != row_bytes:
            raise ValueError(f"a row of {num_bytes} bytes; {width} features of a frame in float16 are {row_bytes}")
    data = b"".join(reader.packets(shard, packets))
    if (np.frombuffer(data, np.uint16) & _EXPONENT == _EXPONENT).any():
        raise ValueError("features that are no finite numbers")
    return np.frombuffer(data, DTYPE).reshape(-1, width)


def check_header(header: bytes, width: int) -> None:
    """ValueError unless this is what NumPy writes before an array of float16 [n, width] in its format 1.0."""
    match = _HEADER.fullmatch(header)
    if match is None or int(match[1]) != width:
        text = header[:200].decode("ascii", "replace").strip()
        raise ValueError(
            f"the array's header is {text!r}; allowed is one of float16 [n, {width}] in NumPy's format 1.0"
        )


def check_options(options: ClipOptions, features: FeatureSource) -> None:
    """ValueError, naming the key, where options ask for what only pixels can give."""
    for name, given in options.set_among(PIXEL_CHANGES):
        raise ValueError(
            f"data.{name} = {given} changes pixels, and data.shards holds features that {features.model} made of "
            "frames: leave it out, or train from the videos"
        )
    if options.test_crops != 1:
        raise ValueError(
            f"data.test_crops = {options.test_crops}; allowed is 1: data.shards holds features of one crop, of "
            f"{features.crop:g} of the short side"
        )


def check_image_model(features: FeatureSource, model: str, source: Mapping[str, Any], folder: Path) -> None:
    """ValueError, saying both, unless the features come from the image model of this name, of which `source` has other
    entries of `FeatureSource`."""
    wanted = {"model": model} | {name: tuple(v) if isinstance(v, list) else v for name, v in source.items()}
    for name, value in wanted.items():
        if (made := getattr(features, name)) != value:
            differs = "" if name == "model" else f" with {name} {made}"
            here = "" if name == "model" else f" with {name} {value}"
            raise ValueError(
                f"the features in {folder} were made by {features.model}{differs}, and the image model here is {model}"
                f"{here}: set model.name, model.pretrained and model.normalisation as they were, or extract the "
                "features with this one (tools/extract_features.py)"
            )


def describe(features: FeatureSource) -> str:
    """What is frozen in a set, for the log."""
    return (
        f"features of {features.model}, {features.width} a frame, made of {features.channels.upper()} frames at "
        f"{features.size} × {features.size}: crop and flip are those of the extraction (the middle, {features.crop:g} "
        "of the short side, not mirrored), whatever data.crop_scale, data.flip and data.eval_crop say"
    )
