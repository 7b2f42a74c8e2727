"""The packed format, written and read here: WebDataset tars, one binary index beside each, one manifest for the set.

A set is a folder:

    manifest.json                     classes, settings, shards of each split, fingerprint
    train-000000.tar                  per sample: KEY.mp4 (or the source's own suffix), KEY.cls, KEY.json
    train-000000.index.safetensors    where each sample, frame or packet lies, and what it is
    rejects.tsv                       every video that was not packed, with the reason

The tars are ordinary WebDataset and open in stock tools. The index is what makes them cheap here: it holds the byte
range and the checksum of every frame (or packet), so that the reader fetches just the frames it uses and no decoder
sees a byte that changed since packing. An index is memory-mapped on first touch; opening a set costs one JSON file
however many samples it has. Nothing is unpickled and no path in a manifest can leave the set's folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

FORMAT_VERSION = 1
PROFILES = ("jpeg", "h264", "copy")
MAX_SIDE = 16384  # pixels; a larger frame in an index is damage or an attack, not a video
_BLOCK = 512  # tar's unit: header size and padding
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-\d{6}\.tar")
_DTYPES = {"I64": "<i8", "I32": "<i4", "U64": "<u8", "U8": "u1", "F64": "<f8"}
_SAMPLE_ARRAYS = {
    "video_offset": np.int64,  # first byte of the video member in the tar
    "video_bytes": np.int64,
    "checksum": np.uint64,  # of the whole video member
    "label": np.int32,
    "width": np.int32,  # pixels of the stored video as a player shows it (after rotation)
    "height": np.int32,
    "source_frames": np.int32,  # frames that the source plays
    "fps": np.float64,  # mean frames per second of the source
}
_FRAME_ARRAYS = {
    "frame_offset": np.int64,  # first byte of the frame's packet, from the start of the video member
    "frame_bytes": np.int32,
    "frame_checksum": np.uint64,
    "source_frame": np.int32,  # number of this stored frame in the source, 0-based, in display order
    "keyframe": np.uint8,
}
_BLOBS = ("key", "extradata")


def checksum(data: bytes | memoryview) -> int:
    """The 64-bit checksum (xxh3) kept for every video, frame and packet."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True, slots=True)
class FrameTable:
    """The stored frames of one video, in display order; all arrays have one entry a frame.

    In the `copy` profile the container is the source's own and is read whole: offsets, sizes and checksums are 0.
    """

    offset: NDArray[np.int64]
    num_bytes: NDArray[np.int32]
    checksum: NDArray[np.uint64]
    source_frame: NDArray[np.int32]
    keyframe: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.source_frame)


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """One video ready to be written: what the packer's encoders return and the writer takes."""

    data: bytes
    suffix: str
    """File name suffix in the tar, without the dot: `mp4`, or the source's own in the `copy` profile."""
    frames: FrameTable
    width: int
    height: int
    source_frames: int
    fps: float
    extradata: bytes = b""
    """What a decoder needs before the first packet (H.264 parameter sets); empty for the other profiles."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the sample's `.json`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored video: where its bytes lie and what they are."""

    sample_id: int
    """Position in the split, 0-based: shards in order, samples in file order."""
    key: str
    label: int
    shard: Path
    video_offset: int
    video_bytes: int
    checksum: int
    width: int
    height: int
    source_frames: int
    fps: float
    frames: FrameTable
    extradata: bytes


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One line of the manifest: a tar and what it must contain."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


