"""Runs the project's kernels on CPU tensors as a GPU would: compiled for it, executed instruction by instruction.

    from tests.triton.emulator.launch import emulated

    with emulated(80):                       # or 89, 90
        y = ops.linear(x, *w.stored, None, w.rows, w.cols)   # x bfloat16 or float16, on the CPU
        model.generate(...)                                  # every operator takes its Triton kernel

    with emulated(80, order=7) as gpu: ...   # programs and warps in a random order of seed 7
    with emulated(80, order="backwards"): ...
    gpu.launches                             # what ran: name, grid, instructions, seconds

Inside, ``ciuic_kernels.triton._launch.start`` compiles what it would compile on a GPU of that capability, with the real
specialisation of its arguments, and executes all programs before it returns. A fault (out of bounds, misaligned,
unwritten memory or registers, a race, a missing wait) raises ``machine.KernelFault`` with instruction and source line;
an instruction that is not known raises ``operands.UnsupportedPtx``. Fresh buffers (``torch.empty`` and its kin) count
as unwritten until something is written there. Which kernel runs is decided as on that GPU, with few processors.
Compiled kernels are kept in ``.cache/triton``; a new one takes seconds.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import pkgutil
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ciuic_kernels import device, dispatch
from ciuic_kernels.device import DeviceFacts
from tests.triton.emulator.compiler import Compiled, Compiler, Pointer, Request
from tests.triton.emulator.machine import Kernel
from tests.triton.emulator.memory import Memory, offset_of, unwritten_buffers

PROCESSORS = 4
"""Of the emulated GPU: few, so that the shares of a strip are few."""


@dataclass(frozen=True)
class Launched:
    """One launch that ran.

    Attributes:
        instructions: of warps, in all programs; ``seconds``: without compilation.
    """

    kernel: str
    grid: tuple[int, int, int]
    instructions: int
    seconds: float


@dataclass
class Gpu:
    """An emulated GPU.

    Attributes:
        order: of the programs of a launch and of the warps of a program: ``forwards``, ``backwards``, or the seed of a
            random one.
    """

    capability: int
    order: str | int = "forwards"
    launches: list[Launched] = field(default_factory=list)

    def start(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        """What ``_launch.start`` does, here; inside ``_launch.compiling`` nothing, as kernels are compiled at need."""
        from ciuic_kernels.triton import _launch

        if _launch._only_compile.get():
            return
        function = getattr(kernel, "fn", kernel)
        compiled = _compiled(self._request(function, arguments, settings))
        names = list(inspect.signature(function).parameters)
        values = dict(zip(names, arguments, strict=False)) | settings
        self.run(compiled, function.__name__, grid, values)

    def run(self, compiled: Compiled, name: str, grid: tuple[int, ...], values: dict[str, Any]) -> None:
        """Run a compiled kernel: ``values`` by the names of its parameters."""
        grid = (*grid, 1, 1)[:3]
        tensors = [(key, value) for key in compiled.names if isinstance(value := values[key], torch.Tensor)]
        memory = Memory(tensors)
        parameters = [_bits(values[key], memory) for key in compiled.names]
        kernel = _kernel(compiled)
        spare = len(kernel.code.parameters) - len(parameters)  # scratch memory, which no kernel here uses
        start = time.perf_counter()
        result = kernel.run(
            grid, [*parameters, *[0] * spare], memory.regions, self._programs(grid), self._seed()
        )
        self.launches.append(Launched(name, grid, result.instructions, time.perf_counter() - start))

    def _request(self, function: Any, arguments: Sequence[Any], settings: dict[str, Any]) -> Request:
        described = tuple(
            Pointer(value.dtype, offset_of(value) % 16) if isinstance(value, torch.Tensor) else value
            for value in arguments
        )
        return Request(f"{function.__module__}:{function.__name__}", self.capability, described, settings)

    def _programs(self, grid: tuple[int, ...]) -> np.ndarray:
        order = np.arange(grid[0] * grid[1] * grid[2])
        if self.order == "backwards":
            return order[::-1].copy()
        return order if self.order == "forwards" else np.random.default_rng(self.order).permutation(order)

    def _seed(self) -> int:
        return self.order + 1 if isinstance(self.order, int) else 0


def _bits(value: Any, memory: Memory) -> int:
    if isinstance(value, torch.Tensor):
        return memory.address_of(value)
    if isinstance(value, float):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value)


@cache
def _compiler() -> Compiler:
    compiler = Compiler()
    atexit.register(compiler.close)
    return compiler


_known: dict[str, Compiled] = {}


def _compiled(request: Request) -> Compiled:
    """Launches that differ only in what the compiler does not look at share a kernel."""

    def seen(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31, value < 1 << 63)
        return type(value) if isinstance(value, float) else value

    key = repr(
        (
            request.kernel,
            request.capability,
            [*map(seen, request.arguments)],
            sorted(request.settings.items()),
        )
    )
    if key not in _known:
        _known[key] = _compiler().compile(request)
    return _known[key]


@cache
def _kernel(compiled: Compiled) -> Kernel:
    return Kernel(compiled.ptx, compiled.warps, compiled.shared)


_facts: list[DeviceFacts] = []
_real_device_facts = device.device_facts


def _device_facts(where: torch.device) -> DeviceFacts:
    """A module that is imported while a GPU is emulated keeps this function: it must be right afterwards too."""
    return _facts[-1] if _facts else _real_device_facts(where)


@contextmanager
def emulated(capability: int, order: str | int = "forwards") -> Iterator[Gpu]:
    """Have every operator take its Triton kernels, on CPU tensors, executed as compiled for this capability.

    Args:
        order: see :class:`Gpu`.
    """
    import triton

    gpu = Gpu(capability, order)
    facts = DeviceFacts("cuda", f"emulated sm_{capability}", capability, PROCESSORS)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("CIUIC_IMPL", raising=False)
        stack.callback(_facts.remove, facts)
        _facts.append(facts)
        _replace(patch, "device_facts", device.device_facts, _device_facts)
        import ciuic_kernels.triton._launch as launching

        _import_kernels()
        _replace(patch, "start", launching.start, gpu.start)
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = False
        stack.enter_context(unwritten_buffers())
        dispatch._choice.cache_clear()
        stack.callback(dispatch._choice.cache_clear)
        yield gpu


def _import_kernels() -> None:
    import ciuic_kernels.triton

    for module in pkgutil.iter_modules(ciuic_kernels.triton.__path__):
        importlib.import_module(f"ciuic_kernels.triton.{module.name}")


def _replace(patch: pytest.MonkeyPatch, name: str, old: Any, new: Any) -> None:
    """In every module of the project that took this function by name."""
    for module in [m for key, m in sys.modules.items() if key.split(".")[0] in ("ciuic_kernels", "ciuic_hf")]:
        if getattr(module, name, None) is old:
            patch.setattr(module, name, new)
