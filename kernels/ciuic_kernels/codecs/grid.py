"""``grid<k>_g<G>``: k-bit codes on a signed cubic grid with one scale byte for each group of G columns.

Value of a code ``q`` (0 .. 2^k-1) in a group with scale ``s``, all steps rounded to float32:

    t = (q - 2^(k-1)) / 2^(k-1)            in [-1, 1), exact
    w = s * (t * (a + t * t))

``a`` weighs the linear term against the cubic: the smaller it is, the finer are the steps near zero, where most
weights are. The outermost level is ``-(1 + a) s``. ``s`` carries a sign, chosen so that the element of largest
magnitude sits there, at t = -1: nothing is clipped, zero is exact, no zero-point is stored.

Record of a block ``[rows, cols]``, G columns a group, ``g = ceil(cols / G)``:

    plane 0    rows x W0 words of 16 bits     the low p0 bits of every code, W0 = ceil(cols * p0 / 16)
    plane 1    rows x W1 words of 16 bits     the other p1 bits, W1 = ceil(cols * p1 / 16); k = 3, 5, 6 and 8 only
    scales     rows x g bytes                 exponent e (bits 5-7), mantissa m (bits 1-4), sign (bit 0)

A plane of p bits is cut into tiles of 8 words a row (the last may have fewer), which are stored one after another:

    tile 0     rows x 8 words                 columns 0 .. 128/p - 1
    tile 1     rows x 8 words                 columns 128/p .. 2 * 128/p - 1, and so on

Words are little-endian. In a tile of V words a row, word w holds the codes of the tile's columns ``j V + w``, code j
in the bits from ``4 (j mod 4) + p (j div 4)`` on:

    bits    15 14 13 12  11 10  9  8   7  6  5  4   3  2  1  0
    p = 4   --- j=3 ---  --- j=2 ---   --- j=1 ---  --- j=0 ---
    p = 2   j=7   j=3    j=6   j=2     j=5   j=1    j=4   j=0
    p = 1   15 11  7  3  14 10  6  2   13  9  5  1  12  8  4  0

So a row of a tile is 16 bytes, one copy of a GPU thread; a shift puts one code of each of a register's two words at
the bottom of its nibble; and planes of 4, 2 and 1 bits have their codes in the same nibbles, so that joining two is
one bit-select. Bits past the last column are zero.

With the block's exponent byte X a scale byte S is the float32 with the bits ``(X << 23) + (S << 18) + (S << 31)``, of
which the last term leaves the sign: ``(1 + m / 16 + sign / 32) * 2^(X + e - 127)`` in magnitude. A negative scale has
its mantissa half a step higher, because then one multiplication of S by ``2^31 + 2^18`` puts all its parts in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ciuic_kernels.codec import register_codec
from ciuic_kernels.format import ceil_div

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
LINEAR: dict[int, float] = {2: 4.25, 3: 3.0, 4: 1.5, 5: 1.0, 6: 1.0, 8: 1.5}
"""a for each width: least KL on a trained LM (docs/adr/002); exact in bfloat16, and every level is in float32."""

SCALE_OFFSETS: dict[int, tuple[int, ...]] = {
    2: (0, -1, 1),
    3: (0, -1, 1, -2, 2),
    4: (0, -1, 1, -2, 2),
    5: (0, -1, 1),
    6: (0, -1, 1),
    8: (0,),
}
"""Scale bytes that the encoder tries, as steps from the smallest scale that clips nothing."""

HEADROOM = 4
"""Scale steps, a quarter of an octave, that a block's exponent leaves above its largest scale when the weights of its
later groups are still going to change (``rounding.py``)."""

GROUPS = (32, 64)
WORD_BITS, TILE_WORDS = 16, 8
MIN_EXPONENT, MAX_EXPONENT = 1, 244
"""Of blocks: ``2^(X - 119)``, more than the largest scale, times the outermost level of any width stays finite."""


@cache
def levels(bits: int) -> Tensor:
    """float32 ``[2^bits]``: the grid for scale 1. All steps of the formula are exact here."""
    half = 1 << (bits - 1)
    t = (torch.arange(2 * half, dtype=torch.float32, device="cpu") - half) / half
    return t * (LINEAR[bits] + t * t)


@cache
def thresholds(bits: int) -> Tensor:
    """float32 ``[2^bits - 1]``: midpoints between neighbouring levels; a code is how many are below the value."""
    grid = levels(bits)
    return (grid[1:] + grid[:-1]) * 0.5


def scale_values(codes: Tensor, exponents: Tensor) -> Tensor:
    """Scale bytes uint8 and block exponents uint8 (broadcastable) -> float32 scales."""
    byte = codes.to(torch.int32)
    return ((exponents.to(torch.int32) << 23) + (byte << 18) + (byte << 31)).view(torch.float32)


def tiles(cols: int, width: int) -> list[tuple[int, int]]:
    """``(first column, words a row)`` of every tile of a plane of ``width`` bits."""
    words, per_word = ceil_div(cols * width, WORD_BITS), WORD_BITS // width
    return [(w * per_word, min(TILE_WORDS, words - w)) for w in range(0, words, TILE_WORDS)]


@cache
def code_places(width: int) -> list[tuple[int, int]]:
    """``(byte, bit)`` where the j-th code of a word starts."""
    return [divmod(4 * (j % 4) + width * (j // 4), 8) for j in range(WORD_BITS // width)]


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """uint8 codes ``[..., rows, cols]`` below 2^width -> bytes ``[..., rows * 2 * ceil(cols * width / 16)]``."""
    places, parts = code_places(width), []
    for first, words in tiles(codes.shape[-1], width):
        tile = codes[..., first : first + len(places) * words]
        fields = torch.nn.functional.pad(tile, (0, len(places) * words - tile.shape[-1]))
        fields = fields.unflatten(-1, (len(places), words))
        packed = fields.new_zeros(*codes.shape[:-1], words, 2)
        for j, (byte, bit) in enumerate(places):
            packed[..., byte] |= fields[..., j, :] << bit
        parts.append(packed.flatten(-3))
    return torch.cat(parts, dim=-1)


def unpack_plane(plane: Tensor, width: int, rows: int, cols: int) -> Tensor:
    """The inverse of :func:`pack_plane`: bytes ``[..., W]`` -> uint8 codes ``[..., rows, cols]``."""
    places, parts, start = code_places(width), [], 0
    shifts = torch.tensor([bit for _, bit in places], dtype=torch.uint8, device=plane.device)[:, None]
    for _, words in tiles(cols, width):
        tile = plane[..., start : start + 2 * rows * words].unflatten(-1, (rows, words, 2))
        bytes_of_codes = torch.stack([tile[..., byte] for byte, _ in places], dim=-2)
        parts.append(((bytes_of_codes >> shifts) & ((1 << width) - 1)).flatten(-2))
        start += 2 * rows * words
    return torch.cat(parts, dim=-1)[..., :cols]


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two) in one fixed order, so that every device agrees bit for bit."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def quantize_groups(weights: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of least squared error for each group, and the codes of its weights.

    Args:
        weights: float32 ``[B, rows, groups, G]``, finite; G is a power of two, zeros after the last weight.

    Returns:
        scale bytes uint8 ``[B, rows, groups]``, codes uint8 like ``weights``, block exponents uint8 ``[B]``.
    """
    smallest, negative, exponents = _anchor(weights, bits)
    base = (exponents.to(torch.int32) << 4)[:, None, None]
    sign = negative.to(torch.uint8)
    grid = levels(bits).to(weights.device)
    bounds = thresholds(bits).to(weights.device)
    best_error = best_scale = best_codes = None
    for offset in SCALE_OFFSETS[bits]:
        scale_byte = ((smallest + offset - base).clamp(0, 127).to(torch.uint8) << 1) | sign
        scale = scale_values(scale_byte, exponents[:, None, None]).unsqueeze(-1)
        codes = torch.bucketize(weights * (1.0 / scale), bounds, out_int32=True)
        difference = weights - scale * grid[codes]
        error = tree_sum(difference * difference)
        if best_error is None or best_scale is None or best_codes is None:
            best_error, best_scale, best_codes = error, scale_byte, codes.to(torch.uint8)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale_byte, best_scale)
        best_codes = torch.where(better.unsqueeze(-1), codes.to(torch.uint8), best_codes)
    assert best_scale is not None and best_codes is not None
    return best_scale, best_codes, exponents


