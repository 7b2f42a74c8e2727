"""What tools/doctor.py can see without trying anything: Python, packages, programs, cores, memory, disks, caches.

Every check returns a `Row` and reads nothing but files of the system. No package of others is needed to import this
file, for the commonest illness is a Python that has none of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.cli import ACTIVATE, is_other_python
from pipelines.machine import available_memory, installed_versions, processor_name

ROOT = Path(__file__).resolve().parents[2]
MB, GB = 10**6, 10**9
OK, FALLBACK, PROBLEM = "ok", "fallback", "problem"
SHOWN_PACKAGES = ("torch", "torchvision", "xformers", "nvidia-dali-cuda130", "deepspeed", "av", "timm")
BUFFER_BYTES = 67 * MB
"""What DeepSpeed takes of /dev/shm for each process on a CPU: two buffers of 32 MiB and a little."""
CLIPS_BYTES = 4 * 16 * 8 * 224 * 224 * 3
"""What a process's loader keeps: data.prefetch + 1 micro-batches of 16 clips of 8 frames, as published."""
LEAST_MEMORY, SMALL_MEMORY = 2 * GB, 4 * GB
LEAST_DISK, SMALL_DISK = GB, 10 * GB
FEW_FILES = 1024
SETUP = "rm -f .venv/.setup-*; make setup (3 minutes, 6 GB)"
"""Installs what the lock names again."""
_BENCH = ROOT / "tools/results/bench_pipeline_2_cores.json"
_HUGE = 2**60  # cgroup v1 says "no limit" with a number near 2⁶³


@dataclass(frozen=True)
class Row:
    """One line of the screen."""

    status: str
    """`ok`; `fallback`: something else is used instead; `problem`: training is prevented."""
    name: str
    found: str
    cost: str = ""
    """What is used instead, and what that costs as far as it was measured."""
    remedy: str = ""


def machine_rows(parts: Sequence[str]) -> list[Row]:
    """All checks of this file; `parts` are folders that a run writes to, relative to the working directory."""
    rows = []
    for check in (python, packages, launcher, compilers, cores, memory, shared_memory, open_files, caches, weights):
        try:
            rows.append(check())
        except Exception as error:  # a machine of another kind: the other checks go on
            rows.append(Row(FALLBACK, check.__name__, f"could not be looked at ({type(error).__name__}: {error})"))
    return [*rows, *disks([Path(part) for part in parts])]


def wrong_python() -> Row | None:
    """The one row to show where this Python is not that of .venv and lacks what that has, for then every other row
    would tell of this Python's packages; None where it may be looked at."""
    missing = [name for name in ("torch", "deepspeed", "av") if importlib.util.find_spec(name) is None]
    if not missing or not is_other_python():
        return None
    found = f"{sys.executable} is not the project's Python and lacks {', '.join(missing)}; nothing else was looked at"
    return Row(PROBLEM, "Python", found, remedy=f"{ACTIVATE} (.venv has all packages), then once more")


def python() -> Row:
    """Its version, and whether it is that of .venv."""
    found = f"{installed_versions(())['python']} of {_short(Path(sys.prefix))}"
    asked = re.search(r'requires-python = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        wanted = asked[1] if asked else ">=3.11,<3.13"
        return Row(PROBLEM, "Python", found, remedy=f"use Python {wanted}: make setup PYTHON=/path/to/python3.11")
    if (ROOT / ".venv").is_dir() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        return Row(
            FALLBACK,
            "Python",
            found,
            "not that of .venv, which has the locked packages",
            f"{ACTIVATE}, or .venv/bin/python tools/doctor.py",
        )
    return Row(OK, "Python", found)


def packages() -> Row:
    """Whether what is installed is what pyproject.toml pins."""
    try:
        from tools.gpu_machine import not_as_pinned

        wrong = list(not_as_pinned())
    except ImportError as error:
        return Row(PROBLEM, "packages", f"not installed: {error.name}", remedy=SETUP)
    versions = installed_versions(SHOWN_PACKAGES)
    if not wrong:
        return Row(OK, "packages", "as pinned: " + ", ".join(f"{n} {v}" for n, v in versions.items() if n != "python"))
    ours = [line for line in wrong if ("we ask for ==" in line or "which we ask for" in line)]
    more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    found = "; ".join((ours + [line for line in wrong if line not in ours])[:4]) + more
    if ours:
        return Row(PROBLEM, "packages", found, remedy=f"{SETUP}: these versions were never tried together")
    return Row(FALLBACK, "packages", found, "versions that were never tried together", SETUP)


def launcher() -> Row:
    """DeepSpeed's, for several processes."""
    path = shutil.which("deepspeed")
    if path is not None:
        starts, ours = _interpreter(Path(path)), str(Path(sys.executable).parent)
        if starts is None or os.path.dirname(starts) == ours:
            return Row(OK, "launcher", f"deepspeed is {_short(Path(path))}")
        cost = "processes run under that Python; what both build (DeepSpeed's operator) is built anew at each change"
        remedy = "one environment, under one path: rm -r .venv, then make setup"
        return Row(FALLBACK, "launcher", f"{_short(Path(path))} starts {starts}, not {sys.executable}", cost, remedy)
    beside = Path(sys.executable).with_name("deepspeed")
    cost = "python train/main.py starts one process; several need the launcher"
    if beside.is_file():
        where = _short(beside.parent)
        found = f"deepspeed is not on PATH, but in {where}"
        return Row(FALLBACK, "launcher", found, cost, f'source {where}/activate, or export PATH="{where}:$PATH"')
    return Row(FALLBACK, "launcher", "no program deepspeed", cost, SETUP)


def compilers() -> Row:
    """What DeepSpeed, torch.compile and Triton build their parts with."""
    folder = str(Path(sys.executable).parent)
    missing = []
    if shutil.which(os.environ.get("CXX") or "c++") is None:
        missing.append(f"no C++ compiler ({os.environ.get('CXX') or 'c++'})")
    if not any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name):
        missing.append("no C compiler (cc)")
    if shutil.which("ninja", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}") is None:
        missing.append("no ninja")
    if not missing:
        return Row(OK, "build tools", "C and C++ compilers, ninja")
    cost = "what is built stays in use; speed.compile, Triton and DeepSpeed's operator cannot be built anew"
    remedy = SETUP if missing == ["no ninja"] else "apt-get install g++"
    return Row(FALLBACK, "build tools", ", ".join(missing), cost, remedy)


