"""Builds ``machine/vm.c`` and runs lowered kernels on it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.triton.emulator.isa import PARAMETER_BASE
from tests.triton.emulator.lower import Code, lower
from tests.triton.emulator.parse import Line
from tests.triton.measurement import CACHE

SOURCES = Path(__file__).parent / "machine"
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-w")
LIMIT = 200_000_000
"""Warp instructions after which a program is thought to run forever."""


class _Instruction(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("op", "guard", "negate", "args"))


class _Program(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in ("entry", "n32", "n64", "predicates", "constants32", "constants64")
        ),
        ("values32", ctypes.c_void_p),
        ("values64", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("warps", "shared_bytes", "grain")),
    )


class _Region(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        ("written", ctypes.c_void_p),
        ("writer", ctypes.c_void_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("order", ctypes.c_void_p),
        ("programs", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("executed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "pc", "warp", "lane")),
        ("program", ctypes.c_int32 * 3),
        ("detail", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("address", ctypes.c_uint64),
    )


def compiler() -> str | None:
    """The system's C compiler."""
    named = os.environ.get("CC")
    return (
        shutil.which(named) if named else next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    )


@cache
def library() -> ctypes.CDLL:
    """The machine, built if its sources changed.

    Raises:
        RuntimeError: there is no C compiler, or it failed.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("the emulator needs a C compiler (install gcc or clang, or set CC)")
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    name = f"emulator-{hashlib.sha256(b''.join([*texts, *map(str.encode, FLAGS)])).hexdigest()[:16]}.so"
    if not (CACHE / name).exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            built = Path(folder) / name
            command = [found, *FLAGS, "-shared", "-fPIC", "-o", str(built), str(SOURCES / "vm.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{found} could not build the emulator:\n{done.stderr[-2000:]}")
            built.replace(CACHE / name)
    return ctypes.CDLL(str(CACHE / name))


def _names(symbol: str) -> list[str]:
    names = []
    pointers = ctypes.cast(getattr(library(), symbol), ctypes.POINTER(ctypes.c_char_p))
    while pointers[len(names)] is not None:
        names.append(pointers[len(names)].decode())
    return names


@cache
def operations() -> list[str]:
    """``name types`` of what the machine can do."""
    return _names("operations")


class KernelFault(AssertionError):
    """A kernel did what no GPU promises to do right.

    Attributes:
        kind: the fault's name in ``machine/state.h``, such as ``shared_race``.
        line: the instruction.
    """

    def __init__(self, kind: str, line: Line, message: str) -> None:
        super().__init__(message)
        self.kind, self.line = kind, line


@dataclass(frozen=True)
class Region:
    """Global memory that a launch may touch.

    Attributes:
        address: as the kernel sees it.
        host: bytes of the tensor.
        written: bool ``[bytes]``, false where nobody wrote yet; None if all is written. Kept up to date.
        name: for messages.
        writable: whether the kernel may store there.
    """

    address: int
    host: np.ndarray
    name: str
    written: np.ndarray | None = None
    writable: bool = True


@dataclass(frozen=True)
class Result:
    """What a launch took: warp instructions in all."""

    instructions: int


class Kernel:
    """A compiled kernel, ready to run.

    Args:
        ptx: text of a module with one kernel.
        warps: of a program.
        shared: bytes of shared memory.
    """

    def __init__(self, ptx: str, warps: int, shared: int) -> None:
        self.warps, self.shared = warps, shared
        self.code: Code = lower(ptx, operations())
        self._instructions = np.array(self.code.instructions, np.int32)
        self._operands = np.array(self.code.operands, np.int32)

    def run(
        self,
        grid: tuple[int, int, int],
        parameters: Sequence[int],
        regions: Sequence[Region],
        order: np.ndarray | None = None,
        seed: int = 0,
    ) -> Result:
        """Run programs of the grid one after another.

        Args:
            parameters: bits of the kernel's parameters, as many as PTX names.
            order: numbers of programs, ``x + grid_x (y + grid_y z)``; all in order without.
            seed: in which order the warps of a program run between barriers; 0: ascending.

        Raises:
            KernelFault: at the first thing that is wrong.
        """
        code = self.code
        values = {"u32": np.array(code.constants["u32"] or [0], np.uint32)}
        values["u64"] = np.array(code.constants["u64"] or [0], np.uint64)
        for bits, place in zip(parameters, code.parameters, strict=True):
            if place is not None:
                values[place[0]][place[1]] = bits & (0xFFFFFFFF if place[0] == "u32" else 0xFFFFFFFFFFFFFFFF)
        program = _Program(
            self._instructions.ctypes.data, self._operands.ctypes.data, code.entry, code.sizes["u32"],
            code.sizes["u64"] + 1, code.sizes["p"] + 1, len(code.constants["u32"]), len(code.constants["u64"]),
            values["u32"].ctypes.data, values["u64"].ctypes.data, self.warps, self.shared, code.grain,
        )  # fmt: skip
        passed = np.zeros(sum(code.places[-1]) if code.places else 0, np.uint8)
        for bits, (at, nbytes) in zip(parameters, code.places, strict=True):
            passed[at : at + nbytes] = np.array([bits], np.uint64).view(np.uint8)[:nbytes]
        regions = [*regions, Region(PARAMETER_BASE, passed, "the parameters", writable=False)]
        ordered = sorted(regions, key=lambda region: region.address)
        table, kept = (_Region * max(len(ordered), 1))(), []
        for entry, region in zip(table, ordered, strict=False):
            writer = np.zeros((region.host.nbytes + 3) // 2, np.uint64) if region.writable else None
            kept.append(writer)
            written = region.written.ctypes.data if region.written is not None else None
            entry.address, entry.bytes, entry.host = (
                region.address,
                region.host.nbytes,
                region.host.ctypes.data,
            )
            entry.written, entry.writer = written, None if writer is None else writer.ctypes.data
        if order is None:
            order = np.arange(grid[0] * grid[1] * grid[2])
        order = np.ascontiguousarray(order, np.int64)
        launch = _Launch(
            table, len(ordered), (ctypes.c_int32 * 3)(*grid), order.ctypes.data, len(order), seed, 0, LIMIT
        )
        fault = _Fault()
        if library().run(ctypes.byref(program), ctypes.byref(launch), ctypes.byref(fault)):
            raise self._explained(fault, ordered)
        return Result(launch.executed)

    def _explained(self, fault: Any, regions: list[Region]) -> KernelFault:
        kind, line = _names("faults")[fault.kind], self.code.lines[fault.pc]
        text = f"{'@' + line.guard + ' ' if line.guard else ''}{line.opcode} {', '.join(line.operands)}"
        where = f"program {tuple(fault.program)}, warp {fault.warp}, lane {fault.lane}"
        what = kind.replace("_", " ")
        if kind.startswith("global"):
            index = fault.detail if kind == "global_race" else fault.other
            near = (
                f"{regions[index].name} + {fault.address - regions[index].address}"
                if index >= 0
                else "no tensor"
            )
            what += f" at {near}"
            if index >= 0:
                what += f" of {regions[index].host.nbytes} bytes"
            if kind == "global_race":
                what += f", written by program {fault.other}"
        elif kind.startswith("shared"):
            what += f" at {fault.address - 1024} of {self.shared} (with {fault.detail})"
        elif "register" in kind or "predicate" in kind:
            file = {32: "u32", 64: "u64"}.get(fault.other, "p")
            what += f" {self.code.names.get((file, fault.detail), fault.detail)}"
        return KernelFault(
            kind, line, f"{what}: {text[:160]}\n  {where}, {line.source}, line {line.number} of the PTX"
        )
