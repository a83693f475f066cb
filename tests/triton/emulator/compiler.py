"""What a launch compiles to: asked of another process, because Triton interprets its kernels in that of the tests.

The process has a driver that only names its GPU, so that Triton specialises arguments as it would there.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from tests.triton.measurement import CACHE, ROOT


@dataclass(frozen=True)
class Pointer:
    """A tensor as far as the compiler looks at it."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Request:
    """A launch: ``module:name`` of the kernel, its arguments in order, its constants and options by name."""

    kernel: str
    capability: int
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What came of it.

    Attributes:
        names: of the parameters that are not constants, in order.
        error: what the compiler said when it failed; all else is empty then.
    """

    ptx: str = ""
    warps: int = 0
    shared: int = 0
    names: tuple[str, ...] = ()
    error: str = ""


class Compiler:
    """A process that compiles one launch after another."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]
        )
        environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.triton.emulator.compiler"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment,
        )  # fmt: skip

    def compile(self, request: Request) -> Compiled:
        """Raises RuntimeError when the kernel does not compile."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            compiled: Compiled = pickle.load(self._process.stdout)
        if compiled.error:
            raise RuntimeError(f"{request.kernel} does not compile: {compiled.error}")
        return compiled

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    import triton

    from tests.triton.standin import StandIn

    while True:
        try:
            request: Request = pickle.load(requests)
        except EOFError:
            return
        try:
            triton.runtime.driver.set_active(StandIn(request.capability))
            answer = _compiled(request)
        except Exception as error:  # the asker raises it
            answer = Compiled(error=f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def _compiled(request: Request) -> Compiled:
    module, _, name = request.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    built = kernel.warmup(*request.arguments, grid=(1,), **request.settings)
    built = getattr(built, "result", lambda: built)()
    names = tuple(name for name, kind in built.src.signature.items() if kind != "constexpr")
    return Compiled(built.asm["ptx"], built.metadata.num_warps, built.metadata.shared, names)


if __name__ == "__main__":
    # The answers go where nothing else prints.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from tests.triton.emulator import (
        compiler as this,
    )  # what is pickled belongs to the module, not to __main__

    this._serve(sys.stdin.buffer, answers)