def cores(cgroups: Path = Path("/sys/fs/cgroup")) -> Row:
    """Those that may be used, and how much of them."""
    count = len(os.sched_getaffinity(0))
    found = f"{count} of {os.cpu_count()} ({processor_name()})"
    limit = _core_limit(cgroups)
    if limit is not None and limit < 0.9 * count:
        return Row(
            FALLBACK,
            "cores",
            f"{found}, of which this container may keep {limit:g} busy",
            f"the trainer counts {count} and starts as many decode workers and threads; they are slowed down by turns",
            f"--set data.workers={max(1, int(limit) // 2)} and OMP_NUM_THREADS={max(1, int(limit))}, or a larger share",
        )
    if count == 1:
        return Row(FALLBACK, "cores", found, "decoding and training take turns; unmeasured", "two cores or more")
    return Row(OK, "cores", found)


def memory(cgroups: Path = Path("/sys/fs/cgroup")) -> Row:
    """What may be taken, of the machine's and of the container's."""
    free, found = available_memory(), f"{_size(available_memory())} available"
    limit = _memory_limit(cgroups)
    if limit is not None:
        free, found = min(free, limit), f"{found}, of which this container may have {_size(limit)}"
    remedy = "--set ds.train_micro_batch_size_per_gpu=1 --set data.workers=1, or more memory"
    if free < LEAST_MEMORY:
        return Row(PROBLEM, "memory", f"{found}; {_size(LEAST_MEMORY)} is the least", remedy=remedy)
    if free < SMALL_MEMORY:
        return Row(FALLBACK, "memory", found, "enough for small models and few workers; unmeasured", remedy)
    return Row(OK, "memory", f"{found}; a loader keeps {_size(CLIPS_BYTES)} of clips (micro-batch 16 × 8 frames)")


def shared_memory(folder: Path = Path("/dev/shm")) -> Row:
    """Of /dev/shm: DeepSpeed's buffers. The loader's clips do not lie there, they count as memory (memfd)."""
    if not folder.is_dir():
        return Row(PROBLEM, "/dev/shm", "it is not there", remedy="mount a tmpfs on /dev/shm; docker run --ipc=host")
    free = shutil.disk_usage(folder).free
    found = f"{_size(free)} free, room for {free // BUFFER_BYTES} processes on a CPU"
    remedy = "docker run --shm-size=8g or --ipc=host; mount -o remount,size=8G /dev/shm"
    if free < BUFFER_BYTES:
        return Row(PROBLEM, "/dev/shm", f"{_size(free)} free; DeepSpeed takes 67 MB a process on a CPU", remedy=remedy)
    if free < 4 * BUFFER_BYTES:
        return Row(FALLBACK, "/dev/shm", found, "NCCL, between GPUs, takes some as well; unmeasured", remedy)
    return Row(OK, "/dev/shm", found)


