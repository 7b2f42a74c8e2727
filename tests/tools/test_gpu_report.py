"""The report of a GPU machine: its reduced form as a program, parts that fail or find no time, what goals come to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.shell import shell_environment
from tools import gpu_machine, gpu_report
from tools.bench_step import check_variant
from tools.gpu_report import NOT_ON_GPU, Part, main, read_junit, require_packages, run_part
from tools.parts.gpu_goals import BASELINE, EQUAL_FRAMES, GOALS, NO_LEAKS, judge, judge_goals
from tools.profile_throughput import parse_arguments
from train.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_reduced_form_runs_through(tmp_path: Path) -> None:
    """The whole program, with every part."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools/gpu_report.py"), "--reduced", "--out", str(out)]
    run = subprocess.run(command, env=shell_environment(), cwd="/", capture_output=True, text=True, check=False)
    report = json.loads((out / "gpu_report.json").read_text())
    said = (out / "gpu_report.log").read_text()
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr + said[-3000:]
    assert run.stdout.splitlines()[0] == report["note"] == NOT_ON_GPU and not report["measured_on_gpu"]
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("machine", "tests", "step_b16", "decode", "profile", "step_l14"), "done"
    )
    results = {name: part["result"] for name, part in report["parts"].items()}
    assert results["machine"]["cores"] >= 1 and results["machine"]["versions"]["torch"]
    assert results["tests"]["failed"] == results["tests"]["passed"] == 0 < results["tests"]["skipped"]
    assert set(results["step_b16"]["variants"]) == {BASELINE, "ours"} and results["step_b16"]["left_out"] == {}
    rates = {(row["profile"], row["way"]): row["clips_per_s"] for row in results["decode"]["rates"]}
    ways = [("jpeg", "graph on the CPU"), *((profile, "workers") for profile in ("jpeg", "h264", "hevc"))]
    assert sorted(rates) == sorted(ways) and min(rates.values()) > 0
    assert results["decode"]["not_measured"] == dict.fromkeys(("h264 by NVDEC", "hevc by NVDEC"), "no CUDA device")
    assert 0 < results["decode"]["equality"]["jpeg"]["mean"] < 3
    assert results["profile"]["bounds"]["whole"]["clips_per_s"] > 0 and "timeline" not in results["profile"]
    assert {goal["state"] for goal in report["goals"]} == {"not measured"}
    assert all(part["seconds"] > 0 for part in report["parts"].values()) and report["date"] and report["command"]
    assert Image.open(out / "timeline.png").size[0] > 500
    assert_readable((out / "gpu_report.md").read_text(), out)


def assert_readable(text: str, out: Path) -> None:
    """All parts are in the report for people, and no folder of this machine but the one that was given."""
    assert text.startswith(f"**{NOT_ON_GPU}**")
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads[:4] == ["# GPU report", "## The machine", "## Goals for an H200", "## Tests that need a GPU"]
    assert "## Decode rates" in heads and "## Training from jpeg shards" in heads and len(heads) == 8
    for said in (
        "| ours |",
        "| jpeg | workers |",
        "| end to end |",
        "not measured: no CUDA device",
        "temporal attention",
    ):
        assert said in text
    assert "/tmp" not in text.replace(str(out), "")


def python(tmp_path: Path, name: str, code: str, **settings: Any) -> Part:
    """A part that runs some Python."""
    return Part(
        name, f"part {name}", ["-c", code], tmp_path / f"{name}.json", **{"limit": 30.0, "needs": 0.0, **settings}
    )


def writing(tmp_path: Path, name: str, result: str = "{}") -> str:
    return f"open({str(tmp_path / f'{name}.json')!r}, 'w').write({result!r})"


def test_a_part_that_fails_says_why_and_keeps_its_result(tmp_path: Path) -> None:
    log, late = tmp_path / "log", time.monotonic() + 60
    good = run_part(python(tmp_path, "good", writing(tmp_path, "good", '{"a": 1, "timeline": []}')), log, late)
    assert (good.status, good.result, good.said) == ("done", {"a": 1}, [])
    lines = "for i in range(99): print('line', i)"
    bad = run_part(python(tmp_path, "bad", f"{lines}\nraise SystemExit('went wrong')"), log, late)
    assert (bad.status, bad.result, bad.said[-2:], len(bad.said)) == ("failed", None, ["line 98", "went wrong"], 15)
    half = run_part(
        python(tmp_path, "half", writing(tmp_path, "half", '{"b": 2}') + "; raise SystemExit(1)"), log, late
    )
    assert (half.status, half.result) == ("failed", {"b": 2})
    silent = run_part(python(tmp_path, "silent", "print('well')"), log, late)
    assert silent.status == "failed" and silent.said[0].startswith("left no result") and silent.said[1] == "well"
    broken = run_part(python(tmp_path, "broken", writing(tmp_path, "broken", "{")), log, late)
    assert broken.status == "failed" and broken.said[0].startswith("left no result")
    assert "$ python -c" in log.read_text() and "line 0\n" in log.read_text()


