"""Localisation from end to end with a model whose answers are known, what it writes, and the answers to mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.shards import EncodedVideo, ShardSet
from tests.features import WIDTH, make_feature_set, stored
from tests.sets import make_set
from tools import localise
from tools.localise import main, samples_of
from train.config import Config
from train.engine import World
from train.localisation import read_segments, read_truth

FRAMES = 90  # of each video, at 30 a second; every third is stored
CLASSES = ("other", "run", "jump")
JUMPS = (0.0, 1.5)
RUNS = (1.5, 3.0)


def one_hot(_: int, video: EncodedVideo) -> EncodedVideo:
    """Feature 1 (of "run") in the second half of the video, feature 2 (of "jump") in the first."""
    numbers = video.frames.source_frame
    features = np.zeros((len(numbers), WIDTH), np.float16)
    features[np.arange(len(numbers)), np.where(numbers >= FRAMES / 2, 1, 2)] = 1
    return stored(features, FRAMES, every=3)


class Pooling(nn.Module):
    """Clips of features [B, T, D] to the mean of the first three, ten times."""

    reads_class_names = False
    num_frames = 4

    def forward(self, clips: Tensor) -> Tensor:
        return 10 * clips.float().mean(1)[:, : len(CLASSES)]


class Naming(Pooling):
    """The same for the classes that it is told of."""

    reads_class_names = True

    def name_classes(self, names: Sequence[str]) -> None:
        self.columns = [CLASSES.index(name) for name in names]

    def forward(self, clips: Tensor) -> Tensor:
        return super().forward(clips)[:, self.columns]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, 000000_numbers and 000001_numbers."""
    folder = tmp_path_factory.mktemp("features") / "set"
    return make_feature_set(folder, [FRAMES] * 2, every=3, splits=("val",), change=one_hot)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Both halves of both videos are to be found, and are proposed; in a third video without features as well."""
    happens = [{"segment": JUMPS, "label": "jump"}, {"segment": RUNS, "label": "run"}]
    names = ("000000_numbers", "v_000001_numbers", "lost")
    database = {name: {"subset": "validation", "duration": 3.0, "annotations": happens} for name in names}
    proposals = [{"segment": JUMPS, "score": 0.9}, {"segment": [1.6, 3.0], "score": 0.8}]
    (tmp_path / "truth.json").write_text(json.dumps({"database": database}))
    (tmp_path / "proposals.json").write_text(json.dumps({"results": dict.fromkeys(names, proposals)}))
    return ["--truth", str(tmp_path / "truth.json"), "--proposals", str(tmp_path / "proposals.json")]


checked: list[nn.Module] = []
"""Models whose features were compared with those of a set."""


def use(monkeypatch: pytest.MonkeyPatch, model: nn.Module, folder: Path, classes: tuple[str, ...] | None) -> None:
    """The checkpoint that `main` opens."""
    trained = SimpleNamespace(model=model, config=Config(), folder=folder, step=7, classes=classes, micro_batch=2)
    monkeypatch.setattr(localise, "open_trained", lambda path, overrides: trained)
    monkeypatch.setattr(localise, "check_feature_set", lambda shards, given, config: checked.append(given))
    monkeypatch.setattr(localise, "make_ready", lambda *_: World(0, 1, 1, torch.device("cpu")))


def test_from_end_to_end(
    features: Path,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, model := Pooling(), tmp_path, CLASSES)
    assert main([str(tmp_path), "--features", str(features), *files, "--top", "1", "--batch", "1"]) == 0
    assert checked[-1] is model
    out = tmp_path / "localisation-val"
    said = capsys.readouterr()
    assert "1 of 3 videos with proposals are not in" in said.err and "first 'lost'" in said.err
    found = json.loads((out / "detections.json").read_text())["results"]
    assert found["lost"] == []
    sure = np.exp(10) / (np.exp(10) + 1)  # the classes of the truth are two
    expected = [
        {"segment": list(JUMPS), "score": pytest.approx(0.9 * sure, abs=1e-6), "label": "jump"},
        {"segment": [1.6, 3.0], "score": pytest.approx(0.8 * sure, abs=1e-6), "label": "run"},
    ]
    assert found["000000_numbers"] == found["v_000001_numbers"] == expected
    result = json.loads((out / "localisation.json").read_text())
    # Two of three videos: with precision 1, an average precision of 2/3. 1.6 to 3 has tIoU 1.4 / 1.5 with 1.5 to 3.
    assert result["map"]["THUMOS14"] == {f"{t:.2f}": pytest.approx(2 / 3) for t in (0.3, 0.4, 0.5, 0.6, 0.7)} | {
        "mean": pytest.approx(2 / 3)
    }
    assert result["map"]["ActivityNet"]["0.90"] == pytest.approx(2 / 3)
    assert result["map"]["ActivityNet"]["0.95"] == pytest.approx(1 / 3)
    assert result["class_precision_at_0.5"] == {"jump": pytest.approx(2 / 3), "run": pytest.approx(2 / 3)}
    assert (result["videos"], result["videos_without_features"], result["frames"], result["step"]) == (3, 1, 4, 7)
    assert (out / "localisation.md").read_text().partition("\n\n")[2] in said.out and "| 66.7 |" in said.out
    assert Image.open(out / "localisation.png").size[0] > 1000


def test_classes_are_named_to_a_model_that_reads_them_and_others_of_a_class_suppressed(
    features: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Naming(), tmp_path, None)
    more = ["--classes", "run", "--top", "0", "--nms", "0.0", "--frames", "9", "--out", str(tmp_path / "named")]
    assert main([str(tmp_path), "--features", str(features), *files, *more]) == 0
    found = json.loads((tmp_path / "named" / "detections.json").read_text())["results"]
    assert [(entry["label"], entry["score"]) for entry in found["000000_numbers"]] == [("run", 0.9), ("run", 0.8)]
    result = json.loads((tmp_path / "named" / "localisation.json").read_text())
    assert (result["frames"], result["nms"], list(result["class_precision_at_0.5"])) == (9, 0.0, ["run"])


def test_a_damaged_video_is_named(
    features: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = make_feature_set(
        tmp_path / "spoilt",
        [FRAMES],
        every=3,
        splits=("val",),
        change=lambda i, video: stored(np.full((30, WIDTH), np.nan, np.float16), FRAMES, every=3),
    )
    use(monkeypatch, Pooling(), tmp_path, CLASSES)
    with pytest.raises(ValueError, match=r"sample 000000_numbers of .*: features that are no finite numbers"):
        main([str(tmp_path), "--features", str(spoilt), *files])
    use(monkeypatch, Pooling(), tmp_path, ("run", "other"))
    with pytest.raises(ValueError, match=r"'jump' of the truth is none of the 2 classes of"):
        main([str(tmp_path), "--features", str(features), *files])
    use(monkeypatch, Pooling(), tmp_path, None)
    with pytest.raises(ValueError, match="does not say what its classes are"):
        main([str(tmp_path), "--features", str(features), *files])


def test_videos_are_found_by_their_names(files: list[str], tmp_path: Path) -> None:
    truth = read_truth(Path(files[1]))
    proposals = read_segments(Path(files[3]), truth)
    keys = ["000004_000000_numbers", "v_000001_numbers", "000000_another"]

    def holding(*keys: str) -> ShardSet:
        kind = type("Features", (list,), {"features": "some", "folder": "set"})
        return cast("ShardSet", kind(SimpleNamespace(key=key) for key in keys))

    assert samples_of(holding(*keys), truth, proposals) == ({0: 0, 1: 1}, 1)
    with pytest.raises(ValueError, match="set has 2 videos '000000_numbers'; pack each once"):
        samples_of(holding(*keys, "000000_numbers"), truth, proposals)
    with pytest.raises(ValueError, match="3 of 3 videos with proposals are not in set, first '000000_numbers': name"):
        samples_of(holding("x"), truth, proposals)
    pixels = ShardSet.open(make_set(tmp_path / "pixels", [9]), "train")
    with pytest.raises(ValueError, match=r"holds videos, not features: make them with tools/extract_features\.py"):
        samples_of(pixels, truth, proposals)
