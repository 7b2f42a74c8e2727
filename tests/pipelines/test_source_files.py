"""Which files a folder holds and which of them a list means: links, splits, replacements, and what is ambiguous."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from pipelines.source_files import SourceFiles, is_video, subfolders, suffix_of


def tree(root: Path, *paths: str) -> SourceFiles:
    """Empty files."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return SourceFiles(root)


def file(files: SourceFiles, path: str, split: str = "train") -> str | None:
    return files.find_file([path], split, "list.txt, line 3")


def clip(files: SourceFiles, *names: str, split: str = "train") -> str | None:
    return files.find_clip(names, split, "k.csv, line 3")


def test_names_are_of_files_that_lie_directly_in_a_folder(tmp_path: Path) -> None:
    files = tree(tmp_path, "top.mp4", "a/one.mp4", "a/.hidden", "a/b/two.mp4")
    (tmp_path / "a" / "link.mp4").symlink_to("one.mp4")
    (tmp_path / "a" / "broken.mp4").symlink_to("nothing.mp4")
    (tmp_path / "a" / "self.mp4").symlink_to("self.mp4")
    assert files.names("") == {"top.mp4"}
    assert files.names("a") == {"one.mp4", ".hidden", "link.mp4"}
    for folder in ("none", "top.mp4", "top.mp4/below", "a/self.mp4", "n" * 300):
        assert files.names(folder) == set()


def test_a_folder_is_listed_once(tmp_path: Path) -> None:
    files = tree(tmp_path, "a/one.mp4")
    assert file(files, "a/one.mp4") == "a/one.mp4"
    (tmp_path / "a" / "late.mp4").touch()
    assert file(files, "a/late.mp4") is None
    assert file(SourceFiles(tmp_path), "a/late.mp4") == "a/late.mp4"


def test_a_folder_that_may_not_be_read_is_an_error_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tree(tmp_path, "a/one.mp4")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a"):
        files.names("a")
    with pytest.raises(PermissionError):
        list(files.walk(""))


def test_a_walk_follows_links_but_no_loop_and_enters_nothing_hidden(tmp_path: Path) -> None:
    tree(tmp_path / "disk", "far/c.mp4")
    files = tree(tmp_path / "source", "b.mp4", "a/2.mp4", "a/1.mp4", "a/deep/3.mp4", ".cache/no.mp4", "a/.git/no.mp4")
    source = tmp_path / "source"
    (source / "disk").symlink_to(tmp_path / "disk")
    (source / "a" / "deep" / "up").symlink_to(source)
    (source / "a" / "deep" / "here").symlink_to(source / "a" / "deep")
    (source / "again").symlink_to(source / "a" / "deep")  # another way to it is no loop
    (source / "broken").symlink_to(tmp_path / "nothing")
    found = list(islice(files.walk(""), 100))  # in a loop it would never end
    below = ["a/1.mp4", "a/2.mp4", "a/deep/3.mp4"]
    assert sorted(found) == sorted(["b.mp4", *below, "again/3.mp4", "disk/far/c.mp4"])
    assert [path for path in found if path.startswith("a/")] == below
    assert list(files.walk("a")) == below
    assert list(files.walk("a/deep")) == ["a/deep/3.mp4"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../a.mp4", "a/../../a.mp4", "a/..", "/"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    files = tree(tmp_path / "source", "a/one.mp4")
    tree(tmp_path, "a.mp4")
    with pytest.raises(ValueError) as error:
        file(files, path)
    assert str(error.value) == (
        f"list.txt, line 3: path {path!r} leaves the source folder; paths must be relative and without '..'"
    )


def test_a_file_is_found_as_listed_or_below_the_folder_of_its_split(tmp_path: Path) -> None:
    files = tree(
        tmp_path, "run/a.mp4", "train_256/run/b.mp4", "val/run/b.mp4", "val/run/a.mp4", "train_and_val/run/c.mp4"
    )
    assert file(files, "run/a.mp4") == "run/a.mp4"
    assert file(files, "run//./a.mp4") == "run/a.mp4"
    assert not files.found_in
    assert file(files, "run/b.mp4") == "train_256/run/b.mp4"
    assert file(files, "run/b.mp4", "val") == "val/run/b.mp4"
    assert file(files, "run/a.mp4", "val") == "run/a.mp4", "the path as it stands comes first"
    assert file(files, "run/b.mp4", "test") is None
    assert file(files, "run/c.mp4") is None, "a folder whose name speaks of two splits is of neither"
    assert file(files, "run") is None, "a folder is no file"
    assert files.found_in == {"train_256": 1, "val": 1}


def test_a_file_in_two_folders_of_its_split_is_ambiguous(tmp_path: Path) -> None:
    files = tree(tmp_path, "train_b/run/a.mp4", "train_a/run/a.mp4")
    with pytest.raises(ValueError) as error:
        file(files, "run/a.mp4")
    assert str(error.value) == ("list.txt, line 3: run/a.mp4 is there more than once: in train_a and train_b; keep one")


def test_a_clip_is_found_by_how_its_path_ends(tmp_path: Path) -> None:
    files = tree(tmp_path, "x/run/a.MKV", "x/jump/ba.mp4", "notes/a.txt", "y/v.1_000.mp4", "._a.mp4")
    assert clip(files, "a") == clip(files, "run/a") == "x/run/a.MKV"
    assert clip(files, "v.1_000") == "y/v.1_000.mp4"
    assert clip(files, "un/a") is None, "only whole names of folders count"
    assert clip(files, "none", "jump/ba", "a") == "x/jump/ba.mp4", "the first name that fits any"
    assert clip(files) is None
    assert files.num_clips == 3


def test_of_several_clips_a_replacement_wins_then_the_folder_of_the_split(tmp_path: Path) -> None:
    files = tree(tmp_path, "train/a.mp4", "val/a.mp4", "replacement_for_broken/a.mp4", "train/b.mp4", "val/b.avi")
    assert clip(files, "a") == clip(files, "a", split="val") == "replacement_for_broken/a.mp4"
    assert [clip(files, "b", split=split) for split in ("train", "val")] == ["train/b.mp4", "val/b.avi"]
    with pytest.raises(ValueError) as error:
        clip(files, "b", split="test")
    text = str(error.value)
    assert text.startswith("k.csv, line 3: b is there more than once: ") and text.endswith("; keep one")
    assert "train/b.mp4" in text and "val/b.avi" in text


@pytest.mark.parametrize(
    ("path", "video", "suffix"),
    [
        ("a/b.mp4", True, ".mp4"),
        ("a/B.MOV", True, ".mov"),
        ("v.tar.webm", True, ".webm"),
        ("a/._b.mp4", False, "hidden"),
        (".mp4", False, "hidden"),
        ("a.mp4/README", False, "README"),
        ("a/list.TXT", False, ".txt"),
        ("a/mp4", False, "mp4"),
        (".hidden/b.mp4", True, ".mp4"),
    ],
)
def test_suffixes(path: str, video: bool, suffix: str) -> None:
    assert (is_video(path), suffix_of(path)) == (video, suffix)


def test_subfolders_are_sorted_and_not_hidden(tmp_path: Path) -> None:
    tree(tmp_path, "b/1.mp4", "a/1.mp4", ".git/x", "file.mp4")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    assert [path.name for path in subfolders(tmp_path)] == ["a", "b", "c"]
    with pytest.raises(FileNotFoundError):
        subfolders(tmp_path / "none")
