"""The packed format, written and read here: WebDataset tars, one binary index beside each, one manifest for the set.

A set is a folder:

    manifest.json                     classes, settings, shards of each split, fingerprint
    train-000000.tar                  per sample: KEY.mp4 (or the source's own suffix, or npy), KEY.cls, KEY.json
    train-000000.index.safetensors    where each sample, frame or packet lies, and what it is
    rejects.tsv                       every video that was not packed, with the reason

The tars are ordinary WebDataset and open in stock tools. The index is what makes them cheap here: it holds the byte
range and the checksum of every frame (or packet), so that the reader fetches just the frames it uses and no decoder
sees a byte that changed since packing. An index is memory-mapped on first touch and each of its rows carries a checksum
of its own, so opening a set costs one JSON file and taking a sample a few pages, however many samples there are; an
index names the digest of its tar, so one that belongs to another set is refused. Nothing is unpickled and no path in a
manifest can leave the set's folder.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import mmap
import os
import re
import resource
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

FORMAT_VERSION = 2
PROFILES = ("jpeg", "h264", "hevc", "copy")
"""Of sets that hold videos."""
FEATURES = "features"
"""The profile of sets that hold what an image model made of frames, see `features.py`."""
CHANNELS = ("rgb", "bgr")
MAX_MAPPED_INDEXES = 4096  # a mapped index costs 10 kB of Python objects, one descriptor and its touched pages
MAX_SIDE = 16384  # pixels, or features of a frame; more in an index is damage or an attack, not a video
MAX_SAMPLES = 10**7  # of a shard; those made here have some hundred
_BLOCK = 512  # tar's unit: header size and padding
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-\d{6}\.tar")  # of the shards that are written here
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.tar")  # of those that may be read
SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # of the samples that are written here
_DTYPES = {"I64": "<i8", "I32": "<i4", "U64": "<u8", "U8": "u1", "F64": "<f8"}
_SAMPLE_ARRAYS = {
    "video_offset": np.int64,  # first byte of the video member in the tar
    "video_bytes": np.int64,
    "checksum": np.uint64,  # of the whole video member
    "width": np.int32,  # pixels of the stored video as a player shows it (after rotation); features of a frame
    "height": np.int32,  # 1 where features are stored
    "source_frames": np.int32,  # frames that the source plays
    "fps": np.float64,  # mean frames per second of the source
    "row_checksum": np.uint64,  # of everything that the index says of the sample, see `_row_checksum`
}
_LETTERS = {np.int64: "q", np.uint64: "Q", np.int32: "i", np.float64: "d"}
_ROW = struct.Struct("<" + "".join(_LETTERS[d] for name, d in _SAMPLE_ARRAYS.items() if name != "row_checksum"))
"""One value of each of `_SAMPLE_ARRAYS` but the last, as the arrays hold them."""
_FRAME_ARRAYS = {
    "frame_offset": np.int64,  # first byte of the frame's packet, from the start of the video member
    "frame_bytes": np.int32,
    "frame_checksum": np.uint64,
    "source_frame": np.int32,  # number of this stored frame in the source, 0-based, in display order
    "keyframe": np.uint8,
}
_BLOBS = ("key", "extradata")
_RAGGED = {"frame": "frame_offset", "label": "label", "key": "key", "extradata": "extradata"}
"""`first_NAME[i]..first_NAME[i + 1]` are the entries of sample i in these arrays."""

T = TypeVar("T")


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

    @classmethod
    def of_copy(cls, num_frames: int) -> FrameTable:
        """The table of a video in the `copy` profile."""
        zeros = np.zeros(num_frames, np.int64)
        sums = zeros.astype(np.uint64)
        return cls(zeros, zeros.astype(np.int32), sums, np.arange(num_frames, dtype=np.int32), zeros.astype(np.uint8))

    def __len__(self) -> int:
        return len(self.source_frame)


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """One video ready to be written: what the packer's encoders return and the writer takes."""

    data: bytes
    suffix: str
    """File name suffix in the tar, without the dot: `mp4`, the source's own in the `copy` profile, or `npy`."""
    frames: FrameTable
    width: int
    height: int
    source_frames: int
    fps: float
    extradata: bytes = b""
    """What a decoder needs before the first packet (H.264 parameter sets; of features, the header of the array); empty
    for the other profiles."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the sample's `.json`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored video: where its bytes lie and what they are."""

    sample_id: int
    """Position in the split, 0-based: shards in order, samples in file order."""
    key: str
    labels: tuple[int, ...]
    """One, or in a multi-label set any number, ascending."""
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

    @property
    def label(self) -> int:
        """The one label of a sample of a single-label set."""
        (label,) = self.labels
        return label


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One line of the manifest: a tar and what it must contain."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, slots=True)
class FeatureSource:
    """The manifest's entry `features`: what made the features of a set, and of what."""

    model: str
    """Name of the image model."""
    weights_xxh3: str
    """Checksum of its weights."""
    width: int
    """D, features of a frame; as the image model gives them (CLIP: after the projection), not normalised."""
    channels: str
    """Order in which the model saw the colours: `rgb`, or `bgr` for the published features of Efficient-Prompt."""
    size: int
    """Side of the square frames that the model saw, in pixels."""
    crop: float
    """Side of the centre crop that became such a frame, as a share of the short side."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Normalisation of RGB in 0..1 that the model applied."""
    source: str
    """Fingerprint of the set that the frames were taken from."""

    @classmethod
    def from_manifest(cls, entry: Any) -> FeatureSource:
        """Raises ValueError where an entry is missing or is nothing of its kind."""
        names = [f.name for f in fields(cls)]
        if not isinstance(entry, dict) or sorted(entry) != sorted(names):
            raise ValueError(f"its entry `features` must have {', '.join(names)}")
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in entry.items()}
        source = cls(**values)
        texts, sides = (source.model, source.weights_xxh3, source.source), (source.width, source.size)
        good = all(isinstance(text, str) for text in texts) and source.channels in CHANNELS
        good = good and isinstance(source.crop, float)
        if not good or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
            raise ValueError(
                f"its entry `features` has {entry}; allowed are texts for model, weights_xxh3 and source, "
                f"{' or '.join(CHANNELS)} for channels, a fraction for crop, 1 to {MAX_SIDE} for width and size"
            )
        return source


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
        self._index = IndexBuilder()

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def __len__(self) -> int:
        return len(self._index)

    def add(self, key: str, labels: Sequence[int], video: EncodedVideo, facts: Mapping[str, Any]) -> None:
        """Appends one sample as KEY.<suffix>, KEY.cls, KEY.json; `facts` and the video's own go to the json.

        KEY.cls holds one number, as WebDataset has it, so it is there only where `labels` is one.
        """
        if not SAFE_KEY.fullmatch(key):
            raise ValueError(f"sample key {key!r}: 1 to 80 letters, digits, '_' or '-' are allowed")
        video_offset = self._file.tell() + _BLOCK
        self._add_member(f"{key}.{video.suffix}", video.data)
        if len(labels) == 1:
            self._add_member(f"{key}.cls", str(labels[0]).encode())
        text = json.dumps({**facts, **video.facts}, ensure_ascii=False, sort_keys=True)
        self._add_member(f"{key}.json", text.encode())
        self._index.add(key, labels, video, video_offset, len(video.data), checksum(video.data))

    def close(self) -> ShardInfo:
        """Ends the tar, writes the index, makes both durable and gives them their names."""
        self._write(b"\0" * (2 * _BLOCK))
        num_bytes = self._file.tell()
        _sync_and_close(self._file)
        self._part.replace(self._path)
        return self._index.write(self._path, num_bytes, self._digest.hexdigest())

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


