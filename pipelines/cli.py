"""How every command-line program of the project ends: exit status 0, or one clear line and status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with its status (None counts as 0).

    Bad input is reported by the library as ValueError or OSError; a user sees its text as one line, never a
    traceback, and exit status 2. `TRACEBACK=1` in the environment shows where it came from. Anything else is a
    defect of ours and keeps its traceback.
    """
    try:
        status = main() or 0
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
    sys.exit(status)
