"""What is found in a folder of videos or an annotation file, and what is refused."""

import json
import os
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
        Video(Path("run/1.webm"), ("run",), "train"),
        Video(Path("walk/b.mp4"), ("walk",), "train"),
        Video(Path("walk/deep/a.MOV"), ("walk",), "train"),
    )
    assert listing.other_files == {".txt": 1, ".jpg": 1, "README": 1}


def test_splits_on_top(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "validation/b/3.mp4", "test/a/4.mp4", "test/list.txt")
    listing = list_videos(tmp_path)
    assert [(v.labels[0], v.split) for v in listing.videos] == [
        ("a", "test"),
        ("a", "train"),
        ("b", "train"),
        ("b", "val"),
    ]
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
    listing = list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text, name)])
    assert listing.videos == (Video(Path("a 1.mp4"), ("x",), "train"), Video(Path("b.mp4"), ("y",), "val"))


def test_whole_numbers_are_classes_in_numeric_order(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{i}.mp4" for i in range(12)))
    listing = list_videos(tmp_path, annotations=[annotations(tmp_path, "".join(f"{i}.mp4 {i}\n" for i in range(12)))])
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
        list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text)])


def test_missing_files_up_to_a_number_or_a_share(tmp_path: Path) -> None:
    tree(tmp_path, "a.mp4", "b.mp4")
    path = annotations(tmp_path, "a.mp4 x\nb.mp4 y\nc.mp4 z\n")
    for allowed in (1, "1", "34%", "33.4%"):
        listing = list_videos(tmp_path, annotations=[path], max_missing=allowed)
        assert len(listing.videos) == 2
        assert listing.missing == (Path("c.mp4"),)
        assert listing.classes == ("x", "y", "z")  # an index does not depend on what was downloaded
        assert "  train: 2 videos, 1 missing" in listing.notes
    for refused in (0, "33%", "0%"):
        with pytest.raises(ValueError, match=r"1 of the 3 files .* missing"):
            list_videos(tmp_path, annotations=[path], max_missing=refused)
    for nonsense in ("-1", "101%", "5 %", "many", "", "1e9"):
        with pytest.raises(ValueError, match="allowed are a number"):
            list_videos(tmp_path, annotations=[path], max_missing=nonsense)
    with pytest.raises(ValueError, match="3 of the 3"):
        list_videos(tree(tmp_path / "empty", "z/d.mp4"), annotations=[path], max_missing="100%")


def test_val_fraction_is_drawn_from_each_class_by_seed(tmp_path: Path) -> None:
    tree(tmp_path, *(f"a/{i}.mp4" for i in range(10)), *(f"b/{i}.mp4" for i in range(4)), "c/0.mp4")

    def val(seed: int) -> list[str]:
        listing = list_videos(tmp_path, val_fraction=0.2, seed=seed)
        return [str(video.path) for video in listing.videos if video.split == "val"]

    assert [path[0] for path in val(0)] == ["a", "a", "b"]
    assert val(0) == val(0)
    assert len({tuple(val(seed)) for seed in range(5)}) > 1


def test_val_fraction_where_splits_are_given_or_out_of_range(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "test/b/3.mp4")
    with pytest.raises(ValueError, match="leave out the val fraction"):
        list_videos(tmp_path, val_fraction=0.5)
    with pytest.raises(ValueError, match="allowed are 0"):
        list_videos(tmp_path, val_fraction=1.0)


def test_a_folder_of_the_split_train_alone_has_no_other_split_yet(tmp_path: Path) -> None:
    tree(tmp_path, *(f"train/{name}/{i}.mp4" for name in "ab" for i in range(4)))
    assert (
        sorted(video.split for video in list_videos(tmp_path, val_fraction=0.25).videos) == ["train"] * 6 + ["val"] * 2
    )


def test_columns_of_a_list_that_are_not_used_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4")
    rows = "a.mp4,x,train,1,p\nb.mp4,y,train,2,q\n"
    path = annotations(tmp_path, f"path,label,split,group,take\x1b[1m\n{rows}")
    notes = list_videos(tmp_path / "videos", annotations=[path]).notes
    assert [note for note in notes if "group" in note] == [r"  list.txt: columns not used: group, 'take\x1b[1m'"]
    path.write_text("path,label,split\n" + rows.replace(",1,p", "").replace(",2,q", ""))
    assert not [note for note in list_videos(tmp_path / "videos", annotations=[path]).notes if "not used" in note]


