"""``sparse<k>_d<D>``: k-bit cubic-grid codes for at most D 32nds of a block's weights; the others are zero.

For weights that were pruned: a bitmap says which weights are stored, one scale byte a row serves those of the row,
and a code means what it means in ``codecs/grid.py``. The capacity ``n = ceil(rows cols D / 32)`` is part of the
codec, so that a record's size follows from its tag. Blocks with fewer weights leave slots unused; of blocks with
more, the n of largest magnitude are stored (the first in row-major order among equals), and the rest is dropped.

Record of a block ``[rows, cols]``:

    bitmap     rows x ceil(cols / 8) bytes     bit c % 8 of byte c // 8 of a row is set when column c is stored
    scales     rows bytes                      as in grid.py
    plane 0    ceil(n p0 / 8) bytes            the low p0 bits of every code
    plane 1    ceil(n p1 / 8) bytes            the next p1 bits (k = 3, 5, 6 and 8 only)

Codes are in the order of the set bits, row by row: number i is in bits ``[i p, (i + 1) p)`` of a plane of p bits,
bit 0 being the lowest of the first byte. Bits past the last column, unused slots and the scales of empty rows are
written as zero. A reader ignores bits past the last column and takes stored weights from the n-th on for zero, so
that no bitmap leads it out of the record.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_kernels.codec import register_codec
from ciuic_kernels.codecs.grid import (
    PLANES,
    levels,
    nearest_codes,
    quantize_groups,
    roomy_exponents,
    scale_candidates,
    scale_values,
)
from ciuic_kernels.format import BLOCK_COLS, ceil_div

WIDTHS = (2, 3, 4, 5, 6, 8)
CAPACITIES = range(1, 21)
"""D, in 32nds of a block. Denser blocks save too little to be worth a bitmap (docs/adr/008)."""
CAPACITY_UNIT = 32
FIRST_ID = 128  # ids count up from here by width, then capacity


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """uint8 codes ``[B, n]`` below 2^width -> bytes ``[B, ceil(n * width / 8)]``, the first code lowest."""
    per_byte, nbytes = 8 // width, ceil_div(codes.shape[1] * width, 8)
    padded = torch.nn.functional.pad(codes, (0, per_byte * nbytes - codes.shape[1]))
    fields = padded.unflatten(1, (nbytes, per_byte))
    packed = fields[..., 0].clone()
    for j in range(1, per_byte):
        packed |= fields[..., j] << (j * width)
    return packed


def unpack_codes(packed: Tensor, width: int) -> Tensor:
    """The inverse of :func:`pack_codes`: bytes ``[..., W]`` -> uint8 codes ``[..., W * 8 / width]``."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(-2)


def largest(blocks: Tensor, count: int) -> Tensor:
    """bool like ``blocks`` ``[B, rows, cols]``: the ``count`` weights of largest magnitude, zeros never.

    Among equal magnitudes the first in row-major order are taken.
    """
    magnitudes = blocks.flatten(1).abs().view(torch.int32)  # ordered like the floats, subnormals included
    least = magnitudes.kthvalue(magnitudes.shape[1] + 1 - count, dim=1, keepdim=True).values
    above, equal = magnitudes > least, magnitudes == least
    room = count - above.sum(dim=1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=1) <= room))
    return (kept & (magnitudes > 0)).view_as(blocks)


