"""Programs as a person's shell runs them: in the environment that it would give them, whatever the tests' own process
has joined; or, where starting another Python would cost more than it shows, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from pipelines.cli import run_cli

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets, and a training within this process leaves behind."""


def shell_environment(**more: str) -> dict[str, str]:
    """Environment variables with the programs of this Python's folder first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"} | more


def call_program(main: Callable[[], int | None], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A program's `main` with a command line, in this process: its exit status and what it printed."""
    out, err, words = io.StringIO(), io.StringIO(), [f"{main.__module__}.py", *map(str, arguments)]
    status: object = 0
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(main)
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