def test_val_fraction_of_a_multi_label_set_goes_by_first_labels(tmp_path: Path) -> None:
    names = [f"{label}{i}.mp4" for label in "abn" for i in range(5)]
    tree(tmp_path / "videos", *names)
    text = "path,labels\n" + "".join(f"{name},{ {'a': 'a;b', 'b': 'b;a', 'n': ''}[name[0]] }\n" for name in names)
    listing = list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text)], val_fraction=0.4)
    assert [str(video.path)[0] for video in listing.videos if video.split == "val"] == ["a", "a", "b", "b", "n", "n"]


# --- what stands between a path and its labels


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("train/a b.mp4 0\ntrain/c.mp4 1\n", ["train/a b.mp4", "train/c.mp4"]),  # MMAction2, SlowFast
        ("train/a b.mp4,0\ntrain/c.mp4,1\n", ["train/a b.mp4", "train/c.mp4"]),  # VideoMAE
        ("train/a b.mp4::0\ntrain/c.mp4::1\n", ["train/a b.mp4", "train/c.mp4"]),  # V-JEPA
        ("train/a, b.mp4 0\ntrain/c.mp4 1\n", ["train/a, b.mp4", "train/c.mp4"]),
        ("train/a, b.mp4,0\ntrain/c.mp4 , 1\n", ["train/a, b.mp4", "train/c.mp4"]),
        ("train/a.mp4 b.mp4 0\n./train//c.MP4  1\n", ["train/a.mp4 b.mp4", "train/c.MP4"]),
        ("train/a\t0\ntrain/c.d\t1\n", ["train/a", "train/c.d"]),  # no suffix: then a separator decides
        ("train/a b 0\ntrain/c.mp4 1\n", ["train/a b", "train/c.mp4"]),
    ],
)
def test_paths_end_where_the_suffix_of_a_video_does(tmp_path: Path, text: str, paths: list[str]) -> None:
    tree(tmp_path / "videos", *paths)
    listing = list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text)])
    assert [(str(video.path), video.labels) for video in listing.videos] == list(
        zip(paths, [("0",), ("1",)], strict=True)
    )


def test_one_list_a_split(tmp_path: Path) -> None:
    """MMAction2's lists are relative to a folder of their own, which is named after the split."""
    tree(tmp_path / "k", "videos_train/jump/a.mp4", "videos_val/jump/b.mp4", "videos_val/run/c.mp4")
    train = annotations(tmp_path, "jump/a.mp4 0\n", "kinetics400_train_list_videos.txt")
    val = annotations(tmp_path, "jump/b.mp4 0\nvideos_val/run/c.mp4 1\n", "kinetics400_val_list_videos.txt")
    listing = list_videos(tmp_path / "k", annotations=[train, val])
    assert [(str(video.path), video.split) for video in listing.videos] == [
        ("videos_train/jump/a.mp4", "train"),
        ("videos_val/jump/b.mp4", "val"),
        ("videos_val/run/c.mp4", "val"),
    ]
    assert listing.notes[1:] == (
        "  train: 1 videos",
        "  val: 2 videos",
        "  1 of them in videos_train/",
        "  1 of them in videos_val/",
    )
    renamed = annotations(tmp_path, val.read_text(), "other.txt")
    with pytest.raises(ValueError, match=r"other.txt: its videos are of which split\? Say train="):
        list_videos(tmp_path / "k", annotations=[train, renamed])
    said = list_videos(tmp_path / "k", annotations=[train, f"validation={renamed}"])
    assert said.videos == listing.videos
    with pytest.raises(ValueError, match=r"jump/a.mp4 is there more than once"):
        list_videos(tree(tmp_path / "k", "train/jump/a.mp4"), annotations=[train, val])


