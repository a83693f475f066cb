"""Rows of a compressed table.

Grid: one program of one warp for each id and block of 128 columns. Traffic: the bytes of those rows, a row of a tile
being 16 of them. Values are the reference's bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.triton._any import any_values, numbers_at_rows
from ciuic_kernels.triton._blocks import COLS, ROWS, interpreted, load_block_entry
from ciuic_kernels.triton._launch import start
from ciuic_kernels.triton._product import ANY_COLS, ANY_SPARSE
from ciuic_kernels.work import WorkShape


@triton.jit
def embedding_kernel(ids, arena, work, out, n, k, kblocks, HAS_SPARSE: tl.constexpr, PLAIN: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    wanted = tl.load(ids + token)
    inside = (wanted >= 0) & (wanted < n)
    row_of_table = tl.where(inside, wanted, 0).to(tl.int32)
    strip = row_of_table // ROWS
    entry = strip.to(tl.int64) * kblocks + tl.program_id(1)
    offset, codec, exponent, kblock = load_block_entry(work, entry)
    record = arena + offset * 16
    rows = tl.minimum(ROWS, n - strip * ROWS)
    cols = tl.minimum(COLS, k - kblock * COLS)
    row = tl.zeros((1, 1), tl.int32) + row_of_table % ROWS
    SPAN: tl.constexpr = ANY_COLS if HAS_SPARSE else COLS  # at once: bitmaps are read in words of 16 bits
    before = row * 0
    if HAS_SPARSE:
        before = numbers_at_rows(record, codec, row, rows, cols, PLAIN)
    for first in range(0, cols, SPAN):
        column = first + tl.arange(0, SPAN)[None, :]
        values, before = any_values(
            record, codec, exponent, row, first, rows, cols, before, SPAN, HAS_SPARSE, PLAIN
        )
        values = tl.where(inside, values, float("nan"))
        at = out + token * k + kblock * COLS + column
        tl.store(at, values.to(out.dtype.element_ty), mask=column < cols)


def embedding(
    *,
    ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``ids`` of a table ``[rows, cols]`` as ``[T, cols]`` of ``dtype``.

    Args:
        ids: int64 ``[T]``. An id outside the table gives a row of NaN: raising would need a synchronisation.
    """
    shape = WorkShape.of(work, tags)
    out = torch.empty(ids.numel(), cols, dtype=dtype, device=arena.device)
    if ids.numel():
        start(
            embedding_kernel, (ids.numel(), shape.kblocks),
            ids, arena, work, out, rows, cols, shape.kblocks, HAS_SPARSE=ANY_SPARSE.value in kinds,
            PLAIN=interpreted(), num_warps=1
        )  # fmt: skip
    return out
