"""Attention of few new tokens on a GPU: a kernel reads the packed part in place, torch operations the rest.

The packed part comes back as the mean of its values and the log-sum-exp of its scores, and joins the softmax over the
other tokens as one token more (flash-decoding, Dao et al. 2023).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import ChannelFormat
from ciuic_hf.runtime.cache.codes import rotate, rotation_size
from ciuic_kernels import ops
from ciuic_kernels.attention import AttentionChoice, AttentionShape
from ciuic_kernels.dispatch import attention_choice

if TYPE_CHECKING:
    from ciuic_hf.runtime.cache.attention import Mask
    from ciuic_hf.runtime.cache.store import History


def choose(query: Tensor, history: History, mask: Mask, latent: bool) -> AttentionChoice:
    """Whether the kernel serves this step, and why not.

    Args:
        query: ``[B, heads, Q, any width]``.
    """
    if not history.segments:
        return AttentionChoice("tiles", None, "nothing is packed yet")
    if mask.dense is not None and (mask.dense.dtype != torch.bool or mask.dense.shape[1] != 1):
        return AttentionChoice("tiles", None, "the mask adds to scores, or differs from head to head")
    batch, heads, queries, _ = query.shape
    cached, formats = history.fresh[0].shape[1], history.formats
    by_channel = [isinstance(fmt, ChannelFormat) for fmt in (formats.keys, formats.values)]
    if by_channel != ([False, True] if latent else [True, False]):
        return AttentionChoice("tiles", None, "the fused kernel does not read these formats")
    shape = AttentionShape(
        batch=batch,
        heads=cached,
        rows=heads // cached * queries,
        queries=queries,
        key_width=history.fresh[0].shape[-1],
        value_width=history.fresh[1].shape[-1],
        key_group=formats.keys.group,
        value_group=formats.values.group,
        tokens=sum(segment.capacity for segment in history.segments),
        latent=latent,
    )
    return attention_choice(shape, query.dtype, query.device)


def attend_heads(query: Tensor, history: History, scale: float, mask: Mask) -> Tensor:
    """``[B, heads, Q, E]`` in the dtype of the query ``[B, heads, Q, D]``; heads may be grouped."""
    keys, values = history.unpacked()
    turned = query
    if history.formats.keys.rotates:
        turned = _turn(query.float()).to(query.dtype)
    out, lse = _packed(turned, None, history, scale, mask, values.shape[-1])
    if history.formats.values.rotates:
        out = _turn(out)
    return _merge((query * scale,), (keys,), values, out, lse, history, mask).to(query.dtype)


def attend_absorbed(latent: Tensor, rotary: Tensor, history: History, mask: Mask) -> Tensor:
    """float32 ``[B, heads, Q, rank]`` of scaled queries times Wk ``[B, heads, Q, rank]``, and rotary ones."""
    latents, rope = history.unpacked()
    formats = history.formats
    turned, turned_rope = latent, rotary
    if formats.keys.rotates:
        turned = _turn(latent.float()).to(latent.dtype)
    if formats.values.rotates:
        turned_rope = _turn(rotary.float()).to(rotary.dtype)
    out, lse = _packed(turned, turned_rope, history, 1.0, mask, latents.shape[-1])
    if formats.keys.rotates:
        out = _turn(out)
    return _merge((latent, rotary), (latents, rope), latents, out, lse, history, mask)


def _packed(
    query: Tensor, rope: Tensor | None, history: History, scale: float, mask: Mask, width: int
) -> tuple[Tensor, Tensor]:
    keys, values = history.formats.keys, history.formats.values
    seen: Tensor | None = None
    if mask.padding is not None:
        seen = mask.padding[:, None]
    if mask.dense is not None:
        seen = mask.dense[:, 0] if seen is None else seen & mask.dense[:, 0]
    out: tuple[Tensor, Tensor] = ops.attend_packed(
        query,
        rope,
        *history.page_table(),
        seen,
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
    history: History,
    mask: Mask,
) -> Tensor:
    """float32 ``[B, heads, Q, E]``: attention to unpacked tokens, and to the packed part as if it were one."""
    cached = values.shape[1]
    grouped = [q.unflatten(1, (cached, -1)) for q in queries]
    rows = grouped[0].shape[2:4]
    scores = grouped[0].flatten(2, 3) @ keys[0].mT
    for q, k in zip(grouped[1:], keys[1:], strict=True):
        scores = scores + q.flatten(2, 3) @ k.mT
    offset = history.length - rows[1]
    scores = mask.apply(scores.float().unflatten(2, rows), 0, history.packed, offset)
    one = lse.unflatten(1, (cached, -1))[..., None]
    weights = torch.cat([one, scores], -1).softmax(-1)
    product = weights[..., 1:].to(values.dtype).flatten(2, 3) @ values
    merged = product.unflatten(2, rows) + weights[..., :1] * out.unflatten(1, (cached, -1))
    return merged.flatten(1, 2)


@cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    return rotate(torch.eye(size, device=device))


def _turn(x: Tensor) -> Tensor:
    """``rotate`` of float32 as one product instead of some thirty small kernels."""
    size = rotation_size(x.shape[-1])
    return (x.unflatten(-1, (-1, size)) @ _hadamard(size, x.device)).flatten(-2)