def _anchor(weights: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest unclipped scale index and sign of each group, exponent byte of each block."""
    index, negative = _smallest_scales(weights, bits)
    return index, negative, _exponents(index.amax(dim=(-2, -1)))


def _smallest_scales(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of groups ``[..., G]``: index of the smallest scale that clips nothing, int32, and whether it is negative."""
    high, low = weights.amax(-1), weights.amin(-1)
    negative = high > -low
    absmax = torch.maximum(high, -low)
    # A divisor on the device: CUDA multiplies by the reciprocal of a number, which rounds twice. abs() turns -0.0 to 0.
    least = absmax.abs() / absmax.new_full((), 1 + LINEAR[bits])
    # float32 bits >> 19 are exponent and 4 mantissa bits; adding 2^19 - 1 rounds up. Negative scales lie 2^18 higher.
    return (least.view(torch.int32) + ((1 << 19) - 1) - (negative.to(torch.int32) << 18)) >> 19, negative


def _exponents(top: Tensor) -> Tensor:
    """uint8: the exponent byte of a block by the index of its largest scale."""
    return ((top >> 4) - 7).clamp(MIN_EXPONENT, MAX_EXPONENT).to(torch.uint8)


def roomy_exponents(weights: Tensor, bits: int) -> Tensor:
    """uint8 ``[B]``: exponent bytes of blocks float32 ``[B, rows, groups, G]`` whose weights may still change."""
    index, _ = _smallest_scales(weights, bits)
    return _exponents(index.amax(dim=(-2, -1)) + HEADROOM)


def scale_candidates(groups: Tensor, exponents: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales to try for groups float32 ``[B, rows, G]``: their bytes uint8 and values float32 ``[C, B, rows]``."""
    index, negative = _smallest_scales(groups, bits)
    offsets = torch.tensor(SCALE_OFFSETS[bits], dtype=torch.int32, device=groups.device)
    steps = index + offsets.view(-1, 1, 1) - (exponents.to(torch.int32) << 4)[:, None]
    scale_bytes = (steps.clamp(0, 127).to(torch.uint8) << 1) | negative.to(torch.uint8)
    return scale_bytes, scale_values(scale_bytes, exponents[:, None])


def nearest_codes(ratios: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of weights divided by their scales: the codes, uint8, and what they stand for, float32."""
    codes = torch.bucketize(ratios, thresholds(bits).to(ratios.device), out_int32=True)
    return codes.to(torch.uint8), levels(bits).to(ratios.device)[codes]


@dataclass(frozen=True)
class GridCodec:
    """See the module docstring. ``width`` is k, ``group`` is G."""

    width: int
    group: int

    @property
    def id(self) -> int:
        return self.group + self.width

    @property
    def name(self) -> str:
        return f"grid{self.width}_g{self.group}"

    @property
    def bits(self) -> float:
        return self.width + 8 / self.group

    def plane_nbytes(self, rows: int, cols: int) -> list[int]:
        return [2 * rows * ceil_div(cols * p, WORD_BITS) for p in PLANES[self.width]]

    def record_nbytes(self, rows: int, cols: int) -> int:
        return sum(self.plane_nbytes(rows, cols)) + rows * ceil_div(cols, self.group)

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        scales, codes, exponents = quantize_groups(self._grouped(blocks), self.width)
        return self.pack(scales, codes.flatten(-2)[..., : blocks.shape[-1]]), exponents

    def _grouped(self, blocks: Tensor) -> Tensor:
        """``[B, rows, cols] -> [B, rows, groups, G]``, zeros after the last column."""
        groups = ceil_div(blocks.shape[-1], self.group)
        # contiguous: bucketize() copies and warns otherwise
        padded = torch.nn.functional.pad(blocks, (0, groups * self.group - blocks.shape[-1])).contiguous()
        return padded.unflatten(-1, (groups, self.group))

    def pack(self, scales: Tensor, codes: Tensor) -> Tensor:
        """Records of scale bytes uint8 ``[B, rows, groups]`` and codes uint8 ``[B, rows, cols]``."""
        parts, shift = [], 0
        for width in PLANES[self.width]:
            parts.append(pack_plane((codes >> shift) & ((1 << width) - 1), width))
            shift += width
        return torch.cat([*parts, scales.flatten(1)], dim=1)

    def exponents(self, blocks: Tensor) -> Tensor:
        return roomy_exponents(self._grouped(blocks), self.width)

    def scale_candidates(self, groups: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
        return scale_candidates(groups, exponents, self.width)

    def round(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_codes(ratios, self.width)

    def decode(self, records: Tensor, exponents: Tensor, rows: int, cols: int) -> Tensor:
        batch, groups = records.shape[0], ceil_div(cols, self.group)
        codes, start, shift = torch.zeros((), dtype=torch.int32, device=records.device), 0, 0
        for width, nbytes in zip(PLANES[self.width], self.plane_nbytes(rows, cols), strict=True):
            plane = unpack_plane(records[:, start : start + nbytes], width, rows, cols)
            codes = codes + (plane.to(torch.int32) << shift)
            start, shift = start + nbytes, shift + width
        scale_bytes = records[:, start : start + rows * groups].reshape(batch, rows, groups)
        scales = scale_values(scale_bytes, exponents[:, None, None])
        scales = scales.repeat_interleave(self.group, dim=-1)[..., :cols]
        return scales * levels(self.width).to(records.device)[codes]


GRIDS = {(k, g): register_codec(GridCodec(k, g)) for g in GROUPS for k in PLANES}
