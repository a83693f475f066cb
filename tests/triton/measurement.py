"""What is measured of a compiled kernel, and the compilations of a list of cases in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.triton.cases import Case
from tests.triton.sass import Loop

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"


@dataclass(frozen=True)
class Measurement:
    """One compiled kernel.

    Attributes:
        error: what the compiler said when it failed; all else is empty then.
        instructions: in the whole kernel.
        registers: of a thread.
        stack: bytes of a thread; ``spills``: instructions that read or write it.
        shared: bytes of shared memory; ``tensor_memory``: columns.
        trap: whether the PTX gives up.
        serialised: codes of ptxas's remarks on matrix instructions that wait for each other.
        seconds: compile time, close to nothing when cached.
        accesses: instructions of the whole kernel that read or write memory, by name (``sass.accesses``).
    """

    loops: list[Loop] = field(default_factory=list)
    instructions: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    trap: bool = False
    serialised: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    accesses: dict[str, int] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Measurement:
        return cls(**fields | {"loops": [Loop(**loop) for loop in fields["loops"]]})

    def costs(self, case: Case) -> list[float]:
        """Instructions per weight of each loop; of a kernel without loops around MMAs, of the whole of it."""
        if self.loops or case.kernel not in ("dequantize", "embedding"):
            return [loop.per_weight for loop in self.loops]
        weights = 64 * 128 if case.kernel == "dequantize" else 128
        return [round(self.instructions * 32 * case.num_warps / weights, 2)]


def measure_each(cases: list[Case], triton_path: Path | None = None) -> Iterator[tuple[Case, Measurement]]:
    """Compile cases on all cores, without a GPU; each result as soon as those before it are there.

    Args:
        triton_path: a folder that holds another Triton than the installed one.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    folders = [*([triton_path] if triton_path else []), ROOT, ROOT / "kernels"]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as said:
        asked.write("".join(case.to_json() + "\n" for case in cases))
        asked.seek(0)
        command = [sys.executable, "-m", "tests.triton.compiler"]
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, env=environment
        ) as process:
            assert process.stdout is not None
            answers = (Measurement.from_fields(json.loads(line)) for line in process.stdout)
            yield from zip(cases, answers, strict=False)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"the compiling process failed:\n{said.read()[-2000:]}")


def measure_all(cases: list[Case], triton_path: Path | None = None) -> dict[Case, Measurement]:
    """The results of :func:`measure_each`."""
    return dict(measure_each(cases, triton_path))
