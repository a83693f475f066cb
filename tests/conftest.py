"""What every test stands on: no network, fixed seeds, Triton interpreted where there is no GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

# Read once, when huggingface_hub or triton is first imported; torch imports neither.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

from ciuic_kernels.poison import poisoned_buffers

# Of the processes that `make test` starts, each has its share of the cores.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(4, os.cpu_count() or 1) // _PROCESSES))

settings.register_profile("ciuic", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("ciuic"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "ciuic")
settings.register_profile("thorough", settings(), max_examples=300)  # of `make test-all`


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    return torch.device(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fresh buffers are full of NaN, so that a kernel that leaves a hole in its output fails."""
    with poisoned_buffers():
        yield
