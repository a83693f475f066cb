"""Device functions that read pages of a compressed cache (``cache_codes.py`` has the layout).

Eight codes are taken from one word of each plane, so that words of all widths have the same shape, and come out in
order: 32, 16 and 8 bits for planes of 4, 2 and 1. Of 8-bit codes a word of 32 bits has four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ciuic_kernels.cache_codes import LLOYD, NO_SCALE, PLANES, SCALE_OF_ONE, SCALES_PER_OCTAVE
from ciuic_kernels.triton import _cache_asm

_UNPACK = tl.constexpr({" ".join(map(str, map(int, key))): text for key, text in _cache_asm.UNPACK.items()})
_SCALE = tl.constexpr(_cache_asm.SCALE)
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
def unpack_text(bits, channels, half, scaled):
    return _UNPACK.value[f"{bits} {int(channels)} {int(half)} {int(scaled)}"]


@triton.constexpr_function
def codes_of_word(bits):
    """Codes that one word holds."""
    return 4 if bits == 8 else 8


@triton.jit
def part(addresses, page, NUMBER: tl.constexpr, PARTS: tl.constexpr):
    """Pointer to a part of a page, uint8."""
    at = tl.load(addresses + page * PARTS + NUMBER)
    return tl.multiple_of(at.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def load_plane(plane, row, word, pitch, mask, WIDTH: tl.constexpr):
    """Words of a plane of WIDTH bits, int32 ``[R, W]``; ``pitch`` is the bytes of a row."""
    if WIDTH >= 4:
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
def four_in_order(v0, v1, v2, v3):
    """Codes 0..3 of words ``[R, W]`` each, as ``[R, 4 W]``."""
    joined = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(joined, (v0.shape[0], v0.shape[1] * 4))


@triton.jit
def eight_in_order(v0, v1, v2, v3, v4, v5, v6, v7):
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
def plain(low, high, NUMBER: tl.constexpr, BITS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """Code NUMBER of each word as a value of DTYPE, by plain operations."""
    if BITS == 8:
        byte = (low >> (8 * NUMBER)) & 255
        if CHANNELS:
            return (byte - 128).to(tl.float32).to(DTYPE)
        else:
            return (byte - ((byte >> 7) << 8)).to(tl.float32).to(DTYPE)
    elif CHANNELS:
        return step(low, high, NUMBER, BITS, DTYPE)
    else:
        return lloyd(low, high, NUMBER, BITS, DTYPE)


@triton.jit
def unpack_plain(low, high, scale, BITS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """What ``unpack`` gives."""
    v0 = plain(low, high, 0, BITS, CHANNELS, DTYPE) * scale
    v1 = plain(low, high, 1, BITS, CHANNELS, DTYPE) * scale
    v2 = plain(low, high, 2, BITS, CHANNELS, DTYPE) * scale
    v3 = plain(low, high, 3, BITS, CHANNELS, DTYPE) * scale
    if BITS == 8:
        return four_in_order(v0, v1, v2, v3)
    else:
        v4 = plain(low, high, 4, BITS, CHANNELS, DTYPE) * scale
        v5 = plain(low, high, 5, BITS, CHANNELS, DTYPE) * scale
        v6 = plain(low, high, 6, BITS, CHANNELS, DTYPE) * scale
        v7 = plain(low, high, 7, BITS, CHANNELS, DTYPE) * scale
        return eight_in_order(v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def unpack(
    low,
    high,
    scale,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """All codes in order, ``[R, C]`` of DTYPE: less half their number by channel, by token levels.

    Args:
        scale: ``[R, W]`` of DTYPE, what the levels of each word are multiplied with; 1 if not SCALED.
    """
    if PLAIN:
        return unpack_plain(low, high, scale, BITS, CHANNELS, DTYPE)
    elif BITS == 8 and DTYPE == tl.float16:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            unpack_text(BITS, CHANNELS, True, SCALED), "=h,=h,=h,=h,r,r,h", [low, high, scale],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        return four_in_order(v0, v1, v2, v3)
    elif BITS == 8:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            unpack_text(BITS, CHANNELS, False, SCALED), "=h,=h,=h,=h,r,r,h", [low, high, scale],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
        return four_in_order(v0, v1, v2, v3)
    elif DTYPE == tl.float16:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            unpack_text(BITS, CHANNELS, True, SCALED), "=h,=h,=h,=h,=h,=h,=h,=h,r,r,h", [low, high, scale],
            dtype=(
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            ),
            is_pure=True, pack=1,
        )  # fmt: skip
        return eight_in_order(v0, v1, v2, v3, v4, v5, v6, v7)
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            unpack_text(BITS, CHANNELS, False, SCALED), "=h,=h,=h,=h,=h,=h,=h,=h,r,r,h", [low, high, scale],
            dtype=(
                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True, pack=1,
        )  # fmt: skip
        return eight_in_order(v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def settled(x, PLAIN: tl.constexpr):
    """``x [R, C]`` as it was computed.

    A reduction, here over one element, is where the compiler stops to carry the layout that a product wants backwards.
    Without it codes are unpacked in pieces, once for each operand; with it they go to shared memory once, 16 bytes at a
    time, and every product reads them there.
    """
    if PLAIN:
        return x
    else:
        return tl.reduce(tl.reshape(x, (x.shape[0], x.shape[1], 1)), 2, first_of)


@triton.jit
def scale_of(byte, PLAIN: tl.constexpr):
    """The float32 that a scale byte stands for."""
    if PLAIN:
        value = tl.exp2((byte.to(tl.int32) - _SCALE_OF_ONE).to(tl.float32) * (1.0 / _PER_OCTAVE))
    else:
        value = tl.inline_asm_elementwise(
            _SCALE, "=f,r", [byte.to(tl.int32)], dtype=tl.float32, is_pure=True, pack=1
        )
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
    inside = word < units * (GROUP // PER_WORD)  # codes past the tokens are read as well: copies stay wide
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
    factor = scale_of(tl.load(part(addresses, page, SCALE, PARTS) + at, mask=known, other=0), PLAIN)
    lows = part(addresses, page, SCALE + 1, PARTS).to(tl.pointer_type(tl.float16))
    middle = tl.load(lows + at, mask=known, other=0.0).to(tl.float32) + (1 << (BITS - 1)) * factor
    one = tl.full(low.shape, 1.0, DTYPE)
    codes = unpack(low, high, one, BITS, True, False, DTYPE, PLAIN)
    return codes, settled(factor, PLAIN), settled(middle, PLAIN)


@triton.jit
def shifted(codes, factor, middle, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """What ``load_channels`` gives, decoded: ``[D, T]`` of DTYPE."""
    D: tl.constexpr = codes.shape[0]
    T: tl.constexpr = codes.shape[1]
    GROUPS: tl.constexpr = factor.shape[1]
    grouped = tl.reshape(codes, (D, GROUPS, T // GROUPS))
    decoded = (grouped * factor[:, :, None] + middle[:, :, None]).to(DTYPE)
    return settled(tl.reshape(decoded, (D, T)), PLAIN)


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
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """What is stored by token: levels ``[T, BLOCK]`` of DTYPE, times their scales with SCALED, and these, float32, by
    groups of channels ``[T, G]``.

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
    base = part(addresses, page, FIRST + planes_of(BITS), PARTS) + head * capacity * COUNT
    scales = load_scales(base, token[:, None] * COUNT, read[:, None], COUNT, GROUPS, PLAIN)
    WORDS: tl.constexpr = BLOCK // PER_WORD // GROUPS
    SHAPE: tl.constexpr = (low.shape[0], GROUPS, WORDS)
    if SCALED:
        of_word = tl.broadcast_to(scales.to(DTYPE)[:, :, None], SHAPE)
    else:
        of_word = tl.full(SHAPE, 1.0, DTYPE)
    of_word = tl.reshape(of_word, (low.shape[0], low.shape[1]))
    return settled(unpack(low, high, of_word, BITS, False, SCALED, DTYPE, PLAIN), PLAIN), scales


@triton.jit
def load_scales(base, at, read, COUNT: tl.constexpr, GROUPS: tl.constexpr, PLAIN: tl.constexpr):
    """float32 ``[T, GROUPS]`` of which COUNT are stored in a row, four bytes at once where rows are multiples of that.

    Args:
        at: int32 ``[T, 1]``, where rows start.
        read: bool ``[T, 1]``; scales of others are 0, whatever is stored.
    """
    if COUNT == GROUPS and COUNT % 4 == 0:
        word = tl.arange(0, COUNT // 4)[None, :]
        words = tl.load((base + at).to(tl.pointer_type(tl.int32)) + word, mask=read, other=0)
        bytes = tl.reshape(
            (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255, (at.shape[0], COUNT)
        )
        return settled(tl.where(read, scale_of(bytes, PLAIN), 0.0), PLAIN)
    else:
        group = tl.arange(0, GROUPS)[None, :]
        exists = read & (group < COUNT)
        bytes = tl.load(base + at + group, mask=exists, other=0)
        return settled(tl.where(exists, scale_of(bytes, PLAIN), 0.0), PLAIN)
