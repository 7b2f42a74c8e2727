"""The contenders of tools/bench_pipeline.py: each turns a setup into an endless iterator of batches of the same clips.

What MMAction2 does is taken from its own files, mmaction/datasets/transforms/{loading,processing}.py of 1.x, and from
mmcv/image/{geometric,photometric}.py; float normalisation in the workers from its 0.x, which the official AIM uses.
"""

from __future__ import annotations

import io
import math
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipelines.dali import JpegSlicer
from pipelines.decode import IMAGES_A_RUN, crop_to_rgb, resize_into
from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, ClipPlan, Order, plan_clip, train_turns
from pipelines.read import ClipRequest, ShardReader, request_clip
from pipelines.shards import Sample, ShardSet
from pipelines.video import packet_frames, stored_planes
from tools.parts.bench_sources import HEIGHT, WIDTH

Frames = NDArray[np.uint8]
"""[T, H, W, 3] or one of them, RGB."""
Batches = Generator[Any, None, None]
"""Endless; what a batch is, is the contender's own."""

SIZE, BATCH = 224, 8
SAMPLINGS = {
    "dense16": ClipOptions(num_frames=16, sampling="dense", interval=4),
    "uniform8": ClipOptions(num_frames=8, sampling="uniform"),
}
MEAN, STD = np.array([[123.675, 116.28, 103.53]]), np.array([[58.395, 57.12, 57.375]])
PLANNED = 200  # batches, after which the rivals begin again
BARE_BATCHES = 10  # that every process of (e) decodes again and again
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setup:
    """What a contender is told."""

    work: Path
    profiles: tuple[str, ...]
    """The packed sets; the plans come from the first one's index."""
    workers: int
    seconds: float
    """To measure, at least."""
    start: int = 0
    """Batches to leave out at the beginning of the sequence: every round sees other clips."""

    def shards(self, profile: str) -> ShardSet:
        return ShardSet.open(self.work / profile, "train")


class Clip(NamedTuple):
    """What the rivals are to deliver."""

    source: Path
    frames: tuple[int, ...]
    box: tuple[int, int, int, int]
    """left, top, width, height in a frame of WIDTH × HEIGHT."""
    flip: bool


def source_of(setup: Setup, sample: Sample) -> Path:
    """The video that a packed sample was made of."""
    (path,) = (setup.work / "sources").glob(f"*/{sample.key.partition('_')[2]}.mp4")
    return path


def planned(setup: Setup, profile: str, sampling: str, batches: int) -> list[tuple[Sample, ClipPlan]]:
    """What our loader delivers in the first so many batches."""
    shards = setup.shards(profile)
    order = Order([shard.samples for shard in shards.shards], 0)
    turns = [order.turn(setup.start * BATCH + i) for i in range(batches * BATCH)]
    samples = [shards[turn.sample_id] for turn in turns]
    return [(s, plan_clip(s, turn, 0, SAMPLINGS[sampling])) for s, turn in zip(samples, turns, strict=True)]


def planned_clips(setup: Setup, sampling: str) -> list[Clip]:
    """The same for the rivals, so that all do the same work."""
    clips = []
    for sample, plan in planned(setup, setup.profiles[0], sampling, PLANNED):
        (left, top, width, height), scale = plan.box, WIDTH / sample.width
        box = (round(left * scale), top, round(width * scale), height)
        clips.append(Clip(source_of(setup, sample), plan.frames, box, plan.flip))
    return clips


# ------------------------------------------------------------------------------------------------ the rivals


def check_decord() -> None:
    """ValueError where (a) cannot run: without it there is nothing to compare with."""
    try:
        import decord  # noqa: F401
    except ImportError as error:
        text = f"decord, which all others are compared with, is missing ({error}): make setup, or pip install decord"
        raise ValueError(text) from error


def decord_frames(data: bytes, wanted: Sequence[int]) -> list[Frames]:
    """(a): MMAction2's DecordInit and DecordDecode, mode 'accurate' (mmaction/datasets/transforms/loading.py)."""
    import decord

    return list(decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(list(wanted)).asnumpy())


def pyav_frames(data: bytes, wanted: Sequence[int]) -> list[Frames]:
    """(b): MMAction2's PyAVDecode, mode 'accurate', kinder: only the wanted frames are converted to RGB."""
    last, images = max(wanted), dict[int, Any]()
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                images[number] = frame.to_ndarray(format="rgb24")
            if number == last:
                break
    return [images[number] for number in wanted]


