"""A CPU that counts as a GPU: Triton's interpreter runs the kernels, a fake timer tells the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from ciuic_hf.bench.kernels.facts import Machine
from ciuic_hf.bench.kernels.timing import Call, Timing
from ciuic_kernels import derived, dispatch
from ciuic_kernels.device import DeviceFacts

CPU = torch.device("cpu")
FACTS = DeviceFacts("cuda", "interpreter", 90, 4)
MACHINE = Machine("NVIDIA H100 80GB HBM3", 90, 132, 80 << 30, 50 << 20, "2.11", "13.0", "3.6", "5.17", {})


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceFacts]:
    """Every operator takes its Triton kernels, on CPU tensors; float16 only, the interpreter has no bfloat16."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here")
    monkeypatch.delenv("CIUIC_IMPL", raising=False)
    for module in (dispatch, derived):
        monkeypatch.setattr(module, "device_facts", lambda device: FACTS)
    dispatch._choice.cache_clear()
    yield FACTS
    dispatch._choice.cache_clear()


class FakeTimer:
    """Runs every call once and gives it the time that ``seconds`` says for its place in the comparison."""

    def __init__(self, seconds: Callable[[int], float] = lambda place: 1e-6 * (place + 1)) -> None:
        self.seconds, self.compared = seconds, 0

    def medians(self, calls: Sequence[Call]) -> list[Timing]:
        self.compared += 1
        timings = []
        for place, call in enumerate(calls):
            try:
                call()
            except Exception as error:
                timings.append(Timing(None, f"{type(error).__name__}: {error}"))
            else:
                timings.append(Timing(self.seconds(place)))
        return timings


class SilentProgress:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.steps: list[str] = []

    def start(self, what: str, total: int | None) -> None:
        self.started.append(what)

    def step(self, what: str) -> None:
        self.steps.append(what)