class ShardWriter:
    """Writes one shard and its index under temporary names; `close` makes both appear, the index last.

    The bytes depend on nothing but the samples: owner, mode and time in the tar headers are fixed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"shard name {name!r} is not of the form name-000000.tar")
        self._path = folder / name
        self._part = folder / f".{name}.part"
        self._file = self._part.open("wb")
        self._digest = hashlib.sha256()
        self._samples: dict[str, list[Any]] = {n: [] for n in _SAMPLE_ARRAYS}
        self._frames: dict[str, list[NDArray[Any]]] = {n: [] for n in _FRAME_ARRAYS}
        self._blobs: dict[str, list[bytes]] = {n: [] for n in _BLOBS}

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def __len__(self) -> int:
        return len(self._samples["label"])

    def add(self, key: str, label: int, video: EncodedVideo, facts: Mapping[str, Any]) -> None:
        """Appends one sample as KEY.<suffix>, KEY.cls, KEY.json; `facts` and the video's own go to the json."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key):
            raise ValueError(f"sample key {key!r}: 1 to 80 letters, digits, '_' or '-' are allowed")
        video_offset = self._file.tell() + _BLOCK
        self._add_member(f"{key}.{video.suffix}", video.data)
        self._add_member(f"{key}.cls", str(label).encode())
        text = json.dumps({**facts, **video.facts}, ensure_ascii=False, sort_keys=True)
        self._add_member(f"{key}.json", text.encode())
        row = {
            "video_offset": video_offset,
            "video_bytes": len(video.data),
            "checksum": checksum(video.data),
            "label": label,
            "width": video.width,
            "height": video.height,
            "source_frames": video.source_frames,
            "fps": video.fps,
        }
        for name, value in row.items():
            self._samples[name].append(value)
        t = video.frames
        columns: tuple[NDArray[Any], ...] = (t.offset, t.num_bytes, t.checksum, t.source_frame, t.keyframe)
        for name, column in zip(_FRAME_ARRAYS, columns, strict=True):
            self._frames[name].append(column)
        self._blobs["key"].append(key.encode())
        self._blobs["extradata"].append(video.extradata)

    def close(self) -> ShardInfo:
        """Ends the tar, writes the index, makes both durable and gives them their names."""
        self._write(b"\0" * (2 * _BLOCK))
        num_bytes = self._file.tell()
        _sync_and_close(self._file)
        index = self._index_bytes()
        index_path = index_path_of(self._path)
        self._part.replace(self._path)
        write_durably(index_path, index)
        digests = self._digest.hexdigest(), hashlib.sha256(index).hexdigest()
        return ShardInfo(self._path.name, len(self), num_bytes, *digests)

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _add_member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._write(info.tobuf(format=tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(b"\0" * (-len(data) % _BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _index_bytes(self) -> bytes:
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(self._samples[name], dtype) for name, dtype in _SAMPLE_ARRAYS.items()
        }
        for name, dtype in _FRAME_ARRAYS.items():
            arrays[name] = np.concatenate([np.asarray(a, dtype) for a in self._frames[name]] or [np.zeros(0, dtype)])
        arrays["first_frame"] = _starts([len(a) for a in self._frames["frame_offset"]])
        for name in _BLOBS:
            arrays[f"first_{name}"] = _starts([len(blob) for blob in self._blobs[name]])
            arrays[name] = np.frombuffer(b"".join(self._blobs[name]), np.uint8)
        return save_arrays(arrays, metadata={"format_version": str(FORMAT_VERSION)})


class ShardSet:
    """One split of a packed set: a sequence of `Sample`, opened shard by shard on first touch."""

    def __init__(self, folder: Path, split: str, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.shards = tuple(ShardInfo(**shard) for shard in manifest["splits"][split]["shards"])
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.profile: str = manifest["profile"]["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self._ends = np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)
        self._indexes: dict[int, _Index] = {}

    @classmethod
    def open(cls, folder: str | Path, split: str) -> ShardSet:
        """Opens a split of the set in `folder`.

        Raises ValueError or OSError, naming the file, when the manifest is missing, damaged, of another version,
        names files outside the folder, or the split is not in it.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}; it has: {', '.join(manifest['splits'])}")
        shards = cls(folder, split, manifest)
        if not len(shards):
            raise ValueError(f"{folder}: split {split!r} holds no sample; see {folder / 'rejects.tsv'} for the reasons")
        return shards

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, sample_id: int) -> Sample:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        index = self._indexes.get(shard)
        if index is None:
            index = self._indexes[shard] = _Index(self.folder, self.shards[shard], len(self.classes))
        return index.sample(sample_id, sample_id - int(self._ends[shard] - self.shards[shard].samples))

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Label of every sample; touches every index, so for evaluation and reports, not for training."""
        parts = []
        for number, shard in enumerate(self.shards):
            end = int(self._ends[number])
            parts.append([self[i].label for i in range(end - shard.samples, end)])
        return np.concatenate([np.asarray(part, np.int32) for part in parts])


class _Index:
    """The memory-mapped index of one shard."""

    def __init__(self, folder: Path, info: ShardInfo, num_classes: int) -> None:
        self._shard = folder / info.name
        self._path = index_path_of(self._shard)
        self._num_classes = num_classes
        if not self._shard.is_file():
            raise ValueError(f"{self._shard} is listed in the manifest but missing; pack again or copy it here")
        shard_bytes = self._shard.stat().st_size
        if shard_bytes != info.bytes:
            raise ValueError(f"{self._shard} has {shard_bytes} bytes, the manifest says {info.bytes}; copy it again")
        if not self._path.is_file():
            raise ValueError(f"{self._path}, the index of {self._shard.name}, is missing; pack again or copy it here")
        self._arrays = _map_arrays(self._path)
        self._check_shapes(info)

    def sample(self, sample_id: int, row: int) -> Sample:
        a = self._arrays
        frames = slice(int(a["first_frame"][row]), int(a["first_frame"][row + 1]))
        table = FrameTable(*(a[name][frames] for name in _FRAME_ARRAYS))
        sample = Sample(
            sample_id=sample_id,
            key=self._blob("key", row).decode("ascii", "replace"),
            label=int(a["label"][row]),
            shard=self._shard,
            video_offset=int(a["video_offset"][row]),
            video_bytes=int(a["video_bytes"][row]),
            checksum=int(a["checksum"][row]),
            width=int(a["width"][row]),
            height=int(a["height"][row]),
            source_frames=int(a["source_frames"][row]),
            fps=float(a["fps"][row]),
            frames=table,
            extradata=self._blob("extradata", row),
        )
        self._check_sample(sample)
        return sample

    def _blob(self, name: str, row: int) -> bytes:
        starts = self._arrays[f"first_{name}"]
        return self._arrays[name][int(starts[row]) : int(starts[row + 1])].tobytes()

    def _check_shapes(self, info: ShardInfo) -> None:
        a = self._arrays
        missing = [n for n in (*_SAMPLE_ARRAYS, *_FRAME_ARRAYS, *_BLOBS) if n not in a]
        if missing:
            raise ValueError(f"{self._path} lacks {', '.join(missing)}: not an index of this project")
        starts = {"first_frame": len(a["frame_offset"])} | {f"first_{b}": len(a[b]) for b in _BLOBS}
        good = all(len(a[n]) == info.samples for n in _SAMPLE_ARRAYS)
        good &= all(len(a[n]) == len(a["frame_offset"]) for n in _FRAME_ARRAYS)
        for name, total in starts.items():
            first = a.get(name, np.zeros(0, np.int64))
            good &= len(first) == info.samples + 1 and bool(np.all(np.diff(first) >= 0))
            good &= len(first) > 0 and int(first[0]) == 0 and int(first[-1]) == total
        if not good:
            raise ValueError(f"{self._path} does not fit its shard ({info.samples} samples): pack or index it again")
        wrong = np.flatnonzero((a["label"] < 0) | (a["label"] >= self._num_classes))
        if len(wrong):
            key, label = self._blob("key", int(wrong[0])).decode("ascii", "replace"), int(a["label"][wrong[0]])
            raise ValueError(f"{self._path}: sample {key!r} has label {label}, allowed are 0..{self._num_classes - 1}")

    def _check_sample(self, s: Sample) -> None:
        """An index may come from a stranger: nothing in it may point outside its own video."""
        ends = s.frames.offset + s.frames.num_bytes
        fits = s.video_offset >= 0 and s.video_bytes >= 0 and len(s.frames) > 0
        fits &= s.video_offset + s.video_bytes <= self._shard_bytes
        fits &= bool((s.frames.offset >= 0).all() and (s.frames.num_bytes >= 0).all())
        fits &= len(ends) > 0 and int(ends.max()) <= s.video_bytes
        fits &= 0 < s.width <= MAX_SIDE and 0 < s.height <= MAX_SIDE and s.source_frames > 0
        fits &= bool((np.diff(s.frames.source_frame) >= 0).all())
        if not fits:
            raise ValueError(f"{self._path}: the entry of sample {s.key!r} points outside its video; pack again")

    @cached_property
    def _shard_bytes(self) -> int:
        return self._shard.stat().st_size


def index_path_of(shard: Path) -> Path:
    """`train-000000.tar` → `train-000000.index.safetensors`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.safetensors")


def write_manifest(folder: Path, contents: Mapping[str, Any]) -> str:
    """Writes `manifest.json` last and durably; returns the fingerprint that it adds.

    The fingerprint is the SHA-256 of classes, profile and the digests of every shard and index: it changes when
    anything that training sees changes.
    """
    fingerprint = _fingerprint(contents)
    document = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, **contents}
    write_durably(
        folder / "manifest.json",
        (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode(),
    )
    return fingerprint


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks `manifest.json`; ValueError or OSError says what is wrong with which file."""
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of shards: {folder}; make one with tools/make_shards.py")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no manifest.json: not a packed set, or packing did not finish")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; pack again")
        names = [s["name"] for split in manifest["splits"].values() for s in split["shards"]]
        expected = _fingerprint(manifest)
        found = manifest["fingerprint"]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); pack again") from error
    bad = [name for name in names if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name)]
    if bad:
        raise ValueError(f"{path} names {bad[0]!r}; a shard is name-000000.tar in the same folder")
    if expected != found:
        raise ValueError(f"{path} was edited: its fingerprint does not match its contents; pack again")
    return manifest


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is there whole or not at all: temporary name, fsync, rename, fsync."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    shards = [
        [split, *(shard[name] for name in ("name", "samples", "bytes", "sha256", "index_sha256"))]
        for split, entry in sorted(manifest["splits"].items())
        for shard in entry["shards"]
    ]
    text = json.dumps([manifest["classes"], manifest["profile"], shards], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file as views of the mapped file: no byte is read before it is used."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header_bytes = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            flat = np.frombuffer(mapped, dtype, (end - start) // dtype.itemsize, 8 + header_bytes + start)
            arrays[name] = flat.reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); pack or index again") from error
    return arrays


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _sync_and_close(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
