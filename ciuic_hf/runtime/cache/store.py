"""What one layer has cached: packed segments, then a tail in full precision.

A token is encoded once, when its group lies before the last ``TAIL`` tokens, and its bytes never change again. Segments
have room for ``CHUNK`` tokens and are filled in place, so appending copies no history. Cutting tokens off shortens the
last segment and seals it; its bytes stay as they are, and what comes next starts a segment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CHUNK, TAIL, CacheFormats, ChannelFormat, Format
from ciuic_hf.planning.tiles import tile_tokens
from ciuic_hf.runtime.cache.codes import rotate
from ciuic_hf.runtime.cache.encoding import Record, decode_into, empty_record, encode, narrow_record
from ciuic_hf.runtime.cache.pages import PageTable, PageTables


@dataclass(frozen=True)
class Segment:
    """Packed tokens.

    Attributes:
        keys, values: records with room for ``capacity`` tokens.
        tokens: how many of them count.
        sealed: that none may be added.
    """

    keys: Record
    values: Record
    capacity: int
    tokens: int = 0
    sealed: bool = False

    def map(self, fn: Callable[[Tensor], Tensor]) -> Segment:
        return replace(self, keys=tuple(map(fn, self.keys)), values=tuple(map(fn, self.values)))


class LayerStore:
    """Keys ``[B, H, t, D]`` and values ``[B, H, t, E]`` of one layer; of MLA the latent and the rotary part.

    Attributes:
        formats: how they are packed.
        segments: oldest first.
        tail: the newest keys and values, as they came; None before the first token.
    """

    def __init__(self, formats: CacheFormats) -> None:
        self.formats = formats
        self.segments: list[Segment] = []
        self.tail: tuple[Tensor, Tensor] | None = None
        self.tables = PageTables()

    @property
    def packed(self) -> int:
        """Tokens in segments."""
        return sum(segment.tokens for segment in self.segments)

    def __len__(self) -> int:
        return self.packed + (0 if self.tail is None else self.tail[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Everything that is allocated."""
        parts = [part for s in self.segments for part in (*s.keys, *s.values)]
        return sum(part.nbytes for part in [*parts, *(self.tail or ())])

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add ``t`` tokens; of earlier ones only the tail is touched."""
        if self.tail is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.tail, (keys, values), strict=True))
        group = self.formats.group
        stop = max(0, keys.shape[2] - TAIL) // group * group
        start = 0
        while start < stop:
            segment = self._open_segment(keys, values)
            count = min(stop - start, segment.capacity - segment.tokens)
            for record, x, fmt in self._both(segment, keys, values):
                room = narrow_record(record, segment.capacity, segment.tokens, segment.tokens + count, fmt)
                for part, encoded in zip(room, encode(x[:, :, start : start + count], fmt), strict=True):
                    part.copy_(encoded)
            self.segments[-1] = replace(segment, tokens=segment.tokens + count)
            start += count
        # Copies, so that a long prompt is not kept alive by the few tokens at its end.
        self.tail = (keys[:, :, stop:].clone(), values[:, :, stop:].clone())

    def _both(self, segment: Segment, keys: Tensor, values: Tensor) -> list[tuple[Record, Tensor, Format]]:
        formats = self.formats
        return [(segment.keys, keys, formats.keys), (segment.values, values, formats.values)]

    def _open_segment(self, keys: Tensor, values: Tensor) -> Segment:
        if not self.segments or self.segments[-1].sealed or self.segments[-1].tokens == CHUNK:
            records = (
                empty_record(keys, CHUNK, self.formats.keys),
                empty_record(values, CHUNK, self.formats.values),
            )
            self.segments.append(Segment(*records, CHUNK))
        return self.segments[-1]

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.tables.clear()
        packed = self.packed
        if self.tail is not None:
            kept = max(0, length - packed)
            self.tail = (self.tail[0][:, :, :kept].clone(), self.tail[1][:, :, :kept].clone())
        while self.segments and packed > length:
            last = self.segments.pop()
            packed -= last.tokens
            if packed < length:
                self.segments.append(self._cut(last, length - packed))
                return

    def _cut(self, segment: Segment, tokens: int) -> Segment:
        """A sealed copy of the first tokens of a segment, in whole groups of which the last is not used up."""
        capacity = -(-tokens // self.formats.group) * self.formats.group
        keys, values = (
            tuple(part.clone() for part in narrow_record(record, segment.capacity, 0, capacity, fmt))
            for record, fmt in ((segment.keys, self.formats.keys), (segment.values, self.formats.values))
        )
        return Segment(keys, values, capacity, tokens, sealed=True)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, such as by the same on another device or other sequences of the batch."""
        self.tables.clear()
        self.segments = [segment.map(fn) for segment in self.segments]
        if self.tail is not None:
            self.tail = (fn(self.tail[0]), fn(self.tail[1]))


