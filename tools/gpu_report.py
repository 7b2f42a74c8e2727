"""Everything of this project that needs a CUDA machine, in one command of less than 8 minutes, and a report of it.

    python tools/gpu_report.py --out DIR

Parts, one program each, one after the other: what the machine is; the tests that need a GPU; a training step of AIM
ViT-B/16 and ViT-L/14 beside the plainly written one (tools/bench_step.py); decode rates (tools/bench_decode.py); a
training run from the shards that this packed (tools/profile_throughput.py); and more ways to compute a step.

A part that fails or takes too long costs only itself: the report has the last lines of what it said. What would not fit
into --minutes any more is left out and named. After every part DIR holds gpu_report.json and gpu_report.md, from which
tools/results/ is filled, gpu_report.log with all that was said, and timeline.png.

Without CUDA, or with --reduced, the same programs run in tiny sizes on the CPU, to see that all of this works; the
report then says in its first line that nothing was measured on a GPU. It has not been run on one yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the project's root, not tools/, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.cli import run_cli
from tools.parts.gpu_goals import judge_goals
from tools.parts.gpu_markdown import markdown, summary

ROOT = Path(__file__).resolve().parents[1]
NOT_ON_GPU = "no CUDA device was used: nothing in this report was measured on a GPU"
TAIL_LINES = 15
NOTHING: Mapping[str, str] = {}
GRACE_SECONDS = 8.0  # between asking a part to end and ending it
MODULES = {
    **{"av": "av", "cv2": "opencv-python-headless", "deepspeed": "deepspeed", "fsspec": "fsspec"},
    **{"matplotlib": "matplotlib", "ninja": "ninja", "numpy": "numpy", "nvidia.dali": "nvidia-dali-cuda130"},
    **{"open_clip": "open_clip_torch", "PIL": "pillow", "pytest": "pytest", "safetensors": "safetensors"},
    **{"tensorboard": "tensorboard", "timm": "timm", "torch": "torch", "torchvision": "torchvision"},
    **{"tqdm": "tqdm", "xformers": "xformers", "xxhash": "xxhash"},
}
"""What the parts import, and the package that has it."""


@dataclass(frozen=True)
class Part:
    """A program that measures something."""

    name: str
    title: str
    command: Sequence[str]
    """What follows Python."""
    result: Path
    """The file that it writes: JSON, or of tests JUnit's XML."""
    limit: float
    """Seconds after which it is ended."""
    needs: float = 10.0
    """Seconds: with less left it is not begun."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a part."""

    title: str
    status: str
    """`done`, `failed`, `timed out` or `skipped`."""
    command: str
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    """The last lines of its output, unless it is done."""
    result: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a report; the exit status is 1 where a part did not come to its end."""
    args = _parse_args(argv)
    require_packages()
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "timeline.png").unlink(missing_ok=True)  # of an earlier report
    log = args.out / "gpu_report.log"
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as folder:
        work = Path(folder)
        machine = run_part(machine_part(work, args.reduced), log, deadline)
        if machine.result is None:
            raise ValueError(
                f"what the machine is could not be found out ({machine.status}): {' '.join(machine.said[-3:])}"
            )
        on_gpu = bool(machine.result.get("gpu")) and not args.reduced
        print("measuring on " + machine.result["gpu"]["name"] if on_gpu else NOT_ON_GPU, flush=True)
        outcomes = {"machine": machine}
        for part in plan_parts(work, on_gpu):
            publish(args, work, outcomes, on_gpu)
            outcomes[part.name] = outcome = run_part(part, log, deadline)
            print(f"{outcome.status:>9} after {outcome.seconds:4.0f} s: {outcome.title}", flush=True)
            timeline = work / "profile" / "timeline.png"
            if timeline.exists():
                shutil.copyfile(timeline, args.out / timeline.name)
        document = publish(args, work, outcomes, on_gpu)
    print(summary(document))
    print(args.out / "gpu_report.md")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes.values()))


def require_packages() -> None:
    """ValueError naming what is not installed of what the parts import."""
    missing = [package for module, package in MODULES.items() if not _is_there(module)]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; run make setup, or where there is no registry bring them along, in "
            "the versions of pyproject.toml"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that should hold it
        return False


# ------------------------------------------------------------------------------------------------ parts


def machine_part(work: Path, reduced: bool) -> Part:
    result = work / "machine.json"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if reduced else {}
    return Part("machine", "the machine", ["tools/gpu_machine.py", str(result)], result, 150.0, 0.0, hidden)


def plan_parts(work: Path, on_gpu: bool) -> list[Part]:
    """All others, the most telling first; `needs` and `limit` are guesses for CUDA until they were seen there."""
    return _cuda_parts(work) if on_gpu else _reduced_parts(work)


def _cuda_parts(work: Path) -> list[Part]:
    base, large = ["--model", "ViT-B-16-quickgelu"], ["--model", "ViT-L-14-quickgelu"]
    usual = ["--variants", "ours", "ours+compile", "ours+compile+checkpoint"]
    # Apart from the others, for what was never run may take its whole process with it.
    more = ["ours", "ours+sdpa", "ours+xformers", "ours+compile+graphs", "ours+compile+fp8", "paper+amp"]
    recipe = ["--recipe", "aim_b16_k400", "--set", "model.pretrained=none", "--rounds", "5", "--seconds", "2"]
    return [
        _tests(work, 150.0, {"REQUIRE_GPU": "1"}),
        _step("step_b16", "a step of ViT-B/16", work, [*base, *usual], 110.0),
        _decode(work, [], 110.0, NOTHING),
        _profile(work, recipe, 100.0, NOTHING),
        _step("step_l14", "a step of ViT-L/14", work, [*large, *usual[:3]], 110.0),
        _step(
            "step_more", "other ways to compute ViT-B/16", work, [*base, "--rounds", "3", "--variants", *more], 110.0
        ),
    ]


def _reduced_parts(work: Path) -> list[Part]:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # more threads of tiny sizes wait for each other
    quick = ["--quick", "--variants", "ours"]
    batch = [f"ds.{key}=2" for key in ("train_batch_size", "train_micro_batch_size_per_gpu")]
    keys = [part for key in ("model.pretrained=none", "data.workers=1", *batch) for part in ("--set", key)]
    sizes = [*("--videos", "2", "--frames", "24", "--batches", "2", "--size", "48", "--workers", "1")]
    return [
        _tests(work, 180.0, hidden),
        _step("step_b16", "a step of the tiny CLIP, for ViT-B/16", work, quick, 180.0, hidden),
        _decode(work, [*sizes, "--rounds", "1", "--seconds", "0.1"], 180.0, hidden),
        _profile(work, ["--recipe", "demo", *keys, "--rounds", "1", "--seconds", "0.2"], 180.0, hidden),
        _step("step_l14", "a step of the tiny CLIP, for ViT-L/14", work, quick, 180.0, hidden),
    ]


def _tests(work: Path, limit: float, environment: Mapping[str, str]) -> Part:
    """Only files that have such tests, so that no other file's imports are needed; without options of pytest that may
    be unknown there."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    )
    result = work / "junit.xml"
    command = ["-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", f"--junitxml={result}"]
    command += ["-o", "addopts=--import-mode=importlib", "--continue-on-collection-errors"]
    if _is_there("pytest_timeout"):
        command.append("--timeout=100")
    return Part("tests", "tests that need a GPU", [*command, *files], result, limit, 20.0, environment)


