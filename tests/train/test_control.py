"""How a run ends before its end: by a signal to one rank or to all, and by the death of a rank; and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shell import LAUNCHER
from tests.train.runs import FP32, arguments, metrics, run_here, trace
from tests.train.together import Together
from train.checkpoint import newest_checkpoint
from train.control import Control, Stopped, _leave_terminal, _Relay, _watch_launcher, typed_launcher
from train.engine import World
from train.main import main

LONG = (FP32, "schedule.epochs=60", "train.log_every=50", "train.checkpoint_every=0", 'data.val_split=""')
STEPS = 195  # ceil(60 · 26 / 8)


def wait_for(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def steps(out: Path) -> int:
    path = out / "trace-0.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def children(pid: int) -> list[int]:
    """Of all its threads: decode workers belong to the one that started them."""
    return [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


# --- several processes


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_sigterm_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on(packed: Path, tmp_path: Path) -> None:
    """As a launcher sends it: to one rank, and to its decode workers, which must live until the step is done."""
    out = tmp_path / "run"
    with Together(tmp_path, arguments(packed, out, *LONG)) as run:
        wait_for(lambda: steps(out) >= 3, "no step")
        workers = [child for rank in run.ranks for child in children(rank.pid or 0)]
        assert workers
        for child in workers:
            os.kill(child, signal.SIGTERM)
        run.send(1, signal.SIGTERM)
        assert run.end() == [143, 143]
        wait_for(lambda: not any(map(lives, workers)), "workers are left")
    seen = len(trace(out, 0))
    assert 3 <= seen < STEPS and seen == len(trace(out, 1))
    assert run.said()[-1] == f"stopped by SIGTERM at step {seen}; go on with --resume"
    assert run.said().count("SIGTERM: stopping after this step and saving") == 1, "rank 0 says so, though rank 1 heard"
    assert [path.name for path in out.glob("*checkpoint*")] == [f"checkpoint-{seen:06d}"]
    assert metrics(out, "train")[-1]["step"] == seen


def test_the_death_of_a_rank_ends_the_others_who_say_so(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with Together(tmp_path, arguments(packed, out, *LONG)) as run:
        wait_for(lambda: steps(out) >= 3, "no step")
        started = time.monotonic()
        run.send(1, signal.SIGKILL)
        assert run.end() == [1, -9]
        assert time.monotonic() - started < 20
    (line,) = [line for line in run.said() if "error" in line]
    assert line.startswith("error: rank 1 of 2 is gone (killed") and "--resume" in line
    assert not any("Traceback" in said for said in run.said())


def test_an_error_of_one_rank_alone_ends_the_others_with_its_reason(tmp_path: Path, packed: Path) -> None:
    """It cannot write its trace: the other waits in the next step."""
    out = tmp_path / "run"
    with Together(tmp_path, arguments(packed, out, *LONG)) as run:
        wait_for(lambda: steps(out) >= 2, "no step")
        (out / "trace-0.jsonl").unlink()
        (out / "trace-0.jsonl").mkdir()
        assert run.end() == [2, 1]
    assert any("rank 0 of 2 is gone (" in line and "Is a directory" in line for line in run.said())


# --- one process


def test_ctrl_c_finishes_the_step_and_the_run_that_is_continued_is_the_same(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (FP32, "run.report=false", "schedule.epochs=3", "train.log_every=2", 'data.val_split=""')
    run_here(packed, tmp_path / "whole", *settings)
    out, at = tmp_path / "run", 5

    def strike(self: Control, step: int) -> bool:
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    original = Control.ends_after
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Control, "ends_after", strike)
        assert main(arguments(packed, out, *settings)) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert newest_checkpoint(out) == out / f"checkpoint-{at:06d}"
    run_here(packed, out, *settings, resume=True)
    name = "checkpoint-000010/state.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert trace(out) == trace(tmp_path / "whole")


def test_a_signal_within_an_evaluation_saves_the_step_before_it_and_the_evaluation_is_made_up(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Control.check

    def strike(self: Control) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(self)

    out, settings = tmp_path / "run", (FP32, "schedule.epochs=2", "schedule.warmup_epochs=1", "train.eval_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(Control, "check", strike)
        assert main(arguments(packed, out, *settings)) == 143
    assert capsys.readouterr().err.strip().endswith("stopped by SIGTERM at step 4; go on with --resume")
    assert newest_checkpoint(out) == out / "checkpoint-000004"
    assert not metrics(out, "eval")
    run_here(packed, out, *settings, resume=True)
    run_here(packed, tmp_path / "whole", *settings)
    assert metrics(out, "eval") == metrics(tmp_path / "whole", "eval") and len(metrics(out, "eval")) == 2
    assert trace(out) == trace(tmp_path / "whole")


@pytest.mark.parametrize(
    ("signum", "more"), [(signal.SIGINT, "; Ctrl-C again ends at once"), (signal.SIGTERM, ""), (signal.SIGHUP, "")]
)
def test_a_signal_is_answered_at_once(
    signum: signal.Signals, more: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.control._leave_terminal", lambda: None)
    with Control() as control:
        control.start(1)
        assert not control.ends_after(1)
        signal.raise_signal(signum)
        assert capfd.readouterr().err == f"{signum.name}: stopping after this step and saving{more}\n"
        assert control.ends_after(2)
    assert control.stopped(2).status == 128 + signum


def test_nohup_is_left_as_it_is() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Control():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_fails_no_print() -> None:
    terminal, ours = os.openpty()
    process = os.fork()
    if process == 0:
        os.dup2(ours, 1)
        os.close(ours)
        os.close(terminal)  # the last end of it
        try:
            os.write(1, b"x")
        except OSError:
            _leave_terminal()
            os.write(1, b"x")
            os._exit(7)
        os._exit(0)
    os.close(ours)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7


def test_a_signal_before_the_first_step_leaves_nothing_to_save(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.start._opening", lambda job: signal.raise_signal(signal.SIGTERM))
    assert main(arguments(packed, tmp_path / "run", FP32)) == 143
    assert "stopped by SIGTERM before its first step was done" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "run") is None


def test_a_second_interrupt_ends_at_once_and_workers_with_it(packed: Path, tmp_path: Path) -> None:
    """In a step that never ends; the first is noted, a SIGTERM after it is the launcher's."""
    with Together(tmp_path, arguments(packed, tmp_path / "run", *LONG), processes=1, hang_at=4) as run:
        wait_for(lambda: steps(tmp_path / "run") >= 3, "no step")
        workers = children(run.ranks[0].pid or 0)
        run.send(0, signal.SIGINT)
        run.send(0, signal.SIGTERM)
        run.ranks[0].join(1.2)
        assert run.ranks[0].exitcode is None
        run.send(0, signal.SIGINT)
        assert run.end() == [130]
        assert workers
        wait_for(lambda: not any(map(lives, workers)), "workers are left", 5)
    assert run.said()[-1] == "interrupted again: ended at once, nothing more is saved"


