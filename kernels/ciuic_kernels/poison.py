"""Fresh buffers that no test can mistake for a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or the largest integer of the type."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return poison(allocate(*args, **kwargs).detach()).requires_grad_(
                bool(kwargs.get("requires_grad", False))
            )

    return allocate_poisoned


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Have every buffer that Python code allocates filled with NaN, so that a kernel's hole in its output shows.

    Covers torch.empty, empty_like, empty_strided and Tensor.new_empty; what C++ code allocates stays as it is.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, allocate in originals:
            setattr(owner, name, _poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)
