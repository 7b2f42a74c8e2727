"""Training from frame features in place of videos: the same loss, and what does not fit is refused first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sets import make_set
from tests.train.runs import FP32, arguments, trace
from tools.extract_features import main as extract
from train.main import main

SETTINGS = ("model.method=prompt_clip", "model.pretrained=shapes", "model.prefix=4", "model.postfix=4", FP32)
SMALL = ("ds.train_batch_size=4", "ds.train_micro_batch_size_per_gpu=4", "schedule.epochs=2", "data.fixed_views=true")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("videos") / "set", [12, 20, 9, 16], splits=("train", "val"))


@pytest.fixture(scope="module")
def features(videos: Path) -> Path:
    """As evaluation of the demo cuts frames."""
    out = videos.parent / "features"
    extract([str(videos), str(out), "--name", "tiny-clip", "--pretrained", "shapes", "--workers", "1", "--crop", "1"])
    return out


def run(shards: Path, out: Path, *settings: str) -> list[float]:
    """The losses of a run."""
    given = arguments(shards, out, *SETTINGS, *SMALL, *settings)
    others = ("model.drop_path", "model.head_dropout")  # which the method does not have
    values = [value for value in given[3::2] if not value.startswith(others)]
    assert main(["--recipe", "demo", *(part for value in values for part in ("--set", value))]) == 0
    return [line["loss"] for line in trace(out)]


def test_the_loss_is_that_of_the_videos(
    videos: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With augmentation off; and what is frozen is said once."""
    online, cached = run(videos, tmp_path / "online"), run(features, tmp_path / "cached")
    assert cached == pytest.approx(online, rel=1e-3) and len(cached) == 2 and cached[0] != cached[1]
    assert capsys.readouterr().out.count("crop and flip are those of the extraction") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.pretrained=none",), r"made by tiny-clip with weights_xxh3 \w+, and the image model here is tiny-clip"),
        (("data.fixed_views=false", "data.grayscale=0.2"), r"data.grayscale = 0.2 changes pixels"),
        (("speed.cache_gb=1",), r"speed.cache_gb = 1 keeps what the frozen image model makes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    features: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(features, tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_a_method_that_needs_the_frames_is_refused(features: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method aim needs the frames themselves.*holds features that tiny-clip made"):
        main(arguments(features, tmp_path / "out", "model.pretrained=shapes"))
