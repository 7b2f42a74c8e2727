"""How programs end: a status, and for what the user can mend one line and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.cli import one_of_several, run_cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEBACK", raising=False)


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def ended(main: Callable[[], int | None]) -> object:
    """The exit status."""
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    return stop.value.code


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_the_status_is_what_the_program_returns(
    returned: int | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(lambda: returned) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lr = -1; allowed is more than 0"), "error: lr = -1; allowed is more than 0\n"),
        (ValueError("first\n  second\tthird\n"), "error: first second third\n"),
        (FileNotFoundError(2, "No such file or directory", "a.mp4"), "error: [Errno 2] No such file or directory: 'a."),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: 'utf-8' codec can't decode"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(raising(error)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(line) and said.err.count("\n") == 1
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_cli(raising(error))


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyError("ours"), AssertionError("ours")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="ours"):
        run_cli(raising(error))


def test_another_python_without_a_package_is_told_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
    monkeypatch.setattr(cli, "_VENV", tmp_path)
    with pytest.raises(ModuleNotFoundError):  # .venv is not complete: activating it would not help
        run_cli(raising(missing))
    (tmp_path / ".setup-0123").touch()
    assert ended(raising(missing)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no package tqdm in ") and said.endswith(": source .venv/bin/activate\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ModuleNotFoundError):
        run_cli(raising(missing))


def test_an_interrupted_program_says_so_and_an_exit_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert ended(raising(SystemExit(7))) == 7  # argparse's


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_error(lines: int) -> None:
    """One line is written only when the program ends, for a pipe is buffered; many while it runs."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = (
        "import sys; from pipelines.cli import run_cli\n"
        f"run_cli(lambda: [sys.stdin.read(), *(print('line') for _ in range({lines}))] and None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait(20) == 141
    process.stderr.close()


@pytest.mark.parametrize(("rank", "seconds"), [(None, []), ("0", []), ("3", [5.0])])
def test_of_several_processes_that_fail_alike_the_first_is_heard(
    rank: str | None, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    with pytest.raises(ValueError, match="no such set"):
        one_of_several(raising(ValueError("no such set")))
    assert slept == seconds
    with pytest.raises(RuntimeError, match="ours"):
        one_of_several(raising(RuntimeError("ours")))
    assert slept == seconds, "a defect is shown at once"


@pytest.mark.parametrize("joined", [False, True])
def test_a_process_that_joined_others_leaves_them_in_order(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    left: list[bool] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: joined)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    assert [one_of_several(lambda: None), one_of_several(lambda: 4)] == [0, 4]
    assert left == [True, True] * joined


def test_a_program_without_standard_output_still_ends_well() -> None:
    code = "from pipelines.cli import run_cli\nrun_cli(lambda: None)"
    shell = f"exec {sys.executable} -c '{code}' >&-"
    assert subprocess.run(["bash", "-c", shell], cwd=ROOT, check=False).returncode == 0