@dataclass(frozen=True)
class SparseCodec:
    """See the module docstring. ``width`` is k, ``capacity`` is D."""

    width: int
    capacity: int

    @property
    def id(self) -> int:
        return FIRST_ID + len(CAPACITIES) * WIDTHS.index(self.width) + self.capacity - 1

    @property
    def name(self) -> str:
        return f"sparse{self.width}_d{self.capacity}"

    @property
    def bits(self) -> float:
        return 1 + 8 / BLOCK_COLS + self.width * self.capacity / CAPACITY_UNIT

    def slots(self, rows: int, cols: int) -> int:
        """How many weights of a block are stored at most; at least 1."""
        return ceil_div(rows * cols * self.capacity, CAPACITY_UNIT)

    def part_nbytes(self, rows: int, cols: int) -> list[int]:
        """Bytes of bitmap, scales and planes."""
        planes = [ceil_div(self.slots(rows, cols) * p, 8) for p in PLANES[self.width]]
        return [rows * ceil_div(cols, 8), rows, *planes]

    def record_nbytes(self, rows: int, cols: int) -> int:
        return sum(self.part_nbytes(rows, cols))

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = blocks.shape[1:]
        stored = largest(blocks, self.slots(rows, cols))
        # A row is one group. Zeros between its weights add nothing to the squared error of any scale.
        lone = torch.where(stored, blocks, 0.0)
        groups = torch.nn.functional.pad(lone, (0, BLOCK_COLS - cols)).unsqueeze(2)
        scales, codes, exponents = quantize_groups(groups, self.width)
        return self.pack_stored(scales[..., 0], codes[:, :, 0, :cols], stored), exponents

    def stored(self, importance: Tensor) -> Tensor:
        return largest(importance, self.slots(*importance.shape[1:]))

    def exponents(self, blocks: Tensor) -> Tensor:
        return roomy_exponents(blocks.unsqueeze(2), self.width)

    def scale_candidates(self, groups: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
        return scale_candidates(groups, exponents, self.width)

    def round(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_codes(ratios, self.width)

    def pack_stored(self, scales: Tensor, codes: Tensor, stored: Tensor) -> Tensor:
        slots = self._gather_codes(codes, stored)
        bitmap = torch.nn.functional.pad(stored.to(torch.uint8), (0, -stored.shape[2] % 8))
        scales = torch.where(stored.any(-1), scales, torch.zeros_like(scales))
        parts, shift = [pack_codes(bitmap.flatten(1), 1), scales], 0
        for width in PLANES[self.width]:
            parts.append(pack_codes((slots >> shift) & ((1 << width) - 1), width))
            shift += width
        return torch.cat(parts, dim=1)

    def _gather_codes(self, codes: Tensor, stored: Tensor) -> Tensor:
        """uint8 ``[B, n]``: the codes of the stored weights in row-major order, zeros behind them."""
        batch, rows, cols = stored.shape
        slots = torch.zeros(batch, self.slots(rows, cols), dtype=torch.uint8, device=codes.device)
        flat = stored.flatten(1)
        block, place = flat.nonzero(as_tuple=True)
        slots[block, flat.cumsum(dim=1)[block, place] - 1] = codes.flatten(1)[block, place]
        return slots

    def decode(self, records: Tensor, exponents: Tensor, rows: int, cols: int) -> Tensor:
        bitmap, scale_bytes, *planes = records.split(self.part_nbytes(rows, cols), dim=1)
        stored = unpack_codes(bitmap.unflatten(1, (rows, -1)), 1)[..., :cols].flatten(1)
        number = stored.cumsum(dim=1, dtype=torch.int32) - 1
        count, codes, shift = self.slots(rows, cols), torch.zeros_like(number), 0
        inside = number.clamp(0, count - 1).long()
        for width, plane in zip(PLANES[self.width], planes, strict=True):
            codes += unpack_codes(plane, width).gather(1, inside).to(torch.int32) << shift
            shift += width
        scales = scale_values(scale_bytes, exponents[:, None]).unsqueeze(-1)
        values = scales * levels(self.width).to(records.device)[codes].unflatten(1, (rows, cols))
        kept = (stored.bool() & (number < count)).unflatten(1, (rows, cols))
        return torch.where(kept, values, 0.0)


SPARSE = {(k, d): register_codec(SparseCodec(k, d)) for k in WIDTHS for d in CAPACITIES}


def sparse_codec_for(nnz: int, rows: int, cols: int, width: int) -> SparseCodec | None:
    """The smallest codec of a width that stores ``nnz`` weights of a block ``[rows, cols]``; None if none does.

    Raises:
        ValueError: for a width without a codec, or a count that the block cannot have.
    """
    if width not in WIDTHS:
        raise ValueError(f"Sparse codes have {', '.join(map(str, WIDTHS))} bits, got {width}.")
    if not 0 <= nnz <= rows * cols:
        raise ValueError(f"A block of {rows} x {cols} weights cannot have {nnz} that are not zero.")
    # ceil(size D / 32) >= nnz is the same as D > 32 (nnz - 1) / size.
    capacity = CAPACITY_UNIT * max(0, nnz - 1) // (rows * cols) + 1
    return SPARSE.get((width, capacity))
