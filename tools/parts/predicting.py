"""What tools/predict.py does: has videos, or windows of them, cut and decoded, and asks the model what they show."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.files import FileSet, find_videos, printable
from pipelines.loader import ClipLoader, default_workers
from pipelines.plan import ClipOptions, eval_turns
from pipelines.remote import open_set
from pipelines.shards import ShardSet, read_manifest
from pipelines.stream import StreamError
from pipelines.windows import WindowedVideo
from tools.evaluate import with_views
from tools.parts.captions import Label, Span, annotate
from tools.parts.prediction_files import (
    KEY_WIDTH,
    Answer,
    Outputs,
    annotation_places,
    appearing,
    file_names,
    label_cells,
    label_columns,
)
from tools.parts.timeline import Timeline, classify_windows
from tools.retrieve import machine, make_ready
from train.engine import World, to_device
from train.feature_sets import check_feature_set
from train.run_folder import read_answers
from train.trained import Trained, open_trained

Places = dict[str, tuple[Path, Path]]
"""A video's key → itself, and where it goes with labels."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model that is ready to answer."""

    trained: Trained
    world: World
    options: ClipOptions
    """How a video, or a window of it, is cut into views."""
    names: tuple[str, ...]
    multi_label: bool
    micro_batch: int
    top: int
    """Classes that are told of a video."""

    @torch.no_grad()
    def probabilities(self, clips: torch.Tensor) -> NDArray[np.float64]:
        """Of clips uint8 [B, T, S, S, 3] (or frame features): [B, C]; not finite where the model's answer is not."""
        logits = self.trained.model(to_device(clips, self.world.device)).double()
        answers: NDArray[np.float64] = (logits.sigmoid() if self.multi_label else logits.softmax(1)).cpu().numpy()
        return answers

    def best(self, probabilities: NDArray[np.float64], key: str) -> list[Label]:
        """The likeliest classes, the first of equally likely ones first. ValueError where an answer is no number, for
        then all are in doubt."""
        if not np.isfinite(probabilities).all():
            raise ValueError(
                f"the model's answer to {key} is not a finite number: its weights are damaged, or its precision is too "
                "low (--precision fp32)"
            )
        order = np.argsort(-probabilities, kind="stable")[: self.top]
        return [(self.names[c], float(probabilities[c])) for c in order]


def predict_all(arguments: argparse.Namespace) -> int:
    """The whole program; its exit status. Raises ValueError or OSError for what a user can mend."""
    paths, given = find_videos(arguments.videos), read_classes(arguments.classes)
    places = None if arguments.annotate is None else annotation_places(arguments.annotate, paths)
    trained = open_trained(arguments.checkpoint, arguments.set)
    shards = open_shards(trained, arguments) if arguments.shards else None
    names = choose_classes(trained, given, None if shards is None else shards.classes)
    several = arguments.multi_label or (several_labels(trained) if shards is None else shards.multi_label)
    options = with_views(trained.config.data, arguments.views or ("1x1" if arguments.window else None))
    world = make_ready(trained, arguments.precision)
    batch, top = arguments.batch or trained.micro_batch, min(arguments.top or len(names), len(names))
    predictor = Predictor(trained, world, options, names, several, batch, top)
    if trained.assumed:
        print(trained.assumed, file=sys.stderr, flush=True)
    if arguments.window:
        return draw_timelines(predictor, paths, places, arguments)
    if shards is not None:
        return predict_set(predictor, shards, {}, arguments)
    workers = min(default_workers(1, world.device.type), len(paths))
    seconds = arguments.timeout
    with closing(FileSet(paths, names, multi_label=several, workers=workers, timeout_seconds=seconds)) as files:
        return predict_set(predictor, files, places or {}, arguments)


def read_classes(text: str | None) -> tuple[str, ...]:
    """Names from the command line, or from a file with one a line; none for None. Raises ValueError or OSError."""
    if text is None:
        return ()
    path, parts = Path(text), text.split(",")
    if len(parts) == 1 and (path.suffix == ".txt" or path.is_file()):
        if path.stat().st_size > 2**24:
            raise ValueError(f"--classes {path}: {path.stat().st_size} bytes are no list of class names, one a line")
        try:
            parts = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--classes {path}: not a text in UTF-8; give class names, one a line") from error
    names = tuple(part.strip() for part in parts if part.strip())
    if len(names) < 2 or len(set(names)) < len(names):
        what = "the same name twice" if len(set(names)) < len(names) else "fewer than two"
        raise ValueError(f"--classes {text}: {what}; give two or more different names, or a file with one a line")
    return names


