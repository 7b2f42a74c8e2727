"""What processes take of a machine: measured on work that is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np

from pipelines.machine import (
    available_memory,
    command_line,
    cpu_seconds,
    forget_peak_memory,
    machine_cpu_seconds,
    peak_memory,
    process_tree,
    wait_for_rest,
)


def burn(seconds: float) -> None:
    deadline = time.process_time() + seconds
    while time.process_time() < deadline:
        pass


def test_children_and_grandchildren_belong_to_the_tree() -> None:
    inner = "import sys; print('ready', flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {inner!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", outer], **pipes) as child:
        assert child.stdout is not None
        child.stdout.readline()
        tree = process_tree()
        shown = command_line(child.pid)
        child.communicate()
    assert tree[0] == os.getpid() and child.pid in tree and len(tree) >= 3
    assert child.pid not in process_tree()
    assert "subprocess.run" in shown and command_line(child.pid) == ""


def test_our_time_is_part_of_the_machines() -> None:
    ours, everybody = cpu_seconds(), machine_cpu_seconds()
    burn(0.3)
    ours, everybody = cpu_seconds() - ours, machine_cpu_seconds() - everybody
    assert 0.3 <= ours < 2 and everybody >= 0.25  # the kernel counts in hundredths of a second a core


def test_rest_begins_when_work_ends() -> None:
    program = "import time\nwhile time.process_time() < 0.4: pass\ninput()"
    with subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE) as child:
        begin = time.perf_counter()
        since = wait_for_rest()
        child.communicate(b"\n")
    assert since - begin >= 0.3


def test_peak_memory_is_forgotten_when_asked() -> None:
    size = 200_000_000
    np.ones(size, np.uint8).sum()
    high = peak_memory(os.getpid())
    forget_peak_memory()
    assert high - peak_memory(os.getpid()) > 0.9 * size
    assert high > size and available_memory() > 0
    assert peak_memory(2**22 + 1) == 0, "no such process"


def test_cpu_time_of_children_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-S", "-c", burn], stdin=subprocess.PIPE) as child:
        while cpu_seconds() - before < 0.3:  # it runs, and has not been waited for
            time.sleep(0.01)
        child.communicate(b"\n")
    assert 0.3 <= cpu_seconds() - before < 1.0  # nothing is lost when it ends
