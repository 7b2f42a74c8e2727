"""What is found in a folder of videos or an annotation file, and what is refused."""

from pathlib import Path

import pytest

from pipelines.annotations import Video, list_videos


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def annotations(root: Path, text: str, name: str = "list.txt") -> Path:
    path = root / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    tree(tmp_path, "walk/b.mp4", "walk/deep/a.MOV", "run/1.webm", "run/notes.txt", "run/cover.jpg", "README", ".git/x")
    listing = list_videos(tmp_path)
    assert listing.classes == ("run", "walk")
    assert listing.videos == (
        Video(Path("run/1.webm"), "run", "train"),
        Video(Path("walk/b.mp4"), "walk", "train"),
        Video(Path("walk/deep/a.MOV"), "walk", "train"),
    )
    assert listing.other_files == {".txt": 1, ".jpg": 1, "README": 1}


def test_splits_on_top(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "validation/b/3.mp4", "test/a/4.mp4", "test/list.txt")
    listing = list_videos(tmp_path)
    assert [(v.label, v.split) for v in listing.videos] == [("a", "test"), ("a", "train"), ("b", "train"), ("b", "val")]
    assert listing.other_files == {".txt": 1}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a.mp4"], "holds no folders"),
        (["a/1.mp4"], r"1 class \(a\)"),
        (["a/1.mp4", "b/notes.txt"], r"b holds no video \(1 other"),
        (["train/a/1.mp4", "other/a/1.mp4"], "both a split"),
        (["train/a/1.mp4", "train/b/.keep"], "train/b holds no video"),
    ],
)
def test_folders_that_make_no_sense(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_videos(tree(tmp_path, *paths))


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_videos(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.tsv", "path\tlabel\tsplit\tgroup\na 1.mp4\tx\ttrain\tg\nb.mp4\ty\tval\th\n"),
        ("list.csv", "\ufeffgroup,split,class,video\n1,train,x,a 1.mp4\n2,validation,y,b.mp4\n"),
        ("list.csv", '"a 1.mp4",x,train\nb.mp4,y,val\n'),
        ("list.txt", "a 1.mp4 x train\nb.mp4 y val\n"),
        ("list.txt", "path label split\r\na 1.mp4 x train\r\n\r\nb.mp4 y val\r\n"),
        ("list.csv", "a 1.mp4 x train\nb.mp4 y val"),
    ],
)
def test_separators_and_headers(tmp_path: Path, name: str, text: str) -> None:
    tree(tmp_path / "videos", "a 1.mp4", "b.mp4")
    listing = list_videos(tmp_path / "videos", annotations=annotations(tmp_path, text, name))
    assert listing.videos == (Video(Path("a 1.mp4"), "x", "train"), Video(Path("b.mp4"), "y", "val"))


def test_whole_numbers_are_classes_in_numeric_order(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{i}.mp4" for i in range(12)))
    listing = list_videos(tmp_path, annotations=annotations(tmp_path, "".join(f"{i}.mp4 {i}\n" for i in range(12))))
    assert listing.classes == tuple(map(str, range(12)))
    assert {video.split for video in listing.videos} == {"train"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.mp4\n", "line 1: expected"),
        ("a.mp4 x\nb.mp4\n", "line 2: expected"),
        ("a.mp4,x,dev\nb.mp4,y,train\n", "line 1: split 'dev'; allowed are train, val, test"),
        ("path,label,split\na.mp4,x,\n", "line 2: split ''"),
        ("a.mp4 x\na.mp4 y\n", "line 2: a.mp4 was already listed in line 1"),
        ("../a.mp4 x\nb.mp4 y\n", "line 1: path '../a.mp4' leaves"),
        ("a/../../a.mp4 x\nb.mp4 y\n", "leaves"),
        ("/etc/passwd x\nb.mp4 y\n", "leaves"),
        ("a.mp4 x\nb.mp4 x\n", r"1 class \(x\)"),
        ("a.mp4 x\nc.mp4 y\nd.mp4 y\n", r"2 of the 3 .* missing .*c\.mp4, d\.mp4.*allowed are 0"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4")
    with pytest.raises(ValueError, match=message):
        list_videos(tmp_path / "videos", annotations=annotations(tmp_path, text))


def test_binary_annotation_file(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        list_videos(tmp_path, annotations=tmp_path / "list.csv")


def test_missing_files_up_to_a_number(tmp_path: Path) -> None:
    tree(tmp_path, "a.mp4", "b.mp4")
    path = annotations(tmp_path, "a.mp4 x\nb.mp4 y\nc.mp4 y\n")
    listing = list_videos(tmp_path, annotations=path, max_missing=1)
    assert len(listing.videos) == 2
    assert listing.missing == (Path("c.mp4"),)


def test_val_fraction_is_drawn_from_each_class_by_seed(tmp_path: Path) -> None:
    tree(tmp_path, *(f"a/{i}.mp4" for i in range(10)), *(f"b/{i}.mp4" for i in range(4)), "c/0.mp4")

    def val(seed: int) -> list[str]:
        listing = list_videos(tmp_path, val_fraction=0.2, seed=seed)
        return [str(video.path) for video in listing.videos if video.split == "val"]

    assert [path[0] for path in val(0)] == ["a", "a", "b"]
    assert val(0) == val(0)
    assert len({tuple(val(seed)) for seed in range(5)}) > 1


def test_val_fraction_where_splits_are_given_or_out_of_range(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.mp4", "train/b/2.mp4")
    with pytest.raises(ValueError, match="leave out the val fraction"):
        list_videos(tmp_path, val_fraction=0.5)
    with pytest.raises(ValueError, match="allowed are 0"):
        list_videos(tmp_path, val_fraction=1.0)
