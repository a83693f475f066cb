"""Compiles the kernels of a module on a machine without a GPU, twice: the process that a test starts.

    python -m tests.triton.ahead

Prints how many kernels there are, and how many each of two calls compiled. A driver that can only name its GPU stands
in for CUDA's.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ciuic_hf.modules import kernels
from ciuic_hf.modules.linear import CiuicLinear
from ciuic_kernels import derived, dispatch
from ciuic_kernels.device import DeviceFacts
from tests.kernels.samples import packed_sample

FACTS = DeviceFacts("cuda", "stand-in", 90, 132)


class StandIn(DriverBase):
    """A driver for a GPU of compute capability 9.0 that is not there."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", FACTS.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def main() -> None:
    triton.runtime.driver.set_active(StandIn())
    for module in (derived, dispatch, kernels):
        module.device_facts = lambda device: FACTS  # type: ignore[attr-defined]
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["key"])
    module = CiuicLinear.from_packed(packed_sample((64, 128), 0, ("grid4_g64", "grid3_g64")))
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        count = kernels.compile_kernels([module], torch.bfloat16, routed=1, workers=4)
        first = len(compiled)
        kernels.compile_kernels([module], torch.bfloat16, routed=1, workers=4)
    print(json.dumps({"kernels": count, "first": first, "again": len(compiled) - first}))


if __name__ == "__main__":
    main()
