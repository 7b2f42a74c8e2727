"""What each way of storing would cost for your own videos, before you pack all of them.

    python tools/estimate_profile.py VIDEO_OR_FOLDER … [--sample 5] [--num-frames 16] [--interval 4]

A few of the videos are packed in every profile and rate into a temporary folder, with the packer's own encoder, and
read back with the trainer's own plan and decoder. The table says for each:

    MB, × source   bytes of all stored videos, and as a multiple of the sources'
    PSNR dB        RGB, the centre square of up to 12 frames of each video as the trainer gets it, beside the source's
                   frames scaled alike; the mean, and the video that fares worst
    pack s         seconds of CPU to decode, verify, scale and store a video
    clips/s        training clips a second of CPU of one core (process time, bytes in the page cache), random crops to
                   224 × 224, of frames `--interval` apart (dense) or one of each of T equal parts (uniform)
    decoded        frames decoded for each frame used

A rate that a pattern cannot be served from is marked: `repeats` where neighbouring frames of a clip would be the same
stored one, `uneven` where their distance would change. The last line recommends a profile for `--sampling`. Another
crop, resolution or machine moves the numbers, hardly the order of the profiles. A 3-second 1080p clip takes 20 seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from numpy.typing import NDArray

from pipelines.cli import run_cli
from pipelines.decode import ClipDecoder
from pipelines.encode import FrameChoice, encode_video
from pipelines.files import printable
from pipelines.pack import PackSettings
from pipelines.plan import EVAL_EPOCH, SAMPLINGS, ClipOptions, ClipPlan, Turn, plan_clip
from pipelines.read import ClipRequest, request_clip
from pipelines.shards import PROFILES, EncodedVideo, Sample, ShardSet, ShardWriter, write_durably, write_manifest
from pipelines.source_files import SourceFiles, is_video
from pipelines.video import VideoError, file_frames
from tools.make_shards import SHORT_SIDE
from tools.parts.bench_sources import scaled
from tools.parts.progress import Progress

PSNR_FRAMES = 12  # of each stored video
PLANNED_CLIPS = 32  # of each video, on which `repeats` and `uneven` are judged
SIZE = 224  # pixels a side of a decoded clip
CPU_SECONDS = 0.25  # of decoding for each video, profile, rate and pattern
CLIPS_A_CALL = 8  # as a decode worker gets them
AS_FAST = 0.9  # of the fastest: then the smaller one is recommended
NEAR_DB = 1.0  # under the quality that is asked for: a few points of --quality
MUCH_FASTER = 2.0  # times: then what is so near is recommended all the same
EQUAL_DB = 99.0
_SEED = 0


@dataclass(frozen=True, slots=True)
class Way:
    """One way to store a video."""

    profile: str
    fps: str
    """As `FrameChoice.parse` takes it."""

    def __str__(self) -> str:
        return f"--profile {self.profile}" + (f" --fps {self.fps}" if self.profile != "copy" else "")


@dataclass(slots=True)
class Reading:
    """How clips of one pattern come out of one way of storing; sums over the videos."""

    clips: int = 0
    cpu_seconds: float = 0.0
    decoded: int = 0
    used: int = 0
    steps: int = 0
    """From one wanted frame to the next, another one."""
    still: int = 0
    """Of these: to the same stored frame."""
    uneven: int = 0
    """Of these: of another length than planned."""

    @property
    def clips_per_cpu_second(self) -> float:
        return self.clips / max(self.cpu_seconds, 1e-9)

    @property
    def decoded_per_used(self) -> float:
        return self.decoded / max(self.used, 1)

    def trouble(self, sampling: str) -> str:
        """Empty where the stored frames serve the pattern.

        A few odd steps are no trouble: time stamps shake, and frames drawn from two parts of a video may be neighbours.
        Of uniform clips every seventh step is lost when a part has about as many frames as the rate leaves out.
        """
        if self.still > (0.02 if sampling == "dense" else 0.15) * self.steps:
            return "repeats"
        return "uneven" if sampling == "dense" and self.uneven > 0.1 * self.steps else ""


@dataclass(slots=True)
class Cost:
    """What one way of storing costs; sums over the videos, or one entry a video."""

    source_bytes: int = 0
    stored_bytes: int = 0
    pack_cpu_seconds: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    """Empty in the copy profile: the frames are the source's own."""
    reading: dict[str, Reading] = field(default_factory=lambda: {sampling: Reading() for sampling in SAMPLINGS})
    """By sampling."""

    @property
    def bytes_ratio(self) -> float:
        return self.stored_bytes / max(self.source_bytes, 1)

    @property
    def mean_psnr(self) -> float:
        return mean(self.psnr_db) if self.psnr_db else math.inf

    def summary(self) -> dict[str, Any]:
        """The numbers of the table, for machines."""
        patterns = {
            sampling: {
                "clips_per_cpu_second": round(reading.clips_per_cpu_second, 2),
                "decoded_per_used": round(reading.decoded_per_used, 3),
                "trouble": reading.trouble(sampling),
            }
            for sampling, reading in self.reading.items()
        }
        return {
            "stored_bytes": self.stored_bytes,
            "bytes_ratio": round(self.bytes_ratio, 4),
            "psnr_db": round(self.mean_psnr, 2) if self.psnr_db else None,
            "lowest_psnr_db": round(min(self.psnr_db), 2) if self.psnr_db else None,
            "pack_cpu_seconds": round(mean(self.pack_cpu_seconds), 3),
            **patterns,
        }


