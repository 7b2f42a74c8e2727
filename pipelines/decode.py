"""Requests to pixels: the bytes of a clip's wanted frames, decoded, cropped, resized and flipped.

Each profile decodes no more than it must: `jpeg` the wanted frames alone, `h264` and `hevc` from each wanted frame's
keyframe to it, `copy` and `file` the file up to the last wanted frame, once for clips in a row that are of one video. A
frame wanted twice is decoded once.

On the CPU, DALI decodes JPEGs inside the crop box and FFmpeg (PyAV) the rest; OpenCV resizes straight into the place
where the clip is wanted. Pixels of a box that shrinks to less than half are averaged, all others interpolated
linearly, as in the published pipelines (MMCV's resize is OpenCV's); half-pixel geometry throughout. H.264 and HEVC
frames stay in their planes until they are cropped.

Milliseconds of CPU a frame, 340 × 256 stored, crops drawn as in training, 224 × 224 out: JPEG (19 kB) 0.30 to decode,
0.07 to resize; H.264 (13 kB) 0.43 to decode, 0.08 to RGB, 0.07 to resize.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.dali import Box, JpegCropper, JpegSlicer, VideoCropper, shrinks
from pipelines.mp4 import wrap_packets
from pipelines.read import FILE, ClipRequest, ShardReader
from pipelines.video import Yuv420, file_frames, packet_frames, stored_planes, to_rgb

IMAGES_A_RUN = 64  # of DALI: its 0.2 ms a run are then 1 % of the time
PIXELS_A_RUN = 2**24  # of the stored frames: bounds memory, and the time between two signs of life
_SOF = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}  # JPEG markers that say the size
_MAX_SEGMENTS = 64  # before it; ours has 6

Failure = tuple[int, str]
"""Position of the request, and why it failed."""


class ClipDecoder:
    """Decodes clips. Holds open files and a DALI pipeline; not for several threads."""

    def __init__(
        self,
        size: int,
        num_frames: int,
        *,
        gpu: int | None = None,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        """Clips of `num_frames` frames of `size` × `size` pixels. `gpu` is the number of a CUDA device that decodes
        (all profiles but copy), None for the CPU. `on_progress` is called after every image or frame decoded (on CUDA
        after every run)."""
        cv2.setNumThreads(1)  # parallelism is over processes
        self._reader = ShardReader()
        self._on_progress = on_progress or _nothing
        self._slicer = JpegSlicer(IMAGES_A_RUN)
        self._croppers = None if gpu is None else _Croppers(size, num_frames, gpu)

    def decode_into(self, requests: Sequence[ClipRequest], rows: Any) -> list[Failure]:
        """Decodes requests[i], all of one profile, into rows[i]: uint8 RGB [T, size, size, 3], each a contiguous NumPy
        array or (on CUDA) a torch tensor.

        Returns (i, reason) of the clips that failed; their rows hold anything.
        """
        if self._croppers is not None:
            return self._decode_on_gpu(requests, rows, self._croppers)
        if requests[0].profile == "jpeg":
            return self._decode_jpegs(requests, rows)
        if requests[0].profile in ("copy", FILE):
            return self._decode_files(requests, rows)
        failures = []
        for i, request in enumerate(requests):
            try:
                self._decode_packets(request, rows[i])
            except (ValueError, OSError) as error:
                failures.append((i, _reason(error)))
        return failures

    def _decode_jpegs(self, requests: Sequence[ClipRequest], rows: Any) -> list[Failure]:
        failures: dict[int, str] = {}
        for run in _runs(self._jpegs(requests, failures)):
            slices = self._slicer.slice([jpeg.data for jpeg in run], [jpeg.clip.box for jpeg in run])
            for jpeg, image in zip(run, slices, strict=True):
                if isinstance(image, ValueError):
                    failures.setdefault(jpeg.row, _reason(image))
                else:
                    _write(image, jpeg.clip, jpeg.k, rows[jpeg.row])
                self._on_progress()
        return sorted(failures.items())

    def _jpegs(self, requests: Sequence[ClipRequest], failures: dict[int, str]) -> Iterator[_Jpeg]:
        """Reads all that can be read; notes why the others cannot."""
        for row, request in enumerate(requests):
            try:
                packets = self._read_jpegs(request)
            except (ValueError, OSError) as error:
                failures[row] = _reason(error)
                continue
            for k, data in enumerate(packets):
                yield _Jpeg(row, request, k, data)

    def _read_jpegs(self, request: ClipRequest) -> list[memoryview]:
        packets = self._reader.packets(request.shard, request.packets)
        for data in packets:
            _check_size(jpeg_size(data), request)  # before memory is taken for it
        return packets

    def _decode_files(self, requests: Sequence[ClipRequest], rows: Any) -> list[Failure]:
        """Clips in a row that are of one video are decoded in one pass."""
        failures: list[Failure] = []
        same_video = attrgetter("shard", "packets", "width", "height")
        for _, members in groupby(range(len(requests)), lambda i: same_video(requests[i])):
            group = list(members)
            reached = -1  # the last frame that came out
            try:
                for reached, frame in self._frames_of_file([requests[i] for i in group]):
                    for i in group:
                        self._write_if_wanted(reached, frame, requests[i], rows[i])
            except (ValueError, OSError) as error:
                failures += [(i, _reason(error)) for i in group if requests[i].wanted[-1] > reached]
        return failures

    def _frames_of_file(self, requests: Sequence[ClipRequest]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number and pixels of each frame that a clip of one video wants."""
        first = requests[0]
        packets = self._reader.packets(first.shard, first.packets)
        source = first.shard if first.profile == FILE else bytes(packets[0])
        wanted = sorted(set().union(*(request.wanted for request in requests)))
        for number, frame in zip(wanted, file_frames(source, wanted, on_frame=self._on_progress), strict=True):
            _check_size((frame.shape[1], frame.shape[0]), first)
            yield number, frame

    def _write_if_wanted(self, number: int, frame: NDArray[np.uint8], request: ClipRequest, row: Any) -> None:
        if number in request.wanted:
            left, top, width, height = request.box
            _write(frame[top : top + height, left : left + width], request, request.wanted.index(number), row)

    def _decode_packets(self, request: ClipRequest, row: NDArray[np.uint8]) -> None:
        packets = self._reader.packets(request.shard, request.packets)
        left, top, width, height = request.box
        pictures = packet_frames(
            packets,
            request.extradata,
            request.wanted,
            codec=request.profile,
            size=(request.width, request.height),
            on_frame=self._on_progress,
        )
        for k, picture in enumerate(pictures):
            _check_size((picture.width, picture.height), request)
            planes = stored_planes(picture)
            if planes is not None:
                image = crop_to_rgb(planes, request.box)
            else:
                image = to_rgb(picture)[top : top + height, left : left + width]
            _write(image, request, k, row)

    def _decode_on_gpu(self, requests: Sequence[ClipRequest], rows: Any, croppers: _Croppers) -> list[Failure]:
        failures = []
        for start in range(0, len(requests), croppers.clips_a_run):
            group = range(start, min(start + croppers.clips_a_run, len(requests)))
            if self._crop_group(requests, rows, group, croppers) is None:
                continue
            for i in group:  # somebody failed: who?
                reason = self._crop_group(requests, rows, [i], croppers)
                if reason is not None:
                    failures.append((i, reason))
        return failures

    def _crop_group(
        self, requests: Sequence[ClipRequest], rows: Any, group: Sequence[int], croppers: _Croppers
    ) -> str | None:
        """Decodes some of the clips in one run of DALI; returns the reason if any of them fails."""
        crop = self._crop_jpegs if requests[0].profile == "jpeg" else self._crop_videos
        try:
            for i, frames in zip(group, crop([requests[i] for i in group], croppers), strict=True):
                rows[i] = frames[list(requests[i].order)]
            croppers.settle()
        except (ValueError, OSError) as error:
            return _reason(error)
        self._on_progress()
        return None

    def _crop_jpegs(self, clips: Sequence[ClipRequest], croppers: _Croppers) -> list[Any]:
        """The distinct frames of each clip."""
        jpegs = [self._read_jpegs(clip) for clip in clips]
        counted = [(clip, len(packets)) for clip, packets in zip(clips, jpegs, strict=True)]
        boxes = [clip.box for clip, count in counted for _ in range(count)]
        flips = [clip.flip for clip, count in counted for _ in range(count)]
        crops = croppers.jpeg.crop([data for packets in jpegs for data in packets], boxes, flips)
        ends = np.cumsum([count for _, count in counted]).tolist()
        return [crops[end - count : end] for end, (_, count) in zip(ends, counted, strict=True)]

    def _crop_videos(self, clips: Sequence[ClipRequest], croppers: _Croppers) -> list[Any]:
        videos = []
        for clip in clips:
            packets = self._reader.packets(clip.shard, clip.packets)
            size = clip.width, clip.height
            videos.append(wrap_packets(packets, clip.extradata, clip.profile, size))
        wanted, boxes, flips = zip(*((clip.wanted, clip.box, clip.flip) for clip in clips), strict=True)
        return croppers.video.crop(videos, wanted, boxes, flips)


