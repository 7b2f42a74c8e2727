"""One small packed set for all tests of training, and one thread, so that every run can be compared to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.sets import make_set


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 videos of 3 classes in splits train and val."""
    folder = tmp_path_factory.mktemp("packed") / "set"
    return make_set(folder, [12, 20, 9, 16, 31] * 5 + [11], classes=3, splits=("train", "val"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For this process and those it starts."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
