"""What a run or a measurement was made on, and what processes take of it: for the files and tables that quote it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REST_SECONDS = 0.3  # without work: nothing will come any more
MAX_FILLING = 120  # seconds; a slow machine needs 10


def processor_name() -> str:
    """As Linux names it; Python's own answer is mostly empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def process_tree() -> list[int]:
    """The ids of this process, first, and of its living descendants."""
    pids = [os.getpid()]
    for pid in pids:  # grows meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # a thread that ended
                pids += map(int, children.read_text().split())
    return pids


def command_line(pid: int) -> str:
    """What a process was started as; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def cpu_seconds() -> float:
    """User and system time so far of this process, its living descendants and its children that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Linux numbers the CPU clock of a process so (man 3 clock_getcpuclockid); /proc counts in steps of 10 ms.
    return ended.ru_utime + ended.ru_stime + sum(time.clock_gettime((~pid << 3) | 2) for pid in process_tree())


def machine_cpu_seconds() -> float:
    """User and system time so far of all programs on all cores of the machine; 0 where the kernel does not say."""
    with suppress(OSError):
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return 0.0


def wait_for_rest() -> float:
    """Returns when nobody has worked for a while, for the queues are full: since when (perf_counter)."""
    pause = REST_SECONDS / 10
    begin = since = time.perf_counter()
    spent = cpu_seconds() - time.thread_time()  # looking costs this thread a little
    while time.perf_counter() - since < REST_SECONDS:
        time.sleep(pause)
        now = cpu_seconds() - time.thread_time()
        if now - spent > 0.1 * pause:
            since = time.perf_counter()
        if since - begin > MAX_FILLING:
            raise TimeoutError(f"its queues are not full after {MAX_FILLING} s")
        spent = now
    return since


def forget_peak_memory() -> None:
    """`peak_memory` of this process begins anew, where the kernel allows that, with what is really in use.

    What was freed and is kept for later (by glibc) goes back first: hundreds of MB after a large step.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(pid: int) -> int:
    """Most bytes that a process has had in memory, shared ones too; 0 if it has ended."""
    return _kilobytes(f"/proc/{pid}/status", "VmHWM")


def available_memory() -> int:
    """Bytes that may still be taken without swapping."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(path: str, name: str) -> int:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 0
