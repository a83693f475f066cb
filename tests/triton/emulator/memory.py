"""Tensors as the memory of an emulated GPU: where a kernel sees them, and what of them nobody has written yet."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tests.triton.emulator.machine import Region

FIRST_ADDRESS = 0x7000_0000_0000
GAP = 1 << 20
"""Between two tensors, so that what runs over the end of one is in none."""

ALIGNED = 512
"""Every storage, as torch's allocator for GPUs does it."""

UNWRITTEN = np.array([0x7FBAFFAB], np.uint32)
"""In fresh buffers: both halves are NaN in float16 and bfloat16, and no result of arithmetic."""

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first and behind the last byte that a tensor's elements lie in."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def offset_of(tensor: torch.Tensor) -> int:
    """Bytes from the start of a tensor's storage, which a GPU's allocator aligns; a file mapped on the CPU is not."""
    return tensor.data_ptr() - tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def bytes_at(begin: int, end: int) -> np.ndarray:
    """uint8 view of memory."""
    if begin == end:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))


def written_bytes(host: np.ndarray, halves: bool) -> np.ndarray | None:
    """uint8 mask of what is no longer as :func:`unwritten_buffers` left it; None if nothing is."""
    unit = 2 if halves else 4
    whole = host[: host.nbytes // 4 * 4].view(np.uint16 if halves else np.uint32)
    fresh = whole == (np.tile(UNWRITTEN.view(np.uint16), len(whole) // 2) if halves else UNWRITTEN[0])
    if not fresh.any():
        return None
    written = np.ones(host.nbytes, np.uint8)
    written[: whole.nbytes] = np.repeat(~fresh, unit)
    return written


@contextmanager
def unwritten_buffers() -> Iterator[None]:
    """Have what Python code allocates be known as unwritten until something is written there."""

    def marked(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_marked(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "cpu" and tensor.numel():
                host = bytes_at(*span_of(tensor))
                whole = host.nbytes // 4
                host[: 4 * whole] = np.tile(UNWRITTEN.view(np.uint8), whole)
            return tensor

        return allocate_marked

    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, allocate in originals:
            setattr(owner, name, marked(allocate))
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


class Memory:
    """The memory of one launch.

    Args:
        tensors: the arguments by name. A kernel sees them at made-up addresses with gaps between them, aligned as on a
            GPU; those that share memory are one region. An int64 tensor may hold addresses of others (pages of a
            cache): the tensors that Python knows there are seen where they are.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.regions: list[Region] = []
        self._places: list[tuple[int, int, int]] = []
        spans = sorted((*span_of(x), name, x.dtype.itemsize == 2, offset_of(x)) for name, x in tensors)
        merged: list[tuple[int, int, str, bool, int]] = []
        for begin, end, name, halves, offset in spans:
            if merged and begin < merged[-1][1]:
                old_begin, old_end, names, old, old_offset = merged[-1]
                merged[-1] = (old_begin, max(end, old_end), f"{names}/{name}", halves and old, old_offset)
            else:
                merged.append((begin, end, name, halves, offset))
        address = FIRST_ADDRESS
        for begin, end, name, halves, offset in merged:
            address += offset % ALIGNED
            self._add(address, begin, end, name, halves)
            address = (address + end - begin + GAP) // ALIGNED * ALIGNED
        for name, tensor in tensors:
            if tensor.dtype == torch.int64:
                for begin, end in _pointed_at(tensor):
                    self._add(begin, begin, end, f"what {name} points at", False)

    def _add(self, address: int, begin: int, end: int, name: str, halves: bool) -> None:
        host = bytes_at(begin, end)
        self.regions.append(Region(address, host, name, written_bytes(host, halves)))
        self._places.append((begin, end, address))

    def address_of(self, tensor: torch.Tensor) -> int:
        """Where the kernel sees a tensor of the launch."""
        at = tensor.data_ptr()
        for begin, end, address in self._places:
            if begin <= at < end or (begin == at == end):
                return address + at - begin
        raise KeyError(f"no tensor of this launch is at {at:#x}")


def _pointed_at(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Memory of the tensors whose storage an element points into."""
    values = np.unique(tensor.detach().numpy())
    values = values[values > 1 << 32]
    if not len(values):
        return []
    found = set()
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), torch.Tensor)
            and thing.device.type == "cpu"
            and thing.layout == torch.strided
        ):
            storage = thing.untyped_storage()
            try:
                begin = storage.data_ptr()
            except RuntimeError:  # what a compiler traces with has no bytes
                continue
            end = begin + storage.nbytes()
            at = np.searchsorted(values, begin)
            if at < len(values) and values[at] < end:
                found.add((begin, end))
    return sorted(found)
