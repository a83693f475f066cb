"""Device functions that read full blocks of a grid, the fast way.

A full block of k bits is k tiles of 1 KB, ``[64, 8]`` 16-bit words, and its scale bytes. Warps copy tiles to shared
memory in pieces of 16 bytes, load them as MMA operands and unpack there: no weight is stored again before it is
multiplied. ``PLAIN`` replaces the PTX by the same arithmetic in float32, for the interpreter and other devices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ciuic_kernels.codecs.grid import LINEAR, PLANES
from ciuic_kernels.triton import _asm

ROWS = tl.constexpr(64)
COLS = tl.constexpr(128)
GROUP_COLS = tl.constexpr(32)  # columns that one step unpacks: four codes of eight words
TILE_WORDS = tl.constexpr(64 * 8)

_UNPACK = tl.constexpr({f"{k} {g} {int(half)}": text for (k, g, half), text in _asm.UNPACK.items()})
_UNPACK_SCALED = tl.constexpr({f"{k} {part}": text for (k, part), text in _asm.UNPACK_SCALED.items()})
_SCALES = tl.constexpr({f"{b} {rows}": _asm.scales(b, rows) for b, rows in _asm.SCALE_FORMS})
_LINEAR = tl.constexpr(LINEAR)
_LOW_PLANE = tl.constexpr({k: planes[0] for k, planes in PLANES.items()})


def interpreted() -> bool:
    """Whether Triton interprets its kernels (TRITON_INTERPRET=1), where PTX is not to be had."""
    return bool(triton.knobs.runtime.interpret)


@triton.constexpr_function
def unpack_text(width, group, half):
    return _UNPACK.value[f"{width} {group} {int(half)}"]


@triton.constexpr_function
def unpack_scaled_text(width, part):
    return _UNPACK_SCALED.value[f"{width} {part}"]


@triton.constexpr_function
def scales_text(first_byte, rows):
    return _SCALES.value[f"{first_byte} {rows}"]


@triton.constexpr_function
def width_of(kind):
    return kind & 31


@triton.constexpr_function
def group_of(kind):
    return kind & 96


@triton.constexpr_function
def linear_term(width):
    return _LINEAR.value[width]


@triton.constexpr_function
def low_plane(width):
    return _LOW_PLANE.value[width]


@triton.jit
def load_words(tiles, TILE: tl.constexpr):
    """One tile of a full block: int16 ``[64, 8]``."""
    row = tl.arange(0, ROWS)
    word = tl.arange(0, 8)
    return tl.load(tiles + TILE * TILE_WORDS + row[:, None] * 8 + word[None, :])


@triton.jit
def load_planes(tiles, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """The words that hold 32 columns of a full block, of the low and the high plane (the low one if there is none)."""
    LOW: tl.constexpr = low_plane(WIDTH)
    low = load_words(tiles, GROUP * LOW // 4)
    if WIDTH > LOW:
        high = load_words(tiles, LOW + GROUP * (WIDTH - LOW) // 4)
    else:
        high = low
    return low, high


@triton.jit
def load_plane(tiles, offset, FIRST: tl.constexpr, BITS: tl.constexpr):
    """A plane of a full block in one load: int16 ``[64, 8]`` for each 32 columns, the same tile where it holds more.

    Args:
        tiles: pointer to the arena, int16.
        offset: of the block, in 16-byte units.
        FIRST: tiles before the plane.
    """
    row = tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, 8 * BITS)[None, :]
    words = tl.load(tiles + ((FIRST + word // 8) * TILE_WORDS + row * 8 + word % 8) + offset * 8)
    if BITS == 4:
        even, odd = tl.split(tl.permute(tl.reshape(words, (ROWS, 2, 2, 8)), (0, 1, 3, 2)))
        w0, w2 = tl.split(tl.permute(even, (0, 2, 1)))
        w1, w3 = tl.split(tl.permute(odd, (0, 2, 1)))
    elif BITS == 2:
        w0, w2 = tl.split(tl.permute(tl.reshape(words, (ROWS, 2, 8)), (0, 2, 1)))
        w1 = w0
        w3 = w2
    else:
        w0 = words
        w1 = words
        w2 = words
        w3 = words
    return w0, w1, w2, w3


@triton.jit
def plain_codes(low, high, WIDTH: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr):
    """Code N of each word as int32."""
    LOW: tl.constexpr = low_plane(WIDTH)
    HIGH: tl.constexpr = WIDTH - LOW
    code = (low.to(tl.int32) >> (4 * N + LOW * (GROUP % (4 // LOW)))) & ((1 << LOW) - 1)
    if HIGH > 0:
        above = (high.to(tl.int32) >> (4 * N + HIGH * (GROUP % (4 // HIGH)))) & ((1 << HIGH) - 1)
        code = code | (above << LOW)
    return code


@triton.jit
def plain_values(low, high, WIDTH: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr):
    """Code N of each word at scale 1, float32, exact."""
    HALF: tl.constexpr = 1 << (WIDTH - 1)
    C0: tl.constexpr = linear_term(WIDTH)
    t = (plain_codes(low, high, WIDTH, GROUP, N) - HALF).to(tl.float32) * (1.0 / HALF)
    return t * (t * t + C0)


@triton.jit
def in_order(v0, v1, v2, v3):
    """Codes 0..3 of eight words ``[64, 8]`` each, as 32 columns ``[64, 32]``; no instruction once compiled."""
    joined = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (ROWS, GROUP_COLS))


@triton.jit
def unpack_plain(low, high, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """32 columns at scale 1, float32 ``[64, 32]``."""
    return in_order(
        plain_values(low, high, WIDTH, GROUP, 0),
        plain_values(low, high, WIDTH, GROUP, 1),
        plain_values(low, high, WIDTH, GROUP, 2),
        plain_values(low, high, WIDTH, GROUP, 3),
    )


@triton.jit
def unpack(low, high, WIDTH: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """32 columns at scale 1 as MMA operand ``[64, 32]`` of DTYPE."""
    if PLAIN:
        return unpack_plain(low, high, WIDTH, GROUP).to(DTYPE)
    elif DTYPE == tl.float16:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            unpack_text(WIDTH, GROUP, True),
            "=r,=r,=r,=r,r,r",
            [low, high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return in_order(v0, v1, v2, v3)
    else:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            unpack_text(WIDTH, GROUP, False),
            "=r,=r,=r,=r,r,r",
            [low, high],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        return in_order(v0, v1, v2, v3)


@triton.jit
def unpack_scaled(
    low0,
    low1,
    high0,
    high1,
    scale0,
    scale1,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    DTYPE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """64 columns times their scales as MMA operand ``[64, 64]`` of DTYPE, which is bfloat16 unless PLAIN.

    Args:
        low0, low1, high0, high1: words of 32 columns each, of the low and the high plane.
        scale0, scale1: their scales, float32 ``[64, 1]``.
    """
    if PLAIN:
        left = unpack_plain(low0, high0, WIDTH, 2 * PART) * scale0
        right = unpack_plain(low1, high1, WIDTH, 2 * PART + 1) * scale1
    else:
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            unpack_scaled_text(WIDTH, PART),
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r",
            [low0, low1, high0, high1, upper_half(scale0), upper_half(scale1)],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=2,
        )
        left = in_order(a0, a1, a2, a3)
        right = in_order(b0, b1, b2, b3)
    joined = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(joined, (ROWS, 2 * GROUP_COLS)).to(DTYPE)


@triton.jit
def upper_half(scales):
    """float32 ``[64, 1]`` that bfloat16 holds -> their bits for each word, int16 ``[64, 8]``."""
    return tl.broadcast_to((scales.to(tl.int32, bitcast=True) >> 16).to(tl.int16), (ROWS, 8))


@triton.jit
def scale_from_byte(byte, exponent):
    """The float32 scale of a byte (int32, 0..255) in a block with this exponent."""
    return ((exponent << 23) + (byte << 18) + (byte << 31)).to(tl.float32, bitcast=True)


@triton.jit
def load_scale_words(record, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """The scale bytes of each row of a full block: int16 ``[64]`` in groups of 64 columns, int32 in groups of 32."""
    row = tl.arange(0, ROWS)
    at = record + WIDTH * (2 * TILE_WORDS)
    if SPAN == 64:
        return tl.load(at.to(tl.pointer_type(tl.int16)) + row)
    else:
        return tl.load(at.to(tl.pointer_type(tl.int32)) + row)


@triton.jit
def scales_of(words, exponent, BYTE: tl.constexpr, SPAN: tl.constexpr, PLAIN: tl.constexpr):
    """Scales float32 ``[64]`` of one group of columns."""
    if PLAIN:
        return scale_from_byte((words.to(tl.int32) >> (8 * BYTE)) & 255, exponent)
    elif SPAN == 64:
        return tl.inline_asm_elementwise(
            scales_text(BYTE, 2),
            "=r,=r,r,r,r",
            [words, exponent << 23],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            scales_text(BYTE, 1),
            "=r,r,r",
            [words, exponent << 23],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def load_scale_column(arena, offset, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """The scale bytes of each row like :func:`load_scale_words`, ``[64, 1]``.

    Args:
        offset: of the block in 16-byte units, int64 ``[1, 1]``.
    """
    row = tl.arange(0, ROWS)[:, None]
    if SPAN == 64:
        return tl.load(arena.to(tl.pointer_type(tl.uint16)) + (WIDTH * TILE_WORDS + row) + offset * 8)
    else:
        return tl.load(arena.to(tl.pointer_type(tl.int32)) + (WIDTH * TILE_WORDS // 2 + row) + offset * 4)


@triton.jit
def scale_column(words, exponent, BYTE: tl.constexpr, PLAIN: tl.constexpr):
    """Scales float32 ``[64, 1]`` of one group of columns; ``exponent [1, 1]``."""
    if PLAIN:
        return scale_from_byte((words.to(tl.int32) >> (8 * BYTE)) & 255, exponent)
    else:
        return tl.inline_asm_elementwise(
            scales_text(BYTE, 1),
            "=r,r,r",
            [words.to(tl.int32), tl.broadcast_to(exponent << 23, (ROWS, 1))],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def load_block_entry(blocks, index):
    """(offset in 16-byte units int64, codec, exponent, kblock) of one entry of a work table."""
    offset = tl.load(blocks + 2 * index).to(tl.int64)
    meta = tl.load(blocks + 2 * index + 1)
    return offset, meta & 255, (meta >> 8) & 255, meta >> 16