# --- the agreement by itself


class Told(World):
    """A world of threads: all are told what rank 0 says."""

    def gather(self, text: str) -> list[str]:
        if self.rank == 0:
            BOARD.append(text)
        wait_for(lambda: bool(BOARD), "rank 0 says nothing")
        return [BOARD[0]]


BOARD: list[str] = []


@pytest.mark.parametrize("asker", [0, 2])
def test_all_stop_after_the_step_of_the_furthest(asker: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that run ahead of each other by some steps, as hosts do; one is asked to stop, which none of the others
    sees. A step costs microseconds."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    BOARD.clear()
    ends: dict[int, int] = {}
    controls = [Control() for _ in range(4)]

    def run(rank: int) -> None:
        import torch

        with controls[rank] as control:
            control.join(Told(rank, 4, 4, torch.device("cpu")))
            control.start(1)
            step = 1
            while not control.ends_after(step):
                time.sleep(0.001 * (1 + rank))  # rank 0 is far ahead
                if rank == asker and step == 20:
                    control._send({"stop": int(signal.SIGTERM)})
                step += 1
            ends[rank] = step
            control.finish()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ends) == 4 and len(set(ends.values())) == 1, ends
    assert ends[0] >= 20


def test_who_was_started_by_deepspeed_stops_when_that_is_gone() -> None:
    """A starter, its launcher, and a process of the run, which is told of the starter's end by a SIGTERM."""
    here, there = os.pipe()
    starter = os.fork()
    if starter == 0:
        if os.fork() == 0:
            process = os.fork()
            if process == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _watch_launcher(os.getppid())
                os._exit(0)
            os.write(there, b"r")
            os.write(there, bytes([os.waitpid(process, 0)[1] & 127]))
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    assert os.read(here, 1) == b"r"
    time.sleep(0.2)
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    assert os.read(here, 1) == bytes([signal.SIGTERM])
    os.close(here)
    os.close(there)


def test_the_launcher_is_known_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "python3 /bin/deepspeed --num_gpus 2 train/main.py --recipe demo"
    lines = {os.getppid(): "python3 -m deepspeed.launcher.launch train/main.py", 7: typed}
    monkeypatch.setattr("train.control._parent", lambda pid: 7)
    monkeypatch.setattr("train.control._command_line", lambda pid: lines[pid].replace(" ", "\0").encode())
    assert typed_launcher(["train/main.py", "--recipe", "demo"]) == ["deepspeed", "--num_gpus", "2"]
    lines[7] = "sshd"
    assert typed_launcher(["train/main.py"]) == ["deepspeed"]
    lines[os.getppid()] = "bash"
    assert typed_launcher(["train/main.py"]) == []


def test_strangers_at_the_door_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not know the token of the run is not heard, and disturbs nobody."""
    listener = socket.create_server(("127.0.0.1", 0))
    relay = _Relay(listener, "secret", 1)
    relay.start()
    for hello in (b"0 wrong\n", b"\xff\xfe\n", b"x" * 5000, b'{"stop": 15}\n'):
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(hello)
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionResetError):  # it did not even read all
                assert stranger.recv(1) == b""
    with socket.create_connection(listener.getsockname()) as own:
        own.sendall(b'0 secret\n{"stop": 15}\n')
        own.settimeout(5)
        assert own.recv(100) == b'{"ask": 15}\n'
        own.sendall(b'{"done": true}\n')
    relay.join(5)
    assert not relay.is_alive()
    assert Stopped(15, "x").status == 143
