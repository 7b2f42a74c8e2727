"""Tars by stock webdataset, and by worse programs, become sets: what can be used is, the rest is named."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import webdataset

from pipelines import foreign
from pipelines.foreign import ForeignOptions, IndexReport, Survey, index_tars, list_samples, survey_tars
from pipelines.loader import ClipLoader
from pipelines.plan import ClipOptions, eval_turns
from pipelines.shards import ShardSet
from tests.videos import read_number, write_noise, write_video

PLAIN = ForeignOptions()


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a test; `test_processes.py` has the rest, and stock shards go through real ones."""
    if "stock" not in request.node.name:
        monkeypatch.setattr(foreign, "map_isolated", lambda function, tasks, **_: map(function, tasks))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A few small videos, by what they are."""
    folder = tmp_path_factory.mktemp("videos")
    made = {
        "mp4": write_video(folder / "a.mp4", 12, (64, 64)),
        "long": write_video(folder / "b.mp4", 30, (64, 64), bf="2"),
        "webm": write_video(folder / "c.webm", 9, (64, 64), codec="libvpx-vp9"),
        "avi": write_video(folder / "d.avi", 10, (64, 64), codec="mpeg4"),
        "mkv": write_video(folder / "e.mkv", 11, (64, 64)),
        "mov": write_video(folder / "f.mov", 8, (64, 64), rotation=90),
        "wide": write_video(folder / "g.mp4", 7, (96, 64), rotation=270),
    }
    return {name: path.read_bytes() for name, path in made.items()}


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], **options: object) -> Path:
    """In this order, whatever the names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def index(
    tars: Mapping[str, Sequence[Path]], options: ForeignOptions = PLAIN, classes: Sequence[str] | None = None
) -> tuple[IndexReport, Path]:
    """As tools/index_shards.py does it."""
    survey = Survey()
    paths = [tar for members in tars.values() for tar in members]
    for found in survey_tars(paths, options, workers=1):
        survey.add(found)
    several = survey.several
    return index_tars(tars, paths[0].parent, options, survey.classes(classes), several=several), paths[0].parent


def rejects(folder: Path) -> list[tuple[str, str]]:
    """Key and reason of every line."""
    head, *lines = (folder / "rejects.tsv").read_text().splitlines()
    assert head == "tar\tkey\treason\tdetail" and all(line.count("\t") == 3 for line in lines)
    return [(line.split("\t")[1], line.split("\t")[2]) for line in lines]