def test_class_names_for_numbers(tmp_path: Path) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4")
    path = annotations(tmp_path, "a.mp4 2\nb.mp4 0\n")
    assert list_videos(tmp_path / "videos", annotations=[path]).notes[-1].startswith("  class numbers are not 0 to 1")
    for name, text in (
        ("label_map_k400.txt", "abseiling\nair drumming\n42 steps\n"),
        ("classes.json", '{"air drumming": 1, "\\"abseiling\\"": "0", "42 steps": 2}'),
        ("classes.txt", "0 abseiling\n2 42 steps\n1 air drumming\n"),
    ):
        classes = annotations(tmp_path, text, name)
        listing = list_videos(tmp_path / "videos", annotations=[path, f"classes={classes}"])
        assert listing.classes == ("abseiling", "air drumming", "42 steps")
        assert [video.labels for video in listing.videos] == [("42 steps",), ("abseiling",)]
    path.write_text("a.mp4 3\nb.mp4 0\n")
    with pytest.raises(ValueError, match=r"list.txt, line 1: label '3' is not in .*classes.txt"):
        list_videos(tmp_path / "videos", annotations=[path, f"classes={classes}"])


# --- several labels


def test_multi_label_lists(tmp_path: Path) -> None:
    tree(tmp_path / "videos", "a b.mp4", "c.mp4", "d.mp4")
    for text in (
        "a b.mp4 1 10\nc.mp4 2\nd.mp4\n",
        "a b.mp4 1,10\nc.mp4 2\nd.mp4\n",
        "a b.mp4\t1;10\nc.mp4\t2\nd.mp4\n",
    ):
        path = annotations(tmp_path, text)
        listing = list_videos(tmp_path / "videos", annotations=[path], annotation_format="multi-label")
        assert listing.multi_label
        assert listing.classes == ("1", "2", "10")
        assert [video.labels for video in listing.videos] == [("1", "10"), ("2",), ()]
    with pytest.raises(ValueError, match=r"line 1: .*--format multi-label .* --format frames-list"):
        list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, "a b.mp4 1 10\nc.mp4 2 3\n")])


def test_multi_label_table(tmp_path: Path) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4", "c.mp4")
    text = "path,labels,split\na.mp4,open door; enter room,train\nb.mp4,,val\nc.mp4,sit,train\n"
    listing = list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text)])
    assert listing.multi_label and listing.classes == ("enter room", "open door", "sit")
    assert [(v.labels, v.split) for v in listing.videos] == [
        (("open door", "enter room"), "train"),
        ((), "val"),
        (("sit",), "train"),
    ]
    with pytest.raises(ValueError, match="line 2: a label stands there twice: sit, sit"):
        list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, "path,labels\na.mp4,sit;sit\n")])


def test_lists_of_extracted_frames(tmp_path: Path) -> None:
    tree(tmp_path / "videos", "some/182040.webm", "other/197728.mp4")
    path = annotations(tmp_path, "some/182040 58 3\nother/197728 29 4 6\n")
    listing = list_videos(tmp_path / "videos", annotations=[path], annotation_format="frames-list")
    assert [(str(v.path), v.labels) for v in listing.videos] == [
        ("other/197728.mp4", ("4", "6")),
        ("some/182040.webm", ("3",)),
    ]
    assert listing.multi_label


# --- official formats

KINETICS = (
    "label,youtube_id,time_start,time_end,split,is_cc\n"
    "air drumming,--aBc_123-X,59,69,train,0\n"
    '"massaging person\'s head",abseil_0001,0.0,10.0,train,0\n'
    "abseiling,zzzzzzzzzzz,4,14,validate,1\n"
)


@pytest.mark.parametrize(
    "paths",
    [
        ["air drumming/--aBc_123-X_000059_000069.mp4", "massaging person's head/abseil_0001_000000_000010.mp4"],
        ["train/air_drumming/--aBc_123-X_000059_000069.mkv", "train/massaging_person's_head/abseil_0001.mp4"],
        ["k400/train/--aBc_123-X_000059_000069.mp4", "k400/val/abseil_0001_000000_000010.webm"],
        ["--aBc_123-X.mp4", "abseil_0001.mp4"],
    ],
)
def test_kinetics(tmp_path: Path, paths: list[str]) -> None:
    tree(tmp_path / "k400", *paths, "val/zzzzzzzzzzz_000004_000014.mp4", "val/unlisted_000004_000014.mp4")
    path = annotations(tmp_path, KINETICS, "labels.csv")
    listing = list_videos(tmp_path / "k400", annotations=[path])
    assert {str(v.path): (v.labels, v.split) for v in listing.videos} == {
        paths[0]: (("air drumming",), "train"),
        paths[1]: (("massaging person's head",), "train"),
        "val/zzzzzzzzzzz_000004_000014.mp4": (("abseiling",), "val"),
    }
    assert listing.classes == ("abseiling", "air drumming", "massaging person's head")
    assert listing.notes[0].startswith("annotations: kinetics")
    assert listing.notes[-1] == "  1 videos of SOURCE are in no list: left alone"


