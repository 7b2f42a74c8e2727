"""Predictions: those of the evaluation, whatever files lie among the videos; timelines; labels drawn onto a video."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.encode import FrameChoice, encode_video
from pipelines.files import FileFacts
from pipelines.shards import ShardWriter, write_manifest
from pipelines.video import open_video, to_rgb
from pipelines.windows import Window, WindowedVideo
from tests.sets import make_set
from tests.shell import call_program
from tests.videos import write_video
from tools import evaluate, predict
from tools.make_motion_videos import encode_mp4
from tools.parts.predicting import several_labels
from tools.parts.prediction_files import file_names
from tools.parts.shapes import COLOURS, Scenes, draw, generator, random_looks
from tools.parts.timeline import Timeline
from train.build import backbone_checksum, build_model
from train.checkpoint import identity, save_checkpoint
from train.config import Batch
from train.resolve import config_from_dict
from train.trained import Trained

CLASSES = ["a", "b", "c"]
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
ZERO_SHOT = """
[data]
num_frames = 4
sampling = "uniform"
[model]
method = "zero_shot"
name = "tiny-clip"
pretrained = "shapes"
template = "a {} arrow."
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a run saves it (run), awkward videos (videos), and a packed set of them as they are (set)."""
    folder = tmp_path_factory.mktemp("predict")
    make_run(folder / "run")
    videos = folder / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", 30, (96, 64), rotation=90)
    times = [round(1.5**k / 30, 3) for k in range(12)]
    write_video(videos / "b.mkv", 12, (65, 63), times=times, pix_fmt="yuv444p")
    write_video(videos / "c.avi", 9, (50, 34), codec="mpeg4")
    write_video(videos / "d.mp4", 40, (96, 96), skipped=7, bf="0")
    pack_copies(folder / "set", videos)
    return folder


def make_run(out: Path) -> None:
    """Without the run."""
    sections = {
        "data": {"num_frames": 4, "sampling": "uniform"},
        "model": {"method": "aim", "name": "tiny-clip", "pretrained": "none"},
        "deepspeed": BATCH,
    }
    config = config_from_dict(sections)
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=3, num_frames=4, seed=config.train.seed)
    checksum = backbone_checksum(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in model.optimizer_groups(0.0)])
    run = identity(config, fingerprint="", backbone=checksum)
    out.mkdir()
    facts = {"config": config, "world_size": 1, "batch": Batch(8, 8, 1), "bad_samples": ()}
    save_checkpoint(out, 3, model, optimizer, run=run, classes=CLASSES, keep=1, **facts)  # type: ignore[arg-type]


def pack_copies(folder: Path, videos: Path) -> None:
    """The videos as they are, keys like their names, in two splits: one of all, one with several labels a video."""
    folder.mkdir()
    writer = ShardWriter(folder, "val-000000.tar")
    for number, video in enumerate(sorted(videos.iterdir())):
        writer.add(video.stem, [number % 3], encode_video(video, "copy", choice=FrameChoice()), {})
    entries = {"val": {"samples": 4, "shards": [asdict(writer.close())]}}
    facts = {"classes": CLASSES, "multi_label": False, "verified": True, "profile": {"name": "copy", "fps": "source"}}
    write_manifest(folder, {**facts, "splits": entries})


def entries(file: Path) -> list[dict[str, Any]]:
    videos: list[dict[str, Any]] = json.loads(file.read_text())["videos"]
    return videos


def test_files_and_sets_give_what_the_evaluation_says(place: Path, tmp_path: Path) -> None:
    """Rotated, of variable rate, odd sizes, cut by an edit list: the packer decoded them all, here most are skimmed."""
    views = ("--views", "2x3", "--batch", "5")
    done = call_program(
        evaluate.main, place / "run", "--shards", place / "set", *views, "--out", tmp_path / "evaluation"
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "evaluation" / "predictions.npz") as stored:
        expected = torch.from_numpy(stored["logits"]).double().softmax(1).numpy()
    for name, source in (("files", [place / "videos"]), ("set", ["--shards", place / "set"])):
        json_file = tmp_path / f"{name}.json"
        done = call_program(predict.main, place / "run", *source, *views, "--top", "0", "--json", json_file)
        assert done.returncode == 0, done.stderr
        by_name = [dict(zip(e["labels"], e["probabilities"], strict=True)) for e in entries(json_file)]
        found = np.asarray([[shares[name] for name in CLASSES] for shares in by_name])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert all(e["views"] == 6 and e["error"] is None for e in entries(json_file))
        assert [e["labels"][0] for e in entries(json_file)] == [CLASSES[c] for c in expected.argmax(1)]
    stated = json.loads((tmp_path / "files.json").read_text())
    expected_facts = {"step": 3, "classes": 3, "multi_label": False, "views": "2x3", "averaging": "prob", "failed": 0}
    assert {name: stated[name] for name in expected_facts} == expected_facts and "torch" in stated["packages"]
    assert done.stdout.count(" %") == 4 * 3, "a table for people"


def test_what_cannot_be_decoded_is_named_and_the_rest_goes_on(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "sub" / ".hidden").mkdir(parents=True)
    secret = shutil.copy(place / "videos" / "a.mp4", tmp_path / "secret.mp4")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {secret}\n")
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n")
    data = Path(secret).read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    shutil.copy(place / "videos" / "d.mp4", folder / "sub" / "good.mp4")
    shutil.copy(place / "videos" / "d.mp4", folder / "sub" / ".hidden" / "not_asked_for.mp4")
    (folder / "notes.txt").write_text("no video")
    (folder / "odd\x1b[31m.mp4").write_text("")
    outputs = ("--json", tmp_path / "x.json", "--csv", tmp_path / "x.csv")
    done = call_program(predict.main, place / "run", folder, *outputs)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "4 of 5 videos cannot be decoded" in done.stderr and "bad sample" not in done.stderr
    lines = done.stdout.splitlines()
    assert [("cannot be decoded" in line) for line in lines] == [True, True, True, True, False]
    assert "\x1b" not in done.stdout and "odd\\x1b[31m.mp4" in lines[2]
    reasons = [e["error"] for e in entries(tmp_path / "x.json")]
    assert [reason.split(":")[0] for reason in reasons[:4]] == ["unreadable", "truncated", "unreadable", "unreadable"]
    assert reasons[4] is None and json.loads((tmp_path / "x.json").read_text())["failed"] == 4
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["error"] == reasons[0] and not rows[0]["label"]
    best = entries(tmp_path / "x.json")[4]
    assert (rows[4]["label"], float(rows[4]["probability_3"])) == (best["labels"][0], best["probabilities"][2])


def test_standard_output_holds_json_alone_and_nothing_decodable_is_an_error(place: Path, tmp_path: Path) -> None:
    done = call_program(predict.main, place / "run", place / "videos" / "b.mkv", "--top", "1", "--json")
    assert done.returncode == 0
    (entry,) = json.loads(done.stdout)["videos"]
    assert entry["key"].endswith("b.mkv") and len(entry["labels"]) == 1
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for more in ((), ("--window", "1s", "--out", tmp_path)):
        done = call_program(predict.main, place / "run", empty, *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: cannot be decoded: {empty}: unreadable: the file is empty\n"
    empty.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    done = call_program(predict.main, place / "run", empty)
    assert done.returncode == 2 and "a Git LFS pointer: run git lfs pull" in done.stderr


def test_with_several_labels_probabilities_stand_for_themselves(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    done = call_program(predict.main, place / "run", place / "videos" / "d.mp4", "--json", file, "--multi-label")
    assert done.returncode == 0 and json.loads(file.read_text())["multi_label"]
    assert sum(entries(file)[0]["probabilities"]) != pytest.approx(1, abs=1e-3)


def test_the_set_of_the_training_says_whether_a_video_has_several_labels(tmp_path: Path) -> None:
    config = config_from_dict({"data": {"shards": str(tmp_path / "set")}, "deepspeed": BATCH})
    trained = Trained(None, config, tmp_path / "run", 1, None, 1)  # type: ignore[arg-type]
    assert not several_labels(trained)
    make_set(tmp_path / "set", [5], multi_label=True)
    assert several_labels(trained)
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "run").mkdir()
    arrays = {"keys": np.asarray(["k"]), "classes": np.asarray(["a", "b"]), "valid": np.ones(1, bool)}
    hot = {"logits": np.zeros((1, 2), np.float32), "labels": np.ones((1, 2), np.uint8)}
    np.savez(tmp_path / "run" / "predictions.npz", **arrays, **hot)
    assert several_labels(trained)


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of 16 frames each: a red arrow, from 3 s on a blue one."""
    path = tmp_path_factory.mktemp("changing") / "changing.mp4"
    encode_mp4(path, np.concatenate([arrows("red", 48), arrows("blue", 48)]))
    path.with_name("zero_shot.toml").write_text(ZERO_SHOT)
    return path