def open_files() -> Row:
    """Descriptors that a process may hold: every shard's index takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEW_FILES:
        return Row(
            FALLBACK,
            "open files",
            f"at most {soft}",
            f"{soft // 4} shards' indexes stay mapped at once; sets of more open them again and again; unmeasured",
            f"ulimit -n {hard if hard > FEW_FILES else 4096}",
        )
    return Row(OK, "open files", f"at most {soft}")


def disks(folders: Sequence[Path]) -> list[Row]:
    """Of every folder, or once where they lie on one disk and nothing is wrong."""
    rows = [disk(folder) for folder in folders]
    same = len({_nearest(folder).stat().st_dev for folder in folders}) == 1
    if not same or any(row.status != OK for row in rows):
        return rows
    return [replace(rows[0], name="disk", found=f"{rows[0].found}, for {' and '.join(f'{f}/' for f in folders)}")]


def disk(folder: Path) -> Row:
    """Room, and leave to write, where a folder lies or would be made."""
    name = f"disk, {folder}/"
    there = _nearest(folder)
    free = shutil.disk_usage(there).free
    if (refusal := _refusal(there)) is not None:
        return Row(PROBLEM, name, f"nothing can be written into {there} ({refusal})", remedy=_elsewhere(folder))
    if free < LEAST_DISK:
        return Row(PROBLEM, name, f"{_size(free)} free; {_size(LEAST_DISK)} is the least", remedy=_elsewhere(folder))
    if free < SMALL_DISK:
        return Row(FALLBACK, name, f"{_size(free)} free", "enough for small sets and checkpoints", _elsewhere(folder))
    return Row(OK, name, f"{_size(free)} free")


def caches() -> Row:
    """Whether what is downloaded or compiled can be kept in the user's folder."""
    home = _cache_home()
    there = _nearest(home)
    if (refusal := _refusal(there)) is None:
        return Row(OK, "caches", f"{home} can be written")
    return Row(
        FALLBACK,
        "caches",
        f"{home} cannot be written ({refusal})",
        "weights by tag and shards from addresses cannot be kept, nor what Triton compiles; files you name work",
        "export HOME=/a/folder/of/yours (or XDG_CACHE_HOME, HF_HOME and TRITON_CACHE_DIR)",
    )


def weights() -> Row:
    """Image models' weights that lie in the caches of their downloads; nothing is asked of the network."""
    home = _cache_home()
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub")
    torch_hub = Path(os.environ.get("TORCH_HOME") or home / "torch") / "hub/checkpoints"
    names = []
    for folder, pattern in ((hub, "models--*"), (home / "clip", "*.pt"), (torch_hub, "*")):
        try:
            names += sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob(pattern))
        except OSError:
            continue
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return Row(OK, "weights", f"shipped: tiny-clip; cached: {', '.join(names[:5])}{more}")
    return Row(
        FALLBACK,
        "weights",
        "shipped: tiny-clip; no others in the caches",
        "a tag such as openai is downloaded at its first use",
        "without a network: --set model.pretrained=FILE.safetensors, or --set model.name=tiny-clip "
        "--set model.pretrained=shapes",
    )


def _interpreter(script: Path) -> str | None:
    """What a script's first line names; None where that is no path."""
    with script.open("rb") as file:
        first = file.readline(1000).decode(errors="replace")
    return first[2:].strip() if first.startswith("#!/") and " " not in first.strip() else None


def _cache_home() -> Path:
    """Where programs keep what can be fetched or made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def _core_limit(cgroups: Path) -> float | None:
    """Cores that the container may keep busy; None without a limit."""
    words = _read(cgroups / "cpu.max").split()  # version 2
    if len(words) != 2:
        quota, period = (_read(cgroups / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        words = [quota, period]
    if not all(word.isdecimal() and int(word) > 0 for word in words):  # "max", -1 or nothing
        return None
    return int(words[0]) / int(words[1])


def _memory_limit(cgroups: Path) -> int | None:
    """Bytes that the container may still take; None without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        text = _read(cgroups / limit).strip()
        if text.isdecimal() and int(text) < _HUGE:
            taken = _read(cgroups / used).strip()
            return max(0, int(text) - (int(taken) if taken.isdecimal() else 0))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _nearest(folder: Path) -> Path:
    """The folder, or what of its path there is."""
    return next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written there; None where it can: tried, for root may be refused too."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def _elsewhere(folder: Path) -> str:
    option = "--set run.out=/another/disk/run" if folder.name == "runs" else "--out of tools/make_shards.py"
    return f"free some, or write elsewhere: {option}"


def _short(path: Path) -> str:
    """Relative to the project where it lies there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GB:,.1f} GB" if num_bytes >= GB else f"{num_bytes / MB:,.0f} MB"


def decode_rates(profile: str) -> str:
    """What a core decodes of a profile: clips of 16 frames 4 apart, and of 8 over 300, 340 × 256, as measured."""
    try:
        rates = json.loads(_BENCH.read_text(encoding="utf-8"))["contenders"][f"ours_{profile}"]
        numbers = [rates[sampling]["clips_per_cpu_second"] for sampling in ("dense16", "uniform8")]
    except (OSError, ValueError, KeyError):
        return "unmeasured"
    return f"{numbers[0]:.0f} clips/s a core (16 frames; 8 far apart: {numbers[1]:.0f})"
