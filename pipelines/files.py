"""Video files that are not packed, as a set: the loader plans and decodes them like the test views of a packed one.

Nothing is held of a file but what was found out about it: a process of its own opens it, decodes its first frame and
counts the others by their packets (where a codec's packets tell too little, decodes all of them), a few files ahead of
the loader. Decode workers then open the file themselves and read of it what they need, so memory does not grow with the
length of a video or with their number. Strangers' files are looked at in those processes alone, with a time limit; as
in packing, no container can make a demuxer open another file or the network.

A file is decoded from its beginning (once for the views that a worker gets together): whoever reads the same videos
again and again packs them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.annotations import VIDEO_SUFFIXES
from pipelines.processes import Lost, map_isolated
from pipelines.read import FILE
from pipelines.shards import FrameTable, Sample, ShardSet
from pipelines.source_files import SourceFiles, is_video
from pipelines.video import VideoError, open_video

PROBE_SECONDS = 300.0
"""In which a file must say what it is; some, such as AVI and MPEG-TS, are decoded for that."""
_SPLIT = "files"


class FileFacts(NamedTuple):
    """What a video file is."""

    width: int
    """Upright, in pixels, as is `height`."""
    height: int
    num_frames: int
    """That a player shows."""
    fps: float
    """Mean frames per second."""
    seconds: float
    """Until its last frame ends."""


def find_videos(places: Sequence[Path]) -> list[Path]:
    """The files given, and all videos below the folders given, sorted in each; none twice.

    Raises FileNotFoundError for a path that is not there, ValueError for a folder without a video.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            videos = sorted(filter(is_video, SourceFiles(place).walk("")))
            if not videos:
                raise ValueError(f"{place} holds no video; they are known by {', '.join(sorted(VIDEO_SUFFIXES))}")
            found += [place / name for name in videos]
        elif place.is_file():
            found.append(place)
        else:
            raise FileNotFoundError(f"no such video file or folder: {place}")
    return list(dict.fromkeys(found))


def printable(path: Path) -> str:
    """A path for logs, tables and terminals: what a name holds of other bytes and control characters is escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def probe(path: Path) -> FileFacts:
    """What a video file is, by decoding no more of it than need be. Raises VideoError or OSError."""
    return probe_times(path)[0]


def probe_times(path: Path) -> tuple[FileFacts, NDArray[np.float64]]:
    """The same, and when each of its frames appears, in seconds from the first one."""
    with open_video(path) as reader:
        width, height = reader.skim() if reader.has_a_frame_a_packet else reader.decode_all()
        facts = FileFacts(width, height, reader.num_frames, reader.fps, reader.seconds)
        return facts, np.asarray(reader.times)


def file_sample(path: Path, facts: FileFacts, sample_id: int = 0) -> Sample:
    """A video file as the loader and `read.request_clip` take it."""
    return Sample(
        sample_id=sample_id,
        key=printable(path),
        labels=(),
        shard=path.absolute(),  # decode workers have a working directory of their own
        video_offset=0,
        video_bytes=0,
        checksum=0,
        width=facts.width,
        height=facts.height,
        source_frames=facts.num_frames,
        fps=facts.fps,
        frames=FrameTable.of_copy(facts.num_frames),
        extradata=b"",
    )


class FileSet(ShardSet):
    """Video files as a split of a set, each a shard by itself, without labels. To be closed.

    What cannot be read is a bad sample to the loader. Samples are looked at in order, `workers` at once.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        classes: Sequence[str],
        *,
        multi_label: bool,
        workers: int,
        timeout_seconds: float = PROBE_SECONDS,
    ) -> None:
        shards = [
            {"name": printable(path), "samples": 1, "bytes": 0, "sha256": "", "index_sha256": ""} for path in paths
        ]
        facts = {"classes": classes, "multi_label": multi_label, "verified": False, "fingerprint": ""}
        super().__init__(Path(), _SPLIT, {**facts, "profile": {"name": FILE}, "splits": {_SPLIT: {"shards": shards}}})
        self._paths = paths
        self._found: list[FileFacts | Lost] = []
        self._probes = map_isolated(_probe, paths, workers=workers, timeout_seconds=timeout_seconds)

    def __getitem__(self, sample_id: int) -> Sample:
        """Raises ValueError for a file that is no video that can be decoded."""
        while len(self._found) <= sample_id:
            self._found.append(next(self._probes))
        found = self._found[sample_id]
        if isinstance(found, Lost):
            raise ValueError(f"{found.reason}: {found.detail}")
        return file_sample(self._paths[sample_id], found, sample_id)

    def close(self) -> None:
        """Ends the processes that look at files."""
        self._probes.close()


def _probe(path: Path) -> FileFacts | Lost:
    """In a process of its own."""
    try:
        return probe(path)
    except VideoError as error:
        return Lost(error.reason, error.detail)
    except OSError as error:
        return Lost("read_error", error.strerror or str(error))
    except MemoryError:
        return Lost("out_of_memory", "not enough memory to read it")
