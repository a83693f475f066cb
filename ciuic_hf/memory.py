"""Peak memory of a piece of work: what CUDA's allocator counts, or this process's anonymous memory on Linux."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")


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


class PeakMemory:
    """Context manager that measures the peak above the start.

    Attributes:
        nbytes: the peak, None where it cannot be measured.
        kind: which memory it is.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.nbytes: int | None = None
        self.kind = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self._cuda_start: int | None = torch.cuda.memory_allocated()
        else:
            self._cuda_start = None
            self._start = self._peak = anonymous_nbytes()
            if self._start is not None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        return self

    def stop(self) -> None:
        if self._cuda_start is not None:
            self.nbytes, self.kind = torch.cuda.max_memory_allocated() - self._cuda_start, "GPU"
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._sample()
            assert self._peak is not None and self._start is not None
            self.nbytes, self.kind = self._peak - self._start, "process, without mapped files"

    def _sample(self) -> None:
        now = anonymous_nbytes()
        if now is not None and self._peak is not None:
            self._peak = max(self._peak, now)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
