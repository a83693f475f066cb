"""Attention of few new tokens on a GPU: a kernel reads the packed part in place, torch operations the rest.

The packed part comes back as the mean of its values and the log-sum-exp of its scores, and joins the softmax over the
other tokens as one token more (flash-decoding, Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CacheFormats, ChannelFormat
from ciuic_hf.runtime.cache.codes import rotate, rotation_size
from ciuic_hf.runtime.cache.pages import PageTable
from ciuic_kernels import ops
from ciuic_kernels.attention import AttentionChoice, AttentionShape
from ciuic_kernels.dispatch import attention_choice

if TYPE_CHECKING:
    from ciuic_hf.runtime.cache.attention import Mask
    from ciuic_hf.runtime.cache.store import History


@dataclass(frozen=True)
class Step:
    """What few new tokens attend to.

    Attributes:
        formats, table: of the packed part.
        seen: bool ``[B or 1, Q or 1, positions]``, which packed tokens a query sees; None for all.
        unpacked: keys ``[B, H, t, D]`` and values ``[B, H, t, E]`` of all other tokens, or latents and rotary part.
        hide: puts scores ``[B, H, g, Q, t]`` of those that are not seen to -inf.
    """

    formats: CacheFormats
    table: PageTable
    seen: Tensor | None
    unpacked: tuple[Tensor, Tensor]
    hide: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, history: History, queries: int, mask: Mask) -> Step:
        seen = None if mask.padding is None else mask.padding[:, None]
        if mask.dense is not None:
            seen = mask.dense[:, 0] if seen is None else seen & mask.dense[:, 0]
        offset = history.length - queries
        return cls(
            history.formats,
            history.page_table(),
            seen,
            history.unpacked(),
            lambda scores: mask.apply(scores, 0, history.packed, offset),
        )


def choose(query: Tensor, history: History, mask: Mask, latent: bool) -> AttentionChoice:
    """Whether the kernel serves this step, and why not.

    Args:
        query: ``[B, heads, Q, any width]``.
    """
    tokens = sum(segment.capacity for segment in history.segments)
    return choose_for(query, history.formats, history.fresh, tokens, mask.dense, latent)


def choose_for(
    query: Tensor,
    formats: CacheFormats,
    cached: tuple[Tensor, Tensor],
    tokens: int,
    dense: Tensor | None,
    latent: bool,
) -> AttentionChoice:
    """The same for any cache.

    Args:
        cached: some keys and values, for heads and widths.
        tokens: that its pages have room for.
        dense: see ``Mask``.
    """
    if not tokens:
        return AttentionChoice("tiles", None, "nothing is packed yet")
    if dense is not None and (dense.dtype != torch.bool or dense.shape[1] != 1):
        return AttentionChoice("tiles", None, "the mask adds to scores, or differs from head to head")
    by_channel = [isinstance(fmt, ChannelFormat) for fmt in (formats.keys, formats.values)]
    if by_channel != ([False, True] if latent else [True, False]):
        return AttentionChoice("tiles", None, "the fused kernel does not read these formats")
    batch, heads, queries, _ = query.shape
    keys, values = cached
    shape = AttentionShape(
        batch=batch,
        heads=keys.shape[1],
        rows=heads // keys.shape[1] * queries,
        queries=queries,
        key_width=keys.shape[-1],
        value_width=values.shape[-1],
        key_group=formats.keys.group,
        value_group=formats.values.group,
        tokens=tokens,
        latent=latent,
    )
    return attention_choice(shape, query.dtype, query.device)


def attend(query: Tensor, rope: Tensor | None, step: Step, scale: float) -> Tensor:
    """float32 ``[B, heads, Q, E]`` of queries ``[B, heads, Q, D]``; heads may be grouped.

    Args:
        rope: to attend to latents, their sums being ``[B, heads, Q, rank]``: the rotary part of the queries, which are
            times Wk ``[B, heads, Q, rank]`` then.
    """
    formats, (keys, values) = step.formats, step.unpacked
    summed = formats.values
    queries: tuple[Tensor, ...] = (query,)
    others: tuple[Tensor, ...] = (keys,)
    if rope is not None:
        queries, others, summed, values = (query, rope), (keys, values), formats.keys, keys
    turned = [
        _turn(x.float()).to(x.dtype) if fmt.rotates else x
        for x, fmt in zip(queries, (formats.keys, formats.values), strict=False)
    ]
    out, lse = _packed(turned, step, scale, values.shape[-1])
    if summed.rotates:
        out = _turn(out)
    return _merge(tuple(x * scale for x in queries), others, values, out, lse, step.hide)


def _packed(queries: list[Tensor], step: Step, scale: float, width: int) -> tuple[Tensor, Tensor]:
    keys, values = step.formats.keys, step.formats.values
    out: tuple[Tensor, Tensor] = ops.attend_packed(
        queries[0],
        queries[1] if len(queries) == 2 else None,
        *step.table,
        step.seen,
        scale,
        keys.bits,
        keys.group,
        values.bits,
        values.group,
        width,
    )
    return out


def _merge(
    queries: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    hide: Callable[[Tensor], Tensor],
) -> Tensor:
    """float32 ``[B, heads, Q, E]``: attention to unpacked tokens, and to the packed part as if it were one."""
    cached = values.shape[1]
    grouped = [q.unflatten(1, (cached, -1)) for q in queries]
    rows = grouped[0].shape[2:4]
    scores = grouped[0].flatten(2, 3) @ keys[0].mT
    for q, k in zip(grouped[1:], keys[1:], strict=True):
        scores = scores + q.flatten(2, 3) @ k.mT
    scores = hide(scores.float().unflatten(2, rows))
    one = lse.unflatten(1, (cached, -1))[..., None]
    weights = torch.cat([one, scores], -1).softmax(-1)
    product = weights[..., 1:].to(values.dtype).flatten(2, 3) @ values
    merged = product.unflatten(2, rows) + weights[..., :1] * out.unflatten(1, (cached, -1))
    return merged.flatten(1, 2)


def warm(formats: CacheFormats, cached: tuple[Tensor, ...]) -> None:
    """Make the constants of ``attend`` now, as a CUDA graph that is being captured must not."""
    for x, fmt in zip(cached, (formats.keys, formats.values), strict=True):
        if fmt.rotates:
            _hadamard(rotation_size(x.shape[-1]), x.device)


@cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    return rotate(torch.eye(size, device=device))


def _turn(x: Tensor) -> Tensor:
    """``rotate`` of float32 as one product instead of some thirty small kernels."""
    size = rotation_size(x.shape[-1])
    return (x.unflatten(-1, (-1, size)) @ _hadamard(size, x.device)).flatten(-2)
