"""Compiles the kernels of a module on a machine without a GPU, twice: the process that a test starts.

    python -m tests.triton.ahead

Prints how many kernels products and attention have, how many are compiled again by another call, and by steps of
generation with caches of many lengths after that: none. A driver that can only name its GPU stands in for CUDA's.
"""

from __future__ import annotations

import json
import tempfile

import torch
import triton

from ciuic_hf.modules import kernels
from ciuic_hf.modules.linear import CiuicLinear
from ciuic_hf.planning.cache_formats import CacheSizes, cache_formats
from ciuic_hf.runtime.cache import attention, fused
from ciuic_hf.runtime.cache.rehearsal import CachedAttention
from ciuic_hf.runtime.cache.static_attention import StaticHistory, attend_heads
from ciuic_hf.runtime.cache.static_store import StaticStore
from ciuic_hf.runtime.cache.store import History, LayerStore
from ciuic_kernels import derived, dispatch
from ciuic_kernels.device import DeviceFacts
from tests.kernels.samples import packed_sample
from tests.triton.standin import StandIn

FACTS = DeviceFacts("cuda", "stand-in", 90, 132)


LATENTS = CachedAttention(CacheSizes(1, 1, 128, 32, True), 4, 4)
HEADS = CachedAttention(CacheSizes(1, 2, 64, 64, False), 8, 4)


def steps() -> int:
    """Steps of one token with caches that grow and one of fixed length: how often attention took the kernel."""
    taken, packed = [], fused._packed
    fused._packed = lambda *args: taken.append(1) or packed(*args)  # type: ignore[func-returns-value, assignment]
    query = torch.zeros(2, 8, 1, 64, dtype=torch.bfloat16)
    one, many = (torch.zeros(2, 2, tokens, 64, dtype=torch.bfloat16) for tokens in (1, 699))
    store = LayerStore(cache_formats(4, False))
    for tokens in (300, 3, 4, 700):  # 1007 of two pages
        store.append(*(2 * [torch.zeros(2, 2, tokens, 64, dtype=torch.bfloat16)]))
        history = History(store, one, one)
        padding = torch.ones(2, history.length, dtype=torch.bool)
        for mask in (attention.Mask(), attention.Mask(padding=padding)):
            attention.attend(query, history, 0.1, mask)
    for capacity in (1100, 1600):
        fixed = StaticStore(4, False, capacity, many, many)
        fixed.append(fixed.recent(many, many))
        seen = torch.ones(2, 1, 1, capacity, dtype=torch.bool)
        attend_heads(query, StaticHistory.of(fixed, one, one), 0.1, seen)
    return len(taken)


def main() -> None:
    from ciuic_kernels.triton._launch import compiling

    triton.runtime.driver.set_active(StandIn(FACTS.capability))
    for module in (derived, dispatch, kernels):
        module.device_facts = lambda device: FACTS  # type: ignore[attr-defined]
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["key"])
    module = CiuicLinear.from_packed(packed_sample((64, 128), 0, ("grid4_g64", "grid3_g64")))
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        said["products"] = kernels.compile_kernels([module], torch.bfloat16, routed=1, workers=4)
        said["latents"] = kernels.compile_kernels([module], torch.bfloat16, 1, workers=4, attention=LATENTS)
        said["heads"] = kernels.compile_kernels([module], torch.bfloat16, 1, workers=4, attention=HEADS)
        said["first"] = len(compiled)
        kernels.compile_kernels([module], torch.bfloat16, routed=1, workers=4, attention=HEADS)
        said["again"] = len(compiled) - said["first"]
        with compiling(4):
            said["attended"] = steps()
        said["steps"] = len(compiled) - said["first"]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