@pytest.mark.parametrize("verify", [False, True])
def test_stock_shards_train(tmp_path: Path, videos: dict[str, bytes], verify: bool) -> None:
    """Every container, in shards by stock `ShardWriter`: the loader delivers the frames that the plans ask for."""
    kinds = ["mp4", "long", "webm", "avi", "mkv", "mov"]
    with webdataset.ShardWriter(str(tmp_path / "some.set-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(12):
            kind = kinds[i % 6]
            writer.write({"__key__": f"{i:04d}", "mp4" if kind == "long" else kind: videos[kind], "cls": i % 3})
    tars = sorted(tmp_path.glob("*.tar"))
    before = [tar.read_bytes() for tar in tars]
    report, folder = index({"train": tars}, ForeignOptions(verify=verify))
    assert report.samples == {"train": 12} and not report.skipped and rejects(folder) == []
    assert [tar.read_bytes() for tar in tars] == before

    shards = ShardSet.open(folder, "train")
    assert (len(shards), shards.profile, shards.verified) == (12, "copy", verify)
    assert shards.classes == ("class0", "class1", "class2") and not shards.multi_label
    assert shards.check_files() == []
    lengths = [12, 30, 9, 10, 11, 8]
    for i in range(12):
        sample = shards[i]
        assert (sample.key, sample.label) == (f"{i:04d}", i % 3)
        assert (sample.width, sample.height, sample.source_frames) == (64, 64, lengths[i % 6])
        assert sample.fps == pytest.approx(30, rel=0.02)
        assert sample.shard.read_bytes()[sample.video_offset :][: sample.video_bytes] == videos[kinds[i % 6]]
    turns = eval_turns(12, micro_batch=4, rank=0, world=1)
    options = ClipOptions(num_frames=3, sampling="uniform", eval_crop=1.0)
    with ClipLoader(shards, turns, micro_batch=4, size=64, options=options) as loader:
        for batch in loader:
            assert batch.valid.all() and not loader.bad
            for row, plan in enumerate(batch.plans):
                assert [read_number(frame) for frame in batch.frames[row].numpy()] == list(plan.frames)
                assert batch.labels[row] == plan.sample_id % 3


def test_rotated_videos_are_indexed_as_shown(tmp_path: Path, videos: dict[str, bytes]) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.mp4", videos["wide"]), ("a.cls", b"1")])
    _, folder = index({"train": [tar]})
    sample = ShardSet.open(folder, "train")[0]
    assert (sample.width, sample.height) == (96, 64)


def test_damage_after_indexing_is_found(tmp_path: Path, videos: dict[str, bytes]) -> None:
    """The checksums are those of the moment of indexing."""
    tar = write_tar(
        tmp_path / "a.tar",
        [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in (("mp4", videos["mp4"]), ("cls", b"%d" % i))],
    )
    _, folder = index({"val": [tar]})
    shards = ShardSet.open(folder, "val")
    data = bytearray(tar.read_bytes())
    data[shards[1].video_offset + 100] ^= 1
    tar.write_bytes(data)
    turns = eval_turns(3, micro_batch=3, rank=0, world=1)
    with ClipLoader(shards, turns, micro_batch=3, size=32, options=ClipOptions(num_frames=2)) as loader:
        assert next(loader).valid.tolist() == [True, False, True]
        assert list(loader.bad) == [1]


@pytest.mark.parametrize(
    ("files", "options", "label", "classes"),
    [
        ([("cls", b"2\n")], PLAIN, 2, ("class0", "class1", "class2")),
        ([("json", b'{"label": 1}')], PLAIN, 1, ("class0", "class1")),
        ([("json", b'{"label": "1"}')], PLAIN, 1, ("class0", "class1")),
        ([("json", b'\xef\xbb\xbf{"label": "run"}')], PLAIN, 1, ("jump", "run")),
        ([("txt", b" jump \n")], PLAIN, 0, ("jump", "run")),
        ([("CLS", b"0")], PLAIN, 0, ("class0", "class1")),
        ([("json", b'{"a": {"b": "run"}, "label": 5}')], ForeignOptions(label="json:a.b"), 1, ("jump", "run")),
        ([("class.txt", b"run"), ("cls", b"7")], ForeignOptions(label="class.txt"), 1, ("jump", "run")),
        ([("json", b'{"other": 1}'), ("txt", b"run")], PLAIN, 1, ("jump", "run")),
        ([("cls", b"1"), ("json", b'{"label": 5}'), ("txt", b"a caption")], PLAIN, 1, ("class0", "class1")),
    ],
)
def test_labels(
    tmp_path: Path,
    videos: dict[str, bytes],
    files: list[tuple[str, bytes]],
    options: ForeignOptions,
    label: int,
    classes: tuple[str, ...],
) -> None:
    other = files[0][0], (b"run" if label == 0 else b"jump") if classes[0] == "jump" else b"%d" % (label ^ 1)
    if options.label.startswith("json"):
        other = "json", json.dumps({"a": {"b": "jump"}}).encode()
    elif other[0] == "json":
        other = "json", json.dumps({"label": other[1].decode()}).encode()
    both = [("x", files), ("y", [other])]
    tar = write_tar(
        tmp_path / "a.tar",
        [
            file
            for key, parts in both
            for file in [(f"{key}.mp4", videos["mp4"]), *((f"{key}.{s}", d) for s, d in parts)]
        ],
    )
    _, folder = index({"train": [tar]}, options)
    shards = ShardSet.open(folder, "train")
    assert shards[0].label == label and shards.classes[: len(classes)] == classes


def test_several_labels(tmp_path: Path, videos: dict[str, bytes]) -> None:
    labels = ([2, 0, 2], [], "1")
    tar = write_tar(
        tmp_path / "a.tar",
        [
            (f"{i}.{s}", d)
            for i, value in enumerate(labels)
            for s, d in (("mp4", videos["mp4"]), ("json", json.dumps({"label": value}).encode()))
        ],
    )
    _, folder = index({"train": [tar]})
    shards = ShardSet.open(folder, "train")
    assert shards.multi_label and [shards[i].labels for i in range(3)] == [(0, 2), (), (1,)]


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([b"0", b"3"], ["a", "b", "c"], r"a\.tar, sample 1: label 3; allowed are 0 to 2"),
        ([b"0", b"-1"], None, r"a\.tar, sample 1: label -1; allowed are 0 to"),
        ([b"0", b"100000"], None, r"a\.tar, sample 1: label 100000"),
        ([b"a", b"d"], ["a", "b", "c"], r"a\.tar, sample 1: label 'd' is none of the 3 classes listed"),
        ([b"0", b"run"], None, r"labels are numbers \(0 in .*sample 0\) and names \('run' in .*sample 1\)"),
        ([b"0", b"0"], None, r"1 class in 2 samples"),
        ([b"run", b"run"], None, r"1 class in 2 samples"),
    ],
)
def test_labels_that_are_no_class_end_it(
    tmp_path: Path, labels: list[bytes], classes: list[str] | None, message: str
) -> None:
    """Before any video is looked at."""
    tar = write_tar(
        tmp_path / "a.tar",
        [(f"{i}.{s}", d) for i, label in enumerate(labels) for s, d in (("mp4", b"no video"), ("cls", label))],
    )
    with pytest.raises(ValueError, match=message):
        index({"train": [tar]}, classes=classes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_listed_classes(tmp_path: Path, videos: dict[str, bytes]) -> None:
    """Numbers count in the order of the list, names are looked up in it; classes nobody has are kept."""
    tar = write_tar(
        tmp_path / "a.tar",
        [
            (f"{i}.{s}", d)
            for i, label in enumerate((b"2", b"walk"))
            for s, d in (("mp4", videos["mp4"]), ("cls", label))
        ],
    )
    _, folder = index({"train": [tar]}, classes=["run", "walk", "jump", "sit"])
    shards = ShardSet.open(folder, "train")
    assert shards.classes == ("run", "walk", "jump", "sit") and [shards[i].label for i in (0, 1)] == [2, 1]


def test_captions_are_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MAX_CLASSES", 3)
    survey = Survey(4, names={f"a caption of {i}": "x" for i in range(4)})
    with pytest.raises(ValueError, match=r"4 class names, such as 'a caption of 0': captions\?"):
        survey.classes(None)


def good(videos: dict[str, bytes], key: str, label: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", videos["mp4"]), (f"{key}.cls", b"%d" % label)]


def test_what_strangers_write(tmp_path: Path, videos: dict[str, bytes]) -> None:
    """One tar with all of it: what is good is indexed, every other key is listed once with its reason."""
    video = videos["mp4"]
    files = [
        *good(videos, "a", 0),
        ("late.mp4", video), ("other.mp4", videos["long"]), ("late.cls", b"1"), ("other.cls", b"0"),  # interleaved
        ("twice.mp4", video), ("twice.cls", b"0"), ("twice.mp4", videos["long"]), ("twice.cls", b"1"),
        ("nolabel.mp4", video),
        ("novideo.cls", b"1"),
        ("empty.mp4", b""), ("empty.cls", b"1"),
        ("garbage.mp4", b"garbage" * 500), ("garbage.cls", b"1"),
        ("cut.mp4", videos["long"][: len(videos["long"]) // 2]), ("cut.cls", b"1"),
        ("two.mp4", video), ("two.webm", videos["webm"]), ("two.cls", b"1"),
        ("json.mp4", video), ("json.json", b"{"),
        ("deep.mp4", video), ("deep.json", b"[" * 100_000),
        ("float.mp4", video), ("float.json", b'{"label": 1.5}'),
        ("bool.mp4", video), ("bool.json", b'{"label": true}'),
        ("novel.mp4", video), ("novel.txt", b"word " * 100),
        ("blank.mp4", video), ("blank.cls", b" \n"),
        ("pickle.mp4", video), ("pickle.pkl", b"cos\nsystem\n(S'exit 1'\ntR."),
        ("README", b"hello"),
        ("._mac.mp4", b"resource fork"),
        ("__meta__/facts.json", b"{}"),  # webdataset leaves it out, and so do we
        ("../../etc/up.mp4", video), ("../../etc/up.cls", b"1"),
        ("/abs.mp4", video), ("/abs.cls", b"0"),
        ("./dot.mp4", video), ("./dot.cls", b"0"),
        ("tab\tnew\nline \x1b[31m ü.mp4", video), ("tab\tnew\nline \x1b[31m ü.cls", b"0"),
        ("k" * 300 + ".mp4", video), ("k" * 300 + ".cls", b"0"),
        ("K" * 2000 + ".mp4", video), ("K" * 2000 + ".cls", b"0"),
        ("dir.with.dots/d.mp4", video), ("dir.with.dots/d.cls", b"1"),
        *good(videos, "z", 1),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "set/a.tar", files, format=tarfile.PAX_FORMAT)
    with tarfile.open(tar, "a") as appended:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        appended.addfile(link)
    report, folder = index({"train": [tar]}, classes=["no", "yes"])
    shards = ShardSet.open(folder, "train")
    keys = {shards[i].key: (shards[i].label, shards[i].source_frames) for i in range(len(shards))}
    assert keys == {
        "a": (0, 12),
        "late": (1, 12),
        "other": (0, 30),
        "twice": (0, 12),
        "../../etc/up": (1, 12),
        "/abs": (0, 12),
        "dot": (0, 12),
        "tab%09new%0Aline %1B[31m %C3%BC": (0, 12),
        "k" * 300: (0, 12),
        "dir.with.dots/d": (1, 12),
        "z": (1, 12),
    }
    assert Counter(rejects(folder)) == Counter(
        {
            ("twice", "duplicate"): 2,
            ("nolabel", "no_label"): 1,
            ("novideo", "no_video"): 1,
            ("empty", "empty"): 1,
            ("garbage", "unreadable"): 1,
            ("cut", "unreadable" if ("cut", "unreadable") in rejects(folder) else "truncated"): 1,
            ("two", "several_videos"): 1,
            **dict.fromkeys(((k, "bad_label") for k in ("json", "deep", "float", "bool", "novel", "blank")), 1),
            ("pickle", "no_label"): 1,
            ("README", "no_key"): 1,
            ("._mac.mp4", "no_key"): 1,
            ("K" * 2000, "no_key"): 1,
            ("link.mp4", "no_file"): 1,
        }
    )
    assert report.samples["train"] + len(report.skipped) == len(keys) + sum(Counter(rejects(folder)).values())
    assert sorted(path.name for path in folder.parent.rglob("*")) == sorted(
        ["set", "a.tar", "a.index.safetensors", "manifest.json", "rejects.tsv"]
    )


@pytest.mark.parametrize(
    ("harm", "usable", "reasons"),
    [
        (lambda data: data[: len(data) // 2], None, {"truncated", "no_label"}),
        (lambda data: b"", 0, {"empty"}),
        (lambda data: b"garbage " * 1000, 0, {"not_a_tar"}),
        (lambda data: b"\x1f\x8b" + data, 0, {"not_a_tar"}),
        (lambda data: data.replace(b"3.mp4", b"3\xff\xff\xff4", 1), 7, {"damaged", "no_video"}),
        (lambda data: data[: data.rindex(b"7.cls") + 1024], 8, {"truncated"}),
    ],
    ids=["cut", "empty", "garbage", "packed", "header", "no end"],
)  # fmt: skip
def test_broken_tars(
    tmp_path: Path, videos: dict[str, bytes], harm: Callable[[bytes], bytes], usable: int | None, reasons: set[str]
) -> None:
    """The other tars of the set, and the whole samples of this one, are usable."""
    whole = write_tar(tmp_path / "a.tar", [f for i in range(8) for f in good(videos, f"{i}", i % 2)])
    broken = tmp_path / "b.tar"
    broken.write_bytes(harm(whole.read_bytes()))
    report, folder = index({"train": [whole, broken]})
    shards = ShardSet.open(folder, "train")
    assert {entry.reason for entry in report.skipped} <= reasons and report.skipped
    assert {entry.tar for entry in report.skipped} == {"b.tar"}
    assert len(shards) - 8 == usable if usable is not None else 0 < len(shards) - 8 < 8
    assert [shards[i].key for i in range(8)] == [f"{i}" for i in range(8)]
    for i in range(len(shards)):
        sample = shards[i]
        assert sample.shard.read_bytes()[sample.video_offset :][: sample.video_bytes] == videos["mp4"]


def test_nothing_usable(tmp_path: Path, videos: dict[str, bytes]) -> None:
    tars = {"train": [write_tar(tmp_path / "a.tar", good(videos, "a"))], "val": [tmp_path / "b.tar"]}
    write_tar(tars["val"][0], [("b.mp4", b"garbage"), ("b.cls", b"1")])
    with pytest.raises(ValueError, match=r"split val: no sample of 1 tars can be used \(1 unreadable\)"):
        index(tars)
    assert not (tmp_path / "manifest.json").exists()


def test_unverified_finds_less(tmp_path: Path, videos: dict[str, bytes]) -> None:
    """A video whose last frames are noise passes unless all of it is decoded; the manifest says which it was."""
    data = bytearray(write_noise(tmp_path, "mp4"))
    end = data.index(b"moov")
    data[end // 2 : end - 100] = bytes(end - 100 - end // 2)
    tar = write_tar(tmp_path / "set/a.tar", [*good(videos, "a"), ("b.mp4", bytes(data)), ("b.cls", b"1")])
    assert index({"train": [tar]})[0].samples == {"train": 2}
    report, folder = index({"train": [tar]}, ForeignOptions(verify=True), ["x", "y"])
    assert report.samples == {"train": 1} and rejects(folder) == [("b", "decode_error")]


def test_splits_and_classes_are_shared(tmp_path: Path, videos: dict[str, bytes]) -> None:
    train = write_tar(tmp_path / "train-0.tar", good(videos, "a", 0) + good(videos, "b", 1))
    val = write_tar(tmp_path / "val-0.tar", good(videos, "a", 2))
    report, folder = index({"train": [train], "val": [val]})
    assert report.samples == {"train": 2, "val": 1}
    assert [shards.classes for shards in (ShardSet.open(folder, "train"), ShardSet.open(folder, "val"))] == [
        ("class0", "class1", "class2")
    ] * 2
    assert ShardSet.open(folder, "val")[0].label == 2


@pytest.mark.parametrize("label", ["json", "json:", "cls:x", "../x", "a b"])
def test_label_rules_are_checked(label: str) -> None:
    if label == "json":
        assert ForeignOptions(label=label)
        return
    with pytest.raises(ValueError, match="allowed are a suffix, such as cls or txt, and json:FIELD"):
        ForeignOptions(label=label)


def test_chosen_video(tmp_path: Path, videos: dict[str, bytes]) -> None:
    files = [("a.rgb.mp4", videos["mp4"]), ("a.depth.mp4", videos["long"]), ("a.cls", b"1")]
    tar = write_tar(tmp_path / "a.tar", files)
    assert [entry.reason for entry in list_samples(tar, PLAIN)[1]] == ["no_video"]
    (sample,), skipped = list_samples(tar, ForeignOptions(video="depth.mp4"))
    assert sample.video.num_bytes == len(videos["long"]) and not skipped


def test_real_files(tmp_path: Path, shared_clips: Path) -> None:
    """What phones, cameras and attackers make: packed in stock shards, every file is indexed or named with a reason."""
    clips = sorted(
        path
        for path in (shared_clips / "zoo").rglob("*")
        if path.is_file() and path.suffix in (".mp4", ".mov", ".webm", ".mkv", ".avi")
    )[:40]
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxsize=5e7, verbose=0) as writer:
        for i, path in enumerate(clips):
            writer.write({"__key__": f"{i:03d}", path.suffix[1:]: path.read_bytes(), "cls": i % 2})
    report, folder = index({"train": sorted(tmp_path.glob("*.tar"))}, classes=["x", "y"])
    assert report.samples["train"] + len(report.skipped) == len(clips) and report.samples["train"] > 0
    assert {entry.reason for entry in report.skipped} <= {*foreign.VideoError.REASONS, "empty"}
    shutil.rmtree(folder)
