"""The doctor: a sound machine, seeded faults each named with its remedy, trials that crash or hang, wrong options."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import cli, dali
from tests.sets import make_set
from tests.shell import call_program
from tools import doctor, gpu_machine
from tools.parts import doctor_data, doctor_machine, doctor_trials
from tools.parts.doctor_machine import FALLBACK, OK, PROBLEM, Row

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def good_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 videos of 2 classes in splits train and val, 3 shards each."""
    return make_set(tmp_path_factory.mktemp("doctor") / "set", [12, 20, 9] * 3 + [12, 9], splits=("train", "val"))


@pytest.fixture
def packed(good_set: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(good_set, tmp_path / "set")


def rows_of(result: str) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in json.loads(result)["rows"]}


def test_a_machine_and_a_set_that_are_sound(good_set: Path, tmp_path: Path) -> None:
    """The real thing, children and all."""
    report = tmp_path / "doctor.json"
    run = call_program(doctor.main, "--shards", good_set, "--json", report)
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
    rows = rows_of(report.read_text())
    assert {"DALI, CPU", "FFmpeg, CPU", "attention", "set", "set: bytes"} <= {
        n for n, r in rows.items() if r["status"] == OK
    }
    assert rows["DeepSpeed"]["status"] in (OK, FALLBACK) and "0.19" in rows["DeepSpeed"]["found"]
    assert all(row["remedy"] or row["cost"] for row in rows.values() if row["status"] != OK)
    lines = run.stdout.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert lines[-1].startswith("fit to train: problems 0")
    assert "jpeg, 2 classes, train 11, val 11" in rows["set"]["found"]
    assert rows["set: bytes"]["found"].startswith("checksums hold: 18 samples of 6 shards")


# ------------------------------------------------------------------------------------------- seeded faults


def no_compiler(monkeypatch: Patch, packed: Path) -> None:
    monkeypatch.setenv("PATH", str(packed))
    monkeypatch.delenv("CC", raising=False)


def no_launcher(monkeypatch: Patch, packed: Path) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def launcher_of_another_python(monkeypatch: Patch, packed: Path) -> None:
    script = packed / "deepspeed"
    script.write_text("#!/opt/other/bin/python\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{packed}{os.pathsep}{os.environ['PATH']}")


def wrong_torchvision(monkeypatch: Patch, packed: Path) -> None:
    real = gpu_machine.metadata.version
    monkeypatch.setattr(gpu_machine.metadata, "version", lambda name: "0.20.0" if name == "torchvision" else real(name))


def no_room(*, shared_memory: bool) -> Callable[[Patch, Path], None]:
    """40 MB are free in /dev/shm, or everywhere else."""

    def seed(monkeypatch: Patch, packed: Path) -> None:
        real = shutil.disk_usage
        little = shutil._ntuple_diskusage(10**8, 6 * 10**7, 4 * 10**7)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda p: little if (str(p) == "/dev/shm") == shared_memory else real(p)
        )

    return seed


def home_that_cannot_be_written(monkeypatch: Patch, packed: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/self/home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def few_files(monkeypatch: Patch, packed: Path) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (256, 4096))


def shard_missing(monkeypatch: Patch, packed: Path) -> None:
    (packed / "train-000001.tar").unlink()


def shard_cut(monkeypatch: Patch, packed: Path) -> None:
    os.truncate(packed / "train-000001.tar", 5000)


def index_of_another_shard(monkeypatch: Patch, packed: Path) -> None:
    shutil.copy(packed / "train-000000.index.safetensors", packed / "train-000001.index.safetensors")


def bytes_changed(monkeypatch: Patch, packed: Path) -> None:
    for path in packed.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)


def manifest_damaged(monkeypatch: Patch, packed: Path) -> None:
    (packed / "manifest.json").write_bytes(b'{"format_version": 2, "splits": [')


def manifest_of_the_future(monkeypatch: Patch, packed: Path) -> None:
    document = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(document | {"format_version": 9}))


def no_manifest(monkeypatch: Patch, packed: Path) -> None:
    (packed / "manifest.json").unlink()


def many_rejects(monkeypatch: Patch, packed: Path) -> None:
    lines = ["path\treason\tdetail", *("a.mp4\ttruncated\tcut" for _ in range(4))]
    (packed / "rejects.tsv").write_text("\n".join(lines) + "\n")


