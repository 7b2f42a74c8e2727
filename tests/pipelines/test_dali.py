"""The executor: what DALI decodes, crops, resizes and flips, against PIL."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.dali import CropExecutor
from pipelines.encode import FrameChoice, encode_video
from tests.videos import write_noise, write_video


def stored_jpegs(tmp_path: Path, kind: str) -> list[bytes]:
    """The packets of a video in the jpeg profile."""
    path = tmp_path / f"{kind}.mp4"
    if kind == "noise":
        path.write_bytes(write_noise(tmp_path, "mp4"))
    else:
        write_video(path, 12, (90, 64))
    video = encode_video(path, "jpeg", choice=FrameChoice())
    table = video.frames
    return [video.data[o : o + n] for o, n in zip(table.offset.tolist(), table.num_bytes.tolist(), strict=True)]


def by_pil(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@pytest.mark.parametrize("kind", ["noise", "numbers"])
def test_decodes_what_pil_decodes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """A box of the output's size at any place, even or odd, is resized to itself."""
    jpegs = stored_jpegs(tmp_path, kind)
    random = np.random.default_rng(0)
    height, width = by_pil(jpegs[0]).shape[:2]
    corners = np.stack([random.integers(0, width - 47, len(jpegs)), random.integers(0, height - 47, len(jpegs))], 1)
    boxes = np.concatenate([corners, np.full((len(jpegs), 2), 48)], 1).astype(np.int32)
    flips = random.random(len(jpegs)) < 0.5
    crops = CropExecutor(48).crop_jpegs(jpegs, boxes, flips)
    assert crops.dtype == np.uint8 and crops.shape == (len(jpegs), 48, 48, 3)
    for crop, jpeg, (left, top, _, _), flip in zip(crops, jpegs, boxes, flips, strict=True):
        expected = by_pil(jpeg)[top : top + 48, left : left + 48]
        assert np.array_equal(crop, expected[:, ::-1] if flip else expected)


def test_frames_by_ffmpeg_go_through_the_same_crop_and_resize() -> None:
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (16, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(3)]
    boxes = np.array([[3, 5, 90, 70], [0, 0, 160, 128], [60, 40, 48, 48]], np.int32)
    flips = np.array([False, True, True])
    crops = CropExecutor(48).crop_frames(frames, boxes, flips)
    for crop, frame, (left, top, width, height), flip in zip(crops, frames, boxes, flips, strict=True):
        image = Image.fromarray(frame).crop((left, top, left + width, top + height))
        expected = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR), np.int16)
        assert np.abs(crop - (expected[:, ::-1] if flip else expected)).max() <= 2


def test_jpegs_and_their_decoded_frames_give_the_same_crops(tmp_path: Path) -> None:
    jpegs = stored_jpegs(tmp_path, "noise")[:4]
    boxes = np.array([[3, 5, 50, 40], [0, 0, 64, 64], [1, 1, 33, 61], [10, 0, 20, 30]], np.int32)
    flips = np.array([False, True, False, True])
    executor = CropExecutor(32)
    from_bytes = executor.crop_jpegs(jpegs, boxes, flips).copy()
    assert np.array_equal(executor.crop_frames([by_pil(jpeg) for jpeg in jpegs], boxes, flips), from_bytes)


def test_a_bad_jpeg_is_an_error_and_the_next_call_works(tmp_path: Path) -> None:
    jpegs = stored_jpegs(tmp_path, "numbers")[:2]
    boxes, flips = np.array([[0, 0, 48, 48]] * 2, np.int32), np.zeros(2, bool)
    executor = CropExecutor(48)
    before = executor.crop_jpegs(jpegs, boxes, flips).copy()
    for bad in (b"no image", jpegs[0][:40], b""):
        with pytest.raises(ValueError, match="DALI cannot decode") as error:
            executor.crop_jpegs([jpegs[0], bad], boxes, flips)
        assert "\n" not in str(error.value)
        assert np.array_equal(executor.crop_jpegs(jpegs, boxes, flips), before)


@pytest.mark.gpu
def test_gpu_equals_cpu(tmp_path: Path) -> None:
    """nvJPEG rounds otherwise than libjpeg: a few steps of 255."""
    jpegs = stored_jpegs(tmp_path, "numbers")
    boxes = np.tile(np.array([3, 5, 70, 50], np.int32), (len(jpegs), 1))
    flips = np.arange(len(jpegs)) % 2 == 0
    on_cpu = CropExecutor(48).crop_jpegs(jpegs, boxes, flips).astype(np.int16)
    on_gpu = CropExecutor(48, gpu=0).crop_jpegs(jpegs, boxes, flips).cpu().numpy()
    assert np.abs(on_gpu - on_cpu).mean() < 1.0 and np.abs(on_gpu - on_cpu).max() < 24