def arrows(colour: str, count: int) -> np.ndarray:
    looks = {name: np.repeat(value, count, 0) for name, value in random_looks(generator(1), 1).items()}
    looks["colour"] = np.tile(np.float32(COLOURS[colour]), (count, 1))
    numbers = {"x": 0.5, "y": 0.5, "radius": 0.35, "angle": 0.0}
    places = {name: np.full(count, value, np.float32) for name, value in numbers.items()}
    return draw(Scenes(shape=np.zeros(count, np.int64), **looks, **places), 64)


def test_a_timeline_changes_when_the_video_does(changing: Path, tmp_path: Path) -> None:
    """The labels come from the command line: of a model that has seen none of them as a class."""
    options = ("--classes", "red,blue,green", "--window", "1s", "--stride", "0.5s", "--out", tmp_path, "--top", "2")
    film = tmp_path / "film.mp4"
    done = call_program(
        predict.main, changing.with_name("zero_shot.toml"), changing, *options, "--annotate", film, "--batch", "3"
    )
    assert done.returncode == 0, done.stderr
    assert "11 windows, the best class is red in 6, blue in 5" in done.stdout
    with (tmp_path / "changing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    starts = [float(row["start_seconds"]) for row in rows]
    assert starts == [0.5 * k for k in range(11)] and float(rows[-1]["end_seconds"]) == 6
    assert [row["label"] for row in rows] == ["red" if start < 3 else "blue" for start in starts]
    assert list(rows[0])[2:] == ["label", "probability", "label_2", "probability_2"]
    assert all(float(row["probability"]) > 0.9 for row in rows if row["start_seconds"] != "2.500000")
    with Image.open(tmp_path / "changing.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changing.csv", "changing.png", "film.mp4"]

    with open_video(film) as reader, open_video(changing) as source:
        shown = [(frame.seconds, to_rgb(frame.picture).astype(int)) for frame in reader.frames()]
        times = [frame.seconds for frame in source.frames()]
    assert [seconds for seconds, _ in shown] == pytest.approx(times, abs=1e-4) and shown[0][1].shape == (64, 64, 3)
    changes = np.abs(np.diff(np.asarray([picture for _, picture in shown]), axis=0))
    # The windows that begin at 2.5 and 3 s meet at 3.25 s: there the name changes, after the picture did at 3 s.
    assert changes[:, 30:].mean((1, 2, 3)).argmax() == 47 and changes[:, :14].mean((1, 2, 3)).argmax() == 51


def test_labels_are_drawn_on_an_upright_video_of_the_same_size_and_times(place: Path, tmp_path: Path) -> None:
    videos = [place / "videos" / name for name in ("a.mp4", "b.mkv")]
    done = call_program(predict.main, place / "run", *videos, "--annotate", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for video in videos:
        with open_video(video) as source, open_video(tmp_path / "out" / f"{video.stem}.mp4") as drawn:
            before = [(frame.seconds, source.orientation.apply(to_rgb(frame.picture))) for frame in source.frames()]
            height, width = (side + side % 2 for side in before[0][1].shape[:2])  # H.264 has even sides alone
            after = [(frame.seconds, to_rgb(frame.picture)) for frame in drawn.frames()]
            assert drawn.codec == "h264"
        assert [seconds for seconds, _ in after] == pytest.approx([seconds for seconds, _ in before], abs=1e-4)
        for (_, old), (_, new) in zip(before, after, strict=True):
            assert new.shape == (height, width, 3)
            difference = np.abs(new[: old.shape[0], : old.shape[1]].astype(int) - old)
            assert difference[-height // 4 :].mean() < 12 < difference[:12, :12].mean(), "labels above, video below"


def test_names_of_files_are_their_stems_each_once() -> None:
    paths = [Path("a/x.mp4"), Path("b/x.mov"), Path("b/X.avi"), Path("c/y \x1b/:z.mp4"), Path("d/x-2.mp4")]
    assert file_names(paths) == ["x", "x-2", "X-3", "_z", "x-2-2"]


def test_hours_of_windows_make_one_picture(tmp_path: Path) -> None:
    windows = [Window(float(k), k + 1.0, 25 * k, 25) for k in range(3000)]
    video = WindowedVideo(tmp_path / "x.mp4", FileFacts(64, 64, 75_000, 25.0, 3000.0), windows)
    timeline = Timeline(["a", "b $", "視"], video)
    for window in windows:
        answer = np.roll([0.7, 0.2, 0.1], int(window.start_seconds) // 1000)
        timeline.add(window, np.zeros((8, 8, 3), np.uint8), answer, [("x", 0.7)])
    assert timeline.summary() == "3000 windows, the best class is a in 1000, b $ in 1000, 視 in 1000"
    assert [until for until, _ in timeline.spans[:2]] == [1.0, 2.0] and timeline.spans[-1][0] == np.inf
    timeline.draw(tmp_path / "x.png", "x $_{y}^ 視")
    with Image.open(tmp_path / "x.png") as picture:
        bar = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB"))[-60].tolist()}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= bar, "a colour for each class"


def test_models_that_read_names_need_some_and_take_a_file(changing: Path, tmp_path: Path) -> None:
    recipe = changing.with_name("zero_shot.toml")
    done = call_program(predict.main, recipe, changing)
    assert done.returncode == 2 and "zero_shot compares videos with class names: add --classes A,B,C" in done.stderr
    (tmp_path / "names.txt").write_text("red\n\nblue \n")
    done = call_program(predict.main, recipe, changing, "--classes", tmp_path / "names.txt", "--json", "-")
    assert sorted(json.loads(done.stdout)["videos"][0]["labels"]) == ["blue", "red"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "give videos (files or folders) or --shards SET, one of the two"),
        (["{run}", "{video}", "--shards", "{set}"], "one of the two"),
        (["{run}", "{tmp}/none.mp4"], "no such video file or folder: {tmp}/none.mp4"),
        (["{run}", "{tmp}/empty"], "{tmp}/empty holds no video; they are known by "),
        (["{tmp}/nothing", "{video}"], "{tmp}/nothing is no folder; give a run, one of its checkpoints"),
        (["{run}", "{video}", "--views", "3"], "--views 3: the form is CLIPSxCROPS"),
        (["{run}", "{video}", "--top", "-1"], "--top -1: allowed are 0 to"),
        (["{run}", "{video}", "--window", "two"], "'two': the form is a number of seconds above 0"),
        (["{run}", "{video}", "--window", "2s", "--stride", "0.01"], "--stride 0.01s: allowed is 1/32 of --window 2s"),
        (["{run}", "{video}", "--stride", "1"], "--stride and --out go with --window"),
        (["{run}", "{video}", "--window", "2", "--json", "-"], "--json and --csv are for whole videos"),
        (["{run}", "--shards", "{set}", "--window", "2"], "need the videos themselves, not --shards"),
        (["{run}", "--shards", "{set}", "--split", "test"], "has no split 'test'; it has: val"),
        (
            ["{run}", "{video}", "--classes", "x,y,z"],
            "was trained for its own 3 classes (a, b, c …) and reads no names",
        ),
        (["{run}", "{video}", "--classes", "x,x"], "--classes x,x: the same name twice"),
        (["{run}", "{video}", "--json", "{tmp}/none/x.json"], "there is no folder {tmp}/none"),
        (
            ["{run}", "--json", "{video}"],
            "--json {video}: that names a video; put --json behind the videos",
        ),
        (["{run}", "{video}", "--annotate", "{video}"], "would write over the video"),
        (["{run}", "{video}", "--annotate", "{tmp}/x.avi"], "what is written is an .mp4; name one, or a folder"),
        (["{run}", "{video}", "{video2}", "--annotate", "{tmp}/x.mp4"], "2 videos do not go into one file"),
        (["{run}", "{video}", "--set", "data.intervall=3"], "did you mean data.interval"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(place: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    videos = {"video": place / "videos" / "d.mp4", "video2": place / "videos" / "a.mp4"}
    words = {"run": place / "run", "set": place / "set", "tmp": tmp_path, **videos}
    done = call_program(predict.main, *(text.format(**words) for text in arguments))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message.format(**words) in done.stderr.splitlines()[-1]


def test_the_shared_clips(place: Path, tmp_path: Path, shared_clips: Path) -> None:
    names = ["decord__video_270.mov", "torchcodec__testsrc2_444_8bit_hevc.mp4", "learning-area__rabbit320.webm"]
    broken = ["made_random_bytes.mp4", "mp4parse-rust__short-cenc.mp4", "made_truncated_60pct_moov_first.mp4"]
    videos = [shared_clips / "zoo" / name for name in names + broken]
    done = call_program(predict.main, place / "run", *videos, "--json", tmp_path / "x.json")
    assert done.returncode == 1
    reasons = [(e["error"] or "").split(":")[0] for e in entries(tmp_path / "x.json")]
    assert reasons == ["", "", "", "unreadable", "encrypted", "truncated"]