class IndexBuilder:
    """The index of one shard, sample by sample."""

    def __init__(self) -> None:
        self._samples: dict[str, list[Any]] = {n: [] for n in _SAMPLE_ARRAYS}
        self._frames: dict[str, list[NDArray[Any]]] = {n: [] for n in _FRAME_ARRAYS}
        self._blobs: dict[str, list[bytes]] = {n: [] for n in _BLOBS}
        self._labels: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._labels)

    def add(
        self,
        key: str,
        labels: Sequence[int],
        video: EncodedVideo,
        video_offset: int,
        video_bytes: int,
        video_checksum: int,
    ) -> None:
        """Appends the row of a sample; `video.data` is not looked at."""
        row = {
            "video_offset": video_offset,
            "video_bytes": video_bytes,
            "checksum": video_checksum,
            "width": video.width,
            "height": video.height,
            "source_frames": video.source_frames,
            "fps": video.fps,
        }
        t = video.frames
        columns: tuple[NDArray[Any], ...] = (t.offset, t.num_bytes, t.checksum, t.source_frame, t.keyframe)
        frames = [np.asarray(c, d) for c, d in zip(columns, _FRAME_ARRAYS.values(), strict=True)]
        row["row_checksum"] = _row_checksum(
            [row[name] for name in _SAMPLE_ARRAYS if name in row], labels, key.encode(), video.extradata, frames
        )
        for name, value in row.items():
            self._samples[name].append(value)
        for name, column in zip(_FRAME_ARRAYS, frames, strict=True):
            self._frames[name].append(column)
        self._labels.append(tuple(labels))
        self._blobs["key"].append(key.encode())
        self._blobs["extradata"].append(video.extradata)

    def write(self, shard: Path, shard_bytes: int, shard_sha256: str) -> ShardInfo:
        """Writes the index beside its shard, durably; returns the shard's line for the manifest."""
        index = self._to_bytes(shard_sha256)
        write_durably(index_path_of(shard), index)
        return ShardInfo(shard.name, len(self), shard_bytes, shard_sha256, hashlib.sha256(index).hexdigest())

    def _to_bytes(self, shard_sha256: str) -> bytes:
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(self._samples[name], dtype) for name, dtype in _SAMPLE_ARRAYS.items()
        }
        for name, dtype in _FRAME_ARRAYS.items():
            arrays[name] = np.concatenate(self._frames[name] or [np.zeros(0, dtype)])
        arrays["label"] = np.asarray([label for labels in self._labels for label in labels], np.int32)
        arrays["first_label"] = _starts([len(labels) for labels in self._labels])
        arrays["first_frame"] = _starts([len(a) for a in self._frames["frame_offset"]])
        for name in _BLOBS:
            arrays[f"first_{name}"] = _starts([len(blob) for blob in self._blobs[name]])
            arrays[name] = np.frombuffer(b"".join(self._blobs[name]), np.uint8)
        return save_arrays(arrays, metadata={"shard_sha256": shard_sha256})  # of two entries, the order is random