def _step(
    name: str, title: str, work: Path, options: Sequence[str], limit: float, environment: Mapping[str, str] = NOTHING
) -> Part:
    result = work / f"{name}.json"
    command = ["tools/bench_step.py", *options, "--json", str(result)]
    return Part(name, title, command, result, limit, limit / 3, environment)


def _decode(work: Path, options: Sequence[str], limit: float, environment: Mapping[str, str]) -> Part:
    result = work / "decode.json"
    command = ["tools/bench_decode.py", "--work", str(work / "sets"), "--json", str(result), *options]
    return Part("decode", "decode rates", command, result, limit, limit / 3, environment)


def _profile(work: Path, options: Sequence[str], limit: float, environment: Mapping[str, str]) -> Part:
    result, shards = work / "profile" / "report.json", work / "sets" / "jpeg"
    command = ["tools/profile_throughput.py", "--shards", str(shards), "--out", str(result.parent), *options]
    return Part("profile", "training from jpeg shards", command, result, limit, limit / 3, environment)


# ------------------------------------------------------------------------------------------------ running them


def run_part(part: Part, log: Path, deadline: float) -> Outcome:
    """Runs a part to its end, its limit or the deadline (of time.monotonic), whichever comes first."""
    shown = shlex.join(["python", *part.command])
    left = deadline - time.monotonic()
    if left < part.needs:
        reason = f"{max(0.0, left):.0f} s of --minutes were left, and it takes {part.needs:.0f} s or more"
        return Outcome(part.title, "skipped", shown, said=[reason])
    started = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {shown}\n".encode())
        file.flush()
        begins = file.tell()
        status = _run(part, file, min(part.limit, max(1.0, left)))
    outcome = Outcome(part.title, status, shown, round(time.monotonic() - started, 1))
    try:
        outcome.result = read_result(part.result)
    except (OSError, ValueError) as error:
        if status == "done":
            outcome.status = "failed"
            outcome.said = [f"left no result: {error}"]
    if outcome.status != "done":
        outcome.said += log.read_bytes()[begins:].decode(errors="replace").splitlines()[-TAIL_LINES:]
    return outcome


