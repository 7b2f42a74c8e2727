"""The environment that a person's shell would give a program, whatever the tests' own process has joined."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets, and a training within this process leaves behind."""


def shell_environment(**more: str) -> dict[str, str]:
    """Environment variables with the programs of this Python's folder first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"} | more
