"""What one layer has cached in tensors that never move and never change their shape.

The bytes of a token are those of :mod:`ciuic_hf.runtime.cache.store`; only where they are, and who counts, differ:

    records  [pages, ...]        records of ``CHUNK`` tokens, for everything that can be packed within the capacity
    tails    [B, H, T, D]        the last T tokens as they came, the newest at the end; at most T are not packed
    length   int64 []            tokens in all, on the device
    packed   int64 []            how many of them are packed, on the device

Beside them, not counted in sizes, are the addresses of the pages: 40 to 56 bytes of each.

A step joins tail and new tokens, encodes the groups that may be due, and writes those that are. How many that is only
the device knows, so on a GPU the shapes are those of the most that can be, and a group that is not due writes back the
bytes that it finds: one token encodes one group. On a CPU the counters can be read, and only what is due is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.cache_formats import (
    CHUNK,
    TAIL,
    CacheFormats,
    ChannelFormat,
    Format,
    cache_formats,
    static_pages,
    static_tail,
)
from ciuic_hf.runtime.cache import fused
from ciuic_hf.runtime.cache.encoding import Record, empty_record, encode
from ciuic_hf.runtime.cache.static_fused import addresses_of


class StaticStore:
    """Room for ``capacity`` tokens of one layer; of MLA ``keys`` is the latent, ``values`` the rotary part.

    Args:
        bits, latent: of the formats.
        capacity: tokens.
        keys, values: ``[B, H, any, D]`` and ``[B, H, any, E]``, for shape, dtype and device.

    Attributes:
        addresses: int64 ``[pages, parts]``, see ``addresses_of``.
    """

    def __init__(self, bits: int, latent: bool, capacity: int, keys: Tensor, values: Tensor) -> None:
        self.bits, self.latent, self.capacity = bits, latent, capacity
        pages, tail = static_pages(self.formats, capacity), static_tail(self.formats)
        self.records = (
            _pages(keys, pages, self.formats.keys),
            _pages(values, pages, self.formats.values),
        )
        self.tails = tuple(x.new_zeros(*x.shape[:2], tail, x.shape[3]) for x in (keys, values))
        self.length, self.packed = (torch.zeros((), dtype=torch.int64, device=keys.device) for _ in range(2))
        self.addresses = addresses_of(self.records)
        if self.addresses.shape[0] and self.addresses.device.type == "cuda":
            fused.warm(self.formats, (keys, values))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "addresses"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose pages lie elsewhere."""
        self.__dict__.update(state)
        self.addresses = addresses_of(self.records)

    @property
    def formats(self) -> CacheFormats:
        return cache_formats(self.bits, self.latent)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is allocated but the addresses."""
        for record in self.records:
            yield from record
        yield from self.tails
        yield from (self.length, self.packed)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def recent(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The tails, then new tokens: ``[B, H, T + t, D]`` each."""
        return torch.cat([self.tails[0], keys], dim=2), torch.cat([self.tails[1], values], dim=2)

    def append(self, recent: tuple[Tensor, Tensor]) -> None:
        """Add the tokens of ``recent()``.

        Raises:
            CiuicError: on a CPU, where they are more than the capacity; elsewhere that is an assertion on the device.
        """
        torch.ops.ciuic_hf.static_append(
            [*self.records[0]], [*self.records[1]], [*self.tails], self.length, self.packed, *recent, self.bits,
            self.latent, self.capacity,
        )  # fmt: skip

    def clear(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens. Waits for the device.

        Raises:
            CiuicError: where that would leave a part of a packed group.
        """
        before, packed, group = int(self.length), int(self.packed), self.formats.group
        removed = before - length
        if removed <= 0:
            return
        kept = min(packed, length // group * group)
        if kept < length < packed:
            raise CiuicError(
                f"A static CiuicCache of {before} tokens cannot be cropped to {length}: {packed} are packed in groups "
                f"of {group}; crop to {packed} or more, to a multiple of {group}, or use a cache without max_cache_len."
            )
        for tail in self.tails:
            size = tail.shape[2]
            shifted = torch.zeros_like(tail)
            if removed < size:
                shifted[:, :, removed:] = tail[:, :, : size - removed]
            tail.copy_(shifted)
        self.length.fill_(length)
        self.packed.fill_(kept)

    def select(self, indices: Tensor) -> None:
        """Replace the sequences of the batch by others of it, as many as they are, in place."""
        for axis, parts in ((1, (*self.records[0], *self.records[1])), (0, self.tails)):
            for x in parts:
                x.copy_(x.index_select(axis, indices.to(x.device)))

    def map_batch(self, fn: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every tensor by ``fn(tensor, axis of the batch)``, which may have another batch."""
        keys, values = (tuple(fn(part, 1) for part in record) for record in self.records)
        self.records = (keys, values)
        self.tails = tuple(fn(tail, 0) for tail in self.tails)
        self.addresses = addresses_of(self.records)

    def move(self, device: torch.device | str) -> None:
        """Everything but the counters."""
        self.map_batch(lambda x, _: x.to(device, non_blocking=True))


def can_be_read(counter: Tensor) -> bool:
    """Whether the host reads a counter without waiting for a device."""
    return counter.device.type == "cpu"


def _pages(like: Tensor, pages: int, fmt: Format) -> Record:
    """Records of ``pages`` chunks, zero: what is decoded from bytes that were not written must be finite."""
    of_page = empty_record(like[:, :, :0], CHUNK, fmt)
    return tuple(part.new_zeros(pages, *part.shape) for part in of_page)


@torch.library.custom_op(
    "ciuic_hf::static_append", mutates_args=("keys", "values", "tails", "length", "packed")
)
def static_append(
    keys: list[Tensor],
    values: list[Tensor],
    tails: list[Tensor],
    length: Tensor,
    packed: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    bits: int,
    latent: bool,
    capacity: int,
) -> None:
    """See ``StaticStore.append``; the tensors are those of its attributes."""
    formats, room = cache_formats(bits, latent), tails[0].shape[2]
    tokens = recent_keys.shape[2] - room
    _check_capacity(length, tokens, capacity)
    group = formats.group
    due = torch.div((length - packed + tokens - TAIL).clamp(min=0), group, rounding_mode="floor")
    slots = keys[0].shape[0] * (CHUNK // group)
    groups = int(due) if can_be_read(due) else min((room + tokens - TAIL) // group, slots)
    for first in range(0, groups, CHUNK // group):
        which = torch.arange(first, min(first + CHUNK // group, groups), device=length.device)
        # Slots of groups that are not due wrap around, so that no two groups of a step share one.
        slot = (packed // group + which) % slots
        start = room - (length - packed) + which * group
        index = (start[:, None] + torch.arange(group, device=length.device)).flatten()
        index = index.clamp(max=room + tokens - 1)
        for record, x, fmt in ((keys, recent_keys, formats.keys), (values, recent_values, formats.values)):
            _write(record, encode(x.index_select(2, index), fmt), slot, which < due, fmt, group)
    for tail, x in zip(tails, (recent_keys, recent_values), strict=True):
        tail.copy_(x[:, :, tokens:])
    packed += due * group
    length += tokens


@static_append.register_fake
def _append_fake(
    keys: list[Tensor],
    values: list[Tensor],
    tails: list[Tensor],
    length: Tensor,
    packed: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    bits: int,
    latent: bool,
    capacity: int,
) -> None:
    return None


def _check_capacity(length: Tensor, tokens: int, capacity: int) -> None:
    advice = f"give max_cache_len (now {capacity}) room for prompt and new tokens."
    if can_be_read(length):
        if int(length) + tokens > capacity:
            raise CiuicError(
                f"{tokens} tokens after {int(length)} do not fit this static CiuicCache; {advice}"
            )
    else:
        torch._assert_async(length + tokens <= capacity, f"The static CiuicCache is full; {advice}")


def _write(
    record: list[Tensor], encoded: Record, slot: Tensor, wanted: Tensor, fmt: Format, group: int
) -> None:
    """Write groups ``encoded`` to their slots where they are ``wanted``; both are ``[groups]``."""
    per_page = CHUNK // group
    page, place = slot // per_page, slot % per_page
    for part, fresh in zip(record, encoded, strict=True):
        # [pages, groups of a page, B, H, ...] and [groups, B, H, ...]
        if isinstance(fmt, ChannelFormat):
            room = part.unflatten(-1, (per_page, -1)).movedim(-2, 1)
            fresh = fresh.unflatten(-1, (len(slot), -1)).movedim(-2, 0)
        else:
            room = part.unflatten(3, (per_page, group)).movedim(3, 1)
            fresh = fresh.unflatten(2, (len(slot), group)).movedim(2, 0)
        chosen = wanted.view(-1, *(1 for _ in fresh.shape[1:]))
        room[page, place] = torch.where(chosen, fresh, room[page, place])
