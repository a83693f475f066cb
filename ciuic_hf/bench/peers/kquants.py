"""GGUF's k-quants as a peer to compare with: their values, computed without llama.cpp.

The formats are those of the GGUF specification and its reference reader (package ``gguf``, ``quants.py``). Super-blocks
of 256 consecutive weights of the flattened matrix hold sub-blocks of n weights with integer scales:

======  ===  =====================  =================================================  ============
format  n    a weight is            stored beside the codes of k bits                  bits a weight
======  ===  =====================  =================================================  ============
Q2_K    16   d sc q - dmin m        sc and m of 4 bits, d and dmin in fp16             2.625
Q3_K    16   d sc q, q from -4      sc of 6 bits with sign, d in fp16                  3.4375
Q4_K    32   d sc q - dmin m        sc and m of 6 bits, d and dmin in fp16             4.5
Q5_K    32   as Q4_K                as Q4_K                                            5.5
Q6_K    16   d sc q, q from -32     sc of 8 bits with sign, d in fp16                  6.5625
Q8_0    32   d q, q from -127       d in fp16 for each 32, no super-block              8.5
======  ===  =====================  =================================================  ============

A scale is searched as llama.cpp describes it for quantization without an importance matrix: several ranges for each
sub-block, for each the least-squares scale (and minimum) of its codes, of which the one of least error is kept. Scales
are then rounded to integers and the codes chosen again. Errors count by magnitude in Q2_K, Q4_K and Q5_K; in Q3_K and
Q6_K, where llama.cpp counts them by the square, all alike, which was better (docs/adr/022).

llama.cpp refuses matrices whose rows are no multiple of 256 and takes another format for them; here super-blocks
run on over the ends of rows, so that every matrix takes the bits of its format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

SUPER = 256
Q2_POWER = 1.0  # of the magnitude, in the importance of a weight of Q2_K; 0 would minimise the squared error
_CHUNK = 256  # super-blocks at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Format:
    """One format. ``encode`` takes float32 ``[B, 256]``; :meth:`Encoded.decode` gives it back."""

    bits: float
    encode: Callable[[Tensor], Encoded]


@dataclass(frozen=True)
class Encoded:
    """What super-blocks store.

    Attributes:
        codes: int64 ``[B, S, n]``.
        scales: int64 ``[B, S]``, with ``step`` the scale of a sub-block.
        step: float16 ``[B, 1]``.
        minima, min_step: the same of what is subtracted; zeros where a format has none.
    """

    codes: Tensor
    scales: Tensor
    step: Tensor
    minima: Tensor
    min_step: Tensor

    def decode(self) -> Tensor:
        """float32 ``[B, 256]``."""
        scale = (self.step.float() * self.scales)[..., None]
        low = (self.min_step.float() * self.minima)[..., None]
        return (scale * self.codes - low).flatten(1)


@torch.no_grad()
def roundtrip(weight: Tensor, name: str) -> Tensor:
    """``weight``, any floating dtype and shape, in the format ``name`` and back; a last super-block is padded."""
    flat = weight.detach().float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % SUPER)).view(-1, SUPER)
    decoded = torch.cat([FORMATS[name].encode(part).decode() for part in padded.split(_CHUNK)])
    return decoded.flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def _affine(values: Tensor, width: int, size: int, scale_width: int, steps: int, first: float) -> Encoded:
    x = values.view(len(values), -1, size)
    importance = x.abs() ** Q2_POWER if size == 16 else x.abs() + x.square().mean(-1, keepdim=True).sqrt()
    scale, low = _search_affine(x, importance, 2**width - 1, steps, first)
    largest = 2**scale_width - 1
    scales, step = _integers(scale, largest)
    minima, min_step = _integers(low, largest)
    by, offset = (step.float() * scales)[..., None], (min_step.float() * minima)[..., None]
    codes = torch.where(by > 0, (x + offset) / by.clamp_min(1e-30), 0.0).round().clamp(0, 2**width - 1)
    return Encoded(codes.long(), scales, step, minima, min_step)


def _search_affine(
    x: Tensor, importance: Tensor, levels: int, steps: int, first: float
) -> tuple[Tensor, Tensor]:
    """Scale and minimum (subtracted, at least 0) of each sub-block ``[B, S]``."""
    low = x.amin(-1, keepdim=True).clamp_max(0)
    spread = (x.amax(-1, keepdim=True) - low).clamp_min(1e-30)
    total, sum_x = importance.sum(-1), (importance * x).sum(-1)
    best_scale, best_low = spread[..., 0] / levels, -low[..., 0]
    best = _weighted_error(x, importance, best_scale, best_low, levels)
    for i in range(steps + 1):
        codes = ((x - low) * ((levels + first + 0.1 * i) / spread)).round().clamp(0, levels)
        weighted = importance * codes
        sum_l, sum_ll, sum_xl = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        determinant = total * sum_ll - sum_l.square()
        scale = (total * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        positive = minimum > 0
        scale = torch.where(positive, sum_xl / sum_ll, scale)
        minimum = torch.where(positive, 0.0, minimum)
        restored = scale[..., None] * codes + minimum[..., None]
        error = (importance * (restored - x).square()).sum(-1)
        better = (determinant > 0) & (error < best)
        best = torch.where(better, error, best)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, -minimum, best_low)
    return best_scale, best_low


def _weighted_error(x: Tensor, importance: Tensor, scale: Tensor, low: Tensor, levels: int) -> Tensor:
    by = scale[..., None].clamp_min(1e-30)
    codes = ((x + low[..., None]) / by).round().clamp(0, levels)
    return (importance * (codes * by - low[..., None] - x).square()).sum(-1)


def _integers(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """``[B, S]`` of at least 0 -> integers up to ``largest``, and the fp16 step of each row."""
    step = (values.amax(-1, keepdim=True) / largest).half()
    by = step.float()
    return torch.where(by > 0, values / by.clamp_min(1e-30), 0.0).round().clamp(0, largest).long(), step


def _symmetric(values: Tensor, width: int, scale_width: int) -> Encoded:
    x = values.view(len(values), -1, 16)
    half, largest = 2 ** (width - 1), 2 ** (scale_width - 1)
    scale = _search_symmetric(x, half)
    extreme = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    step = (extreme / -largest).half()
    by = step.float()
    scales = (
        torch.where(by != 0, scale / torch.where(by != 0, by, 1.0), 0.0).round().clamp(-largest, largest - 1)
    )
    each = (by * scales)[..., None]
    codes = torch.where(each != 0, x / torch.where(each != 0, each, 1.0), 0.0).round().clamp(-half, half - 1)
    none = torch.zeros_like(scales)
    return Encoded(codes.long(), scales.long(), step, none.long(), torch.zeros_like(step))


def _search_symmetric(x: Tensor, half: int) -> Tensor:
    """Scale ``[B, S]``, whose sign lets the weight of largest magnitude meet the code of largest magnitude."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    safe = torch.where(extreme != 0, extreme, 1.0)
    best, best_scale = torch.zeros_like(x[..., 0]), torch.zeros_like(x[..., 0])
    for i in range(-9, 10):
        codes = (x * (-(half + 0.1 * i) / safe)).round().clamp(-half, half - 1)
        sum_xl, sum_ll = (x * codes).sum(-1), codes.square().sum(-1)
        gain = torch.where(sum_ll > 0, sum_xl.square() / sum_ll, 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, sum_xl / sum_ll, best_scale)
    return best_scale


def _q8_0(values: Tensor) -> Encoded:
    x = values.view(-1, 1, 32)
    step = (x.abs().amax(-1) / 127).half()
    by = step.float()[..., None]
    codes = torch.where(by > 0, x / by.clamp_min(1e-30), 0.0).round().clamp(-127, 127)
    one = torch.ones_like(step).long()
    return Encoded(codes.long(), one, step, torch.zeros_like(one), torch.zeros_like(step))


FORMATS = {
    "Q2_K": Format(2.625, partial(_affine, width=2, size=16, scale_width=4, steps=15, first=-0.5)),
    "Q3_K": Format(3.4375, partial(_symmetric, width=3, scale_width=6)),
    "Q4_K": Format(4.5, partial(_affine, width=4, size=32, scale_width=6, steps=20, first=-1.0)),
    "Q5_K": Format(5.5, partial(_affine, width=5, size=32, scale_width=6, steps=15, first=-0.5)),
    "Q6_K": Format(6.5625, partial(_symmetric, width=6, scale_width=8)),
    "Q8_0": Format(8.5, _q8_0),
}
