"""A CPU that counts as a GPU: Triton's interpreter runs the kernels, stand-ins for CUDA or a timer tell the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from ciuic_hf.bench.kernels import timing
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


class FakeEvent:
    """Says that every replay takes ten microseconds, and what came between two events."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.time = -1.0

    def record(self) -> None:
        self.time = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert 0 <= self.time <= end.time, "an event that was not recorded, or in the wrong order"
        return 1e3 * (end.time - self.time)


class FakeGraph:
    """Counts how often it was replayed."""

    def __init__(self) -> None:
        self.whole, self.replays = False, 0

    def replay(self) -> None:
        assert self.whole, "a graph that was not captured"
        self.replays += 1
        FakeEvent.now += 1e-5


class FakeStream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: FakeStream) -> None:
        pass


@contextmanager
def fake_capture(graph: FakeGraph) -> Iterator[None]:
    yield
    graph.whole = True


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``CudaTimer`` and the report ask of torch.cuda, for CPU tensors; a capture runs its calls."""
    free = 80 << 30
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: FakeStream(),
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (free, free),
        "get_device_properties": lambda device=None: SimpleNamespace(L2_cache_size=1 << 10),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "FLUSH_NBYTES", 1 << 10)
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