def open_shards(trained: Trained, arguments: argparse.Namespace) -> ShardSet:
    """The packed set, as tools/evaluate.py takes it."""
    data = trained.config.data
    shards = open_set(arguments.shards, arguments.split or data.val_split or "val", cache=data.cache, window=1)
    check_feature_set(shards, trained.model, trained.config)
    return data.part.of_testing(shards)


def choose_classes(trained: Trained, given: Sequence[str], of_set: Sequence[str] | None) -> tuple[str, ...]:
    """What the model's answers are called; a model that reads class names is told those asked for."""
    model, own = trained.model, trained.classes
    if model.reads_class_names:
        names = tuple(given or of_set or own or ())
        if not names:
            raise ValueError(f"{trained.config.model.method} compares videos with class names: add --classes A,B,C")
        model.name_classes(names)
        return names
    if model.num_classes is None:
        raise ValueError(f"{trained.folder} has no classifier, so it cannot name what it sees; train it")
    if given and own is not None and tuple(given) != own:
        raise ValueError(
            f"--classes: {trained.folder} was trained for its own {len(own)} classes ({', '.join(own[:3])} …) and "
            "reads no names; leave it out (methods zero_shot and prompt_clip answer for any classes)"
        )
    names = tuple(own or given or of_set or [f"class{c}" for c in range(model.num_classes)])
    if len(names) != model.num_classes:
        raise ValueError(f"{trained.folder} was trained for {model.num_classes} classes, {len(names)} names are given")
    return names


def several_labels(trained: Trained) -> bool:
    """Whether a video of the set that a model was trained on may have several labels, as far as that can be seen."""
    with suppress(ValueError, OSError):
        answers = read_answers(trained.folder)
        if answers is not None:
            return answers.evaluation.multi_label
    with suppress(ValueError, OSError):
        return bool(read_manifest(Path(trained.config.data.shards))["multi_label"])
    return False


def predict_set(predictor: Predictor, shards: ShardSet, places: Places, arguments: argparse.Namespace) -> int:
    """Every video of a set: a line, a row and an entry each; the exit status."""
    failed, silent, first = 0, 0, ""
    key_width = max(len(shard.name) for shard in shards.shards) if isinstance(shards, FileSet) else KEY_WIDTH
    with ExitStack() as stack:
        width = min(key_width, KEY_WIDTH)
        outputs = Outputs(arguments.json, arguments.csv, top=predictor.top, key_width=width, stack=stack)
        outputs.begin(facts_of(predictor, arguments.checkpoint))
        bar = stack.enter_context(tqdm(total=len(shards) * predictor.options.num_views, unit="clip", disable=None))
        for answer in stack.enter_context(closing(predict(predictor, shards, bar))):
            if answer.key in places and answer.labels:
                try:
                    write_annotated(*places[answer.key], [(float("inf"), answer.labels)])
                except StreamError as error:
                    answer = dataclasses.replace(answer, error=answer.error or f"no annotated video: {error}")
            outputs.add(answer, shown=bool(answer.labels) or len(shards) > 1)  # a lone one's error is raised below
            if answer.error:
                failed, silent = failed + 1, silent + (not answer.labels)
                first = first or f"{answer.key}: {answer.error}"
        outputs.end(failed)
    if silent == len(shards):
        raise ValueError(_nothing_decodes(silent, first))
    if failed:
        print(f"{failed} of {len(shards)} videos cannot be decoded, or not as a whole", file=sys.stderr)
    return 1 if failed else 0


def predict(predictor: Predictor, shards: ShardSet, bar: Any) -> Generator[Answer, None, None]:
    """An answer for every video of a set, in its order; `bar` counts views. Raises ValueError for answers that are no
    numbers, OSError where decoding cannot go on."""
    options, data, device = predictor.options, predictor.trained.config.data, predictor.world.device
    views, total = options.num_views, len(shards) * options.num_views
    micro_batch = min(predictor.micro_batch, total)
    loader = ClipLoader(
        shards,
        eval_turns(len(shards), views, micro_batch=micro_batch, rank=0, world=1),
        micro_batch=micro_batch,
        size=predictor.trained.model.geometry.image_size,
        options=options,
        workers=data.workers or default_workers(1, device.type),
        prefetch=data.prefetch,
        max_bad_fraction=1.0,
        device=device,
    )
    of_video: list[NDArray[np.float64]] = []
    done = 0
    with loader, _quiet("pipelines.loader"):  # what cannot be decoded stands among the answers
        for batch in loader:
            answers = predictor.probabilities(batch.frames)
            for answer, valid in zip(answers[: total - done], batch.valid.tolist(), strict=False):  # without padding
                of_video += [answer] if valid else []
                done += 1
                bar.update()
                if done % views == 0:
                    sample_id = done // views - 1
                    key, bad = _key(shards, sample_id), loader.bad.get(sample_id)
                    labels = predictor.best(np.mean(of_video, 0), key) if of_video else []
                    yield Answer(
                        key, labels, len(of_video), "" if bad is None else bad.reason.removeprefix("VideoError: ")
                    )
                    of_video = []


