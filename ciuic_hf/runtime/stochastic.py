"""Groups of 2, 4 or 8 bit codes with stochastic rounding: for tensors that live for one step.

Elementwise and without any search, so that packing costs a few passes over memory. Rounding is unbiased: the
expectation of what is unpacked is what was packed, as no value is clipped and each goes up with the probability of
its distance from the grid point below (as in ActNN, arXiv 2104.14129). Where a seed is kept instead of a generator,
the random numbers that decided this (the dither) are drawn again in unpacking and taken off (subtractive dither,
Schuchman 1964): the error is then uniform over one step, with half the variance, in groups with both signs. Others
keep their grid, on which a zero at its end is exact and nothing changes its sign. Layout of a group of ``g`` values:

    codes   g * bits / 8 bytes; byte j holds values j, j + g/p, ..., p = 8 / bits of them, the first in the low bits
    step    bfloat16, rounded up
    low     bfloat16, rounded down; absent from signed groups, where code 2^(bits-1) is zero
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_kernels.cpu import groups as groups_c

BITS = (2, 4, 8)
# Small enough to stay in the cache of a core, large enough to hide the cost of a call.
_CPU_CHUNK, _CHUNK = 1 << 16, 1 << 24
# The step has this much to spare, so that no rounding of float32 lifts the largest code over its limit.
_SLACK = 1 + 2.0**-12
# Magnitudes up to here leave room for the rounding up of steps; smaller steps have no inverse in float32.
_LARGEST, _SMALLEST_STEP = 2.0**120, 2.0**-126
_SEED_NBYTES = 8
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class PackedGroups:
    """A flat tensor of ``numel`` values in groups; the last group is padded.

    Attributes:
        codes: uint8 ``[groups, group * bits / 8]``.
        step: bfloat16 ``[groups]``.
        low: bfloat16 ``[groups]``, or None where the groups are signed.
        dtype: of the source, and of what is unpacked.
        seed: of the dither that unpacking takes off; None where it stays.
        compiled: whose dither it is, ``groups.c``'s or torch's.
    """

    codes: Tensor
    step: Tensor
    low: Tensor | None
    bits: int
    numel: int
    dtype: torch.dtype
    seed: int | None = None
    compiled: bool = False

    @property
    def group(self) -> int:
        """Values in a group."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Codes, steps, lows and the seed."""
        low_nbytes = self.low.nbytes if self.low is not None else 0
        return (
            self.codes.nbytes + self.step.nbytes + low_nbytes + (_SEED_NBYTES if self.seed is not None else 0)
        )


@dataclass(frozen=True)
class PackedOrExact:
    """Groups of a tensor's values, or the tensor as it was where it holds NaN, infinity or more than 2^120.

    Attributes:
        shape, dtype: of the tensor.
        groups: its values; None where ``exact`` holds them.
        exact: a tensor like it, or None.
    """

    shape: torch.Size
    dtype: torch.dtype
    groups: PackedGroups | None
    exact: Tensor | None

    @property
    def nbytes(self) -> int:
        """Everything stored."""
        stored = self.groups if self.groups is not None else self.exact
        assert stored is not None
        return stored.nbytes