class ShardSet:
    """One split of a packed set: a sequence of `Sample`, opened shard by shard on first touch."""

    def __init__(self, folder: Path, split: str, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.shards = tuple(ShardInfo(**shard) for shard in manifest["splits"][split]["shards"])
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.profile: str = manifest["profile"]["name"]
        self.stored_frames: str = manifest["profile"].get("fps", "source")
        """Which frames of the source are stored: see `encode.FrameChoice.parse`."""
        self.multi_label: bool = manifest["multi_label"]
        self.verified: bool = manifest["verified"]
        """Whether every frame was decoded when the set was made; if not, only worker processes decode it."""
        self.fingerprint: str = manifest["fingerprint"]
        self.features: FeatureSource | None = None
        """What made the features of a set that holds such instead of videos."""
        if self.profile == FEATURES:
            try:
                self.features = FeatureSource.from_manifest(manifest.get("features"))
            except ValueError as error:
                raise ValueError(f"{folder / 'manifest.json'}: {error}; extract the features again") from error
        self.kept: NDArray[np.int64] | None = None
        """The ids, ascending, that training takes (see `subset.py`); None: all."""
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        # Every mapped file holds a descriptor, and the limit is often 1024 for the whole process.
        self._max_indexes = min(MAX_MAPPED_INDEXES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

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
        return self._ends[-1] if self._ends else 0

    @property
    def num_kept(self) -> int:
        """Samples that training takes."""
        return len(self) if self.kept is None else len(self.kept)

    def __getitem__(self, sample_id: int) -> Sample:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = self.shard_of(sample_id)
        index = self._indexes.get(shard)
        if index is None:
            if len(self._indexes) >= self._max_indexes:
                self._indexes.popitem(last=False)
            index = _Index(self.folder, self.shards[shard], len(self.classes), self.multi_label)
            self._indexes[shard] = index
        return index.sample(sample_id, sample_id - self._ends[shard] + self.shards[shard].samples)

    def shard_of(self, sample_id: int) -> int:
        """Position in `shards` of the shard that holds a sample."""
        return bisect.bisect_right(self._ends, sample_id)

    def follow(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches of turns; a set whose files are elsewhere reads them ahead (`cache.py`)."""
        return batches

    def check_files(self) -> list[tuple[ShardInfo, str]]:
        """The shards that are missing, of the wrong length or without their index, each with what is wrong.

        Opens none of them. Their samples are bad samples to the loader.
        """
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry for entry in entries}
        problems = []
        for shard in self.shards:
            tar, index = self.folder / shard.name, index_path_of(self.folder / shard.name)
            missing = [path for path in (tar, index) if path.name not in found]
            if missing:
                problems.append((shard, f"{missing[0]} is missing: the manifest lists it; pack again or copy it here"))
            elif (num_bytes := found[tar.name].stat().st_size) != shard.bytes:
                text = f"{tar} has {num_bytes} bytes, the manifest says {shard.bytes}; copy it again"
                problems.append((shard, text))
        return problems


class _Index:
    """The memory-mapped index of one shard."""

    def __init__(self, folder: Path, info: ShardInfo, num_classes: int, multi_label: bool) -> None:
        self._shard = folder / info.name
        self._absolute = self._shard.absolute()  # for decode workers, which have a working directory of their own
        self._path = index_path_of(self._shard)
        self._num_classes, self._multi_label = num_classes, multi_label
        try:
            self._arrays, metadata = _map_arrays(self._path)
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename} is missing: the manifest lists it; pack again or copy it here"
            ) from error
        self._shard_bytes = info.bytes
        self._check_shapes(info)
        if metadata.get("shard_sha256") != info.sha256:
            raise ValueError(f"{self._path} is the index of another {self._shard.name}; pack or index again")
        # One number of a memoryview costs a third of one of an array.
        self._columns = {name: self._arrays[name].data for name in _SAMPLE_ARRAYS}
        self._starts = {name: self._arrays[f"first_{name}"].data for name in _RAGGED}

    def sample(self, sample_id: int, row: int) -> Sample:
        a = self._arrays
        values = {name: column[row] for name, column in self._columns.items()}
        row_checksum = values.pop("row_checksum")
        key = a["key"][self._entries("key", row)].tobytes()
        columns = [a[name][self._entries("frame", row)] for name in _FRAME_ARRAYS]
        sample = Sample(
            sample_id=sample_id,
            key=key.decode("ascii", "replace"),
            labels=tuple(a["label"][self._entries("label", row)].tolist()),
            shard=self._absolute,
            frames=FrameTable(*columns),
            extradata=a["extradata"][self._entries("extradata", row)].tobytes(),
            **values,
        )
        if _row_checksum(tuple(values.values()), sample.labels, key, sample.extradata, columns) != row_checksum:
            raise ValueError(f"{self._path}: the entry of sample {sample.key!r} is damaged; pack or index again")
        self._check_sample(sample)
        return sample

    def _entries(self, name: str, row: int) -> slice:
        """Where the entries of a row lie in the arrays that hold any number of them a row."""
        starts = self._starts[name]
        return slice(starts[row], starts[row + 1])

    def _check_shapes(self, info: ShardInfo) -> None:
        a = self._arrays
        dtypes = _SAMPLE_ARRAYS | _FRAME_ARRAYS | {"label": np.int32} | dict.fromkeys(_BLOBS, np.uint8)
        dtypes |= {f"first_{name}": np.int64 for name in _RAGGED}
        missing = [name for name in dtypes if name not in a]
        if missing:
            raise ValueError(f"{self._path} lacks {', '.join(missing)}: not an index of this project")
        good = all(a[name].ndim == 1 and a[name].dtype == dtype for name, dtype in dtypes.items())
        good = good and all(len(a[n]) == info.samples for n in _SAMPLE_ARRAYS)
        good = good and all(len(a[n]) == len(a["frame_offset"]) for n in _FRAME_ARRAYS)
        for name, of in _RAGGED.items():  # each row's own borders are checked when it is read
            first = a[f"first_{name}"]
            good = good and len(first) == info.samples + 1 and first[0] == 0 and first[-1] == len(a[of])
        if not good:
            raise ValueError(f"{self._path} does not fit its shard ({info.samples} samples): pack or index it again")

    def _check_sample(self, s: Sample) -> None:
        """An index may come from a stranger: nothing in it may point outside its own video."""
        offset, num_bytes, source_frame = s.frames.offset, s.frames.num_bytes, s.frames.source_frame
        fits = s.video_offset >= 0 and s.video_bytes >= 0 and len(s.frames) > 0
        fits = fits and s.video_offset + s.video_bytes <= self._shard_bytes
        # Each offset first by itself: the sum of a huge one and a size would overflow.
        fits = fits and offset.min() >= 0 and offset.max() <= s.video_bytes
        fits = fits and num_bytes.min() >= 0 and (offset + num_bytes).max() <= s.video_bytes
        fits = fits and 0 < s.width <= MAX_SIDE and 0 < s.height <= MAX_SIDE and s.source_frames > 0
        if not fits or source_frame[0] < 0 or (source_frame[1:] < source_frame[:-1]).any():
            raise ValueError(f"{self._path}: the entry of sample {s.key!r} points outside its video; pack again")
        if not self._multi_label and len(s.labels) != 1:
            raise ValueError(f"{self._path}: sample {s.key!r} has {len(s.labels)} labels, allowed is one; pack again")
        if not all(0 <= label < self._num_classes for label in s.labels):
            allowed = f"0..{self._num_classes - 1}"
            raise ValueError(f"{self._path}: sample {s.key!r} has labels {list(s.labels)}, allowed are {allowed}")


def index_path_of(shard: Path) -> Path:
    """`train-000000.tar` → `train-000000.index.safetensors`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.safetensors")


def write_manifest(folder: Path, contents: Mapping[str, Any]) -> str:
    """Writes `manifest.json` last and durably; returns the fingerprint that it adds.

    The fingerprint is the SHA-256 of classes, profile, what made the features, and the digests of every shard and
    index: it changes when anything that training sees changes.
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
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); pack again") from error
    bad = [name for name in names if not isinstance(name, str) or not SAFE_NAME.fullmatch(name)]
    if bad:
        raise ValueError(
            f"{path} names {bad[0]!r}; a shard is a file NAME.tar in the same folder, of letters, digits and ._-"
        )
    wrong = _wrong_entry(manifest)
    if wrong:
        raise ValueError(f"{path} is damaged ({wrong}); pack again")
    if expected != found:
        raise ValueError(f"{path} was edited: its fingerprint does not match its contents; pack again")
    return manifest


def _wrong_entry(manifest: Mapping[str, Any]) -> str:
    """The first entry of a manifest that is not of its type, or nothing."""
    classes, profile = manifest["classes"], manifest["profile"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return "classes is no list of texts"
    if not all(isinstance(manifest[name], bool) for name in ("multi_label", "verified")):
        return "multi_label or verified is neither true nor false"
    texts = (profile.get("name"), profile.get("fps", "")) if isinstance(profile, dict) else (None,)
    if not all(isinstance(text, str) for text in texts):
        return "profile has no name"
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if shard.keys() != {f.name for f in fields(ShardInfo)}:
                return f"{shard['name']} has the entries {', '.join(shard)[:200]}"
            counts, sums = (shard["samples"], shard["bytes"]), (shard["sha256"], shard["index_sha256"])
            if not all(type(n) is int and n >= 0 for n in counts) or not all(isinstance(text, str) for text in sums):
                return f"{shard['name']}: samples and bytes are whole numbers, its digests are texts"
            if counts[0] > MAX_SAMPLES:
                return f"{shard['name']} has {counts[0]} samples, allowed are {MAX_SAMPLES}"
    return ""


def write_rejects(folder: Path, columns: Sequence[str], entries: Iterable[Sequence[str]]) -> None:
    """Writes `rejects.tsv`: what of the sources is not in the set, and why; one line an entry."""
    lines = ["\t".join(" ".join(text.split()) for text in entry) for entry in (columns, *entries)]
    write_durably(folder / "rejects.tsv", ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is there whole or not at all: temporary name, fsync, rename, fsync."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    shards = [
        [split, *(shard[name] for name in ("name", "samples", "bytes", "sha256", "index_sha256"))]
        for split, entry in sorted(manifest["splits"].items())
        for shard in entry["shards"]
    ]
    facts = [manifest[name] for name in ("classes", "multi_label", "verified", "profile")]
    facts += [manifest[FEATURES]] if FEATURES in manifest else []
    text = json.dumps([*facts, shards], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _row_checksum(
    row: Sequence[Any], labels: Sequence[int], key: bytes, extradata: bytes, frames: Sequence[NDArray[Any]]
) -> int:
    """Of everything that an index says of one sample; `row` are the values of `_SAMPLE_ARRAYS` without the last, its
    `row_checksum`; `frames` the columns of the frame table."""
    counts = (*labels, len(labels), len(key), len(extradata))
    digest = xxhash.xxh3_64(_ROW.pack(*row))
    digest.update(struct.pack(f"<{len(counts)}q", *counts) + key + extradata)
    for column in frames:
        digest.update(np.ascontiguousarray(column).data)
    return digest.intdigest()


def _map_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays of a safetensors file as views of the mapped file, of which no byte is read before it is used, and its
    metadata."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; pack or index again")
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header_bytes = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + header_bytes])
        metadata = dict(header.pop("__metadata__", {}))
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            flat = np.frombuffer(mapped, dtype, (end - start) // dtype.itemsize, 8 + header_bytes + start)
            arrays[name] = (flat if flat.flags.aligned else flat.copy()).reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); pack or index again") from error
    return arrays, metadata


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _sync_and_close(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
