"""Indexing as a user runs it, and training from what comes out, here and over the web."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from pipelines.shards import ShardSet
from tests.shell import call_program
from tests.train.runs import metrics, run_here
from tests.videos import write_video
from tests.web import serve
from tools.index_shards import list_tars, main, split_tars


def index_shards(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return call_program(main, *arguments, "--workers", "1")


def write_shards(folder: Path, video: bytes, name: str = "train-%06d.tar", count: int = 12) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / name), maxcount=4, verbose=0) as writer:
        for i in range(count):
            writer.write({"__key__": f"{i:04d}", "mp4": video, "cls": i % 3})
    return sorted(folder.glob(name.split("-")[0] + "*.tar"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", 12, (64, 64)).read_bytes()


def test_in_place(tmp_path: Path, video: bytes) -> None:
    tars = write_shards(tmp_path, video)
    run = index_shards(tmp_path)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert run.stdout.startswith(f"{tmp_path}: 12 of 12 samples indexed in ")
    assert "train: 12 samples" in run.stdout and "not decoded" in run.stdout
    assert len(ShardSet.open(tmp_path, "train")) == 12
    again = index_shards(*tars)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert "has a manifest.json already" in again.stderr


def test_links_in_a_new_folder(tmp_path: Path, video: bytes) -> None:
    """Tars of the same name from two folders, with names that are none of ours."""
    for split in ("train", "validation"):
        write_shards(tmp_path / split, video, "my shards #-%d.tar")
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    out = tmp_path / "new/set"
    run = index_shards(tmp_path / "train", tmp_path / "validation", "--out", out, "--classes", names, "--verify")
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert "train: 12 samples" in run.stdout and "val: 12 samples" in run.stdout and "not decoded" not in run.stdout
    assert sorted(path.name for path in out.glob("*.tar")) == [
        f"{s}-{i:06d}.tar" for s in ("train", "val") for i in range(3)
    ]
    assert (out / "val-000001.tar").samefile(tmp_path / "validation/my shards #-1.tar")
    assert (
        f"val-000001.tar\t'{tmp_path}/validation/my shards #-1.tar'" in (out / "sources.tsv").read_text().splitlines()
    )
    shards = ShardSet.open(out, "val")
    assert shards.classes == ("a", "b", "c", "d") and shards.verified
    assert [path.name for path in tmp_path.joinpath("train").iterdir() if path.suffix != ".tar"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "no such file or folder"),
        (["{tmp}/empty"], "holds no tar"),
        (["{tmp}/a/x-0.tar", "{tmp}/a/x-0.tar"], "is given twice"),
        (["{tmp}/a", "{tmp}/b"], "lie in 2 folders"),
        (["{tmp}/b"], "rename it, or add --out DIR"),
        (["{tmp}/a", "--out", "{tmp}/b"], "exists"),
        (["{tmp}/a", "--label", "json:"], "allowed are a suffix"),
        (["{tmp}/a", "--split", "dev=*"], "expected SPLIT=GLOB"),
        (["{tmp}/a", "--split", "train=*/none/*"], "is of no split"),
        (["{tmp}/a", "--classes", "{tmp}/one.txt"], "two or more are needed"),
        (["{tmp}/a", "--classes", "{tmp}/two.txt"], "sample 0002: label 2; allowed are 0 to 1"),
        (["{tmp}/a", "--out", "/dev/shm/{name}"], "index in place"),
    ],
)
def test_mistakes(
    tmp_path: Path, video: bytes, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "/dev/shm/{name}" in arguments and os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    write_shards(tmp_path / "a", video, "x-%d.tar", count=4)
    write_shards(tmp_path / "b", video, "y z-%d.tar", count=4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    before = sorted(tmp_path.rglob("*"))
    given = [text.format(tmp=tmp_path, name=tmp_path.name) for text in arguments]
    monkeypatch.setattr(sys, "argv", ["index_shards.py", *given, "--workers", "1"])
    with pytest.raises((ValueError, OSError)) as error:
        main()
    assert message in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "rules", "splits"),
    [
        (["a-0.tar", "b.tar"], [], {"train": ["a-0.tar", "b.tar"]}),
        (["train-0.tar", "TEST_1.tar"], [], {"train": ["train-0.tar"], "test": ["TEST_1.tar"]}),
        (["validation/0.tar", "train/0.tar"], [], {"val": ["validation/0.tar"], "train": ["train/0.tar"]}),
        (["trainer-0.tar", "valley-0.tar"], [], {"train": ["trainer-0.tar", "valley-0.tar"]}),
        (["x/0.tar", "x/1.tar"], ["train=*/0.tar", "val=1.tar"], {"train": ["x/0.tar"], "val": ["x/1.tar"]}),
        (["train-0.tar"], ["val=train-*"], {"val": ["train-0.tar"]}),
        (["train-0.tar", "other.tar"], [], "other.tar is of no split"),
        (["a.tar"], ["train=a*", "val=*"], "a.tar is of splits train and val"),
    ],
)  # fmt: skip
def test_splits(names: list[str], rules: list[str], splits: object) -> None:
    tars = [Path("/data") / name for name in names]
    if isinstance(splits, str):
        with pytest.raises(ValueError, match=splits):
            split_tars(tars, rules)
    else:
        found = split_tars(tars, rules)
        assert {s: [str(tar.relative_to("/data")) for tar in members] for s, members in found.items()} == splits


def test_folders_are_listed_to_the_bottom(tmp_path: Path, video: bytes) -> None:
    tars = write_shards(tmp_path / "x/y", video) + write_shards(tmp_path / "x", video)
    assert sorted(list_tars([tmp_path])) == sorted(set(tars))


def test_a_stock_set_trains_over_the_web(tmp_path: Path, video: bytes) -> None:
    """`webdataset.ShardWriter` → `index_shards` → a web server → `train/main.py`."""
    folder = tmp_path / "set"
    write_shards(folder, video, "train-%06d.tar", count=24)
    write_shards(folder, video, "val-%06d.tar", count=8)
    assert index_shards(folder).returncode == 0
    with serve(folder) as site:
        settings = [f'data.shards="{site.url}"', "data.shuffle_shards=1", f'data.cache_dir="{tmp_path / "cache"}"']
        run_here(Path("ignored"), tmp_path / "run", *settings, "data.cache_gb=1", "schedule.epochs=1")
        files = site.files_requested
    assert len(metrics(tmp_path / "run", "train")) > 0 and len(metrics(tmp_path / "run", "eval")) > 0
    assert len(files) == 2 * (6 + 2) and max(files.values()) == 1
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 6 + 2
