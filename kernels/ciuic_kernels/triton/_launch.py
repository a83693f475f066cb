"""Starting a kernel, or only compiling it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton

_only_compile: ContextVar[bool] = ContextVar("only_compile", default=False)


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Start a kernel on the device of its first argument, a tensor.

    Inside :func:`compiling`, compile what this start would need and start nothing.
    """
    with _current(arguments[0].device):
        if _only_compile.get():
            kernel.warmup(*arguments, grid=grid, **settings)
        else:
            kernel[grid](*arguments, **settings)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts on the current device, which need not be that of a model on several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def compiling(workers: int) -> Iterator[dict[Any, Any]]:
    """Have operators compile their kernels side by side instead of starting them; their results are not written.

    The compiler works outside of Python's lock, so threads suffice. A kernel that does not compile is left out: it
    will say so where it is needed.

    Args:
        workers: how many kernels are compiled at a time.

    Yields:
        the compilations, one for each different kernel; all are done at the end of the block.
    """
    token = _only_compile.set(True)
    try:
        with (
            ThreadPoolExecutor(workers) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True) as mode,
        ):
            yield mode.future_kernels
    finally:
        _only_compile.reset(token)
