"""The packed format: what is written is read, and what is damaged, edited or hostile is refused by name."""

import json
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pipelines import shards as format
from pipelines.shards import (
    EncodedVideo,
    FrameTable,
    ShardSet,
    ShardWriter,
    checksum,
    index_path_of,
    write_durably,
    write_manifest,
)


def encoded(seed: int, num_frames: int = 3) -> EncodedVideo:
    """A video of random bytes in which frame i has 10 + i bytes."""
    sizes = np.arange(10, 10 + num_frames, dtype=np.int32)
    offsets = 7 + np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    data = np.random.default_rng(seed).bytes(7 + int(sizes.sum()))
    table = FrameTable(
        offset=offsets,
        num_bytes=sizes,
        checksum=np.array([checksum(data[o : o + n]) for o, n in zip(offsets, sizes, strict=True)], np.uint64),
        source_frame=np.arange(num_frames, dtype=np.int32) * 4,
        keyframe=np.ones(num_frames, np.uint8),
    )
    return EncodedVideo(
        data, "mp4", table, 96, 64, 4 * num_frames, 29.97, extradata=b"x" * seed, facts={"codec": "none"}
    )


def write_set(folder: Path, samples: int = 5, a_shard: int = 2, *, multi_label: bool = False) -> Path:
    """Sample i is of class i mod 2; in a multi-label set of the first i mod 3 classes."""
    folder.mkdir()
    shards = []
    for start in range(0, samples, a_shard):
        writer = ShardWriter(folder, f"train-{len(shards):06d}.tar")
        for i in range(start, min(start + a_shard, samples)):
            labels = list(range(i % 3)) if multi_label else [i % 2]
            writer.add(f"{i:06d}_clip", labels, encoded(i, 3 + i), {"labels": labels})
        shards.append(asdict(writer.close()))
    facts = {"classes": ["a", "b"], "multi_label": multi_label, "verified": True, "profile": {"name": "jpeg"}}
    write_manifest(folder, {**facts, "splits": {"train": {"shards": shards}}})
    return folder


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None], *, sign: bool) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    edit(document)
    if sign:  # as a stranger would who makes a whole set of his own
        write_manifest(folder, {k: v for k, v in document.items() if k not in ("fingerprint", "format_version")})
    else:
        (folder / "manifest.json").write_text(json.dumps(document))


def edit_index(folder: Path, name: str, position: int, value: int, *, sign: bool = True) -> None:
    """Changes one number of the first index; `sign`: and makes the first row's checksum right again, as a stranger
    would who wants his number to be believed."""
    path = folder / "train-000000.index.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = {key: array.copy() for key, array in load_file(path).items()}
    arrays[name][position] = value
    if sign:
        arrays["row_checksum"][0] = checksum_of_first_row(arrays)
    save_file(arrays, path, metadata=metadata)


def checksum_of_first_row(arrays: dict[str, np.ndarray]) -> int:
    """Written out from the format's description, not with the code under test: the sample's values in the order and
    types of their arrays, labels, the numbers of labels and of bytes of key and extradata, these two, and the columns
    of the frame table, one after the other."""

    def ragged(name: str, of: str) -> np.ndarray:
        return arrays[name][arrays[f"first_{of}"][0] : arrays[f"first_{of}"][1]]

    columns = ("video_offset", "video_bytes", "checksum", "width", "height", "source_frames", "fps")
    labels, key, extradata = ragged("label", "label"), ragged("key", "key"), ragged("extradata", "extradata")
    counts = np.asarray([*labels, len(labels), len(key), len(extradata)], np.int64)
    frames = ("frame_offset", "frame_bytes", "frame_checksum", "source_frame", "keyframe")
    parts = [arrays[name][0] for name in columns] + [counts, key, extradata] + [ragged(n, "frame") for n in frames]
    return checksum(b"".join(part.tobytes() for part in parts))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path / "set"), "train")
    assert len(shards) == 5
    assert shards.classes == ("a", "b")
    assert [shards[i].labels for i in range(5)] == [(0,), (1,), (0,), (1,), (0,)]
    assert [shards.shard_of(i) for i in range(5)] == [0, 0, 1, 1, 2]
    for i in (4, 0, 3):
        sample, video = shards[i], encoded(i, 3 + i)
        stored = sample.shard.read_bytes()[sample.video_offset : sample.video_offset + sample.video_bytes]
        assert stored == video.data
        assert (sample.key, sample.checksum) == (f"{i:06d}_clip", checksum(stored))
        assert (sample.width, sample.height, sample.source_frames, sample.fps) == (96, 64, 12 + 4 * i, 29.97)
        assert sample.extradata == b"x" * i
        for column in ("offset", "num_bytes", "checksum", "source_frame", "keyframe"):
            np.testing.assert_array_equal(getattr(sample.frames, column), getattr(video.frames, column))
    with pytest.raises(IndexError):
        shards[5]


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_stock_webdataset_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = write_set(tmp_path / "set")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}_clip" for i in range(5)]
    assert [sample["cls"] for sample in samples] == [0, 1, 0, 1, 0]
    assert samples[1]["json"] == {"labels": [1], "codec": "none"}
    assert samples[1]["mp4"] == encoded(1, 4).data


