"""Plans to pixels: the bytes of a clip's wanted frames, decoded, cropped, resized and flipped.

Each profile decodes no more than it must: `jpeg` the wanted frames alone, `h264` from the last keyframe before the
first wanted frame to the last wanted one, `copy` the file up to the last wanted frame. A frame wanted twice is decoded
once. JPEGs go to DALI as bytes; what only FFmpeg can decode goes through the same executor as frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dali import CropExecutor
from pipelines.plan import ClipPlan
from pipelines.read import ShardReader
from pipelines.shards import Sample, ShardSet
from pipelines.video import decode_file, decode_packets

IMAGES_A_RUN = 256  # images the executor works on at once: enough to hide its 0.3 ms a run


class ClipDecoder:
    """Decodes planned clips of one shard set. Holds open files and an executor; not for several threads."""

    def __init__(self, shards: ShardSet, size: int, num_frames: int, *, gpu: int | None = None) -> None:
        self._shards = shards
        self._reader = ShardReader()
        self._executor = CropExecutor(size, gpu=gpu, max_images=max(IMAGES_A_RUN, num_frames))
        whole_videos = shards.profile == "copy"  # source-sized frames: hold those of one clip at a time
        self._clips_a_run = 1 if whole_videos else max(1, IMAGES_A_RUN // num_frames)

    def decode_into(self, plans: Sequence[ClipPlan], rows: Any) -> list[tuple[int, str]]:
        """Decodes plans[i] into rows[i], uint8 RGB [T, size, size, 3], a NumPy array or (on CUDA) a torch tensor.

        Returns (i, reason) of the clips that failed; their rows hold anything.
        """
        failures = []
        for start in range(0, len(plans), self._clips_a_run):
            group = range(start, min(start + self._clips_a_run, len(plans)))
            if self._decode_group(plans, rows, group) is None:
                continue
            for i in group:  # somebody failed: who?
                reason = self._decode_group(plans, rows, [i])
                if reason is not None:
                    failures.append((i, reason))
        return failures

    def _decode_group(self, plans: Sequence[ClipPlan], rows: Any, group: Sequence[int]) -> str | None:
        """Decodes some of the clips in one run of the executor; returns the reason if any of them fails."""
        try:
            images: list[Any] = []
            orders, boxes, flips = [], [], []
            for i in group:
                stored, order = np.unique(np.asarray(plans[i].stored), return_inverse=True)
                orders.append(order + len(images))
                images += self._images(self._shards[plans[i].sample_id], stored)
                boxes += [plans[i].box] * len(stored)
                flips += [plans[i].flip] * len(stored)
            crop = self._executor.crop_jpegs if self._shards.profile == "jpeg" else self._executor.crop_frames
            crops = crop(images, np.asarray(boxes, np.int32), np.asarray(flips))
            for i, order in zip(group, orders, strict=True):
                rows[i] = crops[order]
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _images(self, sample: Sample, stored: NDArray[np.int64]) -> Sequence[Any]:
        """The distinct frames of one clip, as the executor takes them: JPEG bytes, or [H, W, 3] arrays by FFmpeg."""
        if self._shards.profile == "jpeg":
            return self._reader.frames(sample, stored.tolist())
        if self._shards.profile == "copy":
            frames = decode_file(self._reader.video(sample), stored.tolist())
        else:
            keyframes = np.flatnonzero(sample.frames.keyframe[: stored[0] + 1])
            first = int(keyframes[-1]) if len(keyframes) else 0
            packets = self._reader.frames(sample, range(first, int(stored[-1]) + 1))
            frames = decode_packets(packets, sample.extradata, (stored - first).tolist())
        if frames.shape[1:3] != (sample.height, sample.width):
            found = f"{frames.shape[2]}x{frames.shape[1]}"
            raise ValueError(f"frames are {found}, the index says {sample.width}x{sample.height}")
        return list(frames)
