"""Writes the index files that DALI's `fn.readers.webdataset` takes, in the format of DALI's own `wds2idx` (v1.2).

    python tools/export_index.py SHARDS [--out DIR]

SHARDS is a packed set or any folder of WebDataset tars. Each NAME.tar gets NAME.idx beside it, or in DIR. In DALI:

    fn.readers.webdataset(paths=[…/train-000000.tar], index_paths=[…/train-000000.idx], ext=["mp4", "cls"])

The tars are not changed and training here does not need these files. A tar that DALI could not read is an error.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from pipelines.cli import run_cli
from pipelines.shards import read_manifest, write_durably
from pipelines.tar import Fault, Member, scan_tar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of tars")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the index files (default: SHARDS)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.shards
    tars = list_tars(arguments.shards)
    out.mkdir(parents=True, exist_ok=True)
    samples = 0
    for tar in tqdm(tars, unit="tar", disable=None):
        lines = index_lines(tar)
        samples += len(lines)
        text = f"v1.2 {len(lines)}\n" + "".join(f"{line}\n" for line in lines)
        write_durably(out / f"{tar.stem}.idx", text.encode("utf-8", "surrogateescape"))
    print(f"{out}: {len(tars)} index files of {samples} samples")


def list_tars(folder: Path) -> list[Path]:
    """Those that the folder's manifest names; without a manifest, all."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of tars: {folder}")
    if (folder / "manifest.json").exists():
        splits = read_manifest(folder)["splits"].values()
        return [folder / shard["name"] for split in splits for shard in split["shards"]]
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder} holds no tar")
    return tars


def index_lines(tar: Path) -> list[str]:
    """One line a sample: suffix, offset, bytes and name of each of its files, which stand one after another."""
    with tar.open("rb") as file:
        members = list(_members(tar, scan_tar(file)))
    lines = []
    for _, group in itertools.groupby(members, key=lambda member: _split(member.name)[0]):
        lines.append(" ".join(f"{_split(m.name)[1]} {m.offset} {m.num_bytes} {m.name}" for m in group))
    if not lines:
        raise ValueError(f"{tar} holds no sample: DALI refuses such a tar")
    return lines


def _members(tar: Path, entries: Iterator[Member | Fault]) -> Iterator[Member]:
    for entry in entries:
        if isinstance(entry, Fault):
            if entry.reason == "no_file":
                continue
            raise ValueError(f"{tar}: {entry.reason} {entry.name!r}, {entry.detail}; DALI cannot read it")
        key, suffix = _split(entry.name)
        if not key or key.endswith("/"):  # a hidden file: DALI leaves it out
            continue
        if re.search(r"\s", entry.name):
            raise ValueError(f"{tar}: {entry.name!r} holds a space, at which DALI's index would be cut")
        if not suffix:
            raise ValueError(f"{tar}: {entry.name!r} has no suffix, by which DALI tells the files of a sample")
        yield entry


def _split(name: str) -> tuple[str, str]:
    """`dir/key.suf.fix` → `dir/key` and `suf.fix`, cut at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix


if __name__ == "__main__":
    run_cli(main)
