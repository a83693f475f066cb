"""Device functions that read a block of any codec and size, some columns at a time.

For blocks at an edge, raw and sparse ones. Every element finds its own bytes, so this takes several times the
instructions of a grid's fast path; records are read byte by byte, as nothing about them is aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ciuic_kernels.codecs import raw16, sparse, zero
from ciuic_kernels.triton._blocks import ROWS, linear_term, scale_from_byte

RAW_BF16 = tl.constexpr(raw16.RAW_BF16.id)
RAW_FP16 = tl.constexpr(raw16.RAW_FP16.id)
ZERO = tl.constexpr(zero.ZERO.id)
SPARSE = tl.constexpr(sparse.FIRST_ID)
SPARSE_CAPACITIES = tl.constexpr(len(sparse.CAPACITIES))
SPARSE_UNIT = tl.constexpr(sparse.CAPACITY_UNIT)


@triton.jit
def plane_fields(record, base, p, row, col, rows, cols, mask):
    """Fields of ``p`` bits (0: none) at elements (row, col) of a plane of any block, int32."""
    width = tl.maximum(p, 1)
    words = (cols * width + 15) // 16
    span = 128 // width
    tile = col // span
    across = tl.maximum(1, tl.minimum(8, words - 8 * tile))  # 1 where the mask is not set
    inside = col - tile * span
    code = inside // across
    word = inside - code * across
    at = record + base + 2 * (rows * 8 * tile + row * across + word)
    low = tl.load(at, mask=mask & (p > 0), other=0).to(tl.int32)
    high = tl.load(at + 1, mask=mask & (p > 0), other=0).to(tl.int32)
    bit = 4 * (code % 4) + width * (code // 4)
    return ((low | (high << 8)) >> bit) & ((1 << p) - 1)


@triton.jit
def any_grid(record, codec, exponent, row, col, rows, cols, mask):
    """Elements (row, col) of any grid block, float32, exactly as the codec decodes them."""
    width = codec & 31
    span = codec & 96
    low_p = tl.where(width <= 3, 2, 4)
    high_p = width - low_p
    low_bytes = rows * 2 * ((cols * low_p + 15) // 16)
    high_bytes = rows * 2 * ((cols * high_p + 15) // 16)
    code = plane_fields(record, 0, low_p, row, col, rows, cols, mask)
    code = code | (plane_fields(record, low_bytes, high_p, row, col, rows, cols, mask) << low_p)
    at = record + low_bytes + high_bytes + row * ((cols + span - 1) // span) + col // span
    scale = scale_from_byte(tl.load(at, mask=mask, other=0).to(tl.int32), exponent)
    half = (1 << width) // 2
    t = (code - half).to(tl.float32) / half.to(tl.float32)
    return scale * (t * (t * t + any_linear_term(width)))


@triton.jit
def any_linear_term(width):
    """C0 of a width that is known at run time only."""
    c0 = tl.where(width == 2, linear_term(2), linear_term(3))
    c0 = tl.where(width == 4, linear_term(4), c0)
    c0 = tl.where(width == 5, linear_term(5), c0)
    c0 = tl.where(width == 6, linear_term(6), c0)
    return tl.where(width == 8, linear_term(8), c0)


@triton.jit
def any_raw(record, codec, row, col, cols, mask):
    """Elements (row, col) of a raw_bf16 or raw_fp16 block, float32."""
    at = record + 2 * (row * cols + col)
    low = tl.load(at, mask=mask, other=0).to(tl.int32)
    bits = low | (tl.load(at + 1, mask=mask, other=0).to(tl.int32) << 8)
    from_bf16 = (bits << 16).to(tl.float32, bitcast=True)
    from_fp16 = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(codec == RAW_BF16, from_bf16, from_fp16)


@triton.jit
def popcount(word, PLAIN: tl.constexpr):
    """Bits that are set in each int32."""
    if PLAIN:
        pairs = (word & 0x55555555) + ((word >> 1) & 0x55555555)
        nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        count = (nibbles & 0x0F0F0F0F) + ((nibbles >> 4) & 0x0F0F0F0F)
        return (count & 255) + ((count >> 8) & 255) + ((count >> 16) & 255) + ((count >> 24) & 255)
    else:
        return tl.inline_asm_elementwise(
            "popc.b32 $0,$1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def bitmap_word(record, row, first, rows, cols, SPAN: tl.constexpr):
    """Bits of columns ``first`` .. ``first + SPAN - 1`` of each row ``[R, 1]``, int32; SPAN is at most 16."""
    row_bytes = (cols + 7) // 8
    at = record + row * row_bytes + first // 8
    inside = row < rows
    word = tl.load(at, mask=inside & (first // 8 < row_bytes), other=0).to(tl.int32)
    if SPAN > 8:
        next_byte = tl.load(at + 1, mask=inside & (first // 8 + 1 < row_bytes), other=0).to(tl.int32)
        word = word | (next_byte << 8)
    return word & ((1 << tl.maximum(0, tl.minimum(SPAN, cols - first))) - 1)


@triton.jit
def numbers_at_rows(record, codec, row, rows, cols, PLAIN: tl.constexpr):
    """How many values a sparse block stores before each row ``[R, 1]``; 0 for other codecs."""
    before = row * 0
    if codec >= SPARSE:
        every = tl.arange(0, ROWS)[:, None]
        counts = every * 0
        for first in range(0, cols, 16):
            counts += popcount(bitmap_word(record, every, first, rows, cols, 16), PLAIN)
        earlier = tl.where(every < tl.trans(row), counts, 0)
        before = tl.sum(earlier, 0)[:, None]
    return before


@triton.jit
def sparse_field(plane, number, p, stored):
    """Codes of ``p`` bits (0: none) by number, int32; 0 where nothing is stored."""
    bit = number * p
    byte = tl.load(plane + bit // 8, mask=stored & (p > 0), other=0).to(tl.int32)
    return (byte >> (bit % 8)) & ((1 << p) - 1)


@triton.jit
def any_sparse(
    record, codec, exponent, row, first, rows, cols, before, SPAN: tl.constexpr, PLAIN: tl.constexpr
):
    """SPAN columns of a sparse block, float32 ``[R, SPAN]``, and how many values come before the next columns."""
    kind = codec - SPARSE
    place = kind // SPARSE_CAPACITIES
    width = place + 2 + (place == 5).to(tl.int32)
    capacity = (rows * cols * (kind % SPARSE_CAPACITIES + 1) + SPARSE_UNIT - 1) // SPARSE_UNIT
    low_p = tl.where(width <= 3, 2, 4)
    scales = record + rows * ((cols + 7) // 8)
    low = scales + rows
    high = low + (capacity * low_p + 7) // 8
    word = bitmap_word(record, row, first, rows, cols, SPAN)
    column = tl.arange(0, SPAN)[None, :]
    number = before + popcount(word & ((1 << column) - 1), PLAIN)
    stored = (((word >> column) & 1) != 0) & (number < capacity)
    code = sparse_field(low, number, low_p, stored)
    code = code | (sparse_field(high, number, width - low_p, stored) << low_p)
    scale = scale_from_byte(tl.load(scales + row, mask=row < rows, other=0).to(tl.int32), exponent)
    half = (1 << width) // 2
    t = (code - half).to(tl.float32) / half.to(tl.float32)
    values = tl.where(stored, scale * (t * (t * t + any_linear_term(width))), 0.0)
    return values, before + popcount(word, PLAIN)


@triton.jit
def any_values(
    record,
    codec,
    exponent,
    row,
    first,
    rows,
    cols,
    before,
    SPAN: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Columns ``first`` .. ``first + SPAN - 1`` of some rows of a block of any codec and size.

    Args:
        record: pointer to the record, uint8.
        row: int32 ``[R, 1]``.
        first: a multiple of SPAN, which is 16 at most if HAS_SPARSE.
        rows, cols: the size of the block.
        HAS_SPARSE: whether the block may be sparse; the others are read without that code.
        before: int32 ``[R, 1]``, ``numbers_at_rows`` for first = 0, then what the last call returned.

    Returns:
        float32 ``[R, SPAN]``, exactly as the codec decodes them, 0 outside the block; and the next ``before``.
    """
    column = first + tl.arange(0, SPAN)[None, :]
    mask = (row < rows) & (column < cols)
    if codec == ZERO:
        values = (row + column).to(tl.float32) * 0.0
    elif codec == RAW_BF16 or codec == RAW_FP16:
        values = any_raw(record, codec, row, column, cols, mask)
    elif HAS_SPARSE and codec >= SPARSE:
        values, before = any_sparse(record, codec, exponent, row, first, rows, cols, before, SPAN, PLAIN)
    else:
        values = any_grid(record, codec, exponent, row, column, rows, cols, mask)
    return tl.where(mask, values, 0.0), before
