"""From pictures as they are decoded to pictures as they are stored: scaled, upright, in one colour space.

A module of its own because OpenCV takes as long to load as all the rest of the packer, and copying videos needs none.
Cost on one core: 340 × 256 0.1 ms a frame, from 1080p 1.6 ms, most of it swscale's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipelines.video import Orientation, plane_view

STORED_FORMAT = "yuvj420p"
_USUAL_FORMATS = ("yuv420p", "yuvj420p")
_SCALE = Interpolation.BICUBIC  # widens its filter when it shrinks: nothing aliases; ACCURATE_RND costs a frame's
# conversion again and moves no mean by more than 0.04
_LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # of red and blue
_MATRIX_OF_TAG = {1: "bt709", 9: "bt2020", 10: "bt2020"}  # AVColorSpace; others, and no tag, count as BT.601
_LEFT_TO_CENTRE = np.array([[-9, 111, 29, -3]], np.float32) / 128  # Catmull-Rom a quarter of a sample to the right


class Converter:
    """Turns decoded pictures into stored ones: scaled, upright, 8-bit 4:2:0, full-range BT.601, chroma centred.

    swscale scales. Matrix, range and chroma's place are made here, each value rounded once: swscale rounds chroma down
    (means off by up to 1.5) and places it left, where JPEG decoders expect it centred (1 dB). The usual source, 8-bit
    4:2:0, keeps its half-size chroma all the way; any other goes through 16-bit 4:4:4.
    """

    def __init__(self, first: av.VideoFrame, size: tuple[int, int], orientation: Orientation) -> None:
        cv2.setNumThreads(1)  # parallelism is over videos
        self._size = size
        self._orientation = orientation
        self._scalers = VideoReformatter(), VideoReformatter()  # kept: setting one up costs as much as a frame
        self._chroma_is_left = False
        if first.format.name in _USUAL_FORMATS:
            self._chroma_is_left = self._finds_chroma_left(first)

    def convert(self, picture: av.VideoFrame) -> av.VideoFrame:
        """A new picture in `STORED_FORMAT`."""
        usual = picture.format.name in _USUAL_FORMATS
        left = usual and self._chroma_is_left  # what was halved by us is centred
        y, u, v = self._scaled(picture, picture.format.name) if usual else self._half_size_chroma(picture)
        matrix, offset = _matrix_to_bt601(*_colours(picture), 1 if usual else 256)
        stored = av.VideoFrame(*self._size, STORED_FORMAT)
        planes = [plane_view(plane) for plane in stored.planes]
        turned = self._orientation != Orientation()
        luma, cb, cr = [np.empty(plane.shape, np.uint8) for plane in (y, u, v)] if turned else planes
        if not any(matrix[0][1:]):  # the source's matrix is ours: luma needs luma alone, Cb Cb, and Cr Cr
            cv2.addWeighted(y, matrix[0][0], y, 0, offset[0], luma, cv2.CV_8U)
            for plane, row, target in ((u, 1, cb), (v, 2, cr)):
                _move_chroma(plane, left, matrix[row][row], offset[row], target)
        else:
            u, v = (_move_chroma(plane, left) for plane in (u, v))
            tint = cv2.addWeighted(u, matrix[0][1], v, matrix[0][2], offset[0], dtype=cv2.CV_32F)
            tint = cv2.resize(tint, luma.shape[::-1], interpolation=cv2.INTER_LINEAR)
            cv2.addWeighted(y, matrix[0][0], tint, 1, 0, luma, cv2.CV_8U)
            for row, target in ((1, cb), (2, cr)):
                cv2.addWeighted(u, matrix[row][1], v, matrix[row][2], offset[row], target, cv2.CV_8U)
        if turned:
            for plane, upright in zip((luma, cb, cr), planes, strict=True):
                upright[:] = self._orientation.apply(plane)
        return stored

    def _half_size_chroma(self, picture: av.VideoFrame) -> list[NDArray[Any]]:
        """Y [H, W], Cb and Cr [H / 2, W / 2], centred, in 16 bits and of any format."""
        y, u, v = self._scaled(picture, "yuv444p16le")
        half = (y.shape[1] // 2, y.shape[0] // 2)
        return [y, *(cv2.resize(plane, half, interpolation=cv2.INTER_AREA) for plane in (u, v))]

    def _scaled(self, picture: av.VideoFrame, pix_fmt: str) -> list[NDArray[Any]]:
        width, height = self._orientation.upright_size(*self._size)
        is_rgb = picture.format.is_rgb
        wide = pix_fmt == "yuv444p16le"
        scaled = self._scalers[wide].reformat(
            picture,
            width,
            height,
            pix_fmt,
            interpolation=_SCALE,
            threads=1,
            dst_colorspace=Colorspace.ITU601 if is_rgb else None,
            dst_color_range=ColorRange.MPEG if is_rgb else None,
        )
        return [plane_view(plane, np.uint16 if wide else np.uint8) for plane in scaled.planes]

    def _finds_chroma_left(self, picture: av.VideoFrame) -> bool:
        """Whether the source's chroma stands above its left luma pixel (H.264, HEVC), not between two (JPEG, MPEG-1).

        PyAV does not tell, but swscale knows: it is asked for chroma at full size.
        """
        planes = self._scaled(picture, picture.format.name)[1:]
        centred = self._half_size_chroma(picture)[1:]
        errors = []
        for left in (True, False):
            moved = [_move_chroma(plane, left) for plane in planes]
            errors.append(sum(float(np.abs(a - b / 256).mean()) for a, b in zip(moved, centred, strict=True)))
        return errors[0] <= errors[1]


def _move_chroma(
    plane: NDArray[Any], left: bool, gain: float = 1.0, offset: float = 0.0, target: NDArray[np.uint8] | None = None
) -> NDArray[Any]:
    """Chroma in its stored place, of a plane where it stands `left` or is centred already, times `gain` plus `offset`;
    in 8 bits where a `target` takes it, else float."""
    depth = cv2.CV_32F if target is None else cv2.CV_8U
    if left:
        border, kernel = cv2.BORDER_REPLICATE, _LEFT_TO_CENTRE * gain
        moved = cv2.filter2D(plane, depth, kernel, target, anchor=(1, 0), delta=offset, borderType=border)
    else:
        moved = cv2.addWeighted(plane, gain, plane, 0, offset, target, depth)
    return cast(NDArray[Any], moved)


def _colours(picture: av.VideoFrame) -> tuple[str, bool]:
    """Matrix and full range of what `Converter._scaled` gives of a picture."""
    if picture.format.is_rgb:
        return "bt601", False
    full = picture.color_range == ColorRange.JPEG or picture.format.name.startswith("yuvj")
    return _MATRIX_OF_TAG.get(int(picture.colorspace), "bt601"), full


@lru_cache
def _matrix_to_bt601(source: str, source_full: bool, unit: int) -> tuple[list[list[float]], list[float]]:
    """[3, 3] and [3] that take Y, Cb, Cr of `source`, in steps of 1 / `unit`, to 8-bit full-range ones of BT.601."""

    def to_rgb(name: str) -> NDArray[np.float64]:
        red, blue = _LUMA_WEIGHTS[name]
        green = 1 - red - blue
        of_cb, of_cr = 2 * (1 - blue), 2 * (1 - red)
        return np.array([[1, 0, of_cr], [1, -blue * of_cb / green, -red * of_cr / green], [1, of_cb, 0]])

    source_span = np.array([255, 255, 255] if source_full else [219, 224, 224])  # 8-bit steps per unit
    source_zero = np.array([0 if source_full else 16, 128, 128])
    matrix = np.linalg.solve(to_rgb("bt601"), to_rgb(source)) * 255 / source_span
    matrix[np.abs(matrix) < 1e-9] = 0
    offset = np.array([0, 128, 128]) - matrix @ source_zero
    return (matrix / unit).tolist(), offset.tolist()
