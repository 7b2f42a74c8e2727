"""Sets of frame features: the right rows at any number of workers, the order resumed, nothing believed."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.features import check_image_model, check_options, read_video
from pipelines.loader import ClipBatch, ClipLoader, describe_decoding
from pipelines.plan import ClipOptions, Order, eval_turns, train_turns
from pipelines.read import ShardReader
from pipelines.shards import EncodedVideo, ShardSet, checksum, write_manifest
from tests.features import MADE_BY, WIDTH, make_feature_set, numbered

UNIFORM = ClipOptions(num_frames=4, sampling="uniform")
DENSE = ClipOptions(num_frames=4, interval=5, intervals=(2, 5, 9))
LENGTHS = [30, 45, 3, 17, 64, 8, 21]


def evaluate(shards: ShardSet, micro: int, **settings: Any) -> ClipLoader:
    turns = eval_turns(len(shards), micro_batch=micro, rank=0, world=1)
    return ClipLoader(shards, turns, **{"micro_batch": micro, "size": 32, "options": UNIFORM, **settings})


def train(
    shards: ShardSet, steps: int, start: int = 0, rank: int = 0, world: int = 1, **settings: Any
) -> list[tuple[np.ndarray, ClipBatch]]:
    """The batches of a run of global batch 4, with their features."""
    order = Order([shard.samples for shard in shards.shards], 3)
    micro = 4 // world
    batches = {"global_batch": 4, "micro_batch": micro, "rank": rank, "world": world}
    turns = train_turns(order, **batches, start_step=start, num_steps=steps)
    settings = {"micro_batch": micro, "size": 32, "options": DENSE, "seed": 3, **settings}
    with ClipLoader(shards, turns, **settings) as loader:
        return [(batch.frames.numpy().copy(), batch) for batch in loader]


@pytest.mark.parametrize("options", [UNIFORM, DENSE])
@pytest.mark.parametrize("every", [1, 4])
def test_rows_are_those_of_the_planned_frames(tmp_path: Path, options: ClipOptions, every: int) -> None:
    shards = ShardSet.open(make_feature_set(tmp_path / "set", LENGTHS, every=every), "train")
    seen = 0
    for frames, batch in train(shards, 7, options=options, workers=2):
        assert batch.frames.dtype == torch.float16 and batch.frames.shape == (4, 4, WIDTH) and batch.valid.all()
        for row, plan in enumerate(batch.plans):
            of = shards[plan.sample_id].frames.source_frame
            assert frames[row, :, 0].tolist() == of[list(plan.stored)].tolist()
            assert frames[row, :, 0].tolist() == list(plan.frames) or every > 1
            assert (frames[row, :, 1] == plan.sample_id).all() and batch.labels[row] == plan.sample_id % 2
            seen += len(set(plan.frames)) < 4  # a video shorter than its clip
    assert seen


def test_batches_do_not_depend_on_workers_prefetch_or_ranks_and_go_on_in_the_middle(tmp_path: Path) -> None:
    shards = ShardSet.open(make_feature_set(tmp_path / "set", LENGTHS), "train")
    whole = np.stack([frames for frames, _ in train(shards, 9, workers=1, prefetch=1)])
    again = np.stack([frames for frames, _ in train(shards, 9, workers=3, prefetch=4)])
    resumed = np.stack([frames for frames, _ in train(shards, 9, start=4)])
    shared = [np.stack([frames for frames, _ in train(shards, 9, rank=rank, world=2)]) for rank in range(2)]
    assert len(whole) == 9 and np.array_equal(whole, again)
    assert np.array_equal(whole[4:], resumed) and np.array_equal(whole, np.concatenate(shared, axis=1))


def test_a_worker_for_features_loads_no_decoder(tmp_path: Path) -> None:
    shards = ShardSet.open(make_feature_set(tmp_path / "set", LENGTHS), "train")
    with evaluate(shards, 7) as loader:
        assert next(loader).valid.all()
        maps = Path(f"/proc/{loader._decoder.process_ids[0]}/maps").read_text()  # type: ignore[attr-defined]
    assert "numpy" in maps and not [name for name in ("dali", "cv2", "libav", "libtorch") if name in maps]


def test_a_member_is_a_plain_array(tmp_path: Path) -> None:
    folder = make_feature_set(tmp_path / "set", [5])
    with tarfile.open(folder / "train-000000.tar") as tar:
        names = [info.name for info in tar]
        array = np.load(io.BytesIO(tar.extractfile(names[0]).read()), allow_pickle=False)  # type: ignore[union-attr]
    assert names == ["000000_numbers.npy", "000000_numbers.cls", "000000_numbers.json"]
    assert array.dtype == np.float16 and np.array_equal(array, numbered(5, 1, 0))


def test_a_whole_video_is_read_at_once(tmp_path: Path) -> None:
    sample = ShardSet.open(make_feature_set(tmp_path / "set", LENGTHS, every=4), "train")[4]
    array = read_video(sample, ShardReader())
    assert np.array_equal(array, numbered(64, 4, 4)) and array[:, 0].tolist() == sample.frames.source_frame.tolist()


def array_of(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> Callable[[EncodedVideo], EncodedVideo]:
    """Another array in the member, with an index that fits it."""

    def change(video: EncodedVideo) -> EncodedVideo:
        sink = io.BytesIO()
        np.lib.format.write_array(sink, array, version=version)
        data, num = sink.getvalue(), len(video.frames)
        start, size = len(data) - array.nbytes, array.nbytes // num
        offsets = start + size * np.arange(num)
        sums = np.array([checksum(data[at : at + size]) for at in offsets.tolist()], np.uint64)
        frames = replace(video.frames, offset=offsets, num_bytes=np.full(num, size, np.int32), checksum=sums)
        return replace(video, data=data, frames=frames, extradata=data[:start])

    return change


def header(text: bytes) -> Callable[[EncodedVideo], EncodedVideo]:
    """Another header in the index."""
    return lambda video: replace(video, extradata=text)


def with_value(value: float) -> np.ndarray:
    """In one column."""
    array = numbered(8, 1, 0)
    array[:, 3] = value
    return array


def wrong_sums(video: EncodedVideo) -> EncodedVideo:
    return replace(video, frames=replace(video.frames, checksum=video.frames.checksum + np.uint64(1)))


def short_rows(video: EncodedVideo) -> EncodedVideo:
    return replace(video, frames=replace(video.frames, num_bytes=video.frames.num_bytes - 2))


PLAIN = np.zeros((8, WIDTH), np.float16)
HEADER = r"header is .*allowed is one of float16 \[n, 6\]"
HOSTILE: list[tuple[Callable[[EncodedVideo], EncodedVideo], str]] = [
    (array_of(PLAIN.astype(np.float32)), "'<f4'.*" + HEADER[10:]),
    (array_of(PLAIN.astype(np.int16)), "'<i2'"),
    (array_of(PLAIN.astype(">f2")), "'>f2'"),
    (array_of(np.zeros((8, WIDTH + 1), np.float16)), HEADER),
    (array_of(np.zeros((8, WIDTH // 2, 2), np.float16)), HEADER),
    (array_of(np.asfortranarray(numbered(8, 1, 0))), "'fortran_order': True"),
    (array_of(PLAIN, version=(2, 0)), HEADER),
    (array_of(np.full((8, WIDTH), np.nan, np.float16)), "no finite numbers"),
    (array_of(with_value(-np.inf)), "no finite numbers"),
    (header(b""), HEADER),
    (header(b"\x93NUMPY\x01\x00\x10\x00__import__('os')"), HEADER),
    (header(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535), HEADER),
    (array_of(np.zeros((8, WIDTH), [("a", "<f2")])), HEADER),
    (
        lambda video: replace(video, frames=replace(video.frames, num_bytes=video.frames.num_bytes - 2)),
        "row of 10 bytes",
    ),
    (wrong_sums, "checksum differs"),
]


def test_hostile_arrays_are_bad_samples(tmp_path: Path) -> None:
    """Between each two a good one, which comes out."""

    def change(i: int, video: EncodedVideo) -> EncodedVideo:
        return HOSTILE[i // 2][0](video) if i % 2 else video

    folder = make_feature_set(tmp_path / "set", [8] * 2 * len(HOSTILE), change=change)
    with evaluate(ShardSet.open(folder, "train"), 7, max_bad_fraction=1.0, workers=2) as loader:
        valid = torch.cat([batch.valid for batch in loader]).tolist()
        assert valid[: 2 * len(HOSTILE)] == [True, False] * len(HOSTILE)
        for i, (_, reason) in enumerate(HOSTILE):
            assert re.search(reason, loader.bad[2 * i + 1].reason), (
                i,
                loader.bad[2 * i + 1].reason,
            )


def test_damaged_files_are_bad_samples_and_replaced_in_training(tmp_path: Path) -> None:
    folder = make_feature_set(tmp_path / "set", [40] * 8)
    shards = ShardSet.open(folder, "train")
    with shards[1].shard.open("r+b") as file:
        file.seek(shards[1].video_offset + int(shards[1].frames.offset[0]))
        file.write(b"\xff" * shards[1].video_bytes)
    os.truncate(folder / "train-000001.tar", shards[6].video_offset + 200)
    batches = train(shards, 6, max_bad_fraction=1.0)
    ids = {turn.sample_id for _, batch in batches for turn in batch.turns}
    assert ids == {0, 2, 3, 4, 5}
    for frames, batch in batches:
        assert frames[:, :, 1].tolist() == [[turn.sample_id] * 4 for turn in batch.turns]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"color_jitter": (0.4, 0.0, 0.0, 0.0)}, r"data.color_jitter = \[0.4, 0.0, 0.0, 0.0\]"),
        ({"grayscale": 0.2}, "data.grayscale"),
        ({"lighting": 0.1}, "data.lighting"),
        ({"rand_augment": (2, 9)}, "data.rand_augment"),
        ({"random_erasing": 0.25}, "data.random_erasing = 0.25"),
        ({"mixup_alpha": 0.8}, "data.mixup_alpha"),
        ({"cutmix_alpha": 1.0}, "data.cutmix_alpha"),
        ({"test_crops": 3}, "data.test_crops = 3; allowed is 1"),
    ],
)
def test_what_needs_pixels_is_refused_by_its_key(options: dict[str, Any], key: str) -> None:
    check_options(ClipOptions(flip=0.5, crop_scale=(0.1, 1.0), test_clips=5), MADE_BY)
    with pytest.raises(ValueError, match=key):
        check_options(ClipOptions(**options), MADE_BY)


def test_the_loader_refuses_them_too(tmp_path: Path) -> None:
    shards = ShardSet.open(make_feature_set(tmp_path / "set", [8]), "train")
    with pytest.raises(ValueError, match=r"data.grayscale = 0.2 changes pixels"):
        evaluate(shards, 1, options=ClipOptions(grayscale=0.2))


def test_features_of_another_image_model_are_refused() -> None:
    same = {"weights_xxh3": "0123", "width": WIDTH, "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    check_image_model(MADE_BY, "stub", same, Path("set"))
    with pytest.raises(ValueError, match=r"in set were made by stub, and the image model here is ViT-B-16:"):
        check_image_model(MADE_BY, "ViT-B-16", same, Path("set"))
    with pytest.raises(ValueError, match=r"made by stub with weights_xxh3 0123, .* is stub with weights_xxh3 4567:"):
        check_image_model(MADE_BY, "stub", same | {"weights_xxh3": "4567"}, Path("set"))
    with pytest.raises(ValueError, match=r"made by stub with mean \(0.5, 0.5, 0.5\), .* with mean \(0.4, 0.5, 0.6\)"):
        check_image_model(MADE_BY, "stub", same | {"mean": [0.4, 0.5, 0.6]}, Path("set"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: None, "must have model"),
        (lambda entry: {}, "must have model"),
        (lambda entry: entry | {"more": 1}, "must have model"),
        (lambda entry: entry | {"width": 10**9}, "allowed are"),
        (lambda entry: entry | {"width": True}, "allowed are"),
        (lambda entry: entry | {"width": "6"}, "allowed are"),
        (lambda entry: entry | {"channels": "cmyk"}, "allowed are"),
        (lambda entry: entry | {"crop": "all"}, "allowed are"),
        (lambda entry: entry | {"model": 5}, "allowed are"),
    ],
)
def test_a_manifest_without_a_sound_entry_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    folder = make_feature_set(tmp_path / "set", [8])
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["format_version"], manifest["fingerprint"]
    write_manifest(folder, manifest | {"features": change(manifest["features"])})
    with pytest.raises(ValueError, match=rf"manifest.json: .*{message}"):
        ShardSet.open(folder, "train")


def test_what_made_the_features_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    one = ShardSet.open(make_feature_set(tmp_path / "rgb", [8]), "train")
    two = ShardSet.open(make_feature_set(tmp_path / "bgr", [8], made_by=replace(MADE_BY, channels="bgr")), "train")
    assert one.fingerprint != two.fingerprint and [s.sha256 for s in one.shards] == [s.sha256 for s in two.shards]
    assert one.features == MADE_BY
    said = describe_decoding(two, torch.device("cuda"), 2)
    assert said.startswith("reading, in 2 worker processes a rank, features of stub, 6 a frame, made of BGR frames")
