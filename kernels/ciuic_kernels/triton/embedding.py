"""Rows of a compressed table.

Grid: one program of one warp for each id and block of 128 columns. Traffic: the bytes of those rows, a row of a tile
being 16 of them. Values are the reference's bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.triton._blocks import COLS, ROWS, any_values, load_block_entry
from ciuic_kernels.work import WorkShape


@triton.jit
def embedding_kernel(ids, arena, work, out, n, k, kblocks):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    inside = (row >= 0) & (row < n)
    strip = tl.where(inside, row, 0) // ROWS
    offset, codec, exponent, kblock = load_block_entry(work, strip * kblocks + tl.program_id(1))
    rows = tl.minimum(ROWS, n - strip * ROWS).to(tl.int32)
    cols = tl.minimum(COLS, k - kblock * COLS)
    column = tl.arange(0, COLS)[None, :]
    at = tl.zeros((1, COLS), tl.int32) + (tl.where(inside, row, 0) % ROWS).to(tl.int32)
    mask = column < cols
    values = any_values(arena + offset * 16, codec, exponent, at, column, rows, cols, mask)
    values = tl.where(inside, values, float("nan"))
    tl.store(out + token * k + kblock * COLS + column, values.to(out.dtype.element_ty), mask=mask)


def embedding(
    *, ids: Tensor, arena: Tensor, tags: Tensor, work: Tensor, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """Rows ``ids`` of a table ``[rows, cols]`` as ``[T, cols]`` of ``dtype``.

    Args:
        ids: int64 ``[T]``. An id outside the table gives a row of NaN: raising would need a synchronisation.
    """
    shape = WorkShape.of(work, tags)
    out = torch.empty(ids.numel(), cols, dtype=dtype, device=arena.device)
    if ids.numel():
        embedding_kernel[(ids.numel(), shape.kblocks)](
            ids, arena, work, out, rows, cols, shape.kblocks, num_warps=1
        )
    return out
