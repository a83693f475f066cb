"""Strips of a compressed matrix as dense rows.

Grid: one program of four warps for each block. Traffic: the records once, the result once. Values are computed in
float32 exactly as the codecs do and rounded once, so the result is the reference's bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.triton._any import any_values, numbers_at_rows
from ciuic_kernels.triton._blocks import (
    COLS,
    GROUP_COLS,
    ROWS,
    group_of,
    interpreted,
    load_block_entry,
    load_planes,
    load_scale_words,
    scale_from_byte,
    unpack_plain,
    width_of,
)
from ciuic_kernels.triton._launch import start
from ciuic_kernels.triton._product import ANY_COLS, ANY_SPARSE
from ciuic_kernels.work import WorkShape


@triton.jit
def dense_grid(record, exponent, out, stride, KIND: tl.constexpr):
    """A full block of a grid to ``out [64, 128]`` with rows ``stride`` apart."""
    WIDTH: tl.constexpr = width_of(KIND)
    SPAN: tl.constexpr = group_of(KIND)
    tiles = record.to(tl.pointer_type(tl.int16))
    words = load_scale_words(record, WIDTH, SPAN).to(tl.int32)
    at = out + tl.arange(0, ROWS)[:, None].to(tl.int64) * stride + tl.arange(0, GROUP_COLS)[None, :]
    for group in tl.static_range(4):
        low, high = load_planes(tiles, WIDTH, group)
        byte = (words >> (8 * (group * GROUP_COLS // SPAN))) & 255
        values = unpack_plain(low, high, WIDTH, group) * scale_from_byte(byte, exponent)[:, None]
        tl.store(at + group * GROUP_COLS, values.to(out.dtype.element_ty))


@triton.jit
def dense_any(
    record, codec, exponent, out, stride, rows, cols, HAS_SPARSE: tl.constexpr, PLAIN: tl.constexpr
):
    """A block of any codec and size, a few columns at a time."""
    row = tl.arange(0, ROWS)[:, None]
    before = row * 0
    if HAS_SPARSE:
        before = numbers_at_rows(record, codec, row, rows, cols, PLAIN)
    for first in range(0, cols, ANY_COLS):
        column = first + tl.arange(0, ANY_COLS)[None, :]
        values, before = any_values(
            record, codec, exponent, row, first, rows, cols, before, ANY_COLS, HAS_SPARSE, PLAIN
        )
        mask = (row < rows) & (column < cols)
        tl.store(out + row.to(tl.int64) * stride + column, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_block", "strips"])
def dequantize_kernel(
    arena,
    work,
    out,
    n,
    k,
    kblocks,
    first_block,
    strips,
    KINDS: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    offset, codec, exponent, kblock = load_block_entry(work, first_block + index)
    strip = ((first_block + index) // kblocks) % strips
    rows = tl.minimum(ROWS, n - strip * ROWS).to(tl.int32)
    cols = tl.minimum(COLS, k - kblock * COLS)
    record = arena + offset * 16
    corner = out + index // kblocks * ROWS * k + kblock * COLS
    full = (rows == ROWS) & (cols == COLS)
    done = False
    for i in tl.static_range(len(KINDS)):
        if KINDS[i] < ANY_SPARSE:
            if full & (codec == KINDS[i]):
                dense_grid(record, exponent, corner, k, KINDS[i])
                done = True
    if not done:
        dense_any(record, codec, exponent, corner, k, rows, cols, HAS_SPARSE, PLAIN)


def dequantize(
    *,
    arena: Tensor,
    tags: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
    strips: range,
    dtype: torch.dtype,
    matrix: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Some strips of one matrix as ``[rows of the strips, cols]`` of ``dtype``, each value rounded once from float32.

    Args:
        matrix: which matrix of the parameter.
        out: where to write them, contiguous; a new tensor when None.
    """
    shape = WorkShape.of(work, tags)
    height = min(rows, strips.stop * BLOCK_ROWS) - strips.start * BLOCK_ROWS
    if out is None:
        out = torch.empty(height, cols, dtype=dtype, device=arena.device)
    first_block = (matrix * shape.strips + strips.start) * shape.kblocks
    start(
        dequantize_kernel,
        (len(strips) * shape.kblocks,),
        arena,
        work,
        out,
        rows,
        cols,
        shape.kblocks,
        first_block,
        shape.strips,
        KINDS=tuple(kinds),
        HAS_SPARSE=ANY_SPARSE.value in kinds,
        PLAIN=interpreted(),
        num_warps=4,
    )
    return out