def facts_of(predictor: Predictor, checkpoint: Path) -> dict[str, Any]:
    """What all of a round's predictions have in common."""
    trained, options = predictor.trained, predictor.options
    precision = "bf16" if trained.model.compute_dtype == torch.bfloat16 else "fp32"
    return {
        **{"checkpoint": str(checkpoint), "step": trained.step},
        **{"classes": len(predictor.names), "multi_label": predictor.multi_label},
        **{"views": f"{options.test_clips}x{options.test_crops}", "averaging": "prob"},
        **{"num_frames": options.num_frames, "sampling": options.sampling, "interval": options.interval},
        **{"precision": precision, **machine(predictor.world)},
    }


def draw_timelines(
    predictor: Predictor, paths: Sequence[Path], places: Places | None, arguments: argparse.Namespace
) -> int:
    """A table and a picture of every video; the exit status."""
    out = arguments.out or predictor.trained.folder / "timelines"
    out.mkdir(parents=True, exist_ok=True)
    errors = []
    for path, name in zip(paths, file_names(paths), strict=True):
        key = printable(path)
        try:
            video = WindowedVideo.open(path, arguments.window, arguments.stride, arguments.timeout)
            timeline = draw_timeline(predictor, video, key, out / name)
            if places is not None:
                write_annotated(*places[key], timeline.spans, video.facts.num_frames)
        except StreamError as error:
            errors.append(f"{key}: {error}")
            if len(paths) > 1:
                tqdm.write(f"{key}: cannot be decoded: {error}")
        else:
            tqdm.write(f"{key}: {timeline.summary()}; {out / name}.csv and .png")
    if len(errors) == len(paths):
        raise ValueError(_nothing_decodes(len(errors), errors[0]))
    return 1 if errors else 0


def draw_timeline(predictor: Predictor, video: WindowedVideo, key: str, base: Path) -> Timeline:
    """Writes BASE.csv and BASE.png. Raises StreamError where the video cannot be decoded."""
    timeline = Timeline(predictor.names, video)
    clips = video.clips(predictor.options, predictor.trained.model.geometry.image_size)
    with ExitStack() as stack:
        rows = csv.writer(stack.enter_context(appearing(Path(f"{base}.csv"))), lineterminator="\n")
        rows.writerow(["start_seconds", "end_seconds", *label_columns(predictor.top)])
        bar = stack.enter_context(tqdm(total=len(video.windows), unit="window", desc=key, leave=False, disable=None))
        answers = classify_windows(clips, predictor.probabilities, predictor.micro_batch)
        for window, picture, answer in stack.enter_context(closing(answers)):
            labels = predictor.best(answer, key)
            rows.writerow([f"{window.start_seconds:.6f}", f"{window.end_seconds:.6f}", *label_cells(labels)])
            timeline.add(window, picture, answer, labels)
            bar.update()
    timeline.draw(Path(f"{base}.png"), key)
    return timeline


def write_annotated(path: Path, out: Path, spans: Sequence[Span], num_frames: int | None = None) -> None:
    """A video with its labels, see `captions.annotate`. Raises StreamError where it cannot be decoded or written."""
    with tqdm(total=num_frames, unit="frame", desc=str(out), leave=False, disable=None) as bar:
        for _ in annotate(path, out, spans):
            bar.update()


def _nothing_decodes(count: int, first: str) -> str:
    return f"cannot be decoded: {first}" if count == 1 else f"none of the {count} videos can be decoded, first {first}"


def _key(shards: ShardSet, sample_id: int) -> str:
    name = shards.shards[shards.shard_of(sample_id)].name
    if isinstance(shards, FileSet):
        return name
    try:
        return shards[sample_id].key
    except (ValueError, OSError):
        return f"sample {sample_id} of {name}"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
