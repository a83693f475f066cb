"""The inner loop of every product: one work item times a tile of tokens, accumulated in float32.

Weights are the left operand, so the 64 rows of a block lie along the long side of the MMA and 8 tokens suffice to
fill it. A group of columns is multiplied at scale 1; its scales meet the float32 sums, ``64 x tokens`` multiplications
instead of one for each weight, and no rounding. From 64 tokens on that is more than one for each pair of weights:
there, in bfloat16, which has the range for it, scales meet the weights (docs/adr/031).

A strip of several kinds has one loop for each. Each is a function that is called, not inlined, as passes of the
compiler take time quadratic in the size of a function (docs/adr/023). Functions that are called take and return
numbers only, so each leaves its sums in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ciuic_kernels.triton._any import any_values, numbers_at_rows
from ciuic_kernels.triton._blocks import (
    COLS,
    GROUP_COLS,
    ROWS,
    group_of,
    load_block_entry,
    load_plane,
    load_planes,
    load_scale_column,
    load_scale_words,
    low_plane,
    scale_column,
    scales_of,
    unpack,
    unpack_scaled,
    width_of,
)
from ciuic_kernels.work import ANY as _ANY_KIND
from ciuic_kernels.work import ANY_SPARSE as _ANY_SPARSE_KIND

ANY = tl.constexpr(_ANY_KIND)
ANY_SPARSE = tl.constexpr(_ANY_SPARSE_KIND)
ANY_COLS = tl.constexpr(16)  # the least that an MMA takes


@triton.constexpr_function
def scales_meet_weights(tokens, dtype, plain):
    """Whether it is weights that a tile of so many tokens multiplies by scales; interpreted, float16 may stand in."""
    return tokens >= 64 and (dtype == tl.bfloat16 or plain)


@triton.jit
def grid_block(
    total, arena, blocks, index, x_rows, KIND: tl.constexpr, BM: tl.constexpr, PLAIN: tl.constexpr
):
    """``total [64, BM]`` plus a full block times its 128 columns of x.

    Args:
        x_rows: pointers ``[1, BM]`` to the first column of each token, 16-bit floats.
    """
    WIDTH: tl.constexpr = width_of(KIND)
    SPAN: tl.constexpr = group_of(KIND)
    offset, _, exponent, kblock = load_block_entry(blocks, index)
    record = arena + offset * 16
    tiles = record.to(tl.pointer_type(tl.int16))
    words = load_scale_words(record, WIDTH, SPAN)
    column = tl.arange(0, GROUP_COLS)
    part = tl.zeros((ROWS, BM), tl.float32)
    for group in tl.static_range(4):
        low, high = load_planes(tiles, WIDTH, group)
        weights = unpack(low, high, WIDTH, group, x_rows.dtype.element_ty, PLAIN)
        x = tl.load(x_rows + (kblock * COLS + group * GROUP_COLS + column)[:, None])
        part = tl.dot(weights, x, part)
        if (group + 1) * GROUP_COLS % SPAN == 0:
            scales = scales_of(words, exponent, group * GROUP_COLS // SPAN, SPAN, PLAIN)
            total += part * scales[:, None]
            part = tl.zeros((ROWS, BM), tl.float32)
    return total


@triton.jit
def scaled_block(total, arena, entry, x_rows, KIND: tl.constexpr, BM: tl.constexpr, PLAIN: tl.constexpr):
    """The same with scales on the weights, 64 columns at a time: one chain of sums.

    What scales need of the block's table entry is loaded as a tensor, not as a number: the compiler moves a conversion
    of the operand's layout up to loads only (RemoveLayoutConversions), and so loads all words in the MMA's layout.

    Args:
        entry: pointer to the block's table entry.
    """
    WIDTH: tl.constexpr = width_of(KIND)
    SPAN: tl.constexpr = group_of(KIND)
    LOW: tl.constexpr = low_plane(WIDTH)
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    both = entry.to(tl.pointer_type(tl.int64))
    fields = tl.load(both)
    offset = fields.to(tl.int32).to(tl.int64)
    kblock = (fields >> 48).to(tl.int32)
    own = tl.load(both + tl.zeros((1, 1), tl.int32))
    exponent = ((own >> 32).to(tl.int32) >> 8) & 255
    column = tl.arange(0, COLS // 2)[:, None]
    x0 = tl.load(x_rows + (kblock * COLS + column))
    x1 = tl.load(x_rows + (kblock * COLS + COLS // 2 + column))
    tiles = arena.to(tl.pointer_type(tl.int16))
    l0, l1, l2, l3 = load_plane(tiles, offset, 0, LOW)
    if WIDTH > LOW:
        h0, h1, h2, h3 = load_plane(tiles, offset, LOW, WIDTH - LOW)
    else:
        h0, h1, h2, h3 = l0, l1, l2, l3
    words = load_scale_column(arena, own.to(tl.int32).to(tl.int64), WIDTH, SPAN)
    s0 = scale_column(words, exponent, 0, PLAIN)
    s1 = scale_column(words, exponent, 32 // SPAN, PLAIN)
    total = tl.dot(unpack_scaled(l0, l1, h0, h1, s0, s1, WIDTH, 0, DTYPE, PLAIN), x0, total)
    s2 = scale_column(words, exponent, 64 // SPAN, PLAIN)
    s3 = scale_column(words, exponent, 96 // SPAN, PLAIN)
    return tl.dot(unpack_scaled(l2, l3, h2, h3, s2, s3, WIDTH, 1, DTYPE, PLAIN), x1, total)


@triton.jit
def any_block(
    total,
    arena,
    blocks,
    index,
    x_rows,
    strip,
    n,
    k,
    BM: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The same for a block of any codec and size, few columns at a time: it needs many registers for each."""
    offset, codec, exponent, kblock = load_block_entry(blocks, index)
    record = arena + offset * 16
    rows = tl.minimum(ROWS, n - strip * ROWS)
    cols = tl.minimum(COLS, k - kblock * COLS)
    row = tl.arange(0, ROWS)[:, None]
    before = row * 0
    if IS_SPARSE:
        before = numbers_at_rows(record, codec, row, rows, cols, PLAIN)
    for first in range(0, cols, ANY_COLS):
        column = first + tl.arange(0, ANY_COLS)
        values, before = any_values(
            record, codec, exponent, row, first, rows, cols, before, ANY_COLS, IS_SPARSE, PLAIN
        )
        x = tl.load(x_rows + (kblock * COLS + column)[:, None], mask=(column < cols)[:, None], other=0.0)
        total = tl.dot(values.to(x.dtype), x, total)
    return total