def torchcodec_frames(data: bytes, wanted: Sequence[int]) -> list[Frames]:
    """(c): the way without a scan of the file, right for constant frame rates."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    return list(decoder.get_frames_at(list(wanted)).data.numpy())


def crop_and_flip(
    images: Sequence[Frames], size: tuple[int, int], box: tuple[int, int, int, int], flip: bool
) -> list[Frames]:
    """MMAction2's Resize(-1, 256), RandomResizedCrop, Resize(224) and Flip (processing.py): mmcv's imresize calls cv2
    whether the size changes or not."""
    left, top, width, height = box
    crops = []
    for image in images:
        scaled = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        crop = cv2.resize(scaled[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        crops.append(cv2.flip(crop, 1, crop) if flip else crop)
    return crops


def normalise(crops: Sequence[Frames]) -> torch.Tensor:
    """MMAction2's Normalize (mmcv.imnormalize_) and FormatShape: float32 [3, T, S, S]."""
    images = np.empty((len(crops), *crops[0].shape), np.float32)
    for image, crop in zip(images, crops, strict=True):
        image[:] = crop
        cv2.subtract(image, MEAN, image)
        cv2.multiply(image, 1 / STD, image)
    return torch.from_numpy(images.transpose(3, 0, 1, 2))


class NotAvailable(Exception):
    """A rival cannot run here; the text says why."""


Decode = Callable[[bytes, Sequence[int]], list[Frames]]


class _SourceClips(Dataset[torch.Tensor]):
    """Clips cut from the source files."""

    def __init__(self, decode: Decode, clips: Sequence[Clip]) -> None:
        self._decode, self._clips = decode, clips

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, position: int) -> torch.Tensor:
        clip = self._clips[position % len(self._clips)]
        images = self._decode(clip.source.read_bytes(), clip.frames)
        return normalise(crop_and_flip(images, (WIDTH, HEIGHT), clip.box, clip.flip))


def source_batches(decode: Decode, setup: Setup, sampling: str) -> Batches:
    """(a), (b), (c): a map-style dataset in a DataLoader."""
    clips = planned_clips(setup, sampling)
    try:
        decode(clips[0].source.read_bytes(), [0])
    except (ImportError, RuntimeError) as error:  # torchcodec without FFmpeg: the latter
        raise NotAvailable(
            str(error).strip().splitlines()[0].replace("Likely causes:", "Is FFmpeg installed?")
        ) from error
    yield from DataLoader(
        _SourceClips(decode, clips), batch_size=BATCH, num_workers=setup.workers, multiprocessing_context="fork"
    )


def webdataset_batches(setup: Setup, sampling: str) -> Batches:
    """(d): stock shards of the source files, read in a stream, shuffled in a buffer; the n-th time that a video comes
    its n-th plan is used."""
    try:
        import webdataset as wds
    except ImportError as error:
        raise NotAvailable(str(error)) from error
    clips: dict[str, list[Clip]] = defaultdict(list)
    for clip in planned_clips(setup, sampling):
        clips[clip.source.stem].append(clip)
    folder, num_shards = setup.work / f"webdataset-{setup.workers}", max(4, setup.workers)
    sources = [clips[key][0].source for key in sorted(clips)]
    if not folder.exists():
        folder.mkdir()
        with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=math.ceil(len(sources) / num_shards), verbose=0) as writer:
            for label, source in enumerate(sources):
                writer.write({"__key__": source.stem, "mp4": source.read_bytes(), "cls": label})
    times: Counter[str] = Counter()

    def clip_of(sample: dict[str, Any]) -> torch.Tensor:
        key = sample["__key__"]
        times[key] += 1
        clip = clips[key][times[key] % len(clips[key])]
        images = pyav_frames(sample["mp4"], clip.frames)
        return normalise(crop_and_flip(images, (WIDTH, HEIGHT), clip.box, clip.flip))

    tars = sorted(map(str, folder.glob("*.tar")))
    stream = wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(100).map(clip_of).repeat()
    yield from DataLoader(stream, batch_size=BATCH, num_workers=setup.workers, multiprocessing_context="fork")


# ------------------------------------------------------------------------------------------------ ours