@pytest.mark.parametrize("name", ["../train-000000.tar", "train.tar", "a/train-000000.tar", "train-000000.tar.gz"])
def test_writer_refuses_other_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        ShardWriter(tmp_path, name)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "é", "x" * 81])
def test_writer_refuses_keys_that_webdataset_would_cut(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path, "train-000000.tar")
    with pytest.raises(ValueError, match="sample key"):
        writer.add(key, [0], encoded(0), {})
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "damaged"),
        (b"{}", "damaged"),
        (b'{"format_version": 2}', "damaged"),
        (b'{"format_version": 99}', "format version 99"),
        (b'{"format_version": 2, "fingerprint": "", "classes": [], "profile": {}, "splits": []}', "damaged"),
    ],
)
def test_damaged_manifest(tmp_path: Path, contents: bytes, message: str) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "manifest.json").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        ShardSet.open(folder, "train")


def test_missing_folder_manifest_or_split(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ShardSet.open(tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        ShardSet.open(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'val'; it has: train"):
        ShardSet.open(write_set(tmp_path / "set"), "val")


def test_edited_manifest_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    edit_manifest(folder, lambda document: document.update(classes=["b", "a"]), sign=False)
    with pytest.raises(ValueError, match="was edited"):
        ShardSet.open(folder, "train")


@pytest.mark.parametrize("name", ["../set/train-000000.tar", "/etc/passwd", "sub/train-000000.tar", 7, None])
def test_manifest_cannot_name_other_files(tmp_path: Path, name: object) -> None:
    folder = write_set(tmp_path / "set")
    edit_manifest(folder, lambda document: document["splits"]["train"]["shards"][0].update(name=name), sign=True)
    with pytest.raises(ValueError, match="names"):
        ShardSet.open(folder, "train")


def test_missing_and_cut_files_are_listed_with_what_they_hold(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    shards = ShardSet.open(folder, "train")
    assert shards.check_files() == []
    tar = folder / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    (folder / "train-000001.tar").unlink()
    index_path_of(folder / "train-000002.tar").unlink()
    problems = [(shard.name, shard.samples, text) for shard, text in shards.check_files()]
    assert [problem[:2] for problem in problems] == [(f"train-00000{i}.tar", 2 - i // 2) for i in range(3)]
    assert "train-000000.tar has" in problems[0][2] and "the manifest says" in problems[0][2]
    assert "train-000001.tar is missing" in problems[1][2]
    assert "train-000002.index.safetensors is missing" in problems[2][2]
    assert shards[0].key == "000000_clip", "what the index says of a sample holds whatever its tar has become"
    with pytest.raises(ValueError, match=r"train-000002\.index\.safetensors is missing"):
        shards[4]


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_damaged_index(tmp_path: Path, keep: int) -> None:
    folder = write_set(tmp_path / "set")
    path = index_path_of(folder / "train-000000.tar")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="index"):
        ShardSet.open(folder, "train")[0]


@pytest.mark.parametrize(
    ("name", "position", "value"),
    [
        ("video_offset", 0, -1),
        ("video_offset", 0, 10**12),
        ("video_bytes", 0, 10**12),
        ("video_bytes", 0, -5),
        ("frame_offset", 1, -1),
        ("frame_offset", 1, 10**12),
        ("frame_bytes", 1, -1),
        ("frame_bytes", 1, 2**31 - 1),
        ("first_frame", 1, 10**6),
        ("first_frame", 0, 1),
        ("source_frame", 0, 9),
        ("source_frames", 0, 0),
        ("width", 0, 2**20),
        ("height", 0, 0),
        ("label", 0, 2),
        ("label", 0, -1),
        ("frame_offset", 0, 2**63 - 8),  # plus a size it would be negative
    ],
)
def test_index_cannot_point_outside(tmp_path: Path, name: str, position: int, value: int) -> None:
    folder = write_set(tmp_path / "set")
    edit_index(folder, name, position, value)
    with pytest.raises(ValueError, match=r"train-000000\.index"):
        ShardSet.open(folder, "train")[0]


@pytest.mark.parametrize("name", ["checksum", "fps", "frame_checksum", "key", "keyframe", "row_checksum", "label"])
def test_damaged_row_of_an_index_is_found(tmp_path: Path, name: str) -> None:
    """Numbers that are possible, and only not those that were written; the rows beside it are as good as before."""
    folder = write_set(tmp_path / "set")
    edit_index(folder, name, 0, 7, sign=False)
    shards = ShardSet.open(folder, "train")
    with pytest.raises(ValueError, match=r"entry of sample '.*_clip' is damaged"):
        shards[0]
    assert shards[1].key == "000001_clip"


def test_labels_out_of_range(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    edit_index(folder, "label", 0, 2)
    with pytest.raises(ValueError, match=r"'000000_clip' has labels \[2\], allowed are 0\.\.1"):
        ShardSet.open(folder, "train")[0]


def test_any_number_of_labels_in_multi_label_sets_alone(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", multi_label=True)
    shards = ShardSet.open(folder, "train")
    assert [shards[i].labels for i in range(5)] == [(), (0,), (0, 1), (), (0,)]
    edit_manifest(folder, lambda document: document.update(multi_label=False), sign=True)
    shards = ShardSet.open(folder, "train")
    with pytest.raises(ValueError, match="'000002_clip' has 2 labels, allowed is one"):
        shards[2]
    assert shards[1].label == 0


def test_index_of_another_shard(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", samples=6)
    first, second, last = (index_path_of(folder / f"train-00000{i}.tar") for i in range(3))
    first.write_bytes(second.read_bytes())  # of as many samples
    with pytest.raises(ValueError, match=r"000000\.index\.safetensors is the index of another train-000000\.tar"):
        ShardSet.open(folder, "train")[0]
    other = ShardSet.open(write_set(tmp_path / "other", samples=1), "train")
    last.write_bytes(index_path_of(other[0].shard).read_bytes())
    with pytest.raises(ValueError, match="does not fit its shard"):
        ShardSet.open(folder, "train")[4]


def test_only_so_many_indexes_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the descriptors that a process may have, they take a quarter."""
    monkeypatch.setattr(format, "MAX_MAPPED_INDEXES", 2)
    folder = write_set(tmp_path / "set", samples=20)
    shards = ShardSet.open(folder, "train")
    before, most = mapped_files(folder), 0
    held = []
    for i in np.random.default_rng(0).integers(20, size=200).tolist():
        sample = shards[i]
        assert (sample.sample_id, sample.key) == (i, f"{i:06d}_clip")
        most = max(most, mapped_files(folder) - before)
        if i == 7:
            held.append(sample.frames)  # keeps its index alive, not the other way round
    assert 2 <= most <= 3 + len(held)
    assert all(frames.num_bytes.tolist() == list(range(10, 20)) for frames in held)
    monkeypatch.setattr(format, "MAX_MAPPED_INDEXES", 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 4096))
    assert ShardSet.open(folder, "train")._max_indexes == 16


def mapped_files(folder: Path) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def test_fingerprint_follows_what_training_sees(tmp_path: Path) -> None:
    first = ShardSet.open(write_set(tmp_path / "a"), "train").fingerprint
    assert ShardSet.open(write_set(tmp_path / "b"), "train").fingerprint == first
    assert ShardSet.open(write_set(tmp_path / "c", samples=4), "train").fingerprint != first


def test_write_durably_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
