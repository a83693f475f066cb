"""Attention over a ``StaticStore``, by shapes that do not depend on its length.

To a compiler it is one operator, ``ciuic_hf::attend_static``. Where the kernel of :mod:`.fused` serves, that reads the
pages in place and torch operations the rest. Elsewhere tiles run over the pages and then over tail and new tokens; what
the counters exclude is hidden like any masked token. On a CPU the counter is read, so that pages nobody has written are
not; on a GPU it never leaves the device, tiles decode every page, and a CUDA graph can be replayed while a cache grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CHUNK, CacheFormats, cache_formats
from ciuic_hf.planning.tiles import TILE, LatentShape
from ciuic_hf.runtime.cache import static_fused
from ciuic_hf.runtime.cache.attention import Mask, Prepare, accumulate, compute_dtype
from ciuic_hf.runtime.cache.codes import rotate
from ciuic_hf.runtime.cache.encoding import decode, narrow_record
from ciuic_hf.runtime.cache.latent import UpProjection
from ciuic_hf.runtime.cache.static_store import StaticStore, can_be_read
from ciuic_hf.runtime.cache.store import History, Tile


@dataclass(frozen=True)
class StaticHistory:
    """What a step attends to: a store as it was before the step, and the step's own tokens.

    Appending to the store changes neither the packed bytes that count here nor the copies of all else.

    Attributes:
        records: of keys and of values, ``[pages, ...]``.
        addresses: of them, int64 ``[pages, parts]``; none where there are no pages that the kernel could read.
        packed, past: int64 ``[]`` on the device, tokens that are packed and in all, without the step's.
        recent: ``[B, H, T + t, D]`` and ``[B, H, T + t, E]``, the last T tokens before the step, then the step's t.
        tokens: t.
        capacity: the length of a mask, and of ``dense``.
    """

    records: tuple[list[Tensor], list[Tensor]]
    addresses: Tensor
    packed: Tensor
    past: Tensor
    recent: tuple[Tensor, Tensor]
    tokens: int
    capacity: int
    bits: int
    latent: bool

    @classmethod
    def of(cls, store: StaticStore, keys: Tensor, values: Tensor) -> StaticHistory:
        """Before ``keys`` and ``values`` are appended."""
        records = ([*store.records[0]], [*store.records[1]])
        recent, tokens = store.recent(keys, values), keys.shape[2]
        packed, past = store.packed.clone(), store.length.clone()
        return cls(
            records, store.addresses, packed, past, recent, tokens, store.capacity, store.bits, store.latent
        )

    @property
    def formats(self) -> CacheFormats:
        return cache_formats(self.bits, self.latent)

    @property
    def length(self) -> int:
        """Columns of the tiles: all pages, then the recent tokens. Their positions are those of ``positions``."""
        return self.paged + self.recent[0].shape[2]

    @property
    def paged(self) -> int:
        return self.records[0][0].shape[0] * CHUNK

    def positions(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Of columns from ``start`` on: which token of the sequence each is, and whether it is one."""
        columns = torch.arange(start, start + count, device=self.packed.device)
        if start < self.paged:
            return columns, columns < self.packed
        first = self.past - (self.recent[0].shape[2] - self.tokens)
        columns = columns - self.paged + first
        return columns, columns >= self.packed

    def tiles(self, dtype: torch.dtype, tokens: int) -> Iterator[Tile]:
        """Columns in order, about ``tokens`` at a time and never more than a page."""
        formats, group = self.formats, self.formats.group
        step = max(group, tokens // group * group)
        end = int(self.packed) if can_be_read(self.packed) else self.paged
        for start in range(0, end, CHUNK):
            stop = min(CHUNK, end - start)
            for first in range(0, stop, step):
                last = min(first + step, stop)
                keys, values = (
                    decode(
                        narrow_record(tuple(x[start // CHUNK] for x in record), CHUNK, first, last, fmt),
                        recent.shape[-1],
                        fmt,
                        dtype,
                    )
                    for record, recent, fmt in zip(
                        self.records, self.recent, (formats.keys, formats.values), strict=True
                    )
                )
                yield Tile(start + first, keys, values)
        for first in range(0, self.recent[0].shape[2], step):
            keys, values = (x[:, :, first : first + step].to(dtype) for x in self.recent)
            yield Tile(
                self.paged + first,
                rotate(keys) if formats.keys.rotates else keys,
                rotate(values) if formats.values.rotates else values,
            )

    def dense(self, which: int) -> Tensor:
        """All keys (0) or values (1) ``[B, H, capacity, D]`` as a static cache without bits has them."""
        out: Tensor = torch.ops.ciuic_hf.static_dense(*self._arguments(), self.capacity, which)
        return out

    def _arguments(self) -> tuple[object, ...]:
        return (
            *self.records, self.addresses, self.packed, self.past, *self.recent, self.tokens, self.bits, self.latent,
        )  # fmt: skip


class _StaticMask(Mask):
    """Hides columns that are no tokens and, without ``dense``, those after a query's own."""

    history: StaticHistory

    @classmethod
    def of(cls, history: StaticHistory, dense: Tensor | None) -> _StaticMask:
        out = cls(causal=False, dense=dense)
        object.__setattr__(out, "history", history)
        return out

    def apply(self, scores: Tensor, first: int, start: int, offset: int) -> Tensor:
        positions, seen = self.history.positions(start, scores.shape[-1])
        queries = scores.shape[-2]
        if self.dense is None:
            own = self.history.past + torch.arange(first, first + queries, device=seen.device)
            return scores.masked_fill(~(seen & (positions <= own[:, None])), float("-inf"))
        chosen = positions.clamp(0, self.dense.shape[-1] - 1)
        part = self.dense[:, :, first : first + queries].index_select(-1, chosen)
        one = part.shape[1] == 1
        part = part.unsqueeze(2) if one else part.unflatten(1, (scores.shape[1], scores.shape[2]))
        if part.dtype != torch.bool:
            return (scores + part).masked_fill(~seen, float("-inf"))
        return scores.masked_fill(~(part & seen), float("-inf"))


def attend_heads(query: Tensor, history: StaticHistory, scale: float, mask: Tensor | None) -> Tensor:
    """Attention with grouped heads.

    Args:
        query: ``[B, heads, Q, D]``.
        mask: ``[B or 1, heads or 1, Q, capacity]``, bool or added to the scores; None for a causal one.

    Returns:
        ``[B, heads, Q, E]`` in the dtype of the query.
    """
    arguments = history._arguments()
    out: Tensor = torch.ops.ciuic_hf.attend_static(query, None, *arguments, mask, scale)
    return out


def attend_latents(
    query: Tensor,
    history: StaticHistory,
    up: UpProjection,
    shape: LatentShape,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Attention to latents, absorbed; see ``runtime.cache.latent.attend_latent``."""
    nope, rotary = query.to(compute_dtype(query)).split([shape.nope, shape.rope], dim=-1)
    sums = torch.ops.ciuic_hf.attend_static(up.absorb(nope), rotary, *history._arguments(), mask, scale)
    return up.project(sums).to(query.dtype)


def attend_expanded(
    query: Tensor,
    history: StaticHistory,
    up: UpProjection,
    shape: LatentShape,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """The same for many queries: each tile is expanded. Not for a compiler."""
    dtype, formats = compute_dtype(query), history.formats
    nope, rotary = (query.to(dtype) * scale).split([shape.nope, shape.rope], dim=-1)

    def prepare(tile: Tile) -> tuple[tuple[Tensor, ...], Tensor]:
        latent = rotate(tile.keys) if formats.keys.rotates else tile.keys
        rope = rotate(tile.values) if formats.values.rotates else tile.values
        keys, values = up.expand(latent.to(query.dtype))
        return (keys.to(dtype), rope), values.to(dtype)

    batch, heads = query.shape[:2]
    tokens = TILE // (batch * heads * (shape.nope + shape.value))
    queries = (nope[:, :, None], rotary[:, :, None])
    out = _accumulate(history, tokens, prepare, queries, shape.value, mask)
    return out[:, :, 0].to(query.dtype)


@torch.library.custom_op("ciuic_hf::attend_static", mutates_args=())
def attend_static(
    query: Tensor,
    rotary: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    addresses: Tensor,
    packed: Tensor,
    past: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    tokens: int,
    bits: int,
    latent: bool,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Sums of values ``[B, heads, Q, E]`` in the dtype of the query; of latents, given ``rotary``, of the latents.

    Args:
        query: ``[B, heads, Q, D]``; of latents, times Wk: ``[B, heads, Q, rank]``.
        keys to latent: the attributes of a StaticHistory.
        mask: see ``attend_heads``.
    """
    capacity = 0 if mask is None else mask.shape[-1]
    recent = (recent_keys, recent_values)
    history = StaticHistory((keys, values), addresses, packed, past, recent, tokens, capacity, bits, latent)
    if static_fused.serves(query, history, mask, rotary is not None):
        return _fused(query, rotary, history, mask, scale).to(query.dtype)
    dtype, formats = compute_dtype(query), history.formats
    parts = [query.to(dtype) * scale] + ([] if rotary is None else [rotary.to(dtype) * scale])
    rotates = [formats.keys.rotates, formats.values.rotates]
    parts = [rotate(x) if turned else x for x, turned in zip(parts, rotates, strict=False)]
    cached = recent_keys.shape[1]
    queries = tuple(x.unflatten(1, (cached, -1)) for x in parts)
    per_token = query.shape[0] * cached * (recent_keys.shape[3] + recent_values.shape[3])
    width, prepare = _what_is_summed(history, rotary is not None)
    out = _accumulate(history, TILE // per_token, prepare, queries, width, mask)
    if rotates[1 if rotary is None else 0]:
        out = rotate(out)
    return out.flatten(1, 2).to(query.dtype)


def _fused(
    query: Tensor, rotary: Tensor | None, history: StaticHistory, mask: Tensor | None, scale: float
) -> Tensor:
    """float32 ``[B, heads, Q, E]``, by the kernel."""
    hidden = _StaticMask.of(history, mask)
    return static_fused.attend(
        query, rotary, history, mask, lambda scores: hidden.apply(scores, 0, history.paged, 0), scale
    )


def _accumulate(
    history: StaticHistory,
    tokens: int,
    prepare: Prepare,
    queries: tuple[Tensor, ...],
    width: int,
    mask: Tensor | None,
) -> Tensor:
    """``accumulate``, which reads tiles and length of any history."""
    hidden = _StaticMask.of(history, mask)
    return accumulate(cast(History, history), tokens, prepare, queries, width, hidden)


def _what_is_summed(history: StaticHistory, latents: bool) -> tuple[int, Prepare]:
    if latents:
        return history.recent[0].shape[3], lambda tile: ((tile.keys, tile.values), tile.keys)
    return history.recent[1].shape[3], lambda tile: ((tile.keys,), tile.values)


@attend_static.register_fake
def _attend_fake(
    query: Tensor,
    rotary: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    addresses: Tensor,
    packed: Tensor,
    past: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    tokens: int,
    bits: int,
    latent: bool,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    width = (recent_values if rotary is None else recent_keys).shape[3]
    return query.new_empty(*query.shape[:3], width)


@torch.library.custom_op("ciuic_hf::static_dense", mutates_args=())
def static_dense(
    keys: list[Tensor],
    values: list[Tensor],
    addresses: Tensor,
    packed: Tensor,
    past: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    tokens: int,
    bits: int,
    latent: bool,
    capacity: int,
    which: int,
) -> Tensor:
    """See ``StaticHistory.dense``; zero where no token is."""
    recent = (recent_keys, recent_values)
    history = StaticHistory((keys, values), addresses, packed, past, recent, tokens, capacity, bits, latent)
    fmt, newest = (history.formats.keys, history.formats.values)[which], recent[which]
    # One row more than there are tokens: for columns that are none.
    out = newest.new_zeros(*newest.shape[:2], capacity + 1, newest.shape[3])
    for tile in history.tiles(torch.float32, CHUNK):
        x = (tile.keys, tile.values)[which]
        positions, seen = history.positions(tile.start, x.shape[2])
        rows = torch.where(seen, positions, capacity)
        out.index_copy_(2, rows, (rotate(x) if fmt.rotates else x).to(out.dtype))
    # The newest are exact: their rotation there and back is not.
    positions, seen = history.positions(history.paged, newest.shape[2])
    out.index_copy_(2, torch.where(seen, positions, capacity), newest)
    return out[:, :, :capacity].contiguous()


@static_dense.register_fake
def _dense_fake(
    keys: list[Tensor],
    values: list[Tensor],
    addresses: Tensor,
    packed: Tensor,
    past: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    tokens: int,
    bits: int,
    latent: bool,
    capacity: int,
    which: int,
) -> Tensor:
    like = (recent_keys, recent_values)[which]
    return like.new_empty(*like.shape[:2], capacity, like.shape[3])