def test_a_part_that_takes_too_long_is_ended_and_may_write_what_it_has(tmp_path: Path) -> None:
    """With whatever it started, even if that does not listen."""
    write = writing(tmp_path, "slow", '{"so": "far"}')
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "try:\n"
        "    print('waiting for', child.pid, flush=True)\n"
        "    while True: time.sleep(0.1)  # one long sleep would miss a signal that came just before it\n"
        f"except KeyboardInterrupt: {write}"
    )
    started = time.monotonic()
    slow = run_part(python(tmp_path, "slow", code, limit=2.0), tmp_path / "log", time.monotonic() + 60)
    assert time.monotonic() - started < 20
    assert (slow.status, slow.result, slow.said[0][:11]) == ("timed out", {"so": "far"}, "waiting for")
    child = Path(f"/proc/{slow.said[0].split()[-1]}/stat")
    deadline = time.monotonic() + 5
    while child.exists() and ") Z " not in child.read_text():
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.05)


def test_one_bad_part_costs_only_itself_and_the_budget_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = {"passed": 3, "failed": 1, "skipped": 0, "failures": [{"test": "a::b", "message": "1 is not 2"}]}
    parts = [
        python(tmp_path, "first", "raise SystemExit('no such thing')"),
        python(tmp_path, "tests", writing(tmp_path, "tests", json.dumps(tests))),
        python(tmp_path, "third", writing(tmp_path, "third"), needs=3000.0),
    ]
    facts = {"gpu": None, "driver": None, "processor": "p", "cores": 2, "libraries": {}, "versions": {}}
    machine = json.dumps({**facts, "not_as_pinned": ["x is missing, which we ask for"]})
    monkeypatch.setattr(gpu_report, "machine_part", lambda work, _: python(work, "m", writing(work, "m", machine)))
    monkeypatch.setattr(gpu_report, "plan_parts", lambda work, on_gpu: parts)
    out = tmp_path / "out"
    assert main(["--out", str(out), "--minutes", "2"]) == 1
    report = json.loads((out / "gpu_report.json").read_text())
    found = {name: part["status"] for name, part in report["parts"].items()}
    assert found == {"machine": "done", "first": "failed", "tests": "done", "third": "skipped"}
    assert report["parts"]["third"]["said"][0].endswith("s of --minutes were left, and it takes 3000 s or more")
    text = (out / "gpu_report.md").read_text()
    assert "3 passed, 1 failed, 0 skipped." in text and "- `a::b`: 1 is not 2" in text and "x is missing" in text
    assert "**Failed** after" in text and "no such thing" in text and "**Skipped**: 1" in text
    assert "not whole: part first (failed), part third (skipped)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "goal", "floor", "at_most", "state"),
    [
        (450.0, 450, 300, False, "reached"),
        (449.9, 450, 300, False, "floor"),
        (300.0, 450, 300, False, "floor"),
        (299.0, 450, 300, False, "missed"),
        (2.4, 2.5, None, False, "missed"),
        (2.0, 2, None, True, "reached"),
        (2.1, 2, None, True, "missed"),
        (2.5, 2, 3, True, "floor"),
        (None, 2, None, True, "not measured"),
        (float("nan"), 2, None, False, "not measured"),
    ],
)
def test_what_a_value_is_called(
    value: float | None, goal: float, floor: float | None, at_most: bool, state: str
) -> None:
    assert judge(value, goal, floor, at_most=at_most) == state


def variant(ms: float, ratio: float, memory: int, clips: float) -> dict[str, Any]:
    return {"step": {"ms": ms, "ratio": ratio}, "memory_bytes": memory, "clips_per_second": clips}