def test_kinetics_folder_with_a_test_list_and_a_replacement(tmp_path: Path) -> None:
    clip = "--aBc_123-X_000059_000069.mp4"
    tree(tmp_path / "k400", f"train/{clip}", f"val/{clip}", "val/zzzzzzzzzzz_000004_000014.mp4")
    header, *rows = KINETICS.splitlines(keepends=True)
    annotations(tmp_path, header + rows[0] + rows[1], "train.csv")
    annotations(tmp_path, header + rows[2], "val.csv")
    annotations(tmp_path, "youtube_id,time_start,time_end,split\nyyyyyyyyyyy,1,11,test\n", "test.csv")
    options = {"annotations": [tmp_path], "max_missing": "40%"}
    listing = list_videos(tmp_path / "k400", **options)  # type: ignore[arg-type]
    assert [str(v.path) for v in listing.videos] == [f"train/{clip}", "val/zzzzzzzzzzz_000004_000014.mp4"]
    assert listing.missing == (Path("massaging person's head/abseil_0001_000000_000010"),)
    assert len(listing.classes) == 3
    assert [note for note in listing.notes if "test.csv has no column label" in note]
    with pytest.raises(ValueError, match=r"test.csv has no column label: a test list without labels; leave it out"):
        list_videos(tmp_path / "k400", annotations=[tmp_path / "train.csv", tmp_path / "test.csv"])
    tree(tmp_path / "k400", f"replacement/replacement_for_corrupted_k400/{clip}")
    assert str(list_videos(tmp_path / "k400", **options).videos[0].path).startswith("replacement/")  # type: ignore
    tree(tmp_path / "k400", f"replacement/other/{clip}")
    with pytest.raises(ValueError, match=rf"line 2: .*{clip[:-4]} is there more than once: .*; keep one"):
        list_videos(tmp_path / "k400", **options)  # type: ignore[arg-type]


def ssv2(root: Path) -> None:
    """Labels in the order of their numbers do not have to stand in this order."""
    labels = {"Holding something next to something": "1", "Approaching something with your camera": "0", "Unseen": "2"}
    annotations(root, json.dumps(labels), "something-something-v2-labels.json")
    entry = {"label": "holding a cup next to a pen", "template": "Holding [something] next to [something]"}
    train = [{"id": "78687", **entry, "placeholders": ["a cup", "a pen"]}, {"id": 42326, **entry}]
    annotations(root, json.dumps(train), "something-something-v2-train.json")
    validation = [{"id": "74225", "template": "Approaching [something] with your camera"}]
    annotations(root, json.dumps(validation), "something-something-v2-validation.json")
    annotations(root, json.dumps([{"id": "1420"}]), "something-something-v2-test.json")


def test_something_something_v2(tmp_path: Path) -> None:
    tree(tmp_path / "20bn-something-something-v2", "78687.webm", "42326.webm", "74225.webm", "1420.webm")
    ssv2(tmp_path)
    files = [tmp_path / f"something-something-v2-{name}.json" for name in ("train", "validation", "test")]
    for given in ([tmp_path], files[:2]):
        listing = list_videos(tmp_path / "20bn-something-something-v2", annotations=given)
        assert listing.classes == (
            "Approaching something with your camera",
            "Holding something next to something",
            "Unseen",
        )
        assert [(str(v.path), listing.classes.index(v.labels[0]), v.split) for v in listing.videos] == [
            ("42326.webm", 1, "train"),
            ("74225.webm", 0, "val"),
            ("78687.webm", 1, "train"),
        ]
    with pytest.raises(ValueError, match=r"test.json has no templates: a test list without labels; leave it out"):
        list_videos(tmp_path, annotations=files)
    annotations(tmp_path, json.dumps([{"id": "78687", "template": "Eating [something]"}]), files[0].name)
    with pytest.raises(ValueError, match=r"train.json, entry 1: label 'Eating something' is not in .*labels.json"):
        list_videos(tmp_path, annotations=files[:1])
    (tmp_path / "something-something-v2-labels.json").unlink()
    with pytest.raises(ValueError, match="needs its class file beside it"):
        list_videos(tmp_path, annotations=files[:1])