def main() -> None:
    args = _parse_args()
    patterns = {s: ClipOptions(num_frames=args.num_frames, sampling=s, interval=args.interval) for s in SAMPLINGS}
    rates = args.fps.split(",") if args.fps else default_rates(args.interval)
    ways = [Way(p, fps) for p in args.profiles.split(",") for fps in (rates if p != "copy" else ["source"])]
    for way in ways:  # refuses what makes no sense before anything is packed
        stored = {} if way.profile == "copy" else {"short_side": args.short_side, "quality": args.quality}
        PackSettings(profile=way.profile, fps=way.fps, **stored)
    videos = choose(args.videos, args.sample)
    costs, left_out = measure(videos, ways, patterns, args.short_side, args.quality)
    used = len(videos) - len(left_out)
    for path, reason in left_out.items():
        print(f"left out: {path}: {reason}")
    if not used:
        raise ValueError(f"none of the {len(videos)} videos can be used; the reasons are above")
    print(f"tried {used} of the videos, {next(iter(costs.values())).source_bytes / 1e6:.2f} MB")
    print(f"dense: {args.num_frames} frames, {args.interval} apart; uniform: {args.num_frames} over the whole video\n")
    print("\n".join(table(costs)), end="\n\n")
    advice = recommend(costs, args.sampling, args.min_psnr, args.max_bytes)
    print(advice)
    if args.json:
        document = {
            "videos": [str(path) for path in videos if path not in left_out],
            "left_out": {str(path): reason for path, reason in left_out.items()},
            "settings": {name: getattr(args, name) for name in ("num_frames", "interval", "short_side", "quality")},
            "ways": [{**asdict(way), **cost.summary()} for way, cost in costs.items()],
            "recommendation": advice,
        }
        write_durably(args.json, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEO|DIR", help="videos, or folders of them")
    add("--sample", type=int, default=5, metavar="N", help="how many of them to try, drawn at random (default: 5)")
    add("--num-frames", type=int, default=16, metavar="T", help="frames a clip (default: 16)")
    add("--interval", type=int, default=4, metavar="I", help="source frames between two of a dense clip (default: 4)")
    add("--sampling", choices=SAMPLINGS, default="dense", help="the pattern to recommend for (default: dense)")
    add("--profiles", default=",".join(PROFILES), metavar="A,B", help="what to try (default: %(default)s)")
    add("--fps", metavar="A,B", help="rates to try, as for make_shards (default: source, source/2, … up to --interval)")
    add("--short-side", type=int, default=SHORT_SIDE, metavar="S", help="of stored frames, in pixels (default: 256)")
    add("--quality", type=int, metavar="Q", help="1 to 100 (default: that of tools/make_shards.py)")
    add("--min-psnr", type=float, default=38.0, metavar="DB", help="asked of a recommendation (default: 38)")
    add("--max-bytes", type=_multiple, default=1.6, metavar="Kx", help="of the source's bytes (default: 1.6x)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    if args.sample < 1:
        parser.error(f"--sample {args.sample}: allowed is 1 or more")
    return args


def _multiple(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)[x×]?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a multiple of the source's bytes, such as 1.6x")
    return float(match[1])


def default_rates(interval: int) -> list[str]:
    """All frames, and every 2nd, 4th, 8th … as long as that divides the interval: what serves it exactly."""
    return ["source", *(f"source/{2**k}" for k in range(1, 11) if interval % 2**k == 0)]


def choose(given: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the videos and of those in the folders, drawn at random, always the same, in their order."""
    found: dict[Path, None] = {}
    for path in given:
        if path.is_dir():
            found |= {path / name: None for name in sorted(filter(is_video, SourceFiles(path).walk("")))}
        elif path.exists():
            found[path] = None
        else:
            raise FileNotFoundError(f"no such video or folder: {path}")
    if not found:
        raise ValueError(f"no videos in {', '.join(map(str, given))}")
    videos = list(found)
    drawn = np.random.Generator(np.random.Philox(key=[_SEED, 0])).permutation(len(videos))[:count]
    return [videos[i] for i in sorted(drawn)]


def measure(
    videos: Sequence[Path],
    ways: Sequence[Way],
    patterns: Mapping[str, ClipOptions],
    short_side: int,
    quality: int | None,
) -> tuple[dict[Way, Cost], dict[Path, str]]:
    """What every way costs over all videos, and why some were left out."""
    costs = {way: Cost() for way in ways}
    left_out: dict[Path, str] = {}
    with Progress(len(videos) * 2 * len(ways), "step") as progress:
        for number, path in enumerate(videos, 1):
            advance = partial(progress.advance, note=printable(Path(path.name)))
            try:
                with tempfile.TemporaryDirectory(prefix="estimate_profile-") as folder:
                    found = _measure_video(path, Path(folder), ways, patterns, short_side, quality, advance)
            except (VideoError, OSError) as error:
                left_out[path] = str(error)
                found = {}
            for way, cost in found.items():
                _add(costs[way], cost)
            advance(number * 2 * len(ways) - progress.done)
    return costs, left_out


def _measure_video(
    path: Path,
    folder: Path,
    ways: Sequence[Way],
    patterns: Mapping[str, ClipOptions],
    short_side: int,
    quality: int | None,
    on_step: Callable[[], object],
) -> dict[Way, Cost]:
    costs: dict[Way, Cost] = {}
    samples: dict[Way, Sample] = {}
    for number, way in enumerate(ways):
        start = time.process_time()
        video = encode_video(
            path, way.profile, choice=FrameChoice.parse(way.fps), short_side=short_side, quality=quality
        )
        seconds = time.process_time() - start
        costs[way] = Cost(path.stat().st_size, len(video.data), [seconds])
        samples[way] = store(video, way.profile, folder / str(number))
        on_step()
    references = reference_squares(path, [sample for way, sample in samples.items() if way.profile != "copy"])
    for way, sample in samples.items():
        if way.profile != "copy":
            squares = stored_squares(sample, way.profile)
            pairs = zip(squares, references[sample.shard], strict=True)
            costs[way].psnr_db = [mean(psnr(stored, source) for stored, source in pairs)]
        for sampling, options in patterns.items():
            costs[way].reading[sampling] = read_clips(sample, way.profile, options)
        on_step()
    return costs


def _add(total: Cost, one: Cost) -> None:
    total.source_bytes += one.source_bytes
    total.stored_bytes += one.stored_bytes
    total.pack_cpu_seconds += one.pack_cpu_seconds
    total.psnr_db += one.psnr_db
    for sampling, reading in one.reading.items():
        for name, value in asdict(reading).items():
            setattr(total.reading[sampling], name, getattr(total.reading[sampling], name) + value)


def store(video: EncodedVideo, profile: str, folder: Path) -> Sample:
    """The only sample of a set made for it."""
    folder.mkdir()
    writer = ShardWriter(folder, "train-000000.tar")
    writer.add("video", [0], video, {})
    splits = {"train": {"samples": 1, "shards": [asdict(writer.close())]}}
    facts = {"classes": ["video"], "multi_label": False, "verified": True, "profile": {"name": profile}}
    write_manifest(folder, {**facts, "splits": splits})
    return ShardSet.open(folder, "train")[0]


def read_clips(sample: Sample, profile: str, options: ClipOptions) -> Reading:
    """Decodes training clips of a sample, the first ones of every epoch, until that has cost `CPU_SECONDS`."""
    reading = Reading()
    plans = [plan_clip(sample, Turn(0, epoch), _SEED, options) for epoch in range(PLANNED_CLIPS)]
    for plan in plans:
        _judge_steps(reading, plan, sample)

    def on_progress() -> None:
        reading.decoded += 1

    decoder = ClipDecoder(SIZE, options.num_frames, on_progress=on_progress)
    clips_a_call = CLIPS_A_CALL if profile == "jpeg" else 1
    rows = np.empty((clips_a_call, options.num_frames, SIZE, SIZE, 3), np.uint8)
    for call in count():
        first = call * clips_a_call
        requests = [request_clip(sample, plans[i % len(plans)], profile) for i in range(first, first + clips_a_call)]
        start = time.process_time()
        _decode(decoder, requests, rows)
        if call == 0 and profile == "jpeg":  # DALI has built its pipeline
            reading.decoded = 0
            continue
        reading.cpu_seconds += time.process_time() - start
        reading.clips += clips_a_call
        reading.used += sum(len(request.wanted) for request in requests)
        if reading.cpu_seconds >= CPU_SECONDS:
            return reading
    raise AssertionError


def _judge_steps(reading: Reading, plan: ClipPlan, sample: Sample) -> None:
    used = sample.frames.source_frame[list(plan.stored)].tolist()
    for (a, b), (stored_a, stored_b) in zip(pairwise(plan.frames), pairwise(used), strict=True):
        if b < a:  # a video shorter than the clip starts again
            return
        reading.steps += a != b
        reading.still += a != b and stored_a == stored_b
        reading.uneven += a != b and stored_b - stored_a != b - a


def _decode(decoder: ClipDecoder, requests: Sequence[ClipRequest], rows: NDArray[np.uint8]) -> None:
    for _, reason in decoder.decode_into(requests, rows):
        raise VideoError("decode_error", f"what was packed of it cannot be decoded: {reason}")


def psnr(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB over all values of two arrays of one shape; 99 for equal ones."""
    if image.shape != reference.shape:
        raise ValueError(f"pictures of shapes {image.shape} and {reference.shape} cannot be compared")
    error = float(np.square(image.astype(np.float64) - reference).mean())
    return min(EQUAL_DB, 10 * math.log10(255**2 / error)) if error else EQUAL_DB


def stored_squares(sample: Sample, profile: str) -> list[NDArray[np.uint8]]:
    """The centre squares of the frames that PSNR is taken of, uint8 [S, S, 3], decoded as for training."""
    rows = _psnr_rows(sample)
    box = _centre_square(sample)
    plan = ClipPlan(0, EVAL_EPOCH, (), tuple(rows), box, False)
    side = box[2]  # as large as the box: nothing is resized
    clip = np.empty((1, len(rows), side, side, 3), np.uint8)
    _decode(ClipDecoder(side, len(rows)), [request_clip(sample, plan, profile)], clip)
    return list(clip[0])


def reference_squares(path: Path, samples: Sequence[Sample]) -> dict[Path, list[NDArray[np.uint8]]]:
    """For each sample of a video, by its shard: the same squares of the source's frames, scaled alike.

    The source is decoded once for all of them.
    """
    wanted = {s.shard: s.frames.source_frame[_psnr_rows(s)].tolist() for s in samples}
    numbers = sorted({number for of_sample in wanted.values() for number in of_sample})
    squares: dict[Path, list[NDArray[np.uint8]]] = {shard: [] for shard in wanted}
    if not numbers:
        return squares
    for number, frame in zip(numbers, file_frames(path.read_bytes(), numbers), strict=True):
        for sample in samples:
            if number in wanted[sample.shard]:
                left, top, side, _ = _centre_square(sample)
                whole = scaled(np.ascontiguousarray(frame), (sample.width, sample.height))
                squares[sample.shard].append(whole[top : top + side, left : left + side])
    return squares


def _psnr_rows(sample: Sample) -> list[int]:
    last = len(sample.frames) - 1
    return sorted(set(np.linspace(0, last, PSNR_FRAMES).round().astype(int).tolist()))


def _centre_square(sample: Sample) -> tuple[int, int, int, int]:
    side = min(sample.width, sample.height)
    return (sample.width - side) // 2, (sample.height - side) // 2, side, side


def table(costs: Mapping[Way, Cost]) -> Iterator[str]:
    """The lines of the table."""
    head = ("profile", "fps", "MB", "× source", "PSNR dB", "(worst)", "pack s")
    patterns = "".join(f"  | {sampling:>8} clips/s  decoded         " for sampling in SAMPLINGS)
    yield ("".join(text.rjust(9) for text in head) + patterns).rstrip()
    for way, cost in costs.items():
        decibels = (f"{cost.mean_psnr:.1f}", f"({min(cost.psnr_db):.1f})") if cost.psnr_db else ("source", "")
        size = (f"{cost.stored_bytes / 1e6:.2f}", f"{cost.bytes_ratio:.2f}")
        seconds = f"{mean(cost.pack_cpu_seconds):.2f}"
        line = "".join(text.rjust(9) for text in (way.profile, way.fps, *size, *decibels, seconds))
        for sampling, reading in cost.reading.items():
            line += f"  | {reading.clips_per_cpu_second:>16.1f}  {reading.decoded_per_used:>7.2f}"
            line += f"  {reading.trouble(sampling):<7}"
        yield line.rstrip()


def recommend(costs: Mapping[Way, Cost], sampling: str, min_psnr: float, max_bytes: float) -> str:
    """One sentence: the smallest of the fastest ways that serve the pattern at this quality and within these bytes; or
    one that is not quite as good but much faster, for then a higher quality costs less than the slow decoding."""

    def speed(cost: Cost) -> float:
        return cost.reading[sampling].clips_per_cpu_second

    wanted = f"at {min_psnr:g} dB or more and at most {max_bytes:g} times the source's bytes"
    serving = {way: cost for way, cost in costs.items() if not cost.reading[sampling].trouble(sampling)}
    good = {way: cost for way, cost in serving.items() if cost.mean_psnr >= min_psnr}
    fitting = {way: cost for way, cost in good.items() if cost.bytes_ratio <= max_bytes}
    if not fitting:
        return (
            f"No recommendation: of {len(costs)} ways to store, {len(serving)} serve {sampling} clips, {len(good)} of "
            f"these keep {min_psnr:g} dB, none within {max_bytes:g} times the bytes; try other --fps, --quality or "
            "--max-bytes."
        )
    way, cost, is_alone = _best(fitting, speed)
    close = {
        other: c
        for other, c in serving.items()
        if min_psnr - NEAR_DB <= c.mean_psnr < min_psnr
        and c.bytes_ratio <= max_bytes
        and speed(c) >= MUCH_FASTER * speed(cost)
    }
    if close:
        faster, c, _ = _best(close, speed)
        return (
            f"Recommended: {faster}, and a higher --quality to close the gap of {min_psnr - c.mean_psnr:.1f} dB to "
            f"{min_psnr:g}: {speed(c):.3g} {sampling} clips a CPU-second ({_quality(c)}, {c.bytes_ratio:.2f} times the "
            f"bytes) beside {speed(cost):.3g} of {way} ({_quality(cost)}, {cost.bytes_ratio:.2f} times)."
        )
    reason = "the fastest" if is_alone else "the smallest of the fastest"
    hint = ""
    if way.profile == "copy" and (others := [(speed(c), str(w), c) for w, c in serving.items() if w not in good]):
        rate, other, lossy = max(others)
        hint = f" ({other} gives {rate:.3g}, but {lossy.mean_psnr:.1f} dB: try a higher --quality)"
    return (
        f"Recommended: {way}, {reason} {wanted}: {speed(cost):.3g} {sampling} clips a CPU-second, "
        f"{_quality(cost)}, {cost.bytes_ratio:.2f} times the bytes{hint}."
    )


def _best(ways: Mapping[Way, Cost], speed: Callable[[Cost], float]) -> tuple[Way, Cost, bool]:
    """The smallest of the fastest, and whether no other is as fast."""
    fastest = max(map(speed, ways.values()))
    near = {way: cost for way, cost in ways.items() if speed(cost) >= AS_FAST * fastest}
    way, cost = min(near.items(), key=lambda item: item[1].stored_bytes)
    return way, cost, len(near) == 1


def _quality(cost: Cost) -> str:
    return "the source's own frames" if cost.mean_psnr == math.inf else f"{cost.mean_psnr:.1f} dB"


if __name__ == "__main__":
    run_cli(main)
