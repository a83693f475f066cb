"""Attention over a cache tile by tile.

Scores of one tile exist at a time; softmax is accumulated with a running maximum (Milakov and Gimelshein, arXiv
1805.02867). What is alive beside queries and result: a decoded tile of about ``TILE / 2`` elements and its scores, up
to ``TILE``, and the float32 sums of the queries. On a CPU everything is computed in float32,
elsewhere products are in the dtype of the queries and sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.planning.tiles import TILE
from ciuic_hf.runtime.cache import fused
from ciuic_hf.runtime.cache.codes import rotate
from ciuic_hf.runtime.cache.store import History, Tile

Prepare = Callable[[Tile], tuple[tuple[Tensor, ...], Tensor]]
"""A tile -> keys ``[B, H or 1, t, D_i]``, one for each kind of query, and values ``[B, H, t, E]``."""


@dataclass(frozen=True)
class Mask:
    """Which tokens a query sees.

    Attributes:
        causal: query i of n sees the first ``length - n + i + 1`` tokens of a history of ``length``.
        padding: bool ``[B, >= length]``, False for tokens that nobody sees.
        dense: ``[B or 1, heads or 1, Q, >= length]``, bool or added to the scores.
    """

    causal: bool = True
    padding: Tensor | None = None
    dense: Tensor | None = None

    def apply(self, scores: Tensor, first: int, start: int, offset: int) -> Tensor:
        """Scores ``[B, H, g, q, t]`` of queries from ``first`` and tokens from ``start`` on, hidden ones at -inf.

        Args:
            offset: the token that query 0 is.
        """
        queries, tokens = scores.shape[-2:]
        if self.causal and start + tokens - 1 > offset + first:
            rows = torch.arange(offset + first, offset + first + queries, device=scores.device)
            columns = torch.arange(start, start + tokens, device=scores.device)
            scores = scores.masked_fill(columns > rows[:, None], float("-inf"))
        if self.padding is not None:
            seen = self.padding[:, None, None, None, start : start + tokens]
            scores = scores.masked_fill(~seen, float("-inf"))
        if self.dense is not None:
            part = self.dense[:, :, first : first + queries, start : start + tokens]
            one = part.shape[1] == 1
            part = part.unsqueeze(2) if one else part.unflatten(1, (scores.shape[1], scores.shape[2]))
            hides = part.dtype == torch.bool
            scores = scores.masked_fill(~part, float("-inf")) if hides else scores + part
        return scores


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype of the products."""
    return torch.float32 if like.device.type == "cpu" else like.dtype


def accumulate(
    history: History, tokens: int, prepare: Prepare, queries: tuple[Tensor, ...], width: int, mask: Mask
) -> Tensor:
    """float32 ``[B, H, g, Q, width]``: softmax-weighted sums of values; zero for a query that sees nothing.

    Args:
        tokens: of a tile, about.
        prepare: gives keys and values of a tile.
        queries: ``[B, H, g, Q, D_i]`` of the dtype to compute in, scaled; the scores of all kinds are added.
        width: of a value.
    """
    rows, dtype, device = queries[0].shape[:-1], queries[0].dtype, queries[0].device
    top = torch.full((*rows, 1), torch.finfo(torch.float32).min, device=device)
    total, sums = torch.zeros(*rows, 1, device=device), torch.zeros(*rows, width, device=device)
    count = rows[-1]
    offset = history.length - count
    for tile in history.tiles(dtype, tokens):
        keys, values = prepare(tile)
        size = values.shape[2]
        step = max(1, TILE // (rows[:-1].numel() * size))
        for first in range(max(0, tile.start - offset) if mask.causal else 0, count, step):
            chosen = (..., slice(first, first + step), slice(None))
            scores = _scores([q[chosen] for q in queries], keys)
            scores = mask.apply(scores.float(), first, tile.start, offset)
            highest = torch.maximum(top[chosen], scores.amax(-1, keepdim=True))
            weights, fade = (scores - highest).exp_(), (top[chosen] - highest).exp_()
            total[chosen] = total[chosen] * fade + weights.sum(-1, keepdim=True)
            product = weights.to(dtype).flatten(2, 3) @ values
            sums[chosen] = sums[chosen] * fade + product.unflatten(2, weights.shape[2:4])
            top[chosen] = highest
        del keys, values  # before the next tile is expanded
    return sums.div_(total.clamp_(min=torch.finfo(torch.float32).tiny))


def _scores(queries: list[Tensor], keys: tuple[Tensor, ...]) -> Tensor:
    """``[B, H, g, q, t]``."""
    scores = queries[0].flatten(2, 3) @ keys[0].mT
    for q, k in zip(queries[1:], keys[1:], strict=True):
        scores += q.flatten(2, 3) @ k.mT
    return scores.unflatten(2, queries[0].shape[2:4])


def attend(query: Tensor, history: History, scale: float, mask: Mask) -> Tensor:
    """Attention with grouped heads.

    Args:
        query: ``[B, heads, Q, D]``; heads is a multiple of those of the cache.
        scale: of the scores.

    Returns:
        ``[B, heads, Q, E]`` in the dtype of the query.
    """
    if fused.choose(query, history, mask, latent=False).launch is not None:
        step = fused.Step.of(history, query.shape[2], mask)
        return fused.attend(query, None, step, scale).to(query.dtype)
    batch, heads, _, width = query.shape
    values_width = history.fresh[1].shape[-1]
    cached = history.fresh[0].shape[1]
    q = query.to(compute_dtype(query)) * scale
    if history.formats.keys.rotates:
        q = rotate(q)
    tokens = TILE // (2 * batch * cached * (width + values_width))
    grouped = q.unflatten(1, (cached, heads // cached))
    out = accumulate(
        history, tokens, lambda tile: ((tile.keys,), tile.values), (grouped,), values_width, mask
    )
    if history.formats.values.rotates:
        out = rotate(out)
    return out.flatten(1, 2).to(query.dtype)