def test_diving48(tmp_path: Path) -> None:
    tree(tmp_path / "rgb", "_8Vy3dlHg2w_00000.mp4", "2x00lRzlTVQ_00001.mp4")
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"], ["Forward", "Dive"]]
    annotations(tmp_path, json.dumps(vocabulary), "Diving48_vocab.json")
    train = [{"vid_name": "_8Vy3dlHg2w_00000", "label": 2, "start_frame": 0, "end_frame": 178}]
    annotations(tmp_path, json.dumps(train), "Diving48_V2_train.json")
    test = [{"vid_name": "2x00lRzlTVQ_00001", "label": 0, "start_frame": 3, "end_frame": 9}]
    annotations(tmp_path, json.dumps(test), "Diving48_V2_test.json")
    train_file, test_file = tmp_path / "Diving48_V2_train.json", tmp_path / "Diving48_V2_test.json"
    for given, split in ((tmp_path, "test"), (f"val={test_file}", "val")):
        both = [given] if given == tmp_path else [train_file, given]
        listing = list_videos(tmp_path / "rgb", annotations=both)
        assert listing.classes == ("Back 15som 05Twis FREE", "Back 15som 15Twis FREE", "Forward Dive")
        assert [(v.labels[0], v.split) for v in listing.videos] == [
            ("Back 15som 05Twis FREE", split),
            ("Forward Dive", "train"),
        ]
        assert [note for note in listing.notes if "1 of its clips start after frame 0" in note]


def test_ucf101(tmp_path: Path) -> None:
    tree(
        tmp_path / "UCF-101",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "HandstandPushups/v_HandStandPushups_g01_c01.mp4",  # converted
    )
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    annotations(lists, "1 ApplyEyeMakeup\r\n2 ApplyLipstick\r\n3 HandstandPushups\r\n", "classInd.txt")
    annotations(lists, "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n", "trainlist01.txt")
    annotations(lists, "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n", "testlist01.txt")
    annotations(lists, "HandstandPushups/v_HandStandPushups_g01_c01.avi 3\r\n", "trainlist02.txt")
    annotations(lists, "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi\r\n", "testlist02.txt")
    for given, fold, splits in (
        ([lists], 1, ["train", "test"]),
        ([lists], 2, ["test", "train"]),
        ([lists / "trainlist02.txt", f"val={lists / 'testlist02.txt'}"], 1, ["val", "train"]),
    ):
        listing = list_videos(tmp_path / "UCF-101", annotations=given, fold=fold)
        assert listing.classes == ("ApplyEyeMakeup", "ApplyLipstick", "HandstandPushups")
        assert [v.split for v in listing.videos] == splits
        assert [v.labels[0] for v in listing.videos] == ["ApplyEyeMakeup", "HandstandPushups"]
    with pytest.raises(ValueError, match=r"holds no known annotation files \(fold 4\)"):
        list_videos(tmp_path / "UCF-101", annotations=[lists], fold=4)


def test_hmdb51(tmp_path: Path) -> None:
    tree(tmp_path / "hmdb51", "brush_hair/April_09 (1).avi", "brush_hair/same.avi", "wave/same.avi", "wave/x#y.avi")
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    annotations(lists, "April_09 (1).avi 1 \nsame.avi 2 \n", "brush_hair_test_split1.txt")
    annotations(lists, "same.avi 1 \nx#y.avi 0 \n", "wave_test_split1.txt")
    annotations(lists, "April_09 (1).avi 2 \nsame.avi 2 \n", "brush_hair_test_split2.txt")
    listing = list_videos(tmp_path / "hmdb51", annotations=[lists])
    assert [(str(v.path), v.labels[0], v.split) for v in listing.videos] == [
        ("brush_hair/April_09 (1).avi", "brush_hair", "train"),
        ("brush_hair/same.avi", "brush_hair", "test"),
        ("wave/same.avi", "wave", "train"),
    ]
    assert "  wave_test_split1.txt: 1 videos marked 0, in neither split" in listing.notes


