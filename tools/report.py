"""Writes the report of a run again: report.html, one file to look at or to send, and its pictures and tables beside it.

    python tools/report.py runs/my_videos

Every training writes it at its end (run.report = false leaves it out); this program does for runs that were killed, for
runs from elsewhere, and for evaluations: RUN may be a folder that tools/evaluate.py made of a run's checkpoint. Without
the set or the weights the page says so and has the rest. It opens in any browser, without a network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; train/main.py says why

from pipelines.cli import run_cli, writable
from train.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """One report. Raises ValueError or OSError for what a user can mend."""
    arguments = parse_arguments(argv)
    print(write_report(arguments.run, arguments.out and writable(arguments.out, "--out")))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or that of an evaluation of one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in that folder")
    arguments = parser.parse_args(argv)
    if arguments.out is not None and arguments.out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out {arguments.out}: it is a .html file")
    return arguments


if __name__ == "__main__":
    run_cli(main)
