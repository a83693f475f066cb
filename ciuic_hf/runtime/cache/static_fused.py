"""Few new tokens of a static cache on a GPU: the kernel of :mod:`.fused`, by counters that stay there.

Addresses are made when pages are allocated; how many tokens of each page count is computed from the counter at every
step, so that a CUDA graph can be replayed while the cache grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CHUNK
from ciuic_hf.runtime.cache import fused
from ciuic_hf.runtime.cache.encoding import Record
from ciuic_hf.runtime.cache.pages import PageTable
from ciuic_kernels.ops import page_addresses

if TYPE_CHECKING:
    from ciuic_hf.runtime.cache.static_attention import StaticHistory


def addresses_of(records: tuple[Record, Record]) -> Tensor:
    """int64 ``[pages, parts]`` on the device of the records ``[pages, ...]``; no pages where none have an address.

    That is so while a compiler traces, and where a page of some part is no multiple of 16 bytes (odd widths): tiles
    serve those caches.
    """
    parts = [part for record in records for part in record]
    aligned = all(part[:1].nbytes % 16 == 0 for part in parts)
    if torch.compiler.is_compiling() or not aligned or not parts[0].shape[0]:
        return parts[0].new_empty(0, len(parts), dtype=torch.int64)
    return page_addresses(parts, len(parts)).to(parts[0].device)


def serves(query: Tensor, history: StaticHistory, dense: Tensor | None, latent: bool) -> bool:
    """Whether the kernel does.

    Args:
        query: ``[B, heads, Q, any width]``.
        dense: ``[B or 1, heads or 1, Q, capacity]``, bool or added to the scores, or None for a causal mask.
    """
    if not history.addresses.shape[0]:
        return False
    choice = fused.choose_for(query, history.formats, history.recent, history.paged, dense, latent)
    return choice.launch is not None


def attend(
    query: Tensor,
    rope: Tensor | None,
    history: StaticHistory,
    dense: Tensor | None,
    hide: Callable[[Tensor], Tensor],
    scale: float,
) -> Tensor:
    """See ``fused.attend``; ``hide`` is of the recent tokens. Packed tokens are older than any query."""
    table = page_table(history.records, history.addresses, history.packed)
    seen = None if dense is None else dense[:, 0]
    step = fused.Step(history.formats, table, seen, history.recent, hide)
    return fused.attend(query, rope, step, scale)


def page_table(records: tuple[list[Tensor], list[Tensor]], addresses: Tensor, packed: Tensor) -> PageTable:
    """Pages in order, each full before the next has a token; int64 ``packed`` ``[]`` is not read."""
    first = torch.arange(0, addresses.shape[0] * CHUNK, CHUNK, device=packed.device)
    tokens = (packed - first).clamp(0, CHUNK)
    rows = torch.stack([tokens, first, torch.full_like(first, CHUNK)], 1).to(torch.int32)
    used = torch.div(packed + (CHUNK - 1), CHUNK, rounding_mode="floor").to(torch.int32).view(1)
    return PageTable([*records[0], *records[1]], addresses, rows, used)
