"""Where the packed segments of a layer lie on the device, for the kernel that attends to them in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ciuic_kernels.ops import page_addresses


class Packed(Protocol):
    """What a table is made of: a segment of the store."""

    @property
    def keys(self) -> tuple[Tensor, ...]: ...
    @property
    def values(self) -> tuple[Tensor, ...]: ...
    @property
    def capacity(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class PageTable(NamedTuple):
    """Arguments of ``ciuic::attend_packed``.

    Attributes:
        records: parts of all pages, in order.
        addresses: int64 ``[pages, parts]``.
        pages: int32 ``[pages, 3]``: tokens, position of the first, capacity.
        used: int32 ``[1]``, how many pages there are.
    """

    records: list[Tensor]
    addresses: Tensor
    pages: Tensor
    used: Tensor


class PageTables:
    """Keeps the table of the segments that were asked for last: they change when a group is packed, not every step."""

    def __init__(self) -> None:
        self._segments: list[Packed] = []
        self._table: PageTable | None = None

    def of(self, segments: Sequence[Packed]) -> PageTable:
        """The table of these segments, one at least."""
        same = len(segments) == len(self._segments) and all(
            a is b for a, b in zip(segments, self._segments, strict=True)
        )
        if self._table is None or not same:
            self._segments, self._table = list(segments), _table(segments)
        return self._table

    def clear(self) -> None:
        """Let go of segments that are no longer cached."""
        self._segments, self._table = [], None


def _table(segments: Sequence[Packed]) -> PageTable:
    device = segments[0].keys[0].device
    records = [part for segment in segments for part in (*segment.keys, *segment.values)]
    rows, position = [], 0
    for segment in segments:
        rows.append((segment.tokens, position, segment.capacity))
        position += segment.tokens
    parts = len(records) // len(segments)
    return PageTable(
        records,
        page_addresses(records, parts).to(device, non_blocking=True),
        torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor([len(segments)], dtype=torch.int32).to(device, non_blocking=True),
    )
