"""DALI: what it decodes, and on CUDA resizes and flips, against PIL and the CPU path."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.dali import JpegCropper, JpegSlicer
from pipelines.decode import resize_into
from pipelines.encode import FrameChoice, encode_video
from tests.sets import packets
from tests.videos import write_noise, write_video


def stored_jpegs(tmp_path: Path, kind: str) -> list[bytes]:
    """The packets of a video in the jpeg profile."""
    path = tmp_path / f"{kind}.mp4"
    if kind == "noise":
        path.write_bytes(write_noise(tmp_path, "mp4"))
    else:
        write_video(path, 12, (90, 64))
    return packets(encode_video(path, "jpeg", choice=FrameChoice()))


def by_pil(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def on_cpu(jpeg: bytes, box: tuple[int, int, int, int], flip: bool, size: int) -> NDArray[np.int16]:
    """The crop that decode workers make."""
    (image,) = JpegSlicer(1).slice([jpeg], [box])
    assert isinstance(image, np.ndarray)
    target = np.empty((size, size, 3), np.uint8)
    resize_into(image, target)
    return (target[:, ::-1] if flip else target).astype(np.int16)


@pytest.mark.parametrize("kind", ["noise", "numbers"])
def test_decodes_what_pil_decodes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    jpegs = stored_jpegs(tmp_path, kind)
    random = np.random.default_rng(0)
    height, width = by_pil(jpegs[0]).shape[:2]
    boxes = []
    for _ in jpegs:  # at any place, even or odd, of any size
        w, h = random.integers(1, width + 1), random.integers(1, height + 1)
        boxes.append((int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1)), int(w), int(h)))
    boxes[0] = (0, 0, width, height)
    slices = JpegSlicer(len(jpegs)).slice(jpegs, boxes)
    for image, jpeg, (left, top, w, h) in zip(slices, jpegs, boxes, strict=True):
        assert np.array_equal(image, by_pil(jpeg)[top : top + h, left : left + w])


def test_a_bad_jpeg_costs_only_itself(tmp_path: Path) -> None:
    jpegs = stored_jpegs(tmp_path, "numbers")[:3]
    boxes = [(3, 5, 40, 59)] * 3  # to the last row: what is missing below a box is not missed
    slicer = JpegSlicer(3)
    good = slicer.slice(jpegs, boxes)
    for bad in (b"no image", jpegs[1][:40], jpegs[1][:-300], jpegs[1][:-2], b""):
        first, second, third = slicer.slice([jpegs[0], bad, jpegs[2]], boxes)
        assert isinstance(second, ValueError) and "\n" not in str(second)
        assert "DALI cannot decode" in str(second)
        assert np.array_equal(first, good[0]) and np.array_equal(third, good[2])
    outside = slicer.slice(jpegs, [boxes[0], (60, 5, 40, 30), boxes[2]])
    assert "not valid for image dimensions" in str(outside[1]) and np.array_equal(outside[2], good[2])


@pytest.mark.parametrize("gpu", [None, pytest.param(0, marks=pytest.mark.gpu)])
def test_the_graph_for_cuda_gives_what_the_cpu_path_gives(tmp_path: Path, gpu: int | None) -> None:
    """Without a GPU the graph runs on the CPU: the same operators, but libjpeg in place of nvJPEG."""
    jpegs = stored_jpegs(tmp_path, "numbers")[:6]
    boxes = [(3, 5, 70, 50), (0, 0, 90, 64), (11, 2, 33, 61), (0, 0, 90, 64), (20, 20, 17, 13), (1, 1, 48, 48)]
    flips = [False, True, True, False, False, True]
    tolerance, largest = (0.3, 2) if gpu is None else (1.0, 24)
    for size in (24, 48):
        crops = JpegCropper(size, 6, gpu=gpu).crop(jpegs, boxes, flips)
        crops = (crops if gpu is None else crops.cpu().numpy()).astype(np.int16)
        assert crops.shape == (6, size, size, 3)
        for crop, jpeg, box, flip in zip(crops, jpegs, boxes, flips, strict=True):
            difference = np.abs(crop - on_cpu(jpeg, box, flip, size))
            averaged = max(box[2:]) > 2 * size  # by area there, by a triangle here
            assert difference.mean() < (8 if averaged else tolerance)
            assert averaged or difference.max() <= largest


def test_a_bad_jpeg_is_an_error_of_the_cropper_and_the_next_call_works(tmp_path: Path) -> None:
    jpegs = stored_jpegs(tmp_path, "numbers")[:2]
    cropper = JpegCropper(48, 2, gpu=None)
    before = cropper.crop(jpegs, [(0, 0, 48, 48)] * 2, [False, True]).copy()
    with pytest.raises(ValueError, match="DALI cannot decode"):
        cropper.crop([jpegs[0], b"no image"], [(0, 0, 48, 48)] * 2, [False, True])
    assert np.array_equal(cropper.crop(jpegs, [(0, 0, 48, 48)] * 2, [False, True]), before)
