"""``grid<k>_g<G>``: k-bit codes on a signed cubic grid with one scale byte for each group of G columns.

Value of a code ``q`` (0 .. 2^k-1) in a group with scale ``s``, all steps rounded to float32:

    t = (q - 2^(k-1)) / 2^(k-1)            in [-1, 1), exact
    w = s * (t * ((1 - c) + c * (t * t)))

``c`` bends the grid: steps are finer near zero, where most weights are. ``s`` carries a sign, chosen so that the
element of largest magnitude sits at t = -1: nothing is clipped, zero is exact, no zero-point is stored.

Record of a block ``[rows, cols]``, G columns a group, ``g = ceil(cols / G)``:

    plane 0    rows x ceil(cols * p0 / 8) bytes     the low p0 bits of every code
    plane 1    rows x ceil(cols * p1 / 8) bytes     the next p1 bits (k = 3, 5 and 6 only)
    scales     rows x g bytes                       sign (bit 7), exponent e (bits 4-6), mantissa m (bits 0-3)

A plane of p bits keeps ``W = ceil(cols * p / 8)`` bytes a row; byte w holds the codes of columns ``j * W + w`` in
its bits ``[j * p, (j + 1) * p)``, so that unpacking a row is a shift and a mask of contiguous bytes. Bits past
the last column are zero. With the block's exponent byte X a scale is ``(1 + m / 16) * 2^(X + e - 127)``, which as
float32 is the bit pattern ``(16 X + (byte & 127)) << 19``, with the sign on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ciuic_kernels.codec import register_codec
from ciuic_kernels.format import ceil_div

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
CURVE: dict[int, float] = {2: 0.1875, 3: 0.25, 4: 0.40625, 5: 0.5, 6: 0.5, 8: 0.40625}
"""c for each width: least KL on a trained LM (docs/adr/002); multiples of 1/32, so that 1 - c is exact."""

SCALE_OFFSETS: dict[int, tuple[int, ...]] = {
    2: (0, -1, 1),
    3: (0, -1, 1, -2, 2),
    4: (0, -1, 1, -2, 2),
    5: (0, -1, 1),
    6: (0, -1, 1),
    8: (0,),
}
"""Scale bytes that the encoder tries, as steps from the smallest scale that clips nothing."""

GROUPS = (32, 64)
MIN_EXPONENT, MAX_EXPONENT = 1, 247  # X + 7 must stay a finite float32 exponent


@cache
def levels(bits: int) -> Tensor:
    """float32 ``[2^bits]``: the grid for scale 1, rounded as the formula of this module says."""
    half = 1 << (bits - 1)
    c = torch.tensor(CURVE[bits], dtype=torch.float32, device="cpu")
    t = (torch.arange(2 * half, dtype=torch.float32, device="cpu") - half) / half
    return t * ((1 - c) + c * (t * t))


@cache
def thresholds(bits: int) -> Tensor:
    """float32 ``[2^bits - 1]``: midpoints between neighbouring levels; a code is how many are below the value."""
    grid = levels(bits)
    return (grid[1:] + grid[:-1]) * 0.5


def scale_values(codes: Tensor, exponents: Tensor) -> Tensor:
    """Scale bytes uint8 and block exponents uint8 (broadcastable) -> float32 scales."""
    byte = codes.to(torch.int32)
    bits = ((exponents.to(torch.int32) << 4) + (byte & 127)) << 19
    magnitude = bits.view(torch.float32)
    return torch.where(byte >= 128, -magnitude, magnitude)


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """uint8 codes ``[..., cols]`` below 2^width -> bytes ``[..., ceil(cols * width / 8)]``."""
    if width == 8:
        return codes
    per_byte, nbytes = 8 // width, ceil_div(codes.shape[-1] * width, 8)
    padded = torch.nn.functional.pad(codes, (0, per_byte * nbytes - codes.shape[-1]))
    fields = padded.unflatten(-1, (per_byte, nbytes))
    packed = fields[..., 0, :].clone()
    for j in range(1, per_byte):
        packed |= fields[..., j, :] << (j * width)
    return packed


def unpack_plane(packed: Tensor, width: int, cols: int) -> Tensor:
    """The inverse of :func:`pack_plane`: bytes ``[..., W]`` -> uint8 codes ``[..., cols]``."""
    if width == 8:
        return packed
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << width) - 1)
    return fields.flatten(-2)[..., :cols]


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two) in one fixed order, so that every device agrees bit for bit."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


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
        return [rows * ceil_div(cols * p, 8) for p in PLANES[self.width]]

    def record_nbytes(self, rows: int, cols: int) -> int:
        return sum(self.plane_nbytes(rows, cols)) + rows * ceil_div(cols, self.group)

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, cols = blocks.shape
        groups = ceil_div(cols, self.group)
        # contiguous: bucketize() copies and warns otherwise
        padded = torch.nn.functional.pad(blocks, (0, groups * self.group - cols)).contiguous()
        weights = padded.unflatten(-1, (groups, self.group))
        smallest, negative, exponents = self._anchor(weights)
        scales, codes = self._search(weights, smallest, negative, exponents)
        codes = codes.flatten(-2)[..., :cols]
        parts, shift = [], 0
        for width in PLANES[self.width]:
            parts.append(pack_plane((codes >> shift) & ((1 << width) - 1), width).reshape(batch, -1))
            shift += width
        return torch.cat([*parts, scales.reshape(batch, -1)], dim=1), exponents

    def _anchor(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest unclipped scale index and sign of each group, exponent byte of each block."""
        high, low = weights.amax(-1), weights.amin(-1)
        absmax = torch.maximum(high, -low)
        # abs() turns -0.0 into 0.0. float32 bits >> 19 are exponent and 4 mantissa bits; adding 2^19 - 1 rounds up.
        index = (absmax.abs().view(torch.int32) + ((1 << 19) - 1)) >> 19
        top = index.amax(dim=(-2, -1))
        exponents = ((top >> 4) - 7).clamp(MIN_EXPONENT, MAX_EXPONENT)
        return index, high > -low, exponents.to(torch.uint8)

    def _search(
        self, weights: Tensor, smallest: Tensor, negative: Tensor, exponents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scale byte of least squared error among the candidates, and its codes."""
        base = (exponents.to(torch.int32) << 4)[:, None, None]
        sign = negative.to(torch.uint8) << 7
        grid = levels(self.width).to(weights.device)
        bounds = thresholds(self.width).to(weights.device)
        best_error = best_scale = best_codes = None
        for offset in SCALE_OFFSETS[self.width]:
            scale_byte = (smallest + offset - base).clamp(0, 127).to(torch.uint8) | sign
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
        return best_scale, best_codes

    def decode(self, records: Tensor, exponents: Tensor, rows: int, cols: int) -> Tensor:
        batch, groups = records.shape[0], ceil_div(cols, self.group)
        codes, start, shift = torch.zeros((), dtype=torch.int32, device=records.device), 0, 0
        for width, nbytes in zip(PLANES[self.width], self.plane_nbytes(rows, cols), strict=True):
            plane = records[:, start : start + nbytes].reshape(batch, rows, -1)
            codes = codes + (unpack_plane(plane, width, cols).to(torch.int32) << shift)
            start, shift = start + nbytes, shift + width
        scale_bytes = records[:, start : start + rows * groups].reshape(batch, rows, groups)
        scales = scale_values(scale_bytes, exponents[:, None, None])
        scales = scales.repeat_interleave(self.group, dim=-1)[..., :cols]
        return scales * levels(self.width).to(records.device)[codes]


GRIDS = {(k, g): register_codec(GridCodec(k, g)) for g in GROUPS for k in PLANES}
