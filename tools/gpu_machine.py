"""What a GPU machine is made of, as JSON: for tools/gpu_report.py, or for a first look round.

    python tools/gpu_machine.py [FILE]

Prints it, and writes it to FILE. Says which of the driver's libraries for pictures and videos can be loaded, where
nvJPEG is, and what is not installed as pyproject.toml pins it: a program that finds no nvJPEG may go on, far slower.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.cli import run_cli
from pipelines.machine import available_memory, installed_versions, processor_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "torchvision", "triton", "xformers", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"),
    *("deepspeed", "numpy", "av", "timm", "open_clip_torch", "pytest"),
)
LIBRARIES = {
    "nvcuvid": ("libnvcuvid.so.1", "libnvcuvid.so"),
    "nvjpeg": ("libnvjpeg.so.13", "libnvjpeg.so"),
}
"""NVDEC's and nvJPEG's, by the names under which they may be found."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="where it is written too")
    file: Path | None = parser.parse_args().file
    document = {
        "gpu": gpu(),
        "driver": driver(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "available_memory_bytes": available_memory(),
        "platform": platform.platform(),
        "libraries": {name: find_library(names) for name, names in LIBRARIES.items()},
        "compilers": {name: shutil.which(name) for name in ("gcc", "c++", "nvcc", "ninja")},
        "versions": installed_versions(PACKAGES),
        "not_as_pinned": list(not_as_pinned()),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    print(text)


def gpu() -> dict[str, Any] | None:
    """The first CUDA device as torch sees it; None where it sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def driver() -> str | None:
    """Of the driver's own program, a line a GPU; None where it is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(answer.split("\n")).strip("; ")


def find_library(names: tuple[str, ...]) -> str:
    """Under which name it can be loaded, or what keeps it from that and where a copy lies among Python's packages."""
    reason = ""
    for name in names:
        try:
            ctypes.CDLL(name)
            return name
        except OSError as error:
            reason = reason or str(error)
    copies = [path for folder in sys.path for path in Path(folder).glob(f"nvidia/*/lib/{names[0]}")]
    return f"among Python's packages, {'/'.join(copies[0].parts[-4:])}" if copies else f"not found: {reason}"


def not_as_pinned() -> Iterator[str]:
    """What pyproject.toml and the packages it names ask for, and is missing or of another version; not what torch asks
    for, which came with it."""
    from packaging.requirements import Requirement  # of pytest

    asked = [(line, "we") for line in _dependencies()]
    known = {"torch", "torchvision"}
    for line, who in asked:  # grows meanwhile
        wanted = Requirement(line)
        extras = [*wanted.extras, ""]
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"{wanted.name} is missing, which {who} ask{'s' if who != 'we' else ''} for"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} is {found}; {who} ask{'s' if who != 'we' else ''} for {wanted.specifier}"
        if wanted.name.lower() not in known:
            known.add(wanted.name.lower())
            asked += _needs(wanted.name, extras)


def _needs(package: str, extras: list[str]) -> list[tuple[str, str]]:
    """Its requirements with these extras."""
    from packaging.requirements import Requirement

    needs = []
    for line in metadata.requires(package) or ():
        marker = Requirement(line).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            needs.append((line.partition(";")[0].strip(), package))
    return needs


def _dependencies() -> list[str]:
    project: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


if __name__ == "__main__":
    run_cli(main)
