"""In how large pieces a prompt goes through a model, under a budget.

What a prompt needs beside its cache grows with the tokens that go in together. Large pieces are faster: every piece
decodes all weights once, and at a few thousand tokens that is lost among the products. So pieces are as large as they
can be without costing more than ``SHARE`` of the budget beyond the leanest ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.memory import Run, footprint

SMALLEST = 512
SHARE = 0.03
"""Of the budget. At 4 bits, 3 % of the memory are about an eighth of a bit a weight."""
AUTO, NONE = "auto", "none"


def check_prefill_chunk(value: object) -> int | str:
    """Tokens, ``"auto"`` or ``"none"``. Raises CiuicError."""
    if value in (AUTO, NONE) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise CiuicError(f'prefill_chunk must be a positive number of tokens, "auto" or "none", got {value!r}.')


def candidates(context: int) -> list[int]:
    """Powers of two, the largest first: that one holds the whole context."""
    sizes = [SMALLEST]
    while sizes[0] < context:
        sizes.insert(0, 2 * sizes[0])
    return sizes


def leanest_run(config: Mapping[str, Any], context: int, batch: int, run: Run) -> Run:
    """With the pieces that need least, the largest of those where several do."""
    runs = [replace(run, prefill_chunk=size) for size in candidates(context)]
    return min(runs, key=lambda one: footprint(config, context, batch, one).total)


def fastest_run(config: Mapping[str, Any], memory: int, context: int, batch: int, run: Run) -> Run:
    """With the largest pieces that cost no more than ``SHARE`` of ``memory`` beyond the leanest.

    Args:
        config: a transformers config as a dictionary, of the language model.
        memory: bytes of the smallest device.
        context: tokens of a sequence, all of which the prompt may be.

    Raises:
        CiuicError: as :func:`ciuic_hf.planning.memory.footprint`.
    """
    least = footprint(config, context, batch, leanest_run(config, context, batch, run)).total
    for size in candidates(context):
        chosen = replace(run, prefill_chunk=size)
        if footprint(config, context, batch, chosen).total <= least + SHARE * memory:
            return chosen
    raise AssertionError("the leanest is among them")
