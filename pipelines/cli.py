"""How every command-line program of the project ends: exit status 0, or one clear line and status 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ACTIVATE = "source .venv/bin/activate"
_VENV = Path(__file__).resolve().parents[1] / ".venv"


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with its status (None counts as 0).

    Bad input is reported by the library as ValueError or OSError; a user sees its text as one line, never a
    traceback, and exit status 2. `TRACEBACK=1` in the environment shows where it came from. So is a package that
    another Python than the project's lacks. Anything else is a defect of ours and keeps its traceback.
    """
    try:
        status = main() or 0
        if sys.stdout is not None:  # None: it was closed when we started
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") == "1":
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        if not is_other_python() or os.environ.get("TRACEBACK") == "1":
            raise
        which = f"{sys.executable}, not the project's Python"
        print(f"error: no package {error.name} in {which}: {ACTIVATE}", file=sys.stderr)
        status = 2
    sys.exit(status)


def is_other_python() -> bool:
    """Whether this is not the Python of .venv, where `make setup` has put every package."""
    return Path(sys.prefix).resolve() != _VENV.resolve() and any(_VENV.glob(".setup-*"))


def writable(path: Path, option: str) -> Path:
    """A file that an option names and that is written at the end; ValueError, before any work, where it cannot be."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"{option} {path}: {what}; name a file in a folder that exists")
    return path


def one_of_several(main: Callable[[], int | None]) -> int:
    """`main` as one process of those that `deepspeed` or torchrun started, for `run_cli`.

    They often fail alike: then the launcher ends the others while they wait here, and only rank 0's message is seen.
    One that failed alone is heard after all.
    """
    try:
        status = main() or 0
    except (ValueError, OSError):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5.0)
        raise
    import torch.distributed as dist  # after `main`, which may set up the environment that torch reads

    if dist.is_initialized():  # NCCL asks to be left in order
        dist.destroy_process_group()
    return status
