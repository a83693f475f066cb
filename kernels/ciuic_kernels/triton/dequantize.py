"""Strips of a compressed matrix as dense rows.

Grid: one program of four warps for each block. Traffic: the records once, the result once. Values are computed in
float32 exactly as the codecs do and rounded once, so the result is the reference's bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.triton._any import ZERO, any_linear_term, any_values, numbers_at_rows
from ciuic_kernels.triton._blocks import (
    COLS,
    ROWS,
    TILE_WORDS,
    interpreted,
    load_block_entry,
    scale_from_byte,
)
from ciuic_kernels.triton._launch import start
from ciuic_kernels.triton._product import ANY, ANY_COLS, ANY_SPARSE
from ciuic_kernels.work import WorkShape

STEP_ROWS = tl.constexpr(8)
FIRST_GRID = tl.constexpr(min(grid.id for grid in GRIDS.values()))
LAST_GRID = tl.constexpr(max(grid.id for grid in GRIDS.values()))


@triton.jit
def pairs_of_plane(plane, p, step, row, pair):
    """The words of a plane of ``p`` bits (0: none) that have the codes of each pair of columns: uint32 ``[8, 8, 64]``.

    Returns also where the code of the first column starts, uint32; that of the second is 16 bits higher.
    """
    log = p >> 1  # of 1, 2 and 4
    octet = pair // 4
    tile = (octet << log) >> 4
    at = plane + (tile * (TILE_WORDS // 2) + pair % 4 + row * 4)
    place = 4 * (octet % 4) + (((octet >> 2) & ((4 >> log) - 1)) << log)
    return tl.load(at + step * (STEP_ROWS * 4), mask=p > 0, other=0), place.to(tl.uint32)


@triton.jit
def rotated(words, right):
    """One instruction once compiled."""
    return (words >> (right & 31)) | (words << ((0 - right) & 31))


@triton.jit
def scales_of_pairs(at, exponent, span):
    """Scales of each pair of columns: float32 ``[8, 8, 64]``; a thread reads those of its eight columns once."""
    log = 5 + (span >> 6)  # of 32 and 64
    step = tl.arange(0, ROWS // STEP_ROWS)[:, None, None]
    row = tl.arange(0, STEP_ROWS)[None, :, None]
    octet = tl.arange(0, COLS // 8)[None, None, :]
    at += (octet >> (log - 3)) + (row << (7 - log))
    byte = tl.load(at + (step * STEP_ROWS << (7 - log)))
    scale = scale_from_byte(byte.to(tl.int32), exponent)[:, :, :, None]
    pairs = tl.broadcast_to(scale, (ROWS // STEP_ROWS, STEP_ROWS, COLS // 8, 4))
    return tl.reshape(pairs, (ROWS // STEP_ROWS, STEP_ROWS, COLS // 2))


@triton.jit
def value_of(field, magic, curve, scale):
    """What a code that fills ``field`` stands for, float32: every step but the last is exact."""
    number = (field | magic).to(tl.float32, bitcast=True)
    t = number - (magic.to(tl.float32, bitcast=True) + 1.0)
    return scale * (t * (t * t + curve))


@triton.jit
def dense_grid(record, codec, exponent, out, stride):
    """A full block of any grid to ``out [64, 128]`` with rows ``stride`` apart.

    A thread has eight columns of a row: it reads 16 bytes of each plane, takes one code from each word, and writes
    what it made of them at once, 16 lanes side by side a row.
    """
    width = codec & 31
    low_p = tl.where(width <= 3, 2, 4)
    step = tl.arange(0, ROWS // STEP_ROWS)[:, None, None]
    row = tl.arange(0, STEP_ROWS)[None, :, None]
    pair = tl.arange(0, COLS // 2)[None, None, :]
    scale = scales_of_pairs(record + width * (2 * TILE_WORDS), exponent, codec & 96)
    planes = record.to(tl.pointer_type(tl.uint32))
    low, low_place = pairs_of_plane(planes, low_p, step, row, pair)
    high, high_place = pairs_of_plane(planes + low_p * (TILE_WORDS // 2), width - low_p, step, row, pair)
    low = low >> low_place
    high = rotated(high, high_place - low_p.to(tl.uint32))
    below = ((1 << low_p) - 1).to(tl.uint32) * 0x10001
    codes = ((low ^ high) & below) ^ high  # bits of low where ``below`` is set
    whole = ((1 << width) - 1).to(tl.uint32)
    magic = ((127 + 24 - width) << 23).to(tl.uint32)
    curve = any_linear_term(width)
    first = value_of(codes & whole, magic, curve, scale)
    second = value_of((codes >> 16) & whole, magic, curve, scale)
    values = tl.reshape(tl.join(first, second), (ROWS // STEP_ROWS, STEP_ROWS, COLS))
    at = out + (row.to(tl.int64) * stride + tl.arange(0, COLS)[None, None, :])
    tl.store(at + step.to(tl.int64) * (STEP_ROWS * stride), values.to(out.dtype.element_ty))


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


@triton.jit
def dense_zero(out, stride, rows, cols):
    """An empty block."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLS)[None, :]
    values = tl.zeros((ROWS, COLS), out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * stride + column, values, mask=(row < rows) & (column < cols))


@triton.jit(do_not_specialize=["first_block", "first_strip"])
def dequantize_kernel(
    arena,
    work,
    out,
    n,
    k,
    kblocks,
    first_block,
    first_strip,
    HAS_ANY: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    index = tl.program_id(0)
    strip = index // kblocks
    offset, codec, exponent, kblock = load_block_entry(work, first_block + index.to(tl.int64))
    rows = tl.minimum(ROWS, n - (first_strip + strip) * ROWS)
    cols = tl.minimum(COLS, k - kblock * COLS)
    record = arena + offset * 16
    corner = out + strip.to(tl.int64) * ROWS * k + kblock * COLS
    if (rows == ROWS) & (cols == COLS) & (codec >= FIRST_GRID) & (codec <= LAST_GRID):
        dense_grid(record, codec, exponent, corner, k)
    elif codec == ZERO:
        dense_zero(corner, k, rows, cols)
    elif HAS_ANY:
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
        strips.start,
        HAS_ANY=any(kind in kinds for kind in (ANY.value, ANY_SPARSE.value)),
        HAS_SPARSE=ANY_SPARSE.value in kinds,
        PLAIN=interpreted(),
        num_warps=4,
    )
    return out
