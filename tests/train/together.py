"""Runs in processes that are forked from one which has everything imported: what they said and how they ended."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipelines.cli import one_of_several, run_cli


def poison(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Makes the loss NaN in the micro-batches of these numbers, from 1."""
    from train.step import Step

    original, calls = Step.loss, itertools.count(1)

    def loss(self: Step, batch: Any) -> Tensor:
        found = original(self, batch)
        return found * float("nan") if next(calls) in steps else found

    patch.setattr(Step, "loss", loss)


def hang(patch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the micro-batch of this number never end."""
    from train.step import Step

    original, calls = Step.loss, itertools.count(1)

    def loss(self: Step, batch: Any) -> Tensor:
        hangs = next(calls) == step
        while hangs:
            time.sleep(0.01)
        return original(self, batch)

    patch.setattr(Step, "loss", loss)


def rank_main(
    rank: int, world: int, port: int, errors: str, argv: list[str], nan_at: dict[int, int], hang_at: int
) -> None:
    """One process of a run."""
    os.dup2(os.open(f"{errors}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    from train.main import main

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if rank in nan_at:
        poison(pytest.MonkeyPatch(), nan_at[rank])
    if hang_at:
        hang(pytest.MonkeyPatch(), hang_at)
    run_cli(lambda: one_of_several(lambda: main(argv)))


class Together:
    """Some processes of a run; as a context manager, so that none outlives its test."""

    def __init__(
        self,
        tmp_path: Path,
        argv: list[str],
        *,
        processes: int = 2,
        nan_at: Mapping[int, int] | None = None,
        hang_at: int = 0,
    ) -> None:
        """`nan_at`: rank → the step in which its loss is NaN; `hang_at`: the step that none of them ends."""
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["train.start", "train.control", "deepspeed"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._errors = tmp_path / "errors"
        more = (str(self._errors), argv, dict(nan_at or {}), hang_at)
        places = [(rank, processes, port, *more) for rank in range(processes)]
        self.ranks: list[BaseProcess] = [forks.Process(target=rank_main, args=place) for place in places]

    def __enter__(self) -> Together:
        for rank in self.ranks:
            rank.start()
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def send(self, rank: int, signum: int) -> None:
        os.kill(self.ranks[rank].pid or 0, signum)

    def end(self) -> list[int | None]:
        """How they ended."""
        for rank in self.ranks:
            rank.join(60)
        return [rank.exitcode for rank in self.ranks]

    def said(self) -> list[str]:
        """The lines on stderr."""
        paths = [self._errors.with_name(f"errors-{rank}") for rank in range(len(self.ranks))]
        return [line for path in paths for line in path.read_text().splitlines()]
