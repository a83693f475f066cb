"""Rules that kernels are known to break: each is a strict xfail, so the entry must go when the kernel is mended.

Entries are ``<minor> <case>`` in the words that the budget command prints.
"""

from __future__ import annotations

import pytest

from tests.triton.cases import Case

OUTSIDE = "a few registers spill between the loops over blocks, once a work item; none inside a loop"
BESIDE = "the general path of edges spills, in its loop too"

BYTES = "8-bit codes are not copied ahead, and decoding latents of 8 bits takes more registers than there are"
ROTARY = "a part of what a tile of latents needs is loaded when it is needed, not copied ahead"

BROKEN = {
    "3.6 sm_90 linear bf16 8x1x6 any": OUTSIDE,
    "3.6 sm_89 linear bf16 32x2x4 grid4_g64": OUTSIDE,
    "3.6 sm_90 linear bf16 16x1x6 grid4_g64": OUTSIDE,
    "3.6 sm_90 linear bf16 32x2x4 grid4_g64": OUTSIDE,
    "3.6 sm_90 experts_few bf16 8x1x6 pairs64 grid4_g64+grid8_g32+any": BESIDE,
    "3.8 sm_100 experts_few bf16 8x1x6 pairs64 grid4_g64": OUTSIDE,
    "3.8 sm_90 experts_few bf16 8x1x6 pairs64 grid4_g64+grid8_g32+any": OUTSIDE,
    "3.7 sm_89 linear bf16 32x2x4 grid4_g64": OUTSIDE,
    "3.7 sm_90 linear bf16 16x1x6 grid4_g64": OUTSIDE,
    "3.7 sm_100 linear bf16 32x2x4 grid4_g64": OUTSIDE,
    "3.7 sm_80 linear fp16 64x4x4 grid4_g64": OUTSIDE,
    "3.7 sm_80 experts_many bf16 16x1x6 grid4_g64": OUTSIDE,
    "3.7 sm_90 experts_few bf16 16x1x6 pairs64 grid4_g64": OUTSIDE,
    "3.7 sm_100 experts_few bf16 32x2x4 pairs64 grid4_g64": OUTSIDE,
    "3.7 sm_90 experts_few bf16 8x1x6 pairs64 grid4_g64+grid8_g32+any": OUTSIDE,
    "3.7 sm_90 attend_heads bf16 16x4x3 cache8": BYTES,
    "3.7 sm_90 attend_latents bf16 16x4x2 cache8": BYTES,
    "3.7 sm_90 attend_latents bf16 16x4x2 cache4": ROTARY,
    "3.7 sm_90 attend_latents bf16 16x4x2 cache3": ROTARY,
    "3.7 sm_90 attend_latents bf16 16x4x2 cache2": ROTARY,
    "3.7 sm_90 attend_latents bf16 16x4x2 masked cache4": ROTARY,
    "3.7 sm_90 attend_latents fp16 16x4x2 cache4": ROTARY,
    "3.7 sm_80 attend_latents bf16 16x4x2 cache4": ROTARY,
    "3.7 sm_89 attend_latents bf16 16x4x2 cache4": ROTARY,
    "3.7 sm_100 attend_latents bf16 16x4x2 cache4": ROTARY,
}


def rules_of(minor: str, case: Case) -> list[pytest.MarkDecorator]:
    """The xfail of a case whose kernel breaks a rule."""
    reason = BROKEN.get(f"{minor} {case}")
    return [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
