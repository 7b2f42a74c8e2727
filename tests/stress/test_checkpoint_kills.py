"""SIGKILL for a process that saves checkpoints, at moments drawn from a seed: every folder under a final name is whole,
the newest can be resumed and holds to the last bit what was saved, and what was half written is cleaned up.

Each victim is forked from this process, which has everything imported, and goes on from the newest checkpoint that the
victim before it left. Three kills in four are aimed at one of `PHASES`, right before it or at some moment during it;
where they struck is noted in memory shared with the victim.

    STRESS_KILLS=300 pytest -s tests/stress/test_checkpoint_kills.py      (10 by default, 300 with STRESS=1)
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.video import VideoModel
from train import checkpoint
from train.build import build_model
from train.checkpoint import newest_checkpoint, read_checkpoint, resume, save_checkpoint
from train.config import Batch, Config, ModelConfig

KILLS = int(os.environ.get("STRESS_KILLS", "300" if os.environ.get("STRESS") == "1" else "10"))
SEED = int(os.environ.get("STRESS_SEED", "0"))
KEEP = 2
RUN = {"optimizer.lr": 1e-3}
FORK = multiprocessing.get_context("fork")
PHASES: dict[str, tuple[Any, str]] = {
    "clean up": (checkpoint.shutil, "rmtree"),  # type: ignore[attr-defined]
    "make the folder": (Path, "mkdir"),
    "write a file": (checkpoint, "_write"),
    "make it durable": (checkpoint, "sync_folder"),
    "name it": (Path, "rename"),
}
ALL = ["between two", "saving", *PHASES]


def set_state(model: VideoModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a run of so many steps would have come to: another for every step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.copy_(torch.rand(p.shape, generator=generator))
                state = {"exp_avg": p.clone(), "exp_avg_sq": p.square(), "step": torch.tensor(float(step))}
                optimizer.state[p] = state


def save(out: Path, step: int, model: VideoModel, optimizer: torch.optim.Optimizer) -> None:
    set_state(model, optimizer, step)
    batch = Batch(total=8, micro=8, accumulation=1)
    facts = {"run": RUN, "config": Config(), "world_size": 1, "batch": batch, "bad_samples": [], "classes": ["a", "b"]}
    save_checkpoint(out, step, model, optimizer, **facts, keep=KEEP)  # type: ignore[arg-type]


def victim(
    out: Path,
    first: int,
    parts: tuple[VideoModel, torch.optim.Optimizer],
    aim: tuple[str, int, bool],
    marks: mmap.mmap,
    told: Connection,
) -> None:
    """Saves step after step, and tells when the n-th time of the phase that is aimed at has come; may wait there."""
    phase, times, waits = aim
    seen = 0

    def watch(name: str, owner: Any, attribute: str) -> None:
        original: Callable[..., Any] = getattr(owner, attribute)

        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            before, marks[0] = marks[0], ALL.index(name)
            if name == phase:
                seen += 1
                if seen == times:
                    told.send_bytes(b"now")
                    time.sleep(60 if waits else 0)
            result = original(*arguments, **options)
            marks[0] = before
            return result

        setattr(owner, attribute, watched)

    for name, place in PHASES.items():
        watch(name, *place)
    for step in range(first, first + 1000):
        marks[0] = ALL.index("saving")
        save(out, step, *parts)
        marks[0] = 0
        if phase == ALL[0] and step == first + times:
            told.send_bytes(b"now")
        time.sleep(0.002)


def test_whatever_is_killed_while_it_saves_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    model = build_model(ModelConfig(name="tiny-clip", pretrained="none"), num_classes=2, num_frames=2, seed=0)
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.0))
    parts, marks, random = (model, optimizer), mmap.mmap(-1, 1), np.random.default_rng(SEED)
    struck: Counter[str] = Counter()
    newest, leftovers = 0, 0
    for kill in range(KILLS):
        phase = str(random.choice(list(PHASES))) if kill % 4 else ALL[0]
        aim = (phase, int(random.integers(1, 5)), bool(random.random() < 0.4))
        here, there = FORK.Pipe()
        marks[0] = 0
        process = FORK.Process(target=victim, args=(tmp_path, newest + 1, parts, aim, marks, there), daemon=True)
        process.start()
        assert here.poll(60), f"no victim came to {aim}"
        time.sleep(float(random.exponential(0.002 if phase == ALL[0] else 0.0005)))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        here.close()
        there.close()
        struck[ALL[marks[0]]] += 1

        leftovers += any(tmp_path.glob(".checkpoint-*"))
        found = sorted(tmp_path.glob("checkpoint-*"))
        for path in found:
            document, tensors = read_checkpoint(path)
            set_state(model, optimizer, document["step"])
            expected = checkpoint._state(model, optimizer)
            assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in tensors)
        path = newest_checkpoint(tmp_path)
        assert path == (found[-1] if found else None)
        last = newest
        newest = 0 if path is None else resume(path, model, optimizer, RUN)["step"]
        assert newest >= last, "a checkpoint that was there is gone"
    save(tmp_path, newest + 1, model, optimizer)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"checkpoint-{step:06d}" for step in (newest, newest + 1)]
    within = struck.total() - struck[ALL[0]]
    print(f"\n{struck.total()} kills, {within} while saving, {leftovers} left something half written; {newest} saved:")
    for name, count in struck.most_common():
        print(f"  {count:4d}  {name}")
    assert within >= KILLS // 2
    shutil.rmtree(tmp_path)
