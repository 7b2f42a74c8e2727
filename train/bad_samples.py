"""The samples of a run that could not be decoded, over all ranks, splits and resumes: bad_samples.tsv, the stop rule.

Each rank's loader replaces what it finds to be bad by a rule that needs nobody else. The ranks tell each other what
they found when they meet anyway: in the first step, and in those that log, save or evaluate. Then rank 0 writes each
bad sample down once, and all stop alike when too many are bad. A rank that cannot go on (all that it reads is bad, its
decoders do not start) says so at the next meeting and repeats its last batch until then, for the others wait for it in
every step; nothing is logged or saved in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path

from pipelines.loader import BadSample, ClipBatch, ClipLoader, check_bad_share
from pipelines.shards import ShardSet, write_durably
from train.engine import World

FILE_NAME = "bad_samples.tsv"
COLUMNS = ("sample_id", "key", "split", "shard", "reason")


class BadSamples:
    """Of the run that writes to `out`; every process has one. `met` are the ids of the training split that a resumed
    run had met when it was saved."""

    def __init__(self, world: World, out: Path, max_bad_fraction: float, met: Iterable[int] = ()) -> None:
        self._world, self._path, self._max_bad_fraction = world, out / FILE_NAME, max_bad_fraction
        self.met = set(met)
        """Bad ids of the training split so far, of all ranks."""
        self._found: dict[int, BadSample] = {}  # of the training split, by all ranks since this process began
        self._told = 0  # of what this rank's training loader found
        self._last: ClipBatch | None = None
        self._failure: Exception | None = None

    def next_batch(self, loader: ClipLoader) -> ClipBatch:
        """The next training batch, or the last one again while this rank cannot go on.

        In the first step the ranks meet: when one of them has no batch, all raise its ValueError.
        """
        batch = self._last
        try:
            if self._failure is None:
                batch = next(loader)
        except (ValueError, OSError) as error:
            self._failure = error
        if self._last is None or self._world.size == 1:
            self._world.agree(self._failure)
        assert batch is not None
        self._last = batch
        return batch

    def meet(self, loader: ClipLoader, shards: ShardSet, planned_before: int) -> None:
        """Tells all ranks what the training loaders have found since the last time; all call it in the same step.

        Raises ValueError, on all ranks alike, when one of them cannot go on, or when of all samples planned so far,
        `planned_before` of them in earlier runs, too many are bad.
        """
        self._world.agree(self._failure)
        new = dict(list(loader.bad.items())[self._told :])
        self._told = len(loader.bad)
        bad, planned = self._share(new, loader.planned, shards.split)
        self._found |= bad
        self.met |= bad.keys()
        check_bad_share(len(self.met), planned_before + planned, self._max_bad_fraction, shards, self._found)

    def meet_evaluated(self, found: Mapping[int, BadSample], shards: ShardSet) -> None:
        """The same for what this rank found in an evaluation, which is judged by itself."""
        bad, _ = self._share(found, 0, shards.split)
        check_bad_share(len(bad), len(shards), self._max_bad_fraction, shards, bad)

    def _share(self, found: Mapping[int, BadSample], planned: int, split: str) -> tuple[dict[int, BadSample], int]:
        """What all ranks have found, in order of their ids, and the sum of what they have planned."""
        told = [planned, [[sample_id, *astuple(sample)] for sample_id, sample in found.items()]]
        answers = [json.loads(text) for text in self._world.gather(json.dumps(told))]
        rows = sorted(row for _, rows in answers for row in rows)
        bad = {sample_id: BadSample(key, shard, reason) for sample_id, key, shard, reason in rows}
        if bad:
            self._world.on_first(lambda: self._write(bad, split))
        return bad, sum(planned for planned, _ in answers)

    def _write(self, bad: Mapping[int, BadSample], split: str) -> None:
        """Adds those that are not in the file yet, which an earlier process of the run may have begun."""
        header = "\t".join(COLUMNS) + "\n"
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else header
        known = {(line.split("\t")[0], line.split("\t")[2]) for line in text.splitlines()[1:]}
        for sample_id, sample in bad.items():
            if (str(sample_id), split) not in known:
                cells = (str(sample_id), sample.key, split, sample.shard, sample.reason)
                text += "\t".join(" ".join(cell.split()) for cell in cells) + "\n"
        write_durably(self._path, text.encode())
