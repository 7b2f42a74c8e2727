"""DALI's index files: the same as DALI's own tool writes, and DALI reads the same samples by them. And the other
readers of WebDataset that need nothing but the tars."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.shards import ShardSet
from tests.sets import make_set

ROOT = Path(__file__).resolve().parents[2]


def export_index(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/export_index.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"123"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_set(tmp_path_factory.mktemp("packed") / "set", [5, 9, 12, 7, 3], samples_a_shard=2)
    write_tar(folder / "stray.tar", ["a b.mp4"])  # not of the set
    return folder


def test_dali_reads_our_shards_by_it(packed: Path, tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    run = export_index(packed, "--out", tmp_path / "new/index")
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert run.stdout == f"{tmp_path}/new/index: 3 index files of 5 samples\n"
    indexes = sorted((tmp_path / "new/index").iterdir())
    assert [path.name for path in indexes] == [f"train-{i:06d}.idx" for i in range(3)]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read():  # type: ignore[no-untyped-def]
        outputs = fn.readers.webdataset(
            paths=[str(packed / f"{path.stem}.tar") for path in indexes],
            index_paths=[str(path) for path in indexes],
            ext=["mp4", "cls", "json"],
            missing_component_behavior="error",
        )
        return tuple(outputs)

    pipeline = read()
    pipeline.build()
    shards = ShardSet.open(packed, "train")
    for i in range(len(shards)):
        sample = shards[i]
        video, label, facts = (np.asarray(output.at(0)).tobytes() for output in pipeline.run())
        assert video == sample.shard.read_bytes()[sample.video_offset :][: sample.video_bytes]
        assert int(label) == sample.label and json.loads(facts)["labels"] == [sample.label]


def test_hugging_face_reads_our_shards(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)  # installed, it needs a system FFmpeg
    tars = {"train": sorted(map(str, packed.glob("train-*.tar")))}
    found = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True).decode(False)
    shards = ShardSet.open(packed, "train")
    rows = list(found)
    assert len(rows) == len(shards)
    for i, row in enumerate(rows):
        sample = shards[i]
        assert (row["__key__"], row["cls"], row["json"]["labels"]) == (sample.key, sample.label, [sample.label])
        assert row["mp4"]["bytes"] == sample.shard.read_bytes()[sample.video_offset :][: sample.video_bytes]


NAMES = ["a.mp4", "a.cls", "b.x.mp4", "b.cls", "dir.d/c.mp4", "dir.d/.hidden", "dir.d/c.cls", "./d.mp4", "a.txt"]


@pytest.mark.parametrize("names", [None, NAMES])
def test_like_dalis_own_tool(packed: Path, tmp_path: Path, names: list[str] | None) -> None:
    from wds2idx import IndexCreator

    tar = packed / "train-000000.tar"
    if names:
        tar = tmp_path / "names.tar"
        write_tar(tar, names)
    assert export_index(tar.parent if names else packed, "--out", tmp_path / "ours").returncode == 0
    theirs = tmp_path / "theirs.idx"
    with IndexCreator(str(tar), str(theirs), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "ours" / f"{tar.stem}.idx").read_text() == theirs.read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a b.mp4"], "holds a space"), (["README"], "has no suffix"), ([], "no sample"), ([".a.mp4"], "no sample")],
)
def test_what_dali_could_not_read(tmp_path: Path, names: list[str], message: str) -> None:
    write_tar(tmp_path / "a.tar", names)
    run = export_index(tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr and f"{tmp_path}/a.tar" in run.stderr
    assert not (tmp_path / "a.idx").exists()


def test_damage_and_nothing(tmp_path: Path) -> None:
    assert "no such folder" in export_index(tmp_path / "none").stderr
    assert "holds no tar" in export_index(tmp_path).stderr
    write_tar(tmp_path / "a.tar", ["a.mp4"])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    run = export_index(tmp_path)
    assert run.returncode == 2 and "a.tar: truncated" in run.stderr
