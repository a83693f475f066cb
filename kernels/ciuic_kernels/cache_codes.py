"""Codes of a compressed key-value cache: planes of bits, levels, and the scale that a byte stands for.

A *page* is some consecutive tokens of all sequences and heads, in parts ``[B, H, ...]``. Of keys by channel, in
groups of ``g`` tokens, for a page with room for ``c`` tokens:

    planes of codes  uint8    [B, H, D, c * width / 8]
    scale            uint8    [B, H, D, c / g]
    low              float16  [B, H, D, c / g]           k = low + scale * code

and of anything by token, with channels padded to ``P``, a multiple of 8, in groups of ``g`` channels:

    planes of codes  uint8    [B, H, c, P * width / 8]
    scale            uint8    [B, H, c, ceil(D / g)]     v = scale * level(code)

Fields lie in a byte from its lowest bits up. Below 8 bits levels by token are Lloyd-Max's, the highest bit of a code
being the sign; at 8 bits they are the code as a signed integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a code -> bits of each of its planes, lowest first."""

# J. Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6 (1960), table I: magnitudes of the levels.
LLOYD = {
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}

SCALES_PER_OCTAVE = 8
SCALE_OF_ONE = 168
NO_SCALE = 255
"""The scale byte that is NaN."""


def parts_of(key_bits: int, value_bits: int, latent: bool) -> tuple[int, int]:
    """How many tensors a page has for keys and for values; of latents, for these and their rotary part."""
    by_channel = (0, 1) if latent else (1, 0)
    return len(PLANES[key_bits]) + 1 + by_channel[0], len(PLANES[value_bits]) + 1 + by_channel[1]


def codes_of(planes: tuple[Tensor, ...], bits: int) -> Tensor:
    """int32 ``[..., n]`` from planes ``[..., n * width / 8]``, one field at a time."""
    code, shift = torch.zeros((), dtype=torch.int32, device=planes[0].device), 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        places = torch.arange(0, 8, width, device=plane.device, dtype=torch.int32)
        fields = (plane.int()[..., None] >> places) & ((1 << width) - 1)
        code = code | fields.flatten(-2) << shift
        shift += width
    return code


def scales_of(bytes_: Tensor) -> Tensor:
    """float32: what scale bytes stand for."""
    exponent = (bytes_.double() - SCALE_OF_ONE) / SCALES_PER_OCTAVE
    return torch.exp2(exponent).masked_fill(bytes_ == NO_SCALE, float("nan")).float()


def channels_of(parts: tuple[Tensor, ...], bits: int, group: int) -> Tensor:
    """float32 ``[B, H, c, D]`` of parts by channel."""
    *planes, scale, low = parts
    groups = codes_of(tuple(planes), bits).unflatten(-1, (-1, group))
    return (groups * scales_of(scale)[..., None] + low.float()[..., None]).flatten(-2).mT


def tokens_of(parts: tuple[Tensor, ...], bits: int, group: int, width: int) -> Tensor:
    """float32 ``[B, H, c, width]`` of parts by token."""
    *planes, scale = parts
    codes = codes_of(tuple(planes), bits)[..., :width]
    if bits == 8:
        levels = (codes - ((codes >> 7) << 8)).float()
    else:
        magnitudes = torch.tensor(LLOYD[bits], device=codes.device)
        levels = torch.cat([magnitudes, -magnitudes])[codes.long()]
    return levels * scales_of(scale).repeat_interleave(group, dim=-1)[..., :width]
