"""What tools/bench_pipeline.py checks and counts before it measures speed: that all deliver the same, and at what cost.

That is how far our clips are from those of decord, how large and how good the stored videos are, and how many frames
everybody decodes for each one that is used.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from pipelines.dali import JpegSlicer
from pipelines.decode import IMAGES_A_RUN
from pipelines.plan import ClipPlan
from pipelines.read import ShardReader, request_clip
from pipelines.video import decode_file
from tools.estimate_profile import psnr
from tools.parts.bench_contenders import (
    PLANNED,
    Setup,
    crop_and_flip,
    decoded,
    decord_frames,
    our_batches,
    planned,
    planned_clips,
    sliced,
    source_of,
)
from tools.parts.bench_sources import keyframes_of, scaled

CHECKED_BATCHES = 2
SAME_DB = 30.0  # what one frame and another of the same video differ by is less than 25 dB


def same_clips(setup: Setup, profile: str, sampling: str) -> dict[str, Any]:
    """Compares the clips of our first batches, one by one, with what (a) makes of the same frames, box and flip.

    Raises ValueError when they are not what was planned, or differ by more than storing costs.
    """
    expected = iter(planned(setup, profile, sampling, CHECKED_BATCHES))
    found: list[float] = []
    with closing(our_batches(profile, setup, sampling)) as batches:
        for batch in islice(batches, CHECKED_BATCHES):
            for ours, delivered in zip(batch.frames.numpy(), batch.plans, strict=True):
                sample, plan = next(expected)
                if delivered != plan:
                    raise ValueError(f"{profile}_{sampling}: a clip is {delivered}, planned is {plan}")
                used = sample.frames.source_frame[list(plan.stored)].tolist()
                images = decord_frames(source_of(setup, sample).read_bytes(), used)
                theirs = np.stack(crop_and_flip(images, (sample.width, sample.height), plan.box, plan.flip))
                if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                    kinds = f"{ours.dtype} {ours.shape}, decord's {theirs.dtype} {theirs.shape}"
                    raise ValueError(f"{profile}_{sampling}: a clip is {kinds}")
                found += map(psnr, ours, theirs)
    if min(found) < SAME_DB:
        raise ValueError(
            f"{profile}_{sampling}: a frame is only {min(found):.1f} dB like decord's; these are not the same clips"
        )
    return {"frames": len(found), "psnr_db": round(statistics.mean(found), 2), "lowest_db": round(min(found), 2)}


def stored_quality(setup: Setup) -> dict[str, dict[str, float]]:
    """Of each profile: bytes of its shards and PSNR of all its frames, beside the sources scaled alike."""
    quality: dict[str, dict[str, float]] = {}
    reader = ShardReader()
    for profile in setup.profiles:
        shards = setup.shards(profile)
        decibels, ratios, source_bytes = [], [], 0
        for sample in (shards[i] for i in range(len(shards))):
            data, size = source_of(setup, sample).read_bytes(), (sample.width, sample.height)
            every = ClipPlan(sample.sample_id, 0, (), tuple(range(len(sample.frames))), (0, 0, *size), False)
            request = request_clip(sample, every, profile)
            clip = [(request, reader.packets(request.shard, request.packets))]
            stored = sliced(clip, JpegSlicer(IMAGES_A_RUN)) if profile == "jpeg" else decoded(clip)
            source = decode_file(data, sample.frames.source_frame.tolist())
            pairs = zip(stored, source, strict=True)
            decibels.append(statistics.mean(psnr(a, scaled(b, size)) for a, b in pairs))
            source_bytes += len(data)
            ratios.append(sample.video_bytes / len(data))
        quality[profile] = {
            "bytes_ratio": round(sum(shard.bytes for shard in shards.shards) / source_bytes, 3),
            "mean_of_bytes_ratios": round(statistics.mean(ratios), 3),
            "psnr_db": round(statistics.mean(decibels), 2),
            "lowest_psnr_db": round(min(decibels), 2),
        }
    return quality


def frames_decoded(setup: Setup, samplings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Frames decoded per frame used: sampling → contender, counted from the plans.

    Ours are the packets of the request. decord and torchcodec decode from the last keyframe before a wanted frame, or
    on from the last one if that is nearer; PyAV reads from the beginning to the last wanted frame.
    """
    counts: dict[str, dict[str, float]] = {}
    for sampling in samplings:
        clips = planned_clips(setup, sampling)
        keyframes = {source: keyframes_of(source) for source in {clip.source for clip in clips}}
        used = sum(len(set(clip.frames)) for clip in clips)
        seeking = sum(decoded_by_seeking(keyframes[clip.source], clip.frames) for clip in clips) / used
        reading = sum(max(clip.frames) + 1 for clip in clips) / used
        counts[sampling] = {"decord": seeking, "pyav": reading, "torchcodec": seeking, "webdataset": reading}
        for profile in setup.profiles:
            requests = [request_clip(*pair, profile) for pair in planned(setup, profile, sampling, PLANNED)]
            ratio = sum(len(r.packets) for r in requests) / sum(len(r.wanted) for r in requests)
            counts[sampling] |= {f"ours_{profile}": ratio, f"bare_{profile}": ratio}
    return counts


def decoded_by_seeking(keyframes: Sequence[int], wanted: Sequence[int]) -> int:
    """How many frames are decoded on the way through the wanted ones."""
    total, at = 0, 0
    for frame in sorted(set(wanted)):
        at = max([at, *(key for key in keyframes if key <= frame)])
        total += frame + 1 - at
        at = frame + 1
    return total
