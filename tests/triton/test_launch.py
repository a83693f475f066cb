"""A kernel starts on the device that holds its arguments."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ciuic_kernels.triton import _launch


class Kernel:
    """Notes the current device where Triton would start."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.started = current, []

    def __getitem__(self, grid):
        return lambda *arguments, **settings: self.started.append((grid, self.current[-1]))

    def warmup(self, *arguments, grid, **settings) -> None:
        self.started.append((grid, self.current[-1]))


@pytest.fixture
def current(monkeypatch) -> list[int]:
    """A stack of current devices in place of CUDA's."""
    stack = [0]

    @contextmanager
    def device(wanted: torch.device):
        stack.append(wanted.index)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


@pytest.mark.parametrize("index", [0, 1, 3])
def test_start_makes_the_device_of_the_arguments_current(current: list[int], index: int) -> None:
    kernel = Kernel(current)
    _launch.start(kernel, (2,), SimpleNamespace(device=torch.device("cuda", index)))
    assert kernel.started == [((2,), index)] and current == [0]


def test_compiling_uses_that_device_too(current: list[int]) -> None:
    kernel = Kernel(current)
    with _launch.compiling(1):
        _launch.start(kernel, (2,), SimpleNamespace(device=torch.device("cuda", 1)))
    assert kernel.started == [((2,), 1)] and current == [0]