def packed_nbytes(numel: int, bits: int, group: int, *, signed: bool, seeded: bool = False) -> int:
    """Bytes that ``numel`` values take."""
    groups_nbytes = -(-numel // group) * (group * bits // 8 + (2 if signed else 4))
    return groups_nbytes + (_SEED_NBYTES if seeded else 0)


def pack(
    flat: Tensor,
    bits: int,
    group: int,
    generator: torch.Generator | None,
    *,
    signed: bool = False,
    seed: int | None = None,
) -> PackedGroups | None:
    """Packs ``flat`` ``[n]``, contiguous, of a float dtype; None if it holds NaN, infinity or more than 2^120.

    On a GPU the answer to that is waited for.

    Args:
        generator: of ``flat``'s device; without one, values go to the nearest grid point (which is biased).
        signed: the grid is symmetric and holds zero exactly, at the cost of one level.
        seed: in place of a generator: the dither is drawn from it, and taken off in unpacking. Not for signed groups.
    """
    packed, finite = pack_any(flat, bits, group, generator, signed=signed, seed=seed)
    return packed if bool(finite) else None


def pack_any(
    flat: Tensor,
    bits: int,
    group: int,
    generator: torch.Generator | None,
    *,
    signed: bool = False,
    seed: int | None = None,
) -> tuple[PackedGroups, Tensor]:
    """As ``pack``, without waiting: bool ``[]`` says whether the bounds held.

    Where they did not, the whole group is unpacked to values that are not finite.
    """
    assert seed is None or (generator is None and not signed)
    groups = -(-flat.numel() // group)
    codes = torch.empty(groups, group * bits // 8, dtype=torch.uint8, device=flat.device)
    step = torch.empty(groups, dtype=torch.bfloat16, device=flat.device)
    low = None if signed else torch.empty_like(step)
    if groups_c.usable(flat.device, flat.dtype, group):
        intervals, middle = _grid(bits, signed)
        within = groups_c.pack(
            flat,
            bits,
            _SLACK / intervals,
            middle,
            _LARGEST,
            _SMALLEST_STEP,
            _seed(generator) if seed is None else seed,
            codes,
            step,
            low,
        )
        packed = PackedGroups(codes, step, low, bits, flat.numel(), flat.dtype, seed, compiled=True)
        return packed, torch.tensor(within)
    if seed is not None:
        generator = torch.Generator(flat.device).manual_seed(seed)
    finite = torch.ones((), dtype=torch.bool, device=flat.device)
    rows = max(1, (_CPU_CHUNK if flat.device.type == "cpu" else _CHUNK) // group)
    for first in range(0, groups, rows):
        chunk = slice(first, min(first + rows, groups))
        values = _group_values(flat[first * group : chunk.stop * group], group)
        finite &= _pack_chunk(
            values, bits, generator, codes[chunk], step[chunk], None if low is None else low[chunk]
        )
    return PackedGroups(codes, step, low, bits, flat.numel(), flat.dtype, seed), finite


def unpack(packed: PackedGroups) -> Tensor:
    """A new tensor ``[numel]`` of the source's dtype."""
    group, groups = packed.group, len(packed.codes)
    _, middle = _grid(packed.bits, packed.low is None)
    usable = packed.seed is None and groups_c.usable(packed.codes.device, packed.dtype, group)
    if usable or (packed.seed is not None and packed.compiled):
        out = torch.empty(packed.numel, dtype=packed.dtype)
        groups_c.unpack(packed.codes, packed.step, packed.low, packed.bits, middle, packed.seed, out)
        return out
    generator = None
    if packed.seed is not None:
        generator = torch.Generator(packed.codes.device).manual_seed(packed.seed)
    out = torch.empty(groups * group, dtype=packed.dtype, device=packed.codes.device)
    rows = max(1, (_CPU_CHUNK if out.device.type == "cpu" else _CHUNK) // group)
    for first in range(0, groups, rows):
        chunk = slice(first, min(first + rows, groups))
        values = _spread(packed.codes[chunk], packed.bits)
        step = packed.step[chunk, None].float()
        if packed.low is None:
            values.sub_(middle).mul_(step)
        else:
            low = packed.low[chunk, None].float()
            if generator is not None:
                both_signs = (low < 0) & (low + ((1 << packed.bits) - 1) * step > 0)
                values.sub_(_dither(values.shape, generator).mul_(both_signs))
            values.mul_(step).add_(low)
        if packed.dtype == torch.float16:  # the grid may end beyond the largest value of its group
            values.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
        out[first * group : chunk.stop * group].view(-1, group).copy_(values)
    return out[: packed.numel]


def _grid(bits: int, signed: bool) -> tuple[int, int]:
    """Intervals from low, or from zero, to the end of the range; and the code of low, or of zero."""
    middle = 1 << (bits - 1)
    return (middle - 1, middle) if signed else ((1 << bits) - 1, 0)


def _seed(generator: torch.Generator | None) -> int | None:
    if generator is None:
        return None
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator))


def _group_values(flat: Tensor, group: int) -> Tensor:
    """float32 ``[groups, group]``; the last value fills up the last group, whose range it does not change."""
    missing = -flat.numel() % group
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, group).float()


def _pack_chunk(
    values: Tensor,
    bits: int,
    generator: torch.Generator | None,
    codes: Tensor,
    step: Tensor,
    low: Tensor | None,
) -> Tensor:
    """Fills codes, step and low; returns whether all values are within bounds, on the device."""
    smallest, largest = torch.amin(values, 1), torch.amax(values, 1)
    magnitude = torch.maximum(-smallest, largest)
    finite = (magnitude <= _LARGEST).all()
    intervals, middle = _grid(bits, low is None)
    if low is None:
        step.copy_(_step_of(magnitude, intervals))
        scaled = values * _inverse(step)[:, None]
    else:
        low.copy_(-_rounded_up(-smallest))
        base = low.float()
        step.copy_(_step_of(largest - base, intervals))
        # The difference first: where the range is far from zero, a product would lose the low digits.
        scaled = (values - base[:, None]).mul_(_inverse(step)[:, None])
    if generator is None:
        scaled.add_(middle + 0.5)
    else:
        scaled.add_(_dither(values.shape, generator)).add_(middle + 0.5)
    whole = scaled.to(torch.int16).to(torch.uint8)  # faster than in one step
    if bits == 8:
        codes.copy_(whole)
        return finite
    parts = whole.chunk(8 // bits, dim=1)
    torch.bitwise_or(parts[0], parts[1] << bits, out=codes)
    for index, part in enumerate(parts[2:], start=2):
        codes.bitwise_or_(part << (bits * index))
    return finite


def _spread(codes: Tensor, bits: int) -> Tensor:
    """Codes as float32 ``[groups, group]``."""
    if bits == 8:
        return codes.float()
    each, width = 8 // bits, codes.shape[1]
    values = torch.empty(len(codes), width * each, dtype=torch.float32, device=codes.device)
    mask = (1 << bits) - 1
    for index in range(each):
        values[:, index * width : (index + 1) * width] = (codes >> (bits * index)) & mask
    return values


def _step_of(span: Tensor, intervals: int) -> Tensor:
    return _rounded_up(torch.where(span > 0, (span * (_SLACK / intervals)).clamp_min(_SMALLEST_STEP), span))


def _rounded_up(values: Tensor) -> Tensor:
    """The next bfloat16 that is not smaller, as float32; NaN and infinity stay what they are."""
    rounded = values.bfloat16()
    over = torch.nextafter(rounded, torch.full_like(rounded, float("inf")))
    return torch.where(rounded.float() < values, over, rounded).float()


def _inverse(step: Tensor) -> Tensor:
    """1 / step in float32, and 0 where the step is 0: a group of equal values."""
    step = step.float()
    return torch.where(step > 0, step.reciprocal(), 0.0)


def _dither(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """float32, uniform around zero over one step, 16 bits of it; a 64-bit draw makes four."""
    words = -(-shape.numel() // 4)
    draws = torch.empty(words, dtype=torch.int64, device=generator.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: shape.numel()].view(shape).float().mul_(2.0**-16).add_(2.0**-17)
