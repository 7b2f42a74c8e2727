"""What every test may rely on: the `gpu` marker's meaning and the place of the shared clips."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Beside others a test process, and each that it starts, computes on one thread: more would wait for each other on
    the same cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of which the trainer takes heed
        import torch

        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `gpu` test where there is no CUDA; fail it on a machine that must have one."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # seconds; only sessions that select a gpu test pay for it here

    if torch.cuda.is_available():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """The folder of real videos beside the repository, which is never part of it."""
    path = ROOT.parent / "shared" / "clips"
    if not path.is_dir():
        pytest.skip("no shared/clips beside the repository")
    return path