# --- hostile and garbled files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", b"a.mp4 x\nb.mp4 \xff\n", "list.txt, line 2: not a text file in UTF-8"),
        ("list.csv", b"\xff\xfea\x00", "line 1: not a text file"),
        ("list.txt", b"a.mp4 x\nb\0.mp4 y\n", "line 2: control characters"),
        ("list.txt", b"a.mp4 x\n" + b"b" * 100_000 + b".mp4 y\n", "line 2: 100006 characters; allowed are 65536"),
        ("list.csv", b'path,label\n"a.mp4,x\n', "line 2: unexpected end of data"),
        ("list.txt", b"a.mp4 0\nb.mp4 -1\n", "line 2: label '-1'; allowed are whole numbers"),
        ("list.csv", b"a.mp4,0.0\nb.mp4,1.0\n", "line 1: label '0.0'; allowed are whole numbers"),
        ("list.csv", b"a.mp4,0\nb.mp4,1,train\n", "line 2: expected"),
        ("list.csv", b"a.mp4,0\nb.mp4 1\n", "line 2: expected"),
        ("list.txt", b"label path\nx a.mp4\n", "line 1: separated by spaces a header must be"),
        ("k.csv", b"youtube_id,label\n", "line 1: a Kinetics list has a header with time_start, time_end"),
        ("k.csv", b"label,youtube_id,time_start,time_end\nx,a,nan,3\n", "line 2: expected seconds, got 'nan'"),
        ("k.csv", b"label,youtube_id,time_start,time_end\nx,a,1\n", "line 2: expected 4 columns"),
        ("k.csv", b"label,youtube_id,time_start,time_end\nx,../a,1,2\n", "line 2: expected a label and a YouTube id"),
        ("t.json", b"", "neither a vid_name"),
        ("t.json", b'[{"vid_name": "a", "label": 1}, 7]', "entry 2: expected an object"),
        ("t.json", b'[{"vid_name": "a", "label": true}]', "entry 1: label: expected a whole number"),
        ("t.json", b'[{"vid_name": "a", "label": -1}]', "entry 1: label: expected a whole number"),
        ("t.json", b'[{"vid_name": "a", "label": NaN}]', "NaN is no value of json"),
        ("t.json", b'[{"vid_name": "a", "label": 1e400}]', "entry 1: label: expected a whole number"),
        ("t.json", b'[{"vid_name": "a", "label": 10000000000000000000000}]', "entry 1: label: expected a whole number"),
        ("t.json", b'[{"vid_name": ["a"], "label": 1}]', "entry 1: vid_name: expected text"),
        ("t.json", b'[{"vid_name": "../a", "label": 1}]', "entry 1: vid_name: expected the name of a clip"),
        ("t.json", b'[{"vid_name": "\\ud800", "label": 1}]', "entry 1: control characters"),
        (
            "t.json",
            b'[{"vid_name": "a", "label": 1}, {"vid_name": "a", "label": 1}]',
            "entry 2: a.mp4 was already listed",
        ),
        ("t.json", b'[{"vid_name": "a", "vid_name": "b", "label": 1}]', "a key stands twice"),
        ("t.json", b'{"vid_name": 1}', "expected a list of entries"),
        ("t.json", b'[{"vid_name": "a"', "t.json, line 1: no json"),
        ("t.json", b'[{"vid_name":' + b"[" * 50_000, "nested too deeply"),
    ],
)
def test_hostile_files_end_in_one_line(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4")
    (tmp_path / "Diving48_vocab.json").write_text('["x", "y"]')
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=name) as caught:
        list_videos(tmp_path / "videos", annotations=[tmp_path / name])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"x": "0", "y": "2"}', "each of 0..1, or of 1..2, once"),
        ("c.json", '{"x": 0, "y": 0}', "each of 0..1"),
        ("c.json", '{"x": 0, "x": 1}', "a key stands twice"),
        ("c.json", '{"x": [0]}', "class 'x': expected a whole number"),
        ("c.json", '"x"', "expected an object"),
        ("c.json", '["x", 3]', "entry 2: expected text"),
        ("c.txt", "x\nx\n", "'x' is empty or stands there twice"),
        ("c.txt", "1 x\n3 y\n", "each of 0..1"),
    ],
)
def test_class_files_that_make_no_sense(tmp_path: Path, name: str, text: str, message: str) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4")
    listed, classes = annotations(tmp_path, "a.mp4 x\nb.mp4 y\n"), annotations(tmp_path, text, name)
    with pytest.raises(ValueError, match=name) as caught:
        list_videos(tmp_path / "videos", annotations=[listed, f"classes={classes}"])
    assert message in str(caught.value)


