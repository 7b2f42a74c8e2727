"""What a report is made of: a run's folder, its settings, its answers, its set and its model, each read when a part of
the report first asks for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.backbone import image_size
from pipelines.plan import num_steps
from pipelines.remote import open_set
from pipelines.shards import ShardSet
from train.config import Config
from train.report_clips import ShownClip, of_different_classes, read_frames, surest
from train.resolve import config_from_dict
from train.run_folder import METRICS, RUN, Answers, RunFolder, read_answers, read_run
from train.trained import Trained, open_trained

EVALUATION = "metrics.json"
"""Of a folder of tools/evaluate.py, which has no run.json."""
MISTAKES = 16
"""Clips shown of those that were not recognised."""
MAPS = 4
"""Clips whose attention is shown."""
_MOST_STEPS = 2**53  # that can be drawn


class NotThere(Exception):
    """Why a part of the report is missing, for its reader."""


@dataclass(frozen=True)
class Source:
    """Of one report; each thing is read when it is first asked for, and `NotThere` says why it cannot be had."""

    run: RunFolder
    folder: Path
    """The run's, or that of an evaluation of it."""
    evaluation: Mapping[str, Any]
    """metrics.json of an evaluation; empty for the run's own."""
    fetches: bool

    @classmethod
    def find(cls, folder: Path, fetches: bool) -> Source:
        """ValueError or OSError: no run and no evaluation, or damaged."""
        if (folder / RUN).is_file() or not (folder / EVALUATION).is_file():
            return cls(_checked(read_run(folder)), folder, {}, fetches)
        try:
            document = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
            checkpoint = Path(document["checkpoint"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / EVALUATION} is damaged ({error})") from error
        runs = (folder.parent, checkpoint, checkpoint.parent)
        for run in runs:
            if (run / RUN).is_file():
                return cls(_checked(read_run(run)), folder, document, fetches)
        raise ValueError(f"{folder} is an evaluation of {checkpoint}, which is no run: reports are of runs")

    @property
    def title(self) -> str:
        name = self.folder.resolve().name
        return f"{self.run.path.resolve().name}: {name}" if self.evaluation else name

    @property
    def subtitle(self) -> str:
        model = self.run.facts["config"]["model"]
        parts = [f"{model.get('method')} on {model.get('name')}", self.state]
        if self.evaluation:
            parts.append(f"evaluated with {self.evaluation.get('views')} views in {self.evaluation.get('precision')}")
        return "; ".join(parts)

    @property
    def state(self) -> str:
        """How far the run got."""
        step = max((line["step"] for line in self.run.lines), default=0)
        if self.run.of_kind("end"):
            return f"finished after {step} steps"
        try:
            of = f" of {self.planned_steps}"
        except NotThere:
            of = ""
        return f"not finished: step {step}{of} is the last that was logged"

    @cached_property
    def config(self) -> Config:
        try:
            return config_from_dict(self.run.facts["config"])
        except (ValueError, OverflowError) as error:
            raise NotThere(f"the settings in {RUN} are not those of a run of this version: {error}") from error

    @property
    def planned_steps(self) -> int:
        batch = self.config.deepspeed["train_batch_size"]
        return num_steps(self.config.schedule.epochs, self.run.facts["samples"], batch)

    @cached_property
    def answers(self) -> Answers:
        """Of which at least one is valid."""
        try:
            answers = read_answers(self.folder)
        except (ValueError, OSError) as error:
            raise NotThere(error) from error
        if answers is None:
            raise NotThere(self._why_unanswered())
        if not answers.evaluation.valid.any() or not np.isfinite(answers.evaluation.logits).all():
            raise NotThere(f"the answers in {self.folder} are of no use: none is valid, or some are no finite numbers")
        return answers

    def _why_unanswered(self) -> str:
        if not self.config.data.val_split:
            return "The run had no validation split (data.val_split is empty), so nothing is known of its answers."
        return "There are no answers to a last evaluation yet: the run has not ended."

    @cached_property
    def shards(self) -> ShardSet:
        """What was evaluated, or without a validation split what was learned from."""
        data = self.config.data
        location = str(self.evaluation.get("shards") or data.shards)
        if "://" in location and not self.fetches:
            raise NotThere(f"No clips are fetched from {location} at the end of a training: {again(self.folder)}")
        split = str(self.evaluation.get("split") or data.val_split or data.train_split)
        try:
            shards = open_set(location, split, cache=data.cache, window=1)
            shards = data.part.of_testing(shards) if split != data.train_split else shards
        except (ValueError, OSError) as error:
            raise NotThere(f"The set cannot be opened: {error}") from error
        if shards.features is not None:
            raise NotThere(f"{location} holds features in place of frames: there is nothing to look at.")
        return shards

    @cached_property
    def mistakes(self) -> list[ShownClip]:
        """All of them, the surest first."""
        return surest(self.answers, right=False)

    @cached_property
    def looked_at(self) -> list[ShownClip]:
        """Those whose attention is drawn: the surest answers, right and wrong; where nothing was answered, samples from
        all over the split."""
        try:
            wrong = of_different_classes(self.mistakes[:MISTAKES], MAPS // 2)
            return [*of_different_classes(surest(self.answers, right=True), MAPS - len(wrong)), *wrong]
        except NotThere:
            return [self._unanswered(number) for number in self._spread(MAPS)]

    @cached_property
    def frames(self) -> dict[int, NDArray[np.uint8]]:
        """Of the samples that are shown, by their place in the split: the middle clip as evaluation cuts it, uint8 RGB
        [T, S, S, 3]; without those that cannot be decoded."""
        shards, clips = self.shards, self.looked_at
        try:
            clips = [*self.mistakes[:MISTAKES], *clips]
            same = len(shards) == len(self.answers.keys)
            if not same or any(shards[clip.sample_id].key != clip.key for clip in clips):
                raise ValueError(f"{shards.folder} is not what it was when the answers were given")
        except NotThere:
            pass  # without answers there is nothing to compare
        except (ValueError, OSError) as error:
            raise NotThere(f"No clip is shown: {error}.") from error
        names = ("num_frames", "sampling", "interval")
        given = {name: self.evaluation[name] for name in names if name in self.evaluation}
        try:
            options = replace(self.config.data, test_clips=1, test_crops=1, **given)
            return read_frames(shards, [clip.sample_id for clip in clips], options, image_size(self.config.model.name))
        except (ValueError, OSError, TypeError) as error:
            raise NotThere(f"Clips cannot be read: {error}") from error

    def _spread(self, count: int) -> Iterable[int]:
        return dict.fromkeys(len(self.shards) * i // count for i in range(count))

    def _unanswered(self, sample_id: int) -> ShownClip:
        try:
            sample = self.shards[sample_id]
        except (ValueError, OSError) as error:
            raise NotThere(f"No clip is shown: {error}") from error
        names = tuple(self.shards.classes[label] for label in sample.labels)
        return ShownClip(sample_id, sample.key, names, answer="", probability=0.0)

    @cached_property
    def trained(self) -> Trained:
        try:
            return open_trained(self.run.path)
        except (ValueError, OSError) as error:
            raise NotThere(f"The model cannot be loaded: {error}") from error


def _checked(run: RunFolder) -> RunFolder:
    """The run, if run.json holds what a report relies on; else ValueError."""
    facts = run.facts
    config, parameters = facts["config"], facts["parameters"]
    sections = isinstance(config, dict) and all(isinstance(section, dict) for section in config.values())
    fits = {
        "config": sections and isinstance(config.get("model"), dict),
        "parameters": isinstance(parameters, dict)
        and all(isinstance(parameters.get(name), int) for name in ("total", "trainable")),
        "samples": isinstance(facts["samples"], int) and facts["samples"] > 0,
        "packages": isinstance(facts["packages"], dict),
        **{name: isinstance(facts.get(name, []), list) for name in ("command", "launcher")},
    }
    for name, good in fits.items():
        if not good:
            raise ValueError(f"{run.path / RUN}: {name} is not as the trainer writes it; the file is damaged")
    if any(not 0 <= line["step"] < _MOST_STEPS for line in run.lines):
        raise ValueError(f"{run.path / METRICS}: a step is not as the trainer writes it; the file is damaged")
    return run


def again(folder: Path) -> str:
    """The command that writes a report once more."""
    return f"python tools/report.py {shlex.quote(str(folder))}"
