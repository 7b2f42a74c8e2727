"""Starting small training runs, in this process or in others, and reading what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.shell import shell_environment
from train.main import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "train" / "main.py")
FP32 = "ds.torch_autocast.enabled=false"


def arguments(packed: Path, out: Path, *settings: str) -> list[str]:
    """Command line of a traced run: random tiny CLIP, 4 frames, batch 8, DropPath and dropout on."""
    small = {
        "data.shards": packed,
        "data.num_frames": 4,
        "data.workers": 1,
        "model.pretrained": "none",
        "model.drop_path": 0.2,
        "model.head_dropout": 0.5,
        "ds.train_batch_size": 8,
        "ds.train_micro_batch_size_per_gpu": 8,
        "schedule.epochs": 3,
        "train.eval_every": 0,
        "run.out": out,
        "run.trace": "true",
        "run.report": "false",
    }
    given = [f"{key}={value}" for key, value in small.items()] + list(settings)
    return ["--recipe", "demo", *(part for setting in given for part in ("--set", setting))]


def run_here(packed: Path, out: Path, *settings: str, resume: bool = False) -> None:
    """A run in this process."""
    assert main(arguments(packed, out, *settings) + ["--resume"] * resume) == 0


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """A program with the environment of a shell, whatever this process has joined."""
    env = shell_environment(**environment)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)  # type: ignore[call-overload]


def launch(processes: int, packed: Path, out: Path, *settings: str) -> subprocess.Popen[str]:
    """A run under DeepSpeed's launcher on this machine's CPU."""
    port = str(29500 + os.getpid() % 1000 + 7 * len(settings))
    place = ("--num_accelerators", str(processes), "--master_port", port)
    return start("deepspeed", *place, SCRIPT, *arguments(packed, out, *settings), DS_ACCELERATOR="cpu")


def launch_machines(packed: Path, out: Path, *settings: str) -> list[subprocess.Popen[str]]:
    """A run on two machines of one slot each, as train/README.md says for schedulers: here both are this one."""
    hostfile = out.with_suffix(".hostfile")
    hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
    place = ("--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1")
    port = ("--master_port", str(29500 + os.getpid() % 1000 + 3))
    command = (SCRIPT, *arguments(packed, out, *settings))
    return [
        start("deepspeed", *place, *port, "--node_rank", str(rank), *command, DS_ACCELERATOR="cpu") for rank in (0, 1)
    ]


def trace(out: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank saw, a line a micro-batch."""
    return [json.loads(line) for line in (out / f"trace-{rank}.jsonl").read_text().splitlines()]


def metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
