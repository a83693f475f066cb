"""What every test stands on: no network, fixed seeds, Triton interpreted where there is no GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Read once, when huggingface_hub or triton is first imported; torch imports neither.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

torch.set_num_threads(min(4, os.cpu_count() or 1))

settings.register_profile("ciuic", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("ciuic"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "ciuic")


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


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with a value that no test can mistake for a result."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uninitialised buffers recognisable, so that a kernel that leaves a hole in its output fails.

    Floats become NaN, integers the largest of their type. Covers torch.empty, empty_like, empty_strided and
    Tensor.new_empty; buffers that C++ code allocates for itself stay as they are.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                return _poison(allocate(*args, **kwargs).detach()).requires_grad_(
                    bool(kwargs.get("requires_grad", False))
                )

        return allocate_poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
