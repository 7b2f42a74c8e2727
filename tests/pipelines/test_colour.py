"""Pictures as they are stored, computed by hand: matrix, range, depth, turning. Whole files: `test_encode.py`."""

from __future__ import annotations

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from pipelines.colour import STORED_FORMAT, Converter
from pipelines.video import Orientation, plane_view

SIZE = (32, 24)
UPRIGHT = Orientation()
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # of red and blue
TAGS = {"bt601": 5, "bt709": 1, "bt2020": 9}


def picture(planes: list[NDArray[np.generic]], pix_fmt: str, matrix: int = 2, full: bool = False) -> av.VideoFrame:
    """A decoded picture [H, W] of given planes; `matrix` is AVColorSpace, 2 where the file does not say."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        plane_view(plane, values.dtype.type)[:] = values
    frame.colorspace, frame.color_range = matrix, ColorRange.JPEG if full else ColorRange.MPEG
    return frame


def even(
    colour: tuple[int, int, int], pix_fmt: str, size: tuple[int, int] = SIZE, *, matrix: int = 2, full: bool = False
) -> av.VideoFrame:
    """A picture of one Y, Cb, Cr, given in 8 bits."""
    kind, unit = (np.uint16, 4) if "10le" in pix_fmt else (np.uint8, 1)
    width, height = size
    chroma = (height // 2, width // 2) if "420" in pix_fmt else (height, width)
    shapes = ((height, width), chroma, chroma)
    planes = [np.full(shape, unit * value, kind) for shape, value in zip(shapes, colour, strict=True)]
    return picture(planes, pix_fmt, matrix, full)


def stored(frame: av.VideoFrame, size: tuple[int, int] = SIZE, orientation: Orientation = UPRIGHT) -> av.VideoFrame:
    return Converter(frame, size, orientation).convert(frame)


def values(frame: av.VideoFrame) -> list[int]:
    """Y, Cb, Cr of a stored picture of one colour."""
    planes = [plane_view(plane) for plane in frame.planes]
    assert all(np.ptp(plane) == 0 for plane in planes)
    return [int(plane[0, 0]) for plane in planes]


def by_hand(y: float, u: float, v: float, matrix: str, full: bool) -> list[float]:
    """Full-range Y, Cb, Cr of BT.601, by way of R'G'B'."""
    red, blue = WEIGHTS[matrix]
    luma, cb, cr = (
        (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, *((u - 128) / 224, (v - 128) / 224))
    )
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    grey = 0.299 * r + 0.587 * g + 0.114 * b
    return [255 * grey, 128 + 255 * (b - grey) / 1.772, 128 + 255 * (r - grey) / 1.402]


@pytest.mark.parametrize(("given", "expected"), [(16, 0), (235, 255), (126, 128), (0, 0), (255, 255), (17, 1)])
def test_limited_greys_become_full_ones_and_are_clipped(given: int, expected: int) -> None:
    assert values(stored(even((given, 128, 128), "yuv420p"))) == [expected, 128, 128]


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_a_colour_of_any_matrix_is_the_same_colour_of_ours(matrix: str, full: bool, bits: int) -> None:
    pix_fmt = "yuv420p" if bits == 8 else "yuv444p10le"
    for colour in ((90, 110, 170), (150, 140, 100), (60, 128, 128)):
        frame = even(colour, pix_fmt, matrix=TAGS[matrix], full=full)
        np.testing.assert_allclose(values(stored(frame)), by_hand(*colour, matrix, full), atol=0.6)


@pytest.mark.parametrize("matrix", [2, 4, 5, 6, 7])
def test_a_matrix_that_is_not_said_or_not_known_counts_as_bt601(matrix: int) -> None:
    expected = by_hand(90, 110, 170, "bt601", False)
    np.testing.assert_allclose(values(stored(even((90, 110, 170), "yuv420p", matrix=matrix))), expected, atol=0.51)


@pytest.mark.parametrize("pix_fmt", ["rgb24", "bgra", "gbrp", "rgb48le", "pal8", "gray"])
def test_formats_without_chroma_planes(pix_fmt: str) -> None:
    r, g, b = (40, 40, 40) if pix_fmt == "gray" else (200, 80, 40)
    pixels = np.full((24, 32, 3), (r, g, b), np.uint8)
    if pix_fmt == "pal8":
        frame = av.VideoFrame(32, 24, "pal8")
        palette = np.zeros((256, 4), np.uint8)
        palette[7] = b, g, r, 255
        frame.planes[0].update(bytes([7]) * frame.planes[0].buffer_size)
        frame.planes[1].update(palette.tobytes())
    else:
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pix_fmt)
        frame.color_range = ColorRange.UNSPECIFIED
    grey = 0.299 * r + 0.587 * g + 0.114 * b
    expected = [grey, 128 + (b - grey) / 1.772, 128 + (r - grey) / 1.402]
    np.testing.assert_allclose(values(stored(frame)), expected, atol=1)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_what_is_stored_already_is_only_turned(turns: int, mirrored: bool) -> None:
    random = np.random.default_rng(0)
    planes = [random.integers(60, 200, shape, np.uint8) for shape in ((24, 32), (12, 16), (12, 16))]
    orientation = Orientation(turns, mirrored)
    frame = picture(planes, STORED_FORMAT, TAGS["bt601"], full=True)
    converter = Converter(frame, orientation.upright_size(*SIZE), orientation)
    converter._chroma_is_left = False  # noise does not show where chroma stands
    upright = converter.convert(frame)
    assert (upright.format.name, (upright.width, upright.height)) == (STORED_FORMAT, orientation.upright_size(*SIZE))
    for plane, given in zip(upright.planes, planes, strict=True):
        assert np.array_equal(plane_view(plane), orientation.apply(given))


@pytest.mark.parametrize(
    "kinds",
    [
        [("yuv420p", (64, 48)), ("yuv420p", SIZE), ("yuv420p", (16, 16)), ("yuv420p", (1024, 2))],
        [("yuv444p", (99, 33)), ("yuv444p10le", SIZE), ("yuv420p", (64, 48))],
        [("yuv420p", (64, 48)), ("yuv420p10le", (16, 16)), ("yuv444p", SIZE)],
    ],
)
def test_one_converter_takes_pictures_of_several_sizes_and_formats(kinds: list[tuple[str, tuple[int, int]]]) -> None:
    """As a stream may have them; each comes out in the stored size, a picture of its own."""
    colour = (90, 110, 170)
    frames = [even(colour, kind, size) for kind, size in kinds]
    converter = Converter(frames[0], SIZE, UPRIGHT)
    made = [converter.convert(frame) for frame in frames]
    assert {(frame.width, frame.height, frame.format.name) for frame in made} == {(*SIZE, STORED_FORMAT)}
    for frame in made:
        np.testing.assert_allclose(values(frame), by_hand(*colour, "bt601", False), atol=0.51)
    assert [values(frame) for frame in frames if frame.format.name == "yuv420p"][-1] == list(colour), "left as it was"


def test_shrinking_averages() -> None:
    """Stripes a pixel wide are gone at a quarter of the size, and do not come back as others."""
    luma = np.full((96, 128), 36, np.uint8)
    luma[:, ::2] = 216
    chroma = np.full((48, 64), 128, np.uint8)
    made = plane_view(stored(picture([luma, chroma, chroma], "yuv420p")).planes[0]).astype(int)
    assert made.shape == (24, 32)
    np.testing.assert_allclose(made[:, 2:-2], (126 - 16) * 255 / 219, atol=2)
