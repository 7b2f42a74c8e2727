"""Is this machine fit to train, and this set fit to learn from? One screen: what works, what is used instead, remedies.

    python tools/doctor.py
    python tools/doctor.py --shards data/skate
    python tools/doctor.py --videos clips/ --json doctor.json

Every line is `ok`, `fallback` (something else is used instead; what that costs is said where it was measured) or
`problem` (training is prevented), with a remedy. Decoders, attention and DeepSpeed are tried on small inputs made on
the spot, not assumed, each in a process that may crash or hang without harm; nothing is downloaded, built or left
behind. Of --shards the manifest, all files and a sample of checksums are looked at; of --videos a hundred, or as many
as 4 s allow, are opened.

Exit status: 0 if nothing is a problem, 1 if something is, 2 for a wrong option. It takes 5 to 15 s on two cores. What
concerns GPUs has not been run on one yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Nothing that needs a package of others: a Python without them is what this program finds most often.
from pipelines.cli import run_cli, writable
from tools.parts.doctor_machine import FALLBACK, PROBLEM, Row, machine_rows, wrong_python
from tools.parts.doctor_trials import try_all

GROUPS = (("DALI, CPU", "FFmpeg, CPU"), ("GPU", "nvJPEG", "NVDEC", "attention", "Triton kernel"), ("DeepSpeed",))
"""Trials that share a process."""
SECONDS = 60.0  # for a process; alone they take 2 to 5
WIDTH, NAME_WIDTH = 100, 14


def main(argv: Sequence[str] | None = None) -> int:
    """Looks, prints; returns the exit status."""
    args = parse_arguments(argv)
    begin = time.monotonic()
    rows = examine(args.shards, args.videos)
    seconds = time.monotonic() - begin
    print(screen(rows, seconds))
    if args.json:
        document = {"seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(row.status == PROBLEM for row in rows))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", metavar="SET", help="a packed set to look at")
    add("--videos", type=Path, metavar="DIR", help="a folder of videos that are to be packed")
    add("--json", type=Path, metavar="FILE", help="write the lines there too")
    args = parser.parse_args(argv)
    for option, given, what in (("--shards", args.shards, "packed set"), ("--videos", args.videos, "folder of videos")):
        if given and "://" in str(given):
            raise ValueError(
                f"{option} {given}: allowed is a folder; what comes from an address is checked as it comes"
            )
        if given and not Path(given).is_dir():
            raise ValueError(f"{option} {given}: there is no such folder; name a {what}")
    args.shards = args.shards and Path(args.shards)
    if args.json:
        writable(args.json, "--json")
    return args


def examine(shards: Path | None, videos: Path | None) -> list[Row]:
    """All rows, in the order of the screen; of another Python than the project's only that it is one."""
    if (row := wrong_python()) is not None:
        return [row]
    groups = [[(name, "") for name in group] for group in GROUPS]
    data = [(name, os.fspath(folder)) for name, folder in (("set", shards), ("videos", videos)) if folder]
    if sys.stderr.isatty():
        print("trying decoders, attention and DeepSpeed, each in a process of its own …", file=sys.stderr)
    with ThreadPoolExecutor(len(groups) + 1) as threads:
        trials = [threads.submit(try_all, group, SECONDS) for group in ([*groups, data] if data else groups)]
        machine = machine_rows(("runs", "data"))
        return [*machine, *(row for trial in trials for row in trial.result())]


def screen(rows: Sequence[Row], seconds: float) -> str:
    """The lines for people."""
    lines = []
    indent = " " * (10 + NAME_WIDTH)
    wrap = partial(textwrap.wrap, width=WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    for row in rows:
        lines += wrap(row.found, initial_indent=f"{row.status:9} {row.name:{NAME_WIDTH - 1}} ")
        if row.cost:
            lines += wrap(row.cost, initial_indent=f"{indent}instead: ")
        if row.remedy:
            lines += wrap(row.remedy, initial_indent=f"{indent}→ ")
    counts = {status: sum(row.status == status for row in rows) for status in (PROBLEM, FALLBACK)}
    verdict = "something prevents training" if counts[PROBLEM] else "fit to train"
    return "\n".join([*lines, f"{verdict}: problems {counts[PROBLEM]}, fallbacks {counts[FALLBACK]} ({seconds:.0f} s)"])


if __name__ == "__main__":
    run_cli(main)