def operator_cut_off(monkeypatch: Patch, packed: Path) -> None:
    folder = packed / "extensions" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))


def operator_without_compiler(monkeypatch: Patch, packed: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(packed / "extensions"))
    monkeypatch.setenv("CXX", "no-such-compiler")


def operator_of_another_environment(monkeypatch: Patch, packed: Path) -> None:
    folder = packed / "extensions" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "deepspeed_shm_comm.so").touch()
    (folder / "build.ninja").write_text("cflags = -isystem /opt/other/torch/include")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))


@pytest.mark.parametrize(
    ("seed", "name", "status", "found", "remedy"),
    [
        (no_compiler, "build tools", FALLBACK, "no C++ compiler", "apt-get install g++"),
        (no_launcher, "launcher", FALLBACK, "deepspeed", "activate"),
        (launcher_of_another_python, "launcher", FALLBACK, "starts /opt/other/bin/python", "under one path"),
        (wrong_torchvision, "packages", PROBLEM, "torchvision is 0.20.0; we ask for ==0.26.0", "make setup"),
        (no_room(shared_memory=True), "/dev/shm", PROBLEM, "40 MB free; DeepSpeed takes 67 MB", "--shm-size"),
        (no_room(shared_memory=False), "disk, runs/", PROBLEM, "40 MB free; 1.0 GB is the least", "run.out="),
        (home_that_cannot_be_written, "caches", FALLBACK, "cannot be written", "export HOME="),
        (few_files, "open files", FALLBACK, "at most 256", "ulimit -n 4096"),
        (shard_missing, "set: files", PROBLEM, "4 of 22 samples cannot be read: ", "pack again"),
        (shard_cut, "set: files", PROBLEM, "has 5000 bytes, the manifest says", "copy these files again"),
        (index_of_another_shard, "set: bytes", PROBLEM, "is not the index that the manifest names", "pack again"),
        (bytes_changed, "set: bytes", PROBLEM, "checksum differs", "copy these files again"),
        (manifest_damaged, "set", PROBLEM, "manifest.json is damaged", "pack again"),
        (manifest_of_the_future, "set", PROBLEM, "format version 9, this program reads 2", "pack again"),
        (no_manifest, "set", PROBLEM, "holds no manifest.json", "pack again"),
        (many_rejects, "set: rejects", FALLBACK, "4 sources were left out beside 22", "rejects.tsv"),
        (operator_cut_off, "DeepSpeed", PROBLEM, "earlier build of its operator was cut off", "rm -r "),
        (operator_without_compiler, "DeepSpeed", PROBLEM, "there is no C++ compiler", "apt-get install g++"),
        (operator_of_another_environment, "DeepSpeed", FALLBACK, "built under another path", "one path"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_remedy(
    seed: Callable[[Patch, Path], None],
    name: str,
    status: str,
    found: str,
    remedy: str,
    packed: Path,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    def in_this_process(trials: list[tuple[str, str]], seconds: float) -> list[Row]:
        return [row for trial, argument in trials for row in doctor_trials.one_trial(trial, argument)]

    monkeypatch.setattr(doctor, "try_all", in_this_process)
    monkeypatch.setattr(doctor, "GROUPS", (("DeepSpeed",),) if name == "DeepSpeed" else ())
    seed(monkeypatch, packed)
    report = tmp_path / "doctor.json"
    run = call_program(doctor.main, "--shards", packed, "--json", report)
    assert run.stderr == "" and "Traceback" not in run.stdout
    row = rows_of(report.read_text())[name]
    assert row["status"] == status and found in row["found"] and remedy in row["remedy"], row
    assert run.returncode == (status == PROBLEM), run.stdout


def test_of_another_python_without_the_packages_only_that_is_said(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_VENV", tmp_path)
    (tmp_path / ".setup-0123").touch()
    assert doctor_machine.wrong_python() is None, "another Python that has the packages is looked at"
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    run = call_program(doctor.main)
    assert run.returncode == 1 and run.stderr == ""
    (row, *more) = [line for line in run.stdout.splitlines() if not line.startswith(" ")]
    assert row.startswith("problem   Python ") and more == [
        "something prevents training: problems 1, fallbacks 0 (0 s)"
    ]
    assert "lacks torch; nothing else was looked at" in " ".join(run.stdout.split())
    assert "→ source .venv/bin/activate" in run.stdout and "make setup" not in run.stdout


def test_without_weights_both_settings_that_need_none_are_named(monkeypatch: Patch, tmp_path: Path) -> None:
    for variable in ("XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    row = doctor_machine.weights()
    assert row.status == FALLBACK and "--set model.name=tiny-clip --set model.pretrained=shapes" in row.remedy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shards", "nowhere"], "--shards nowhere: there is no such folder; name a packed set"),
        (["--shards", "s3://bucket/set"], "--shards s3://bucket/set: allowed is a folder"),
        (["--videos", "nowhere"], "--videos nowhere: there is no such folder"),
        (["--videos", __file__], "there is no such folder; name a folder of videos"),
        (["--json", "nowhere/doctor.json"], "there is no folder nowhere"),
        (["--json", "."], "is a folder"),
    ],
)
def test_wrong_options_are_told_in_a_line(words: list[str], said: str) -> None:
    run = call_program(doctor.main, *words)
    assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""


# ------------------------------------------------------------------------------------------- what containers allow


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    """Both versions of control groups."""
    assert doctor_machine.memory(tmp_path).status == OK
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(str(3 * 10**9))
    (tmp_path / "memory.current").write_text(str(2 * 10**9))
    row = doctor_machine.cores(tmp_path)
    assert row.status == FALLBACK and "may keep 0.5 busy" in row.found and "data.workers=1" in row.remedy
    row = doctor_machine.memory(tmp_path)
    assert row.status == PROBLEM and "may have 1.0 GB" in row.found
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert "container" not in doctor_machine.cores(tmp_path).found + doctor_machine.memory(tmp_path).found
    for path in ("cpu.max", "memory.max"):
        (tmp_path / path).unlink()
    for path, text in {
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "3000000000",
        "memory/memory.usage_in_bytes": "0",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert "container" not in doctor_machine.cores(tmp_path).found
    assert doctor_machine.memory(tmp_path).status == FALLBACK


# ------------------------------------------------------------------------------------------- trials


def test_a_trial_that_dies_or_hangs_costs_only_itself(monkeypatch: Patch) -> None:
    """In the place of the real child one that needs no packages: its trials say themselves what to do."""
    child = """
import json, os, signal, sys, time
for name, what in json.loads(sys.argv[3]):
    os.write(int(sys.argv[2]), json.dumps({"begin": name}).encode() + b"\\n")
    if what == "die": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang": time.sleep(60)
    if what == "exit": sys.exit("no such driver")
    os.write(int(sys.argv[2]), json.dumps({"status": "ok", "name": name, "found": "well"}).encode() + b"\\n")
"""
    monkeypatch.setattr(doctor_trials, "_CHILD", child)
    trials = [("a", ""), ("b", "die"), ("c", "hang"), ("d", ""), ("NVDEC", "exit"), ("e", "")]
    rows = doctor_trials.try_all(trials, 1.0)
    assert [(row.name, row.status) for row in rows] == [
        *(("a", OK), ("b", PROBLEM), ("c", PROBLEM), ("d", OK)),
        *(("NVDEC", FALLBACK), ("e", OK)),  # training does without NVDEC
    ]
    assert "SIGSEGV" in rows[1].found and "more than 1 s" in rows[2].found and "no such driver" in rows[4].found


def test_an_import_that_fails_is_a_row(monkeypatch: Patch) -> None:
    def fail(_: str) -> list[Row]:
        raise ImportError("libcuda.so.1: cannot open\nshared object file")

    monkeypatch.setitem(doctor_trials.TRIALS, "GPU", fail)
    (row,) = doctor_trials.one_trial("GPU", "")
    assert row.status == PROBLEM and row.found == "ImportError: libcuda.so.1: cannot open shared object file"


def test_trials_of_a_gpu_with_the_cpu_in_its_place(monkeypatch: Patch) -> None:
    """The same operators of DALI; its CPU decoder knows no H.264, so NVDEC falls back."""
    monkeypatch.setattr(doctor_trials, "has_cuda", lambda: True)
    jpeg, video = dali.JpegCropper, dali.VideoCropper
    monkeypatch.setattr(dali, "JpegCropper", lambda size, n, gpu: jpeg(size, n, gpu=None))
    monkeypatch.setattr(dali, "VideoCropper", lambda size, n, gpu: video(size, n, gpu=None))
    (row,) = doctor_trials.one_trial("nvJPEG", "")
    assert row.status == OK, row
    (row,) = doctor_trials.one_trial("NVDEC", "")
    assert row.status == FALLBACK and "DALI cannot decode" in row.found and "video" in row.remedy, row

    def other_picture(*_: Any) -> Any:
        return np.zeros((1, 64, 64, 3), np.uint8)

    monkeypatch.setattr(jpeg, "crop", other_picture)
    (row,) = doctor_trials.one_trial("nvJPEG", "")
    assert row.status == PROBLEM and "another picture" in row.found


@pytest.mark.parametrize(
    ("facts", "seen", "status", "found"),
    [
        (None, None, FALLBACK, "none (torch "),
        (None, "NVIDIA H200, 535.1", FALLBACK, "torch sees none"),
        ({"capability": "9.0"}, "NVIDIA H200, 580.9", OK, "1 × NVIDIA H200, 141 GB, compute capability 9.0"),
        ({"capability": "7.0"}, "NVIDIA V100", FALLBACK, "compute capability 7.0"),
    ],
)
def test_gpus_are_described(
    facts: dict[str, str] | None, seen: str | None, status: str, found: str, monkeypatch: Patch
) -> None:
    known = {"name": "NVIDIA H200", "count": 1, "memory_bytes": 141 * 10**9, "cuda": "13.0"}
    monkeypatch.setattr(gpu_machine, "gpu", lambda: facts and known | facts)
    monkeypatch.setattr(gpu_machine, "driver", lambda: seen)
    (row,) = doctor_trials.one_trial("GPU", "")
    assert row.status == status and found in row.found
    assert status == OK or (row.cost and row.remedy)


@pytest.mark.gpu
def test_everything_is_tried_on_a_gpu(good_set: Path, tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    run = call_program(doctor.main, "--shards", good_set, "--json", report)
    rows = rows_of(report.read_text())
    assert run.returncode == 0, run.stdout
    assert all(rows[name]["status"] == OK for name in ("GPU", "nvJPEG", "attention", "Triton kernel", "DeepSpeed"))
    assert "on the GPU" in rows["set: decoding"]["found"]


# ------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("profile", ["h264", "copy"])
def test_sets_that_cost_more_to_decode_say_so(profile: str, tmp_path: Path) -> None:
    rows = {row.name: row for row in doctor_data.set_rows(make_set(tmp_path / "set", [9], profile=profile), False)}
    row = rows["set: decoding"]
    assert row.status == FALLBACK and "clips/s a core" in row.cost and "--profile jpeg" in row.remedy
    assert rows["set"].status == FALLBACK and "no samples in split val" in rows["set"].cost


def test_a_few_lost_samples_are_a_fallback(monkeypatch: Patch) -> None:
    row = doctor_data._lost("set: files", 1, 200, ["a", "b", "c", "d"])
    assert row.status == FALLBACK and row.found == "1 of 200 samples cannot be read: a; b; c; and 1 more"


def test_videos_are_looked_at(good_set: Path, tmp_path: Path) -> None:
    (row,) = doctor_data.video_rows(tmp_path)
    assert row.status == PROBLEM and "no video among its files" in row.found
    bad, good = tmp_path / "a" / "bad.mp4", tmp_path / "a" / "good.MP4"
    bad.parent.mkdir()
    bad.write_bytes(b"no video at all")
    (row,) = doctor_data.video_rows(tmp_path)
    assert row.status == PROBLEM and "bad.mp4 (unreadable" in row.found
    from pipelines.shards import ShardSet

    sample = ShardSet.open(good_set, "train")[0]
    good.write_bytes(sample.shard.read_bytes()[sample.video_offset : sample.video_offset + sample.video_bytes])
    (row,) = doctor_data.video_rows(tmp_path)
    assert row.status == FALLBACK and "2 videos" in row.found and "1 open and show a frame" in row.found
    bad.unlink()
    assert doctor_data.video_rows(tmp_path)[0].status == OK
