"""Device functions that read pages of a compressed cache (``cache_codes.py`` has the layout).

Eight codes are taken from one word of each plane, so that words of all widths have the same shape, and come out in
order: 32, 16 and 8 bits for planes of 4, 2 and 1. Bytes of 8-bit codes are words of one code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ciuic_kernels.cache_codes import LLOYD, NO_SCALE, PLANES, SCALE_OF_ONE, SCALES_PER_OCTAVE
from ciuic_kernels.triton import _cache_asm

_UNPACK = tl.constexpr({f"{b} {int(c)} {int(h)}": text for (b, c, h), text in _cache_asm.UNPACK.items()})
_PLANES = tl.constexpr(PLANES)
_LLOYD = tl.constexpr(LLOYD)
_NO_SCALE = tl.constexpr(NO_SCALE)
_SCALE_OF_ONE = tl.constexpr(SCALE_OF_ONE)
_PER_OCTAVE = tl.constexpr(SCALES_PER_OCTAVE)


@triton.constexpr_function
def planes_of(bits):
    return len(_PLANES.value[bits])


@triton.constexpr_function
def low_width(bits):
    return _PLANES.value[bits][0]


@triton.constexpr_function
def level(bits, index):
    return _LLOYD.value[bits][index]


@triton.constexpr_function
def unpack_text(bits, channels, half):
    return _UNPACK.value[f"{bits} {int(channels)} {int(half)}"]


@triton.constexpr_function
def codes_of_word(bits):
    """Codes that one word holds."""
    return 1 if bits == 8 else 8


@triton.jit
def part(addresses, page, NUMBER: tl.constexpr, PARTS: tl.constexpr):
    """Pointer to a part of a page, uint8."""
    at = tl.load(addresses + page * PARTS + NUMBER)
    return tl.multiple_of(at.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def load_plane(plane, row, word, pitch, mask, WIDTH: tl.constexpr):
    """Words of a plane of WIDTH bits, int32 ``[R, W]``; ``pitch`` is the bytes of a row."""
    if WIDTH == 4:
        at = (plane + row * pitch).to(tl.pointer_type(tl.int32)) + word
    elif WIDTH == 2:
        at = (plane + row * pitch).to(tl.pointer_type(tl.uint16)) + word
    else:
        at = plane + row * pitch + word
    return tl.load(at, mask=mask, other=0).to(tl.int32)


@triton.jit
def load_codes(
    addresses,
    page,
    head,
    row,
    rows,
    word,
    units,
    mask,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The words of low and high plane (the low one if there is none), int32 ``[R, W]``.

    Args:
        head: which ``[rows, ...]`` of the parts, int64.
        row: int32 ``[R, 1]``; ``word``: int32 ``[1, W]``.
        units: how many times UNIT codes, a multiple of 8, a row has.
        FIRST: the part that the low plane is.
    """
    LOW: tl.constexpr = low_width(BITS)
    pitch = units * (UNIT // 8 * LOW)
    base = part(addresses, page, FIRST, PARTS) + head * rows * pitch
    low = load_plane(base, row, word, pitch, mask, LOW)
    if planes_of(BITS) == 2:
        above = units * (UNIT // 8 * (BITS - LOW))
        base = part(addresses, page, FIRST + 1, PARTS) + head * rows * above
        high = load_plane(base, row, word, above, mask, BITS - LOW)
    else:
        high = low
    return low, high


@triton.jit
def code(low, high, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Code NUMBER of each word, int32."""
    LOW: tl.constexpr = low_width(BITS)
    value = (low >> (LOW * NUMBER)) & ((1 << LOW) - 1)
    if planes_of(BITS) == 2:
        HIGH: tl.constexpr = BITS - LOW
        value = value | (((high >> (HIGH * NUMBER)) & ((1 << HIGH) - 1)) << LOW)
    return value


@triton.jit
def in_order(v0, v1, v2, v3, v4, v5, v6, v7):
    """Codes 0..7 of words ``[R, W]`` each, as ``[R, 8 W]``."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    joined = tl.join(even, odd)
    return tl.reshape(joined, (v0.shape[0], v0.shape[1] * 8))


@triton.jit
def step(low, high, NUMBER: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of a channel less half their number, exact in DTYPE."""
    return (code(low, high, NUMBER, BITS) - (1 << (BITS - 1))).to(tl.float32).to(DTYPE)


@triton.jit
def lloyd(low, high, NUMBER: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of a token, rounded to DTYPE."""
    index = code(low, high, NUMBER, BITS)
    HALF: tl.constexpr = 1 << (BITS - 1)
    magnitude = index & (HALF - 1)
    value = tl.full(index.shape, level(BITS, 0), tl.float32)
    for i in tl.static_range(1, HALF):
        value = tl.where(magnitude == i, level(BITS, i), value)
    return tl.where(index >= HALF, -value, value).to(DTYPE)


@triton.jit
def unpack_plain(low, high, BITS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """Eight codes of each word by plain operations."""
    if CHANNELS:
        return in_order(
            step(low, high, 0, BITS, DTYPE), step(low, high, 1, BITS, DTYPE),
            step(low, high, 2, BITS, DTYPE), step(low, high, 3, BITS, DTYPE),
            step(low, high, 4, BITS, DTYPE), step(low, high, 5, BITS, DTYPE),
            step(low, high, 6, BITS, DTYPE), step(low, high, 7, BITS, DTYPE),
        )  # fmt: skip
    else:
        return in_order(
            lloyd(low, high, 0, BITS, DTYPE), lloyd(low, high, 1, BITS, DTYPE),
            lloyd(low, high, 2, BITS, DTYPE), lloyd(low, high, 3, BITS, DTYPE),
            lloyd(low, high, 4, BITS, DTYPE), lloyd(low, high, 5, BITS, DTYPE),
            lloyd(low, high, 6, BITS, DTYPE), lloyd(low, high, 7, BITS, DTYPE),
        )  # fmt: skip


@triton.jit
def unpack(low, high, BITS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """All codes in order, ``[R, C]`` of DTYPE: less half their number by channel, as levels by token."""
    if BITS == 8:
        if CHANNELS:
            return (low - 128).to(tl.float32).to(DTYPE)
        else:
            return (low - ((low >> 7) << 8)).to(tl.float32).to(DTYPE)
    elif PLAIN:
        return unpack_plain(low, high, BITS, CHANNELS, DTYPE)
    elif DTYPE == tl.float16:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            unpack_text(BITS, CHANNELS, True),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [low, high],
            dtype=(
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
            ),
            is_pure=True,
            pack=1,
        )
        return in_order(v0, v1, v2, v3, v4, v5, v6, v7)
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            unpack_text(BITS, CHANNELS, False),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [low, high],
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
            pack=1,
        )
        return in_order(v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def scale_of(byte):
    """The float32 that a scale byte stands for."""
    value = tl.exp2((byte.to(tl.int32) - _SCALE_OF_ONE).to(tl.float32) * (1.0 / _PER_OCTAVE))
    return tl.where(byte.to(tl.int32) == _NO_SCALE, float("nan"), value)


@triton.jit
def load_channels(
    addresses,
    page,
    head,
    channel,
    tile,
    tokens,
    capacity,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    T: tl.constexpr,
    DTYPE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """A tile of what is stored by channel: codes less half their number ``[D, T]`` of DTYPE, and of each group of
    tokens, float32 ``[D, G]``, the scale and what half the codes stand for.

    Args:
        channel: int32 ``[D]``, of which WIDTH exist.
        tile: which T tokens of the page, of which ``tokens`` count.
        FIRST: the part that the low plane is.
    """
    PER_WORD: tl.constexpr = codes_of_word(BITS)
    GROUPS: tl.constexpr = 1 if GROUP >= T else T // GROUP
    SCALE: tl.constexpr = FIRST + planes_of(BITS)
    units = capacity // GROUP
    exists = (channel < WIDTH)[:, None]
    word = tile * (T // PER_WORD) + tl.arange(0, T // PER_WORD)[None, :]
    inside = word * PER_WORD < units * GROUP  # codes past the tokens are read as well: copies stay wide
    low, high = load_codes(
        addresses,
        page,
        head,
        channel[:, None],
        WIDTH,
        word,
        units,
        exists & inside,
        FIRST,
        PARTS,
        BITS,
        GROUP,
    )
    group = tile * T // GROUP + tl.arange(0, GROUPS)[None, :]
    known = exists & (group * GROUP < tokens)
    at = (head * WIDTH + channel)[:, None] * units + group
    factor = scale_of(tl.load(part(addresses, page, SCALE, PARTS) + at, mask=known, other=0))
    lows = part(addresses, page, SCALE + 1, PARTS).to(tl.pointer_type(tl.float16))
    middle = tl.load(lows + at, mask=known, other=0.0).to(tl.float32) + (1 << (BITS - 1)) * factor
    return unpack(low, high, BITS, True, DTYPE, PLAIN), factor, middle


@triton.jit
def shifted(codes, factor, middle, DTYPE: tl.constexpr):
    """What ``load_channels`` gives, decoded: ``[D, T]`` of DTYPE."""
    D: tl.constexpr = codes.shape[0]
    T: tl.constexpr = codes.shape[1]
    GROUPS: tl.constexpr = factor.shape[1]
    grouped = tl.reshape(codes, (D, GROUPS, T // GROUPS))
    return tl.reshape((grouped * factor[:, :, None] + middle[:, :, None]).to(DTYPE), (D, T))


@triton.jit
def load_tokens(
    addresses,
    page,
    head,
    token,
    tokens,
    capacity,
    read,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """What is stored by token: levels ``[T, BLOCK]`` of DTYPE, and their scales by groups of channels ``[T, G]``.

    Args:
        token: int32 ``[T]``, of the page, of which ``tokens`` count.
        read: bool ``[T]``; the scales of others are 0, whatever is stored.
        FIRST: the part that the low plane is.
        WIDTH: channels; those up to BLOCK are any number.
    """
    PADDED: tl.constexpr = (WIDTH + 7) // 8 * 8
    PER_WORD: tl.constexpr = codes_of_word(BITS)
    GROUPS: tl.constexpr = 1 if GROUP >= BLOCK else BLOCK // GROUP
    COUNT: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    word = tl.arange(0, BLOCK // PER_WORD)[None, :]
    mask = (token < tokens)[:, None] & (word < PADDED // PER_WORD)
    low, high = load_codes(
        addresses, page, head, token[:, None], capacity, word, 1, mask, FIRST, PARTS, BITS, PADDED
    )
    group = tl.arange(0, GROUPS)[None, :]
    exists = read[:, None] & (group < COUNT)
    base = part(addresses, page, FIRST + planes_of(BITS), PARTS) + head * capacity * COUNT
    bytes = tl.load(base + token[:, None] * COUNT + group, mask=exists, other=0)
    return unpack(low, high, BITS, False, DTYPE, PLAIN), tl.where(exists, scale_of(bytes), 0.0)


@triton.jit
def scaled(values, scales, DTYPE: tl.constexpr):
    """``values [T, BLOCK]`` times the scales ``[T, G]`` of their groups of channels, in DTYPE."""
    TOKENS: tl.constexpr = values.shape[0]
    BLOCK: tl.constexpr = values.shape[1]
    GROUPS: tl.constexpr = scales.shape[1]
    grouped = tl.reshape(values, (TOKENS, GROUPS, BLOCK // GROUPS))
    return tl.reshape((grouped * scales[:, :, None]).to(DTYPE), (TOKENS, BLOCK))
