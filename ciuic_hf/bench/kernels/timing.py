"""Device times: CUDA graphs of single calls, replayed in turn with a cold L2 cache, medians.

A graph leaves out what Python needs to launch, as CUDA graphs do in real decoding. Between two replays a buffer
of several times L2 is read: it evicts what the last run left, and leaves clean lines, whose eviction costs the timed
kernel no write. It also keeps the GPU busy while the host enqueues the replay behind it, so that two events around it
see no gap. All calls of a comparison take turns, so that clocks and neighbours fall on all of them, and begin after
the clocks have come up. What is left beside the kernel, the start of a graph, is measured too (``Ceilings.empty``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
FLUSH_NBYTES = 256 << 20
WARM_SECONDS = 0.01


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call; ``error`` says why there is none."""

    seconds: float | None
    error: str = ""


class Timer(Protocol):
    """What measures; tests have one without a GPU."""

    def medians(self, calls: Sequence[Call]) -> list[Timing]:
        """A time for each call, taken in turn."""
        ...


class CudaTimer:
    """See the module docstring.

    Args:
        rounds: how often each call is timed; fewer when that takes longer than ``seconds`` a comparison.
    """

    def __init__(self, device: torch.device, rounds: int = 25, seconds: float = 0.25) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds
        nbytes = max(FLUSH_NBYTES, 3 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._cold = torch.ones(max(1, nbytes // 4), dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def flush(self) -> None:
        """Fill L2 with other data; enqueued, not waited for."""
        torch.sum(self._cold, dim=0, out=self._sum)

    def medians(self, calls: Sequence[Call]) -> list[Timing]:
        """Median times. A call that cannot be captured or runs out of memory has its error instead."""
        graphs = [self._captured(call) for call in calls]
        replays = [graph for graph in graphs if isinstance(graph, torch.cuda.CUDAGraph)]
        if not replays:
            return [Timing(None, graph) for graph in graphs if isinstance(graph, str)]
        self._warm()
        first = self._round(replays)
        torch.cuda.synchronize(self.device)
        slowest = sum(start.elapsed_time(end) for start, end in first) / 1e3
        rounds = max(5, min(self.rounds, int(self.seconds / max(slowest, 1e-6))))
        events = [self._round(replays) for _ in range(rounds)]
        torch.cuda.synchronize(self.device)
        times = iter(
            statistics.median(start.elapsed_time(end) for start, end in of_call) / 1e3
            for of_call in zip(*events, strict=True)
        )
        return [Timing(None, graph) if isinstance(graph, str) else Timing(next(times)) for graph in graphs]

    def _warm(self) -> None:
        """Keep the GPU busy until its clocks are up: it idled while kernels were compiled and graphs captured."""
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_SECONDS:
            for _ in range(32):
                self.flush()
            torch.cuda.synchronize(self.device)

    def _round(
        self, graphs: Sequence[torch.cuda.CUDAGraph]
    ) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        pairs = []
        for graph in graphs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush()  # takes long enough for the replay to be enqueued behind it
            start.record()
            graph.replay()
            end.record()
            pairs.append((start, end))
        return pairs

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph | str:
        """A graph of one call after three warm-up calls, or what went wrong.

        The warm-up compiles, fills caches and makes workspaces (cuBLAS has one for each stream) outside of the graph.
        """
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            current.wait_stream(side)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except Exception as error:
            torch.cuda.set_stream(current)  # a failed capture leaves its own behind
            return said_by(error)
        return graph


def said_by(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured in the same run.

    Attributes:
        copy_bandwidth: bytes read plus bytes written per second of a large copy.
        dense_rate: operations per second of a bfloat16 product of 8192 x 8192 matrices.
        empty: seconds that a graph of a kernel that does nothing takes; they are in every time, ours and theirs.
    """

    copy_bandwidth: float
    dense_rate: float
    empty: float = 0.0


def measure_ceilings(
    timer: Timer, device: torch.device, copy_nbytes: int = 1 << 30, side: int = 8192
) -> Ceilings:
    """Copy bandwidth, dense rate, and what is in every time. Raises RuntimeError when the device cannot do these."""
    copy = _time_copy(timer, device, copy_nbytes)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    (product,) = timer.medians([lambda: torch.mm(a, b)])
    one = torch.zeros(1, device=device)
    (empty,) = timer.medians([one.zero_])
    if copy.seconds is None or product.seconds is None or empty.seconds is None:
        raise RuntimeError(copy.error or product.error or empty.error)
    return Ceilings(2 * copy_nbytes / copy.seconds, 2 * side**3 / product.seconds, empty.seconds)


def _time_copy(timer: Timer, device: torch.device, nbytes: int) -> Timing:
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return timer.medians([lambda: target.copy_(source)])[0]
