"""Multi-head latent attention over a cache of latents (arXiv 2405.04434, section 2.1).

Keys and values of all heads are linear in the latent: ``k = Wk c``, ``v = Wv c``. With few queries they are moved to
the other side of the product, ``q k = (Wk^T q) c``, so that the latent itself is attended to and nothing is expanded.
With many queries that costs more than expanding a tile: an absorbed score and its sum take ``2 rank + rope`` products
for each query and token, an expanded one ``nope + rope + v``, and expanding ``rank (nope + v)`` for each token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ciuic_hf.planning.tiles import TILE, LatentShape
from ciuic_hf.runtime.cache import fused
from ciuic_hf.runtime.cache.attention import Mask, accumulate, compute_dtype
from ciuic_hf.runtime.cache.codes import rotate
from ciuic_hf.runtime.cache.store import History, Tile


class UpProjection(Protocol):
    """``Wk`` and ``Wv`` of all heads."""

    can_absorb: bool

    def absorb(self, query: Tensor) -> Tensor:
        """``[B, heads, Q, nope] -> [B, heads, Q, rank]``, times Wk."""

    def project(self, latent: Tensor) -> Tensor:
        """``[B, heads, Q, rank] -> [B, heads, Q, value]``, times Wv."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1, t, rank] -> [B, heads, t, nope]`` and ``[B, heads, t, value]``."""


def attend_latent(
    query: Tensor, history: History, up: UpProjection, shape: LatentShape, scale: float, mask: Mask
) -> Tensor:
    """Attention to latents.

    Args:
        query: ``[B, heads, Q, nope + rope]``.

    Returns:
        ``[B, heads, Q, value]`` in the dtype of the query.
    """
    dtype = compute_dtype(query)
    nope, rotary = (query.to(dtype) * scale).split([shape.nope, shape.rope], dim=-1)
    if up.can_absorb and fused.choose(query, history, mask, latent=True).launch is not None:
        absorbed, turned = up.absorb(nope).to(query.dtype), rotary.to(query.dtype)
        out = fused.attend(absorbed, turned, fused.Step.of(history, query.shape[2], mask), 1.0)
        return up.project(out.to(dtype)).to(query.dtype)
    if up.can_absorb and shape.absorbs(query.shape[2]):
        return _absorbed(nope, rotary, history, up, shape, mask).to(query.dtype)
    return _expanded(nope, rotary, history, up, shape, mask, query.dtype).to(query.dtype)


def _absorbed(
    nope: Tensor, rotary: Tensor, history: History, up: UpProjection, shape: LatentShape, mask: Mask
) -> Tensor:
    latent = up.absorb(nope)
    if history.formats.keys.rotates:
        latent = rotate(latent)
    if history.formats.values.rotates:
        rotary = rotate(rotary)
    tokens = TILE // (2 * nope.shape[0] * (shape.rank + shape.rope))
    queries = (latent[:, None], rotary[:, None])
    out = accumulate(
        history, tokens, lambda tile: ((tile.keys, tile.values), tile.keys), queries, shape.rank, mask
    )
    if history.formats.keys.rotates:
        out = rotate(out)
    return up.project(out[:, 0].to(nope.dtype))


def _expanded(
    nope: Tensor,
    rotary: Tensor,
    history: History,
    up: UpProjection,
    shape: LatentShape,
    mask: Mask,
    dtype: torch.dtype,
) -> Tensor:
    formats = history.formats

    def prepare(tile: Tile) -> tuple[tuple[Tensor, ...], Tensor]:
        latent = rotate(tile.keys) if formats.keys.rotates else tile.keys
        rope = rotate(tile.values) if formats.values.rotates else tile.values
        keys, values = up.expand(latent.to(dtype))
        return (keys.to(nope.dtype), rope), values.to(nope.dtype)

    batch, heads = nope.shape[:2]
    tokens = TILE // (batch * heads * (shape.nope + shape.value))
    queries = (nope[:, :, None], rotary[:, :, None])
    return accumulate(history, tokens, prepare, queries, shape.value, mask)[:, :, 0]
