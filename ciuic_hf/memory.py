"""Peak memory of a piece of work: what CUDA's allocator counts, or this process's anonymous memory on Linux."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def anonymous_nbytes() -> int | None:
    """Resident memory of this process that no file backs, or None where /proc does not tell.

    Pages of a memory-mapped checkpoint are left out: the system takes them back when it needs them.
    """
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def system_memory() -> tuple[int, int] | None:
    """Bytes of memory in all and bytes available, or None where /proc does not tell.

    In a container with a limit of its own (cgroup v2) these are the limit and what is left of it; pages of files
    count as available, as the system takes them back.
    """
    if not _MEMINFO.exists():
        return None
    fields = {name: int(value.split()[0]) * 1024 for name, value in _key_values(_MEMINFO.read_text(), ":")}
    total, available = fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        statistics = {
            name: int(value) for name, value in _key_values((_CGROUP / "memory.stat").read_text(), " ")
        }
        files = statistics.get("inactive_file", 0) + statistics.get("active_file", 0)
        total = min(total, int(text))
        available = min(available, max(0, int(text) - int(used.read_text()) + files))
    return total, available


def _key_values(text: str, separator: str) -> list[tuple[str, str]]:
    """``name: value`` lines."""
    pairs = (line.partition(separator) for line in text.splitlines())
    return [(name, value) for name, _, value in pairs if value]


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc only
    except (AttributeError, OSError, TypeError):
        return None


def release_freed_memory() -> None:
    """Give memory that was freed back to the system.

    glibc keeps large freed blocks once it has seen a few, and a small block behind them pins them: without this,
    loads of one model differ by a quarter of its size (docs/adr/007).
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class PeakMemory:
    """Measures the peak above the start, by ``start()`` and ``stop()`` or as a context manager.

    Attributes:
        nbytes: the peak, None where it cannot be measured.
        kind: which memory it is.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.nbytes: int | None = None
        self.kind = ""
        self._on_gpu = False
        self._start = self._peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._on_gpu = True
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif (now := anonymous_nbytes()) is not None:
            self._start = self._peak = now
            # The thread must not keep this object alive: a load that fails never calls stop().
            arguments = (weakref.ref(self), self._stop, self.interval)
            self._thread = threading.Thread(target=_watch, args=arguments, daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        if self._on_gpu:
            self.nbytes, self.kind = torch.cuda.max_memory_allocated() - self._start, "GPU"
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.sample()
            self.nbytes, self.kind = self._peak - self._start, "process, without mapped files"

    def sample(self) -> None:
        """Look at the memory now."""
        self._peak = max(self._peak, anonymous_nbytes() or 0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _watch(owner: weakref.ref[PeakMemory], stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        measuring = owner()
        if measuring is None:
            return
        measuring.sample()
        del measuring