def _run(part: Part, output: Any, seconds: float) -> str:
    """Its status; when time is over it is interrupted, as by Ctrl-C, so that it can still write what it has."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where ninja is
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **part.environment}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
    command = [sys.executable, *part.command]
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ours may be deaf: a job in the background
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=listens, **pipes)
    try:
        return "failed" if process.wait(seconds) else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return "timed out"
    finally:  # whoever is left of it, also when we are interrupted
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_result(path: Path) -> Any:
    """A part's result; OSError or ValueError where there is none."""
    if path.suffix == ".xml":
        return read_junit(path)
    result = json.loads(path.read_bytes())
    result.pop("timeline", None)  # is in the picture
    return result


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, the tests that failed with one line each, and the outcome of every test by name."""
    from xml.etree import ElementTree  # written by our own pytest

    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no XML ({error})") from error
    outcomes: dict[str, str] = {}
    failures = []
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        ends = {child.tag: child for child in case}
        outcome = next((tag for tag in ("error", "failure", "skipped") if tag in ends), "passed")
        outcomes[name] = {"error": "failed", "failure": "failed"}.get(outcome, outcome)
        if outcomes[name] == "failed":
            message = " ".join((ends[outcome].get("message") or ends[outcome].text or "").split())
            failures.append({"test": name, "message": message[:300]})
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    return {**counts, "failures": failures, "outcomes": outcomes}


# ------------------------------------------------------------------------------------------------ the report


def publish(args: argparse.Namespace, work: Path, outcomes: Mapping[str, Outcome], on_gpu: bool) -> dict[str, Any]:
    """Writes what is known so far, without the name of the temporary folder; returns it."""
    from pipelines.shards import write_durably

    results = {name: outcome.result for name, outcome in outcomes.items() if outcome.result is not None}
    document = {
        "measured_on_gpu": on_gpu,
        "note": "" if on_gpu else NOT_ON_GPU,
        "goals": [asdict(goal) for goal in judge_goals(results if on_gpu else {})],
        "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "minutes": args.minutes,
        "command": args.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    texts = {"gpu_report.json": json.dumps(document, indent=1, ensure_ascii=False), "gpu_report.md": markdown(document)}
    for name, text in texts.items():
        write_durably(args.out / name, (text.replace(str(work), "WORK") + "\n").encode())
    return document


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="for everything (default: %(default)g)")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes on the CPU, even where there is a GPU")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "tools/gpu_report.py", *(sys.argv[1:] if argv is None else argv)])
    if not 0 < args.minutes <= 120:
        raise ValueError(f"--minutes {args.minutes:g}: allowed is more than 0, up to 120")
    return args


if __name__ == "__main__":
    run_cli(main)
