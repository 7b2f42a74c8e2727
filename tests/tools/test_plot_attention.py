"""The filmstrip of attention: the frames evaluation takes, equal maps before training, other ones after."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.plan import ClipOptions
from pipelines.video import open_video, to_rgb
from tests.videos import read_number, write_video
from tools.plot_attention import main, read_clip, side_by_side
from train.build import backbone_checksum, build_model
from train.checkpoint import identity, save_checkpoint
from train.config import Batch
from train.resolve import config_from_dict

ROW = 18 + 96 + 4  # caption, frame enlarged to twice the 48 pixels of tiny-clip, gap
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A checkpoint as a run saves it, without the run."""

    def make(method: str = "aim", changed: float = 0.0) -> Path:
        sections = {
            "data": {"num_frames": 4, "sampling": "uniform"},
            "model": {"method": method, "name": "tiny-clip", "pretrained": "none"},
            "deepspeed": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8},
        }
        config = config_from_dict(sections)
        torch.manual_seed(0)
        model = build_model(config.model, num_classes=3, num_frames=4, seed=config.train.seed)
        checksum = backbone_checksum(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=changed)
        groups = [{"params": group["params"]} for group in model.optimizer_groups(0.0)]
        out = tmp_path / "run"
        out.mkdir()
        return save_checkpoint(
            out,
            3,
            model,
            torch.optim.AdamW(groups),
            run=identity(config, fingerprint="", backbone=checksum),
            config=config,
            world_size=1,
            batch=Batch(8, 8, 1),
            bad_samples=(),
            classes=["a", "b", "c"],
            keep=1,
        )

    return make


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "numbers.mp4", 40, (96, 96))


def plot(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def rows_of(picture: Path) -> NDArray[np.uint8]:
    """[3, 4, 96, 96, 3]: what stands in the three rows."""
    sheet = np.asarray(Image.open(picture))
    assert sheet.shape == (3 * ROW, 4 * 100, 3)
    rows = sheet.reshape(3, ROW, 400, 3)[:, 18:114].reshape(3, 96, 4, 100, 3)[:, :, :, :96]
    return rows.transpose(0, 2, 1, 3, 4)


def test_before_training_both_look_alike(make_run: MakeRun, video: Path, tmp_path: Path) -> None:
    plot(make_run(), video, "--out", tmp_path / "a/before.png", "--set", "data.eval_crop=1.0")
    frames, image, trained = rows_of(tmp_path / "a/before.png").astype(int)
    assert [read_number(frame.astype(np.uint8)) for frame in frames] == [5, 15, 24, 34]
    assert np.abs(image - trained).max() <= 1 and np.abs(image - frames).mean() > 10


def test_after_training_they_differ_and_the_video_shows_it(
    make_run: MakeRun, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_run(changed=0.2)
    film = tmp_path / "after.mp4"
    plot(checkpoint.parent, video, "--block", "1", "--out", tmp_path / "after.png", "--mp4", film)
    assert capsys.readouterr().out.split() == [str(tmp_path / "after.png"), str(film)]
    _, image, trained = rows_of(tmp_path / "after.png").astype(int)
    assert np.abs(image - trained).mean() > 1
    with open_video(film) as reader:
        shown = [to_rgb(frame.picture) for frame in reader.frames()]
    assert len(shown) == 4 * 15 and shown[0].shape == (48, 144, 3)


@pytest.mark.parametrize("method", ["finetuned", "timesformer_clip"])
def test_where_all_was_trained_the_run_says_what_it_started_from(
    make_run: MakeRun, video: Path, tmp_path: Path, method: str
) -> None:
    plot(make_run(method, changed=0.1), video, "--out", tmp_path / "x.png")
    frames, image, trained = rows_of(tmp_path / "x.png").astype(int)
    assert np.abs(image - trained).mean() > 1 and np.abs(image - frames).mean() > 10


def test_the_clip_is_the_middle_one_and_short_videos_wrap_around(tmp_path: Path) -> None:
    dense = ClipOptions(num_frames=4, interval=4, test_clips=3, test_crops=3, eval_crop=1.0)
    for length, expected in ((36, [10, 14, 18, 22]), (10, [0, 4, 8, 2])):
        frames, plan = read_clip(write_video(tmp_path / f"{length}.mp4", length, (96, 96)), dense, 96)
        assert list(plan.frames) == expected == [read_number(frame) for frame in frames]


def test_the_three_rows_stand_side_by_side_in_the_video() -> None:
    strips = [np.full((2, 5, 5, 3), value, np.uint8) for value in (1, 2, 3)]
    assert side_by_side(strips).shape == (2, 6, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{video}", "--block", "9"], "block 9: the model has"),
        (["{run}", "{tmp}/none.mp4"], "no such video file: {tmp}/none.mp4"),
        (["{run}", "{run}/state.json"], "{run}/state.json: unreadable"),
        (["{tmp}", "{video}"], "{tmp}"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(
    make_run: MakeRun, video: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    place = {"run": make_run(), "video": video, "tmp": tmp_path}
    with pytest.raises((ValueError, OSError), match=re.escape(message.format(**place))) as raised:
        plot(*(text.format(**place) for text in arguments))
    assert "\n" not in str(raised.value)


def test_a_picture_is_a_png(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        plot("nowhere", video, "--out", "x.jpg")
    assert "it is a .png file" in capsys.readouterr().err