def our_batches(profile: str, setup: Setup, sampling: str) -> Batches:
    """Our loader, as the trainer uses it."""
    shards = setup.shards(profile)
    turns = train_turns(
        Order([shard.samples for shard in shards.shards], 0),
        **{"global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1},
        start_step=setup.start,
        num_steps=10**9,
    )
    options = SAMPLINGS[sampling]
    with ClipLoader(shards, turns, micro_batch=BATCH, size=SIZE, options=options, workers=setup.workers) as loader:
        yield from loader


def bare_batches(profile: str, setup: Setup, sampling: str) -> Batches:
    """(e): as many processes as our loader has workers; yields whenever one of them has decoded a batch."""
    pipes, processes = [], []
    for share in range(setup.workers):
        pipe, theirs = _SPAWN.Pipe()
        processes.append(_SPAWN.Process(target=_decode_bare, args=(profile, setup, sampling, share, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(pipe)
        pipe.send_bytes(b".")  # a batch, please
    try:
        while True:
            for ready in wait(pipes):
                assert isinstance(ready, Connection)
                batch = ready.recv_bytes()
                ready.send_bytes(b".")
                yield batch
    finally:
        for process in processes:
            process.kill()
            process.join()


def _decode_bare(profile: str, setup: Setup, sampling: str, share: int, pipe: Connection) -> None:
    """Decodes the same few batches again and again, the bytes in memory, into the same memory."""
    cv2.setNumThreads(1)
    options, reader = SAMPLINGS[sampling], ShardReader()
    loaded = []
    for sample, plan in planned(setup, profile, sampling, BARE_BATCHES * setup.workers):
        request = request_clip(sample, plan, profile)
        loaded.append((request, reader.packets(request.shard, request.packets)))
    batches = [loaded[i : i + BATCH] for i in range(share * BATCH, len(loaded), setup.workers * BATCH)]
    clips = np.empty((BATCH, options.num_frames, SIZE, SIZE, 3), np.uint8)
    slicer = JpegSlicer(IMAGES_A_RUN)
    while True:
        for batch in batches:
            pipe.recv_bytes()
            images = sliced(batch, slicer) if profile == "jpeg" else decoded(batch)
            for clip, (request, _) in zip(clips, batch, strict=True):
                places = [request.order.index(k) for k in range(len(request.wanted))]
                for t in places:
                    resize_into(next(images), clip[t])
                    if request.flip:
                        cv2.flip(clip[t], 1, dst=clip[t])
                for t, k in enumerate(request.order):
                    if t != places[k]:  # the same frame again
                        clip[t] = clip[places[k]]
            pipe.send_bytes(b".")


LoadedClip = tuple[ClipRequest, list[memoryview]]


def sliced(batch: Sequence[LoadedClip], slicer: JpegSlicer) -> Iterator[Any]:
    """The cut-outs of the frames of a batch, decoded in runs as long as our decoder's."""
    jpegs = [jpeg for _, packets in batch for jpeg in packets]
    boxes = [request.box for request, packets in batch for _ in packets]
    for i in range(0, len(jpegs), IMAGES_A_RUN):
        yield from slicer.slice(jpegs[i : i + IMAGES_A_RUN], boxes[i : i + IMAGES_A_RUN])


def decoded(batch: Sequence[LoadedClip]) -> Iterator[Frames]:
    """The same of H.264."""
    for request, packets in batch:
        size = request.width, request.height
        for picture in packet_frames(packets, request.extradata, request.wanted, codec=request.profile, size=size):
            planes = stored_planes(picture)
            assert planes is not None
            yield crop_to_rgb(planes, request.box)


class Contender(NamedTuple):
    title: str
    batches: Callable[[Setup, str], Batches]
    profile: str | None = None
    """None: a rival."""


CONTENDERS = {
    "decord": Contender("(a) decord, DataLoader", partial(source_batches, decord_frames)),
    "pyav": Contender("(b) PyAV, DataLoader", partial(source_batches, pyav_frames)),
    "torchcodec": Contender("(c) torchcodec, DataLoader", partial(source_batches, torchcodec_frames)),
    "webdataset": Contender("(d) webdataset + PyAV", webdataset_batches),
    "ours_jpeg": Contender("ours, jpeg", partial(our_batches, "jpeg"), "jpeg"),
    "bare_jpeg": Contender("(e) bare, jpeg", partial(bare_batches, "jpeg"), "jpeg"),
    "ours_h264": Contender("ours, h264", partial(our_batches, "h264"), "h264"),
    "bare_h264": Contender("(e) bare, h264", partial(bare_batches, "h264"), "h264"),
}
RIVALS = tuple(name for name, contender in CONTENDERS.items() if contender.profile is None)
