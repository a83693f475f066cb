"""``ciuic plan --cache-bits auto``: how far a cache has to be compressed so that weights keep enough bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.cache import can_compress_cache
from ciuic_hf.hf.placing import TooSmallError
from ciuic_hf.hf.planner import Outlook, Request
from ciuic_hf.hf.source import Source
from ciuic_hf.planning.cache_formats import CACHE_BITS

ENOUGH_BITS = 4.0
"""Of a weight: below, quality falls faster than from a cache of fewer bits (docs/adr/028)."""


def choose_cache(source: Source, model: Any, request: Request) -> tuple[Outlook, str]:
    """The plan with the most cache bits that leaves weights ENOUGH_BITS, and a sentence that says so.

    Where none does, the one that leaves them most; of equals the one with more cache bits.

    Raises:
        TooSmallError: when nothing fits with any cache.
        CiuicError: without a memory.
    """
    if request.memory is None:
        raise CiuicError("--cache-bits auto fits a cache into a memory; add --gpu or --memory.")
    best: Outlook | None = None
    refused: TooSmallError | None = None
    for bits in (None, *(CACHE_BITS if can_compress_cache(model.config) else ())):
        try:
            outlook = Outlook(source, model, replace(request, cache_bits=bits))
        except TooSmallError as error:
            refused = error
            continue
        if outlook.choice.bits >= ENOUGH_BITS:
            return outlook, _told(outlook, f"the most that leave weights {ENOUGH_BITS:g} bits or more")
        if best is None or outlook.choice.bits > best.choice.bits:
            best = outlook
    if best is None:
        assert refused is not None
        raise refused
    return best, _told(best, f"no choice leaves weights {ENOUGH_BITS:g} bits, this one leaves most")


def _told(outlook: Outlook, why: str) -> str:
    bits = outlook.request.cache_bits
    return f"Cache chosen: {f'{bits} bits' if bits else 'in full'}, {why}."