def test_goals_take_the_fastest_way_that_costs_no_accuracy() -> None:
    """Its memory too; FlashAttention must have been there; tests count in all their variants."""
    variants = {
        BASELINE: variant(100, 1.0, 1000, 160),
        "ours": variant(50, 2.0, 300, 320),
        "ours+compile": variant(35, 2.86, 450, 457),
        "ours+compile+fp8": variant(20, 5.0, 450, 800),
    }
    temporal = {name: {"forward_backward": {"ratio": ratio}} for name, ratio in (("auto", 3.5), ("flash", 1.0))}
    outcomes = {f"tests.a::{name}[{i}]": "passed" for name in (*EQUAL_FRAMES, *NO_LEAKS) for i in range(2)}
    results: dict[str, Any] = {
        "step_b16": {"variants": variants, "temporal_attention": temporal},
        "profile": {
            "bounds": {"whole": {"clips_per_s": 260.0}},
            "waiting_share": 0.03,
            "consistency": {"ratio_to_slower": 0.95},
        },
        "tests": {"outcomes": outcomes},
    }
    states = [goal.state for goal in judge_goals(results)]
    without = ["not measured"] * 3
    assert states == ["reached"] * 3 + without + ["reached", "floor", "missed", "reached"] + ["reached"] * 2
    assert [goal.value for goal in judge_goals(results)][:3] == [457, 2.86, 45.0]
    del temporal["flash"]
    outcomes[f"tests.a::{NO_LEAKS[0]}[0]"] = "failed"
    outcomes[f"tests.a::{EQUAL_FRAMES[0]}[0]"] = "skipped"
    changed = judge_goals(results)
    assert [changed[6].state, changed[-2].state, changed[-1].state] == ["not measured", "not measured", "missed"]
    assert changed[-1].note == "1 of 2 tests passed"
    outcomes.pop(f"tests.a::{EQUAL_FRAMES[1]}[0]")
    outcomes.pop(f"tests.a::{EQUAL_FRAMES[1]}[1]")
    assert judge_goals(results)[-2].state == "not measured"
    assert {goal.state for goal in judge_goals({})} == {"not measured"} and len(judge_goals({})) == len(GOALS) + 2


def test_tests_that_goals_rest_on_exist() -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for name in (*EQUAL_FRAMES, *NO_LEAKS):
        assert sum(f"def {name}(" in source for source in sources) == 1, name


def test_failures_are_read_from_pytests_file(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'not\\nequal'\n"
        "@pytest.fixture\ndef lost(): raise OSError('gone')\ndef test_lost(lost): pass\n"
        "def test_not(): pytest.skip('no')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'junit.xml'}"]
    subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(tmp_path), str(tests)], capture_output=True, check=False
    )
    found = read_junit(tmp_path / "junit.xml")
    assert {kind: found[kind] for kind in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 2, "skipped": 1}
    assert [failure["test"] for failure in found["failures"]] == ["test_some::test_bad", "test_some::test_lost"]
    assert "not equal" in found["failures"][0]["message"] and "gone" in found["failures"][1]["message"]
    assert found["outcomes"]["test_some::test_not"] == "skipped"


def test_a_missing_package_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_report.MODULES, "no_such_module", "no-such-package")
    monkeypatch.setitem(gpu_report.MODULES, "nothing.here", "nothing-here")
    with pytest.raises(ValueError, match=r"^not installed: no-such-package, nothing-here; run make setup"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    require_packages()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "500"])
def test_minutes_out_of_range_are_refused(tmp_path: Path, minutes: str) -> None:
    with pytest.raises(ValueError, match=r"--minutes .*: allowed is more than 0, up to 120"):
        main(["--out", str(tmp_path / "out"), "--minutes", minutes])


def test_what_is_not_as_pinned_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["no-such-package>=1", "numpy<1", "pytest[no-extra]>=1", "never; python_version < '3'"]
    monkeypatch.setattr(gpu_machine, "_dependencies", lambda: asked)
    found = list(gpu_machine.not_as_pinned())
    assert found[0] == "no-such-package is missing, which we ask for" and found[1].endswith("; we ask for <1")
    assert len(found) == 2
    assert gpu_machine.find_library(("libc.so.6",)) == "libc.so.6"
    assert gpu_machine.find_library(("libnothing.so.9",)).startswith("not found: libnothing.so.9")


def test_parts_for_cuda_ask_for_what_there_is(tmp_path: Path) -> None:
    """They cannot run here; their programs know the options, variants and keys at least."""
    parts = {part.name: part for part in gpu_report.plan_parts(tmp_path, on_gpu=True)}
    assert list(parts) == ["tests", "step_b16", "decode", "profile", "step_l14", "step_more"]
    assert parts["tests"].environment == {"REQUIRE_GPU": "1"}
    assert {"tests/pipelines/test_loader.py", "tests/train/test_gpu.py"} <= set(parts["tests"].command)
    for name in ("step_b16", "step_l14", "step_more"):
        command = parts[name].command
        variants = command[command.index("--variants") + 1 : command.index("--json")]
        for variant_name in variants:
            check_variant(variant_name)
        assert "ours" in variants
    options = parse_arguments(parts["profile"].command[1:])
    config = load_config(options.recipe, [*options.set, "data.shards=x"])
    assert config.model.pretrained == "none" and config.data.num_frames == 8
    assert sum(part.limit for part in list(parts.values())[:4]) < 480