class _Croppers:
    """What decodes on a CUDA device."""

    def __init__(self, size: int, num_frames: int, gpu: int | None) -> None:
        self._gpu = gpu
        self.clips_a_run = max(1, IMAGES_A_RUN // num_frames)
        self.jpeg = JpegCropper(size, self.clips_a_run * num_frames, gpu=gpu)
        self.video = VideoCropper(size, self.clips_a_run, gpu=gpu)

    def settle(self) -> None:
        """Waits until the crops were copied to where they are wanted: DALI takes their memory for its next run."""
        if self._gpu is not None:
            import torch  # decode workers do without

            torch.cuda.current_stream(self._gpu).synchronize()


@dataclass(frozen=True, slots=True)
class _Jpeg:
    """One image on its way: the k-th distinct frame of the clip for rows[row]."""

    row: int
    clip: ClipRequest
    k: int
    data: memoryview


def _runs(jpegs: Iterable[_Jpeg]) -> Iterator[list[_Jpeg]]:
    """Cuts a stream of images into what DALI takes at once."""
    run: list[_Jpeg] = []
    pixels = 0
    for jpeg in jpegs:
        run.append(jpeg)
        pixels += jpeg.clip.width * jpeg.clip.height
        if len(run) == IMAGES_A_RUN or pixels >= PIXELS_A_RUN:
            yield run
            run, pixels = [], 0
    if run:
        yield run


def _write(image: NDArray[np.uint8], request: ClipRequest, k: int, row: NDArray[np.uint8]) -> None:
    """Puts the k-th distinct frame, cropped, to all its places in the clip, resized and flipped."""
    first = request.order.index(k)
    target = row[first]
    resize_into(image, target)
    if request.flip:
        cv2.flip(target, 1, dst=target)
    if len(request.wanted) < len(request.order):
        for t in range(first + 1, len(request.order)):
            if request.order[t] == k:
                row[t] = target


def resize_into(image: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """Resizes [h, w, 3] into [S, S, 3]: linearly, or, where a side is more than halved, sides that shrink by area."""
    height, width = image.shape[:2]
    size = target.shape[0]
    if shrinks((0, 0, width, height), size):
        image = cv2.resize(image, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    cv2.resize(image, (size, size), dst=target, interpolation=cv2.INTER_LINEAR)


def crop_to_rgb(planes: Yuv420, box: Box) -> NDArray[np.uint8]:
    """A box of a stored frame as uint8 RGB [height, width, 3], within 2 of the same box of FFmpeg's RGB picture.

    The box may begin and end at odd pixels: chroma is enlarged to luma's grid with one sample around the box.
    """
    left, top, width, height = box
    x0, y0 = max(left // 2 - 1, 0), max(top // 2 - 1, 0)
    x1, y1 = (left + width + 1) // 2 + 1, (top + height + 1) // 2 + 1
    chroma = [plane[y0:y1, x0:x1] for plane in (planes.cr, planes.cb)]
    rows, columns = chroma[0].shape
    luma = np.ascontiguousarray(planes.y[2 * y0 : 2 * (y0 + rows), 2 * x0 : 2 * (x0 + columns)])  # else merge is slow
    cr, cb = (cv2.resize(plane, (2 * columns, 2 * rows), interpolation=cv2.INTER_LINEAR) for plane in chroma)
    rgb = cv2.cvtColor(cv2.merge((luma, cr, cb)), cv2.COLOR_YCrCb2RGB)
    return rgb[top - 2 * y0 : top - 2 * y0 + height, left - 2 * x0 : left - 2 * x0 + width]


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height as a JPEG's header says. ValueError where the bytes are no JPEG."""
    if data[:2] == b"\xff\xd8":
        at = 2
        for _ in range(_MAX_SEGMENTS):
            if at + 9 > len(data):
                break
            marker, length = struct.unpack_from(">HH", data, at)
            if marker in _SOF:
                height, width = struct.unpack_from(">HH", data, at + 5)
                return width, height
            if marker < 0xFFC0:
                break
            at += 2 + length
    raise ValueError("not a JPEG")


def _check_size(found: tuple[int, int], request: ClipRequest) -> None:
    if found != (request.width, request.height):
        raise ValueError(f"frames are {found[0]}x{found[1]}, the index says {request.width}x{request.height}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _nothing() -> None:
    pass
