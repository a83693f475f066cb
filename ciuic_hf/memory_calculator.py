"""``MemoryCalculator``: how much of a tensor's size the free memory allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Self

import torch

from ciuic_hf.errors import CiuicError
from ciuic_hf.memory import system_memory
from ciuic_hf.report import human_bytes

COMPRESSION_LEVELS = (0.1, 0.3, 0.5, 0.7, 1.0)


class MemoryCalculator:
    """Keeps account of a memory, and finds the highest fidelity at which a tensor still fits.

    Args:
        total_mem: bytes there are.
        compression_levels: stored bytes / original bytes that may be used, each above 0 and up to 1; a level is a
            ``compression_ratio`` of ``CiuicCompressor``.

    Made by ``from_device`` it follows a device instead: total and use are asked for whenever they are needed, and
    nothing has to be reported to it.

    Raises:
        CiuicError: for a negative or fractional number of bytes, or levels out of range.
    """

    def __init__(self, total_mem: int, compression_levels: Iterable[float] = COMPRESSION_LEVELS) -> None:
        self.compression_levels = sorted(compression_levels)
        if not self.compression_levels or not all(0 < level <= 1 for level in self.compression_levels):
            raise CiuicError(
                f"compression_levels must be above 0 and up to 1, got {self.compression_levels}."
            )
        self._total = _nbytes(total_mem, "total_mem")
        self._used = 0
        self._read: Callable[[], tuple[int, int]] | None = None

    @classmethod
    def from_device(
        cls,
        device: str | torch.device | None = None,
        compression_levels: Iterable[float] = COMPRESSION_LEVELS,
    ) -> Self:
        """A calculator that follows a device: the current GPU where there is one, else the machine's memory.

        On a GPU, what torch has reserved and does not use counts as free, as the next tensor goes there. On a CPU the
        limit of a container counts where it is lower than the machine's memory.

        Raises:
            CiuicError: for a device whose memory cannot be asked for.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        calculator = cls(0, compression_levels)
        calculator._read = lambda: device_memory(chosen)
        calculator._read()
        return calculator

    @property
    def is_live(self) -> bool:
        """Whether this follows a device."""
        return self._read is not None

    @property
    def total_mem(self) -> int:
        return self._read()[0] if self._read else self._total

    @property
    def used_mem(self) -> int:
        if self._read:
            total, free = self._read()
            return total - free
        return self._used

    @property
    def free_mem(self) -> int:
        return self._read()[1] if self._read else self._total - self._used

    def get_optimal_level(self, tensor_size: int) -> float:
        """The largest level at which ``tensor_size`` bytes fit into the free memory.

        Raises:
            CiuicError: when not even the smallest does; says what is missing.
        """
        size, free = _nbytes(tensor_size, "tensor_size"), self.free_mem
        for level in reversed(self.compression_levels):
            if math.ceil(size * level) <= free:
                return level
        lowest = self.compression_levels[0]
        needed = math.ceil(size * lowest)
        raise CiuicError(
            f"A tensor of {human_bytes(size)} needs {human_bytes(needed)} at the lowest level, {lowest:g}, and "
            f"{human_bytes(free)} of {human_bytes(self.total_mem)} are free; free {human_bytes(needed - free)} more, "
            + (f"or allow a level of {free / size:.2g}." if free else "or use another device.")
        )

    def update_usage(self, mem_usage: int) -> None:
        """Count bytes that were allocated; negative when they were freed.

        Raises:
            CiuicError: when more would be in use than there is, or less than nothing, or the memory is a device's.
        """
        if self._read:
            raise CiuicError(
                "This calculator follows a device, which knows its own use; update_usage is for one made as "
                "MemoryCalculator(total_mem)."
            )
        if isinstance(mem_usage, bool) or not isinstance(mem_usage, int):
            raise CiuicError(f"mem_usage is a whole number of bytes, got {mem_usage!r}.")
        used = self._used + mem_usage
        if not 0 <= used <= self._total:
            raise CiuicError(
                f"{human_bytes(self._used)} of {human_bytes(self._total)} are in use, which cannot change by "
                f"{human_bytes(mem_usage)}; nothing was counted."
            )
        self._used = used

    def __repr__(self) -> str:
        live = ", live" if self.is_live else ""
        return f"MemoryCalculator({human_bytes(self.used_mem)} of {human_bytes(self.total_mem)} in use{live})"


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes in all, and bytes that torch could still allocate, on a CUDA device or the CPU. Raises CiuicError."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return total, free + reusable
    memory = system_memory() if device.type == "cpu" else None
    if memory is None:
        raise CiuicError(
            f"The memory of {device} cannot be asked for here; give its size, MemoryCalculator(total_mem)."
        )
    return memory


def _nbytes(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CiuicError(f"{name} is a whole number of bytes, 0 or more, got {value!r}.")
    return value
