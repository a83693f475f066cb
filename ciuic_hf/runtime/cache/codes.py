"""Codes of 2, 3, 4 and 8 bits in bytes, one-byte scales, and the Hadamard transform.

Decoding is one table look-up for each byte, which gives the values of all codes in it. Three-bit codes are a plane of
two bits and one of one bit. Every result is made by operations on single elements, so that the bytes of a token do
not depend on how many others are encoded with it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ciuic_kernels.cache_codes import LLOYD, PLANES, SCALE_OF_ONE, SCALES_PER_OCTAVE


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """uint8 codes ``[..., n]``, n a multiple of 8 -> one uint8 tensor ``[..., n * width / 8]`` a plane."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = codes >> shift & (1 << width) - 1 if len(PLANES[bits]) > 1 else codes
        fields = plane.unflatten(-1, (-1, 8 // width))
        packed = fields[..., 0].clone()
        for i in range(1, 8 // width):
            packed |= fields[..., i] << i * width
        planes.append(packed)
        shift += width
    return tuple(planes)


def unpack_linear(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """float32 ``[..., n]``: the codes as numbers."""
    if bits == 8:
        return planes[0].float()
    values = _values(planes[0], linear_table(bits, planes[0].device))
    if bits == 3:
        values += _high_bits(planes[1], 0, 4)
    return values


def unpack_lloyd(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """float32 ``[..., n]``: the Lloyd-Max levels of the codes; the highest bit of a code is its sign."""
    values = _values(planes[0], lloyd_table(bits, planes[0].device))
    if bits == 3:
        values *= _high_bits(planes[1], 1, -1)
    return values


def lloyd_codes(x: Tensor, bits: int) -> Tensor:
    """uint8: the code of the nearest level of every element."""
    levels = torch.tensor(LLOYD[bits], device=x.device)
    magnitude = torch.bucketize(x.abs(), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return (magnitude + (x < 0) * len(LLOYD[bits])).to(torch.uint8)


def _values(packed: Tensor, table: Tensor) -> Tensor:
    """The values of the codes in every byte, from a table whose elements each hold those of one byte."""
    return table.take(packed.long()).view(torch.float32)


def _high_bits(packed: Tensor, zero: int, one: int) -> Tensor:
    """int8 ``[..., 8 n]``: what stands for each bit."""
    return _bit_table(zero, one, packed.device).take(packed.long()).view(torch.int8)


def _table(values: Tensor, width: int) -> Tensor:
    """``[256]`` of elements as wide as the values of all codes of a byte; ``values[code]`` has one byte or four."""
    byte = torch.arange(256)[:, None] >> torch.arange(0, 8, width) & (1 << width) - 1
    entries = values[byte].contiguous()
    return entries.view(torch.complex128 if entries[0].nbytes == 16 else torch.int64).flatten()


@cache
def linear_table(bits: int, device: torch.device) -> Tensor:
    """The numbers in each byte of the lowest plane of codes of ``bits`` below 8."""
    width = PLANES[bits][0]
    return _table(torch.arange(1 << width, dtype=torch.float32), width).to(device)


@cache
def lloyd_table(bits: int, device: torch.device) -> Tensor:
    """The levels in each byte of the lowest plane; of three bits their magnitudes."""
    levels = torch.tensor(LLOYD[bits])
    return _table(levels if bits == 3 else torch.cat([levels, -levels]), PLANES[bits][0]).to(device)


@cache
def _bit_table(zero: int, one: int, device: torch.device) -> Tensor:
    return _table(torch.tensor([zero, one], dtype=torch.int8), 1).to(device)


@cache
def scale_table(device: torch.device) -> Tensor:
    """float32 ``[256]``: what a scale byte stands for, eight an octave from 2^-21 to 1722; 255 is NaN."""
    scales = [2.0 ** ((i - SCALE_OF_ONE) / SCALES_PER_OCTAVE) for i in range(255)]
    return torch.tensor([*scales, float("nan")], device=device)


def scale_bytes(scales: Tensor) -> Tensor:
    """uint8: the smallest scales that are not below those given, none of which is negative.

    What is NaN or beyond the largest becomes NaN, so that it shows in whatever is computed from it.
    """
    return torch.bucketize(scales, scale_table(scales.device)[:255], out_int32=True).to(torch.uint8)


def rotation_size(width: int) -> int:
    """Channels that are rotated together: the largest power of two in ``width``."""
    return width & -width


def rotate(x: Tensor) -> Tensor:
    """Orthonormal Hadamard transform of each run of ``rotation_size`` channels ``[..., n]``; its own inverse."""
    size = rotation_size(x.shape[-1])
    step = 1
    while step < size:
        pairs = x.unflatten(-1, (-1, 2, step))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return x * size**-0.5


def fold_sum(x: Tensor) -> Tensor:
    """Sum of the last dimension, in an order that depends on its length only."""
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([folded, x[..., -1:]], dim=-1) if n % 2 else folded
    return x[..., 0]