def test_annotations_that_do_not_go_together(tmp_path: Path) -> None:
    tree(tmp_path / "videos", "a.mp4", "b.mp4")
    listed = annotations(tmp_path, "a.mp4 x\nb.mp4 y\n")
    kinetics = annotations(tmp_path, KINETICS, "k.csv")
    both = annotations(tmp_path, "a.mp4 x train\nb.mp4 y val\n", "both.txt")
    cases: list[tuple[list[str | Path], str, str]] = [
        ([listed, kinetics], "auto", "must be of one format"),
        ([f"classes={listed}"], "auto", "got no list of videos"),
        ([f"train={tmp_path}"], "auto", "a folder has files of several splits"),
        ([tmp_path / "videos"], "auto", "holds no known annotation files"),
        ([f"train={both}"], "auto", "says itself what is train and val"),
        ([listed, listed], "list", "of which split"),
        ([f"train={listed}", f"val={listed}"], "auto", "a.mp4 was already listed in line 1"),
        ([listed], "hmdb51", "this name says no class"),
        ([listed], "ucf101", "ucf101 needs its class file"),
        ([listed], "wonder", "allowed are auto, list, multi-label"),
        ([], "list", "needs files"),
    ]
    for given, name, message in cases:
        with pytest.raises(ValueError, match=message):
            list_videos(tmp_path / "videos", annotations=given, annotation_format=name)
    with pytest.raises(FileNotFoundError, match=r"no such annotation file: .*none.csv"):
        list_videos(tmp_path / "videos", annotations=[tmp_path / "none.csv"])


def test_links_are_the_users_own_but_loops_end(tmp_path: Path) -> None:
    tree(tmp_path / "disk", "jump/a_000001_000011.mp4")
    tree(tmp_path / "videos", "run/b_000001_000011.mp4")
    (tmp_path / "videos/jump").symlink_to(tmp_path / "disk/jump")
    (tmp_path / "videos/run/loop").symlink_to(tmp_path / "videos")
    (tmp_path / "videos/run/self.mp4").symlink_to("self.mp4")
    (tmp_path / "videos/run/._b_000001_000011.mp4").write_bytes(b"what macOS leaves")
    listing = list_videos(tmp_path / "videos")
    assert [str(video.path) for video in listing.videos] == ["jump/a_000001_000011.mp4", "run/b_000001_000011.mp4"]
    assert listing.other_files == {"hidden": 1}
    text = "label,youtube_id,time_start,time_end\njump,a,1,11\nrun,b,1,11\n"
    assert list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text)]).videos == listing.videos
    text = "jump/a_000001_000011.mp4 jump\nrun/b_000001_000011.mp4 run\n"
    assert list_videos(tmp_path / "videos", annotations=[annotations(tmp_path, text)]).videos == listing.videos


def test_a_long_list_reads_every_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [f"class{i % 5}/{i:05d}_000000_000010.mp4" for i in range(1000)]
    tree(tmp_path / "videos", *paths)
    listed = annotations(tmp_path, "".join(f"{path} {path[5]}\n" for path in paths))
    header = "label,youtube_id,time_start,time_end\n"
    clips = annotations(tmp_path, header + "".join(f"{p[:6]},{p[7:12]},0,10\n" for p in paths), "k.csv")
    calls: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: calls.append(path) or scandir(path))
    monkeypatch.setattr(Path, "is_file", lambda _: pytest.fail("a file was looked at by itself"))
    for path, most in ((listed, 5), (clips, 6)):
        calls.clear()
        assert len(list_videos(tmp_path / "videos", annotations=[path]).videos) == 1000
        assert len(calls) <= most