@dataclass(frozen=True)
class Tile:
    """Consecutive tokens: keys ``[B, H, t, D]``, values ``[B, H, t, E]``, rotated where their format rotates."""

    start: int
    keys: Tensor
    values: Tensor


class History:
    """What a step attends to: what was cached before it, and its own tokens as they are.

    The packed part is read from the store's bytes as they were when this was made; appending does not change it.

    Attributes:
        formats: of the packed part.
        fresh: keys and values of this step.
        length: tokens in all.
    """

    def __init__(self, store: LayerStore, keys: Tensor, values: Tensor) -> None:
        self.formats = store.formats
        self.segments = list(store.segments)
        self.tail = store.tail
        self.fresh = (keys, values)
        self.past = len(store)
        self.length = self.past + keys.shape[2]
        self._tables = store.tables

    @property
    def packed(self) -> int:
        """Tokens in segments."""
        return sum(segment.tokens for segment in self.segments)

    def page_table(self) -> PageTable:
        """The segments as kernels find them."""
        return self._tables.of(self.segments)

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens after the packed ones, as they came."""
        if self.tail is None:
            return self.fresh
        return torch.cat([self.tail[0], self.fresh[0]], 2), torch.cat([self.tail[1], self.fresh[1]], 2)

    def tiles(self, dtype: torch.dtype, tokens: int) -> Iterator[Tile]:
        """All tokens in order, at most about ``tokens`` at a time; a tile is overwritten by the next one."""
        step = tile_tokens(tokens, self.formats.group)
        rooms = [
            _room(fresh, min(step, self.length), fmt, dtype)
            for fresh, fmt in zip(self.fresh, self._formats, strict=True)
        ]
        for start in range(0, self.length, step):
            count = min(step, self.length - start)
            keys, values = (room[:, :, :count] for room in rooms)
            self._fill(start, (keys, values))
            yield Tile(start, keys, values)

    @property
    def _formats(self) -> tuple[Format, Format]:
        return self.formats.keys, self.formats.values

    def _fill(self, start: int, out: tuple[Tensor, Tensor]) -> None:
        """Keys and values from token ``start`` on, as many as there is room for."""
        stop, position = start + out[0].shape[2], 0
        for segment in self.segments:
            first, last = max(start, position), min(stop, position + segment.tokens)
            if first < last:
                part = (x[:, :, first - start : last - start] for x in out)
                self._decode(segment, first - position, last - position, tuple(part))
            position += segment.tokens
        for dense in (self.tail, self.fresh):
            if dense is None:
                continue
            count = dense[0].shape[2]
            first, last = max(start, position), min(stop, position + count)
            if first < last:
                for x, fmt, room in zip(dense, self._formats, out, strict=True):
                    recent = x[:, :, first - position : last - position].to(room.dtype)
                    room[:, :, first - start : last - start] = rotate(recent) if fmt.rotates else recent
            position += count

    def _decode(self, segment: Segment, first: int, last: int, out: tuple[Tensor, ...]) -> None:
        group = self.formats.group
        begin, end = first // group * group, -(-last // group) * group
        whole = (begin, end) == (first, last)
        for record, fmt, room in zip((segment.keys, segment.values), self._formats, out, strict=True):
            part = narrow_record(record, segment.capacity, begin, end, fmt)
            target = room if whole else _room(room, end - begin, fmt, room.dtype)
            decode_into(part, fmt, target)
            if not whole:
                room.copy_(target[:, :, first - begin : last - begin])

    def dense(self, which: int) -> Tensor:
        """All keys (0) or values (1) ``[B, H, length, D]`` in the dtype of this step's, as a cache without bits has."""
        fresh = self.fresh[which]
        if self.past == 0:
            return fresh
        fmt = (self.formats.keys, self.formats.values)[which]
        out = fresh.new_empty(*fresh.shape[:2], self.length, fresh.shape[-1])
        for tile in self.tiles(torch.float32, CHUNK):
            x = (tile.keys, tile.values)[which]
            out[:, :, tile.start : tile.start + x.shape[2]] = rotate(x) if fmt.rotates else x
        out[:, :, self.past :] = fresh
        return out


def _room(like: Tensor, tokens: int, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Uninitialised ``[B, H, tokens, D]``, laid out as the format is decoded."""
    batch, heads, _, width = like.shape
    if isinstance(fmt, ChannelFormat):
        return like.new_empty(batch, heads, width, tokens, dtype=dtype).mT
    return like.new_empty(batch, heads, tokens, width, dtype=dtype)