@triton.jit
def add_blocks(
    total,
    arena,
    blocks,
    count,
    x_rows,
    strip,
    n,
    k,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """``total [64, BM]`` plus ``count`` neighbouring blocks of one kind times a tile of tokens.

    Args:
        blocks: pointer to the table entry of the first of them.
        x_rows: pointers ``[1, BM]`` to the first column of each token, 16-bit floats.
    """
    if KIND >= ANY_SPARSE:
        for index in range(0, count):
            total = any_block(total, arena, blocks, index, x_rows, strip, n, k, BM, KIND == ANY_SPARSE, PLAIN)
    elif scales_meet_weights(BM, x_rows.dtype.element_ty, PLAIN):
        for _ in tl.range(0, count, num_stages=STAGES):
            total = scaled_block(total, arena, blocks, x_rows, KIND, BM, PLAIN)
            blocks += 2
    else:
        for index in tl.range(0, count, num_stages=STAGES):
            total = grid_block(total, arena, blocks, index, x_rows, KIND, BM, PLAIN)
    return total


@triton.jit
def share_of_strip(work, matrix, strip, part, parts, items, strips, strips_at):
    """One of ``parts`` shares of a strip's items: (number of the strip's first item, begin and end of the share).

    Args:
        matrix: int64, which matrix of the parameter.
    """
    span = work + strips_at + 2 * (matrix * strips + strip)
    first_item = tl.load(span)
    number = tl.load(span + 1)
    return matrix * items + first_item, number * part // parts, number * (part + 1) // parts


@triton.jit
def part_of_strip(
    arena,
    work,
    matrix,
    strip,
    part,
    parts,
    x_rows,
    n,
    k,
    items,
    strips,
    items_at,
    strips_at,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One of ``parts`` shares of a strip whose items are of one kind, times a tile of tokens: float32 ``[64, BM]``."""
    base, begin, end = share_of_strip(work, matrix, strip, part, parts, items, strips, strips_at)
    total = tl.zeros((ROWS, BM), tl.float32)
    for i in range(begin, end):
        item = work + items_at + 3 * (base + i)
        kind = tl.load(item)
        first = work + 2 * tl.load(item + 1).to(tl.int64)
        count = tl.load(item + 2)
        if kind == KIND:  # the kernel was compiled for no other
            total = add_blocks(total, arena, first, count, x_rows, strip, n, k, KIND, BM, STAGES, PLAIN)
    return total


@triton.jit
def next_run(item, at, end, kind):
    """Items ``at`` to ``end`` that are of this kind, from ``at`` on: (their first block, their blocks, the item after).

    Args:
        item: pointer to the strip's first item; items are sorted by kind and their blocks lie side by side.
    """
    first = tl.load(item + 3 * at + 1, mask=at < end, other=0)
    count = at * 0
    same = tl.load(item + 3 * at, mask=at < end, other=-1) == kind
    while same:
        count += tl.load(item + 3 * at + 2)
        at += 1
        same = tl.load(item + 3 * at, mask=at < end, other=-1) == kind
    return first, count, at


@triton.jit
def tile_of(sums, BM: tl.constexpr):
    """Pointers ``[64, BM]`` to partial sums in a workspace."""
    return sums + tl.arange(0, ROWS)[:, None] * BM + tl.arange(0, BM)[None, :]


@triton.jit
def sum_of_parts(total, workspace, counter, slot, part, parts, BM: tl.constexpr, STORED: tl.constexpr):
    """Leave one part of a strip in the workspace; the last program of the strip gets the sum of all, and True.

    Args:
        workspace: float32 ``[slots, parts, 64, BM]``.
        counter: pointer to the strip's counter; zero again afterwards.
        slot: int64.
        STORED: whether the part is there already.
    """
    inside = tl.arange(0, ROWS)[:, None] * BM + tl.arange(0, BM)[None, :]
    sums = workspace + slot * parts * (ROWS * BM) + inside
    if not STORED:
        tl.store(sums + part * (ROWS * BM), total)
    tl.debug_barrier()  # every thread has stored before one says so
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = arrived == parts - 1
    if last:
        tl.store(counter, 0)
        total = tl.zeros((ROWS, BM), tl.float32)
        for other in range(0, parts):
            total += tl.load(sums + other * (ROWS * BM), cache_modifier=".cg")
    return total, last


@triton.jit
def store_rows(total, out, out_rows, valid, strip, n):
    """``total [64, BM]`` as 64 columns of rows of ``out [*, n]``.

    Args:
        out_rows: int ``[BM]``, which rows; ``valid [BM]``, whether they exist.
    """
    row = strip * ROWS + tl.arange(0, ROWS)
    at = out + out_rows[None, :].to(tl.int64) * n + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < n)[:, None] & valid[None, :])
