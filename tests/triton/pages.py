"""Pages of a compressed cache as ``ciuic::attend_packed`` takes them, with what they decode to in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ciuic_hf.planning.cache_formats import CacheFormats, ChannelFormat, TokenFormat, cache_formats
from ciuic_hf.runtime.cache.encoding import decode, encode, narrow_record
from ciuic_kernels import ops
from ciuic_kernels.cache_codes import scales_of

Sizes = list[tuple[int, int]]
"""Tokens and capacity of each page."""


LATENTS = {
    8: CacheFormats(TokenFormat(8, 64), ChannelFormat(8, 64)),
    4: CacheFormats(TokenFormat(4, 128), ChannelFormat(8, 64)),
    3: CacheFormats(TokenFormat(3, 128), ChannelFormat(8, 128)),
    2: CacheFormats(TokenFormat(2, 32), ChannelFormat(4, 16)),
}
"""What the kernel reads: latents by token, their rotary part by channel."""


@dataclass(frozen=True)
class Pages:
    """Pages of ``[B, H]`` heads.

    Attributes:
        keys, values: float64 ``[B, H, t, D]`` and ``[B, H, t, E]`` of the tokens that count, as stored.
        middles: float64, of the same shape as keys, what half the codes stand for; 0 if keys are not by channel.
    """

    formats: CacheFormats
    records: list[Tensor]
    addresses: Tensor
    table: Tensor
    count: Tensor
    keys: Tensor
    values: Tensor
    middles: Tensor

    @property
    def arguments(self) -> tuple[object, ...]:
        return (self.records, self.addresses, self.table, self.count)

    @property
    def codes(self) -> tuple[int, int, int, int]:
        keys, values = self.formats.keys, self.formats.values
        return keys.bits, keys.group, values.bits, values.group


def pages_of(
    bits: int, latent: bool, sizes: Sizes, heads: int, widths: tuple[int, int], batch: int = 2
) -> Pages:
    """Random pages; what no token of a page has written is NaN, and a page more than counted is all NaN."""
    formats = LATENTS[bits] if latent else cache_formats(bits, False)
    records: list[Tensor] = []
    decoded: list[list[Tensor]] = [[], [], []]
    rows, position = [], 0
    for tokens, capacity in sizes:
        for which, (fmt, width) in enumerate(zip((formats.keys, formats.values), widths, strict=True)):
            x = torch.randn(batch, heads, capacity, width) * 0.8 + torch.linspace(-1, 1, width)
            record = tuple(part.contiguous() for part in encode(x, fmt))
            values = decode(record, width, fmt, torch.float32)[:, :, :tokens]
            decoded[which].append(values.double())
            if which == 0:
                decoded[2].append(_middles(record, fmt, values))
            unit = fmt.group if isinstance(fmt, ChannelFormat) else 1
            written = -(-tokens // unit) * unit
            for part in narrow_record(record, capacity, written, capacity, fmt):
                part.fill_(255 if part.dtype == torch.uint8 else float("nan"))
            records += record
        rows.append((tokens, position, capacity))
        position += tokens
    parts = len(records) // len(sizes)
    spare = [torch.full_like(part, 255 if part.dtype == torch.uint8 else 0) for part in records[-parts:]]
    records += spare
    return Pages(
        formats,
        records,
        ops.page_addresses(records, parts),
        torch.tensor([*rows, (sizes[-1][1], position, sizes[-1][1])], dtype=torch.int32),
        torch.tensor([len(sizes)], dtype=torch.int32),
        *(torch.cat(x, 2) for x in decoded),
    )


def _middles(record: tuple[Tensor, ...], fmt: object, values: Tensor) -> Tensor:
    if not isinstance(fmt, ChannelFormat):
        return torch.zeros_like(values).double()
    scale, low = scales_of(record[-2]).double(), record[-1].double()
    middle = (low + scale * (1 << (fmt.bits - 1))).repeat_interleave(fmt.group, -1).mT
    return middle[:, :, : values.shape[2]]


@dataclass(frozen=True)
class Exact:
    """Attention in float64 and how far a kernel may be from it.

    With u the unit roundoff: queries times scales (or latents: levels, and their products) round at most twice, so do
    levels and weights times scales; float32 sums and powers of two add a few units of 2^-22 for each term. A score that
    is off by e changes a weight, and the sum of them, by a factor of at most exp(e).
    """

    out: Tensor
    lse: Tensor
    out_bound: Tensor
    lse_bound: Tensor


def exact_attention(
    query: Tensor, rope: Tensor | None, pages: Pages, mask: Tensor | None, scale: float
) -> Exact:
    """``query [B, heads, Q, D]`` attends to pages, or latents with ``rope``."""
    repeats = query.shape[1] // pages.keys.shape[1]
    keys, others, middles = (
        x.repeat_interleave(repeats, 1) for x in (pages.keys, pages.values, pages.middles)
    )
    values = others if rope is None else keys
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[query.dtype]
    q = query.double()
    scores = q @ keys.mT
    size = q.abs() @ ((keys - middles).abs() + middles.abs()).mT
    if rope is not None:
        scores = scores + rope.double() @ others.mT
        size = size + rope.double().abs() @ others.abs().mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, :, : scores.shape[-1]], float("-inf"))
    scores = scores * scale
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num()
    out = weights @ values
    error = scale * pad(size, (0, 1)).amax(-1) * (2 * unit + (query.shape[-1] + 32) * 2.0**-22) + 2.0**-20
    tokens = scores.shape[-1]
    relative = 2 * torch.expm1(error) + 3 * unit + (tokens + 32) * 2.0**-22
    tiny = 2.0**-24 * tokens * 128 if query.dtype == torch.float16 else 0.0
    bound = relative[..., None] * (weights @ values.abs()) + tiny
    return Exact(out, lse.clamp(min=torch.finfo(torch.float32).min), bound, error)
