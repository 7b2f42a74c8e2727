"""Temporal localisation: gives the proposals of a detector classes, and says how good the detections are.

    python tools/localise.py CHECKPOINT --features SET --proposals P.json --truth T.json --subset validation

The set holds features of all frames of the long videos (tools/extract_features.py), each video's key being its name in
the files, with or without the packer's number or ActivityNet's `v_`; its own classes mean nothing here. Proposals and
the truth are ActivityNet's json, the truth also a folder of THUMOS14's text files (train/localisation.py).

Each proposal is classified by frames evenly spread over it (--frames, by default as many as the model was trained on),
whose features the model pools to one. A detection's score is the proposal's times its class's probability among the
classes of the truth, or of those that --classes names; each proposal counts for its --top likeliest ones. --nms drops
detections that overlap better ones of their class. A model that reads class names (method prompt_clip) is given those
of the truth; of any other they must be among the classes of its training.

CHECKPOINT is a run's folder, one of its checkpoints, or what tools/convert_checkpoint.py made. One process; writes into
OUT: detections.json; localisation.json and .md (mAP at tIoU 0.3 to 0.7, as for THUMOS14, and 0.5 to 0.95, as for
ActivityNet, with their means); localisation.png.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; train/main.py says why

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.cli import run_cli
from pipelines.features import read_video
from pipelines.read import ShardReader
from pipelines.remote import open_set
from pipelines.shards import ShardSet, write_durably
from pipelines.subset import own_name
from tools.retrieve import add_model_arguments, machine, make_ready
from train.engine import to_device
from train.feature_sets import check_feature_set
from train.localisation import (
    ACTIVITYNET_TIOUS,
    THUMOS_TIOUS,
    Segments,
    Truth,
    average_precision,
    classify,
    frames_inside,
    mean_average_precision,
    read_segments,
    read_truth,
    suppress,
    write_segments,
)
from train.trained import Trained, open_trained

_TABLES = {"THUMOS14": THUMOS_TIOUS, "ActivityNet": ACTIVITYNET_TIOUS}
_DRAWN_VIDEOS, _DRAWN_DETECTIONS = 5, 6


def main(argv: Sequence[str] | None = None) -> int:
    """One measurement. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    truth = read_truth(arguments.truth, arguments.subset)
    if arguments.classes:
        truth = truth.of_classes(arguments.classes)
    proposals = read_segments(arguments.proposals, truth)
    trained = open_trained(arguments.checkpoint, arguments.set)
    data = trained.config.data
    shards = open_set(arguments.features, arguments.split or data.val_split or "val", cache=data.cache, window=1)
    samples, missing = samples_of(shards, truth, proposals)
    columns = columns_of(trained, truth.classes)
    check_feature_set(shards, trained.model, trained.config)
    world = make_ready(trained, arguments.precision)
    out = arguments.out or trained.folder / f"localisation-{shards.split}"
    out.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    frames, batch = arguments.frames or trained.model.num_frames, arguments.batch or 256
    given = proposals[np.flatnonzero(np.isin(proposals.video, list(samples)))]
    logits = np.zeros((len(given), len(columns)))
    reader = ShardReader()
    for video in tqdm(np.unique(given.video).tolist(), unit="video", disable=None):
        rows, sample = np.flatnonzero(given.video == video), shards[samples[video]]
        try:
            features = read_video(sample, reader)
        except ValueError as error:
            raise ValueError(f"sample {sample.key} of {shards.folder}: {error}; extract the features again") from error
        inside = frames_inside(sample.frames.source_frame / sample.fps, given.times[rows], frames)
        logits[rows] = answers(trained, features, inside, world.device, batch)[:, columns]
    reader.close()
    detections = classify(given, probabilities(logits), arguments.top)
    if arguments.nms is not None:
        detections = suppress(detections, arguments.nms)
    write_segments(out / "detections.json", truth, detections)
    result = measure(truth, detections) | {
        **{"command": shlex.join(["python", *(sys.argv if argv is None else ["tools/localise.py", *argv])])},
        **{"checkpoint": str(arguments.checkpoint), "step": trained.step},
        **{"features": arguments.features, "split": shards.split, "fingerprint": shards.fingerprint},
        **{"frames": frames, "top": arguments.top, "nms": arguments.nms},
        **{"videos": len(truth.videos), "videos_without_features": missing},
        **{"proposals": len(proposals), "detections": len(detections)},
        **{"seconds": round(time.monotonic() - start, 1), **machine(world)},
    }
    write_durably(out / "localisation.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    text = markdown(result["map"])
    write_durably(out / "localisation.md", f"# Localisation: {arguments.truth.name}\n\n{text}".encode())
    write_durably(out / "localisation.png", draw(truth, detections, result["map"]))
    print(f"{text}{out}", flush=True)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--features", required=True, metavar="SET", help="a set of frame features: a folder, or its address")
    add("--split", help="of that set (default: the run's validation split, or val)")
    add("--proposals", required=True, type=Path, metavar="JSON", help="segments with scores")
    add("--truth", required=True, type=Path, metavar="PATH", help="ActivityNet's json, or a folder of THUMOS14's files")
    add("--subset", default="", help="of the truth's json, such as validation (needed where there are several)")
    add("--classes", type=_names, metavar="A,B,…", help="only these, and the videos in which they happen")
    add("--frames", type=int, metavar="N", help="of each proposal (default: as in training)")
    add("--top", type=int, default=2, metavar="N", help="classes a proposal; 0: all (default: %(default)s)")
    add("--nms", type=float, metavar="TIOU", help="drop what overlaps a better detection by more (default: nothing)")
    arguments = parser.parse_args(argv)
    for name, low, high in (("batch", 1, 65536), ("frames", 1, 4096), ("top", 0, 10**6), ("nms", 0, 1)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} {value}: allowed is {low} to {high}")
    return arguments


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def samples_of(shards: ShardSet, truth: Truth, proposals: Segments) -> tuple[dict[int, int], int]:
    """Sample ids by the truth's videos that have proposals, and how many of these the set lacks, which is said.

    Raises ValueError for a set of no features, one with a video twice, and one that has none of them.
    """
    if shards.features is None:
        raise ValueError(f"{shards.folder} holds videos, not features: make them with tools/extract_features.py")
    ids: dict[str, set[int]] = defaultdict(set)
    for sample_id in range(len(shards)):
        key = shards[sample_id].key
        for name in (key, own_name(key)):
            ids[_plain(name)].add(sample_id)
    wanted = {video: _plain(truth.videos[video]) for video in np.unique(proposals.video).tolist()}
    for name in wanted.values():
        if len(ids[name]) > 1:
            raise ValueError(f"{shards.folder} has {len(ids[name])} videos {name!r}; pack each once")
    found = {video: min(ids[name]) for video, name in wanted.items() if ids[name]}
    missing = [truth.videos[video] for video in wanted if video not in found]
    if missing:
        text = f"{len(missing)} of {len(wanted)} videos with proposals are not in {shards.folder}, first {missing[0]!r}"
        if not found:
            raise ValueError(f"{text}: name the split with --split, or extract the features of these videos")
        print(f"warning: {text}; nothing is detected in them", file=sys.stderr, flush=True)
    return found, len(missing)


def _plain(name: str) -> str:
    """A video's name without what ActivityNet puts before it in the names of files."""
    return name.removeprefix("v_")


def columns_of(trained: Trained, names: Sequence[str]) -> list[int]:
    """Which of the model's logits are those of the classes; a model that reads class names is given these.

    Raises ValueError where the model knows other classes.
    """
    if trained.model.reads_class_names:
        trained.model.name_classes(names)
        return list(range(len(names)))
    if trained.classes is None:
        raise ValueError(f"{trained.folder} does not say what its classes are, so the truth's cannot be found in it")
    for name in names:
        if name not in trained.classes:
            raise ValueError(f"{name!r} of the truth is none of the {len(trained.classes)} classes of {trained.folder}")
    return [trained.classes.index(name) for name in names]


@torch.inference_mode()
def answers(
    trained: Trained,
    features: NDArray[np.float16],
    rows: NDArray[np.int64],
    device: torch.device,
    batch: int,
) -> NDArray[np.float64]:
    """Logits [p, C] of clips of a video's features [n, D], the frames of each in `rows` [p, T]."""
    parts = (torch.from_numpy(features[rows[i : i + batch]]) for i in range(0, len(rows), batch))
    return torch.cat([trained.model(to_device(part, device)) for part in parts]).double().cpu().numpy()


def probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over the classes."""
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def measure(truth: Truth, detections: Segments) -> dict[str, Any]:
    """mAP by tIoU for each of the two conventions, and the average precision of each class at 0.5."""
    by_class = average_precision(truth, detections, [0.5])[:, 0]
    return {
        "map": {name: mean_average_precision(truth, detections, tious) for name, tious in _TABLES.items()},
        "class_precision_at_0.5": dict(zip(truth.classes, by_class.round(6).tolist(), strict=True)),
    }


def markdown(means: Mapping[str, Mapping[str, float]]) -> str:
    """A table a convention, in percent."""
    lines = []
    for name, by_tiou in means.items():
        lines += [
            f"| mAP %, {name}, at tIoU | {' | '.join(by_tiou)} |",
            f"| --- |{' ---: |' * len(by_tiou)}",
            f"| | {' | '.join(f'{100 * value:.1f}' for value in by_tiou.values())} |",
            "",
        ]
    return "\n".join(lines)


def draw(truth: Truth, detections: Segments, means: Mapping[str, Mapping[str, float]]) -> bytes:
    """A PNG: mAP over tIoU, and for a few videos what happens in them above the best detections."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, strips) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=[1, 2.2], layout="constrained")
    at = {float(tiou): 100 * v for by_tiou in means.values() for tiou, v in by_tiou.items() if tiou != "mean"}
    curve.plot(sorted(at), [at[tiou] for tiou in sorted(at)], "o-")
    curve.set(xlabel="tIoU", ylabel="mAP, %", ylim=(0, 105))
    busiest = np.argsort(-np.bincount(truth.segments.video, minlength=len(truth.videos)), kind="stable")
    ticks = {}
    for place, video in enumerate(busiest[:_DRAWN_VIDEOS].tolist()):
        wanted, found = (s[np.flatnonzero(s.video == video)] for s in (truth.segments, detections))
        best = found[np.argsort(-found.score, kind="stable")[:_DRAWN_DETECTIONS]]
        for row, shown, alpha in ((2.5 * place, wanted, 1.0), (2.5 * place + 1, best, 0.45)):
            for (start, end), label in zip(shown.times.tolist(), shown.label.tolist(), strict=True):
                strips.barh(row, end - start, left=start, height=0.8, color=f"C{label % 10}", alpha=alpha)
                strips.text(
                    start, row, truth.classes[label][:24], fontsize=6, va="center", clip_on=True, parse_math=False
                )
        ticks[2.5 * place + 0.5] = truth.videos[video][:24]
    strips.set_yticks(list(ticks), list(ticks.values()), fontsize=7, parse_math=False)
    strips.invert_yaxis()
    strips.set(xlabel="seconds", title=f"truth (above) and the {_DRAWN_DETECTIONS} best detections")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run_cli(main)
