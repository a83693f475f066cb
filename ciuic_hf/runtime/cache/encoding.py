"""Encoding runs of tokens in the formats of :mod:`ciuic_hf.planning.cache_formats`, and decoding them.

A *record* is a tuple of tensors. Of a ChannelFormat, for tokens ``t`` in groups of ``g``:

    planes of codes  uint8    [B, H, D, t * width / 8]
    scale            uint8    [B, H, D, t / g]
    low              float16  [B, H, D, t / g]

so that a decoded key tile is ``[B, H, D, t]``, as the product with queries wants it. Of a TokenFormat, with channels
padded to ``P``:

    planes of codes  uint8    [B, H, t, P * width / 8]
    scale            uint8    [B, H, t, ceil(D / group)]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ciuic_hf.planning.cache_formats import ChannelFormat, Format, TokenFormat, padded
from ciuic_hf.runtime.cache.codes import (
    PLANES,
    fold_sum,
    linear_table,
    lloyd_codes,
    lloyd_table,
    pack,
    rotate,
    scale_bytes,
    scale_table,
    unpack_linear,
    unpack_lloyd,
)
from ciuic_kernels.cpu import cache as compiled

Record = tuple[Tensor, ...]
_SMALLEST_NEGATIVE = -32767  # the bits of float16's smallest negative number, as an int16


def empty_record(like: Tensor, tokens: int, fmt: Format) -> Record:
    """Uninitialised room for ``tokens`` (whole groups) of what ``like`` ``[B, H, t, D]`` holds."""
    batch, heads, _, width = like.shape
    if isinstance(fmt, ChannelFormat):
        columns = [tokens * w // 8 for w in PLANES[fmt.bits]] + [tokens // fmt.group]
        parts = [like.new_empty(batch, heads, width, n, dtype=torch.uint8) for n in columns]
        return (*parts, like.new_empty(batch, heads, width, columns[-1], dtype=torch.float16))
    columns = [padded(width) * w // 8 for w in PLANES[fmt.bits]] + [-(-width // fmt.group)]
    return tuple(like.new_empty(batch, heads, tokens, n, dtype=torch.uint8) for n in columns)


def narrow_record(record: Record, capacity: int, start: int, stop: int, fmt: Format) -> Record:
    """Views of tokens ``start`` to ``stop`` (whole groups) of a record of ``capacity`` tokens."""
    axis = -1 if isinstance(fmt, ChannelFormat) else -2

    def view(part: Tensor) -> Tensor:
        size = part.shape[axis]
        return part.narrow(axis, start * size // capacity, (stop - start) * size // capacity)

    return tuple(view(part) for part in record)


def encode(x: Tensor, fmt: Format) -> Record:
    """A record of x ``[B, H, t, D]``, t whole groups."""
    return _encode_channels(x, fmt) if isinstance(fmt, ChannelFormat) else _encode_tokens(x, fmt)


def decode(record: Record, width: int, fmt: Format, dtype: torch.dtype) -> Tensor:
    """``[B, H, t, width]``, rotated where the format rotates; a transposed view of a ChannelFormat's."""
    if isinstance(fmt, ChannelFormat):
        return _decode_channels(record, fmt).to(dtype).mT
    return _decode_tokens(record, width, fmt).to(dtype)


def decode_into(record: Record, fmt: Format, out: Tensor) -> None:
    """The same into ``out`` ``[B, H, t, width]``, of a ChannelFormat a transposed view; by compiled code on a CPU."""
    if not compiled.usable(out.device, out.dtype):
        out.copy_(decode(record, out.shape[-1], fmt, out.dtype))
        return
    scales = scale_table(out.device)
    if isinstance(fmt, ChannelFormat):
        *planes, scale, low = record
        table = None if fmt.bits == 8 else linear_table(fmt.bits, out.device)
        compiled.decode_channels(tuple(planes), scale, low, table, scales, fmt.bits, fmt.group, out.mT)
    else:
        *planes, scale = record
        table = None if fmt.bits == 8 else lloyd_table(fmt.bits, out.device)
        compiled.decode_tokens(tuple(planes), scale, table, scales, fmt.bits, fmt.group, out)


def _encode_channels(x: Tensor, fmt: ChannelFormat) -> Record:
    groups = x.float().mT.unflatten(-1, (-1, fmt.group))  # [B, H, D, groups, g]
    lowest, highest = groups.amin(-1), groups.amax(-1)
    low = _float16_not_above(lowest)
    top = (1 << fmt.bits) - 1
    scale = scale_bytes((highest - low.float()) / top)
    steps = (groups - low.float()[..., None]) / scale_table(x.device)[scale.int()][..., None]
    codes = steps.round().clamp(0, top).to(torch.uint8)
    return (*pack(codes.flatten(-2), fmt.bits), scale, low)


def _float16_not_above(x: Tensor) -> Tensor:
    """float16, rounded towards minus infinity."""
    near = x.half()
    bits = near.view(torch.int16)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, _SMALLEST_NEGATIVE)).view(
        torch.float16
    )
    return torch.where(near.float() > x, below, near)


def _decode_channels(record: Record, fmt: ChannelFormat) -> Tensor:
    *planes, scale, low = record
    groups = unpack_linear(tuple(planes), fmt.bits).unflatten(-1, (-1, fmt.group))
    groups *= scale_table(scale.device)[scale.int()][..., None]
    groups += low.float()[..., None]
    return groups.flatten(-2)


def _encode_tokens(x: Tensor, fmt: TokenFormat) -> Record:
    x = rotate(x.float()) if fmt.rotates else x.float()
    width = x.shape[-1]
    groups = pad(x, (0, -width % fmt.group)).unflatten(-1, (-1, fmt.group))
    if fmt.bits == 8:
        wanted = groups.abs().amax(-1) / 127
    else:
        members = torch.full((groups.shape[-2],), float(min(width, fmt.group)), device=x.device)
        members[-1] = width - (groups.shape[-2] - 1) * fmt.group
        wanted = (fold_sum(groups.square()) / members).sqrt()
    scale = scale_bytes(wanted)
    steps = (groups / scale_table(x.device)[scale.int()][..., None]).flatten(-2)[..., :width]
    steps = pad(steps, (0, padded(width) - width))
    if fmt.bits == 8:
        return (steps.round().clamp(-127, 127).to(torch.int8).view(torch.uint8), scale)
    return (*pack(lloyd_codes(steps, fmt.bits), fmt.bits), scale)


def _decode_tokens(record: Record, width: int, fmt: TokenFormat) -> Tensor:
    *planes, scale = record
    eight = fmt.bits == 8
    values = planes[0].view(torch.int8).float() if eight else unpack_lloyd(tuple(planes), fmt.bits)
    values = values[..., :width]
    scales = scale_table(scale.device)[scale.int()]
    if scales.shape[-1] == 1:
        return values.mul_(scales)
    return values.mul_(scales.repeat_interleave(fmt.group, dim=-1)[..., :width])
