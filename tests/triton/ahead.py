"""Compiles the kernels of a module on a machine without a GPU, twice: the process that a test starts.

    python -m tests.triton.ahead

Prints how many kernels there are, and how many each of two calls compiled.
"""

from __future__ import annotations

import json
import tempfile

import torch
import triton

from ciuic_hf.modules import kernels
from ciuic_hf.modules.linear import CiuicLinear
from ciuic_kernels import derived, dispatch
from ciuic_kernels.device import DeviceFacts
from tests.kernels.samples import packed_sample
from tests.triton.standin import StandIn

FACTS = DeviceFacts("cuda", "stand-in", 90, 132)


def main() -> None:
    triton.runtime.driver.set_active(StandIn(FACTS.capability))
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
