"""Attention of few new tokens to the packed pages of a compressed cache (flash-decoding).

Grid: parts of the tokens x tiles of queries x heads of the cache in all sequences. A program reads its share of the
pages once, decodes a tile at a time, and leaves the weighted mean of its values and the log-sum-exp of its scores; a
second kernel merges those, in order. Queries that share a head of the cache are the rows of the matrix products.

Traffic: the packed bytes of a head once for each tile of its queries, and ``splits`` float32 partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.attention import AttentionLaunch, AttentionShape, block_width
from ciuic_kernels.format import ceil_div
from ciuic_kernels.triton._blocks import interpreted
from ciuic_kernels.triton._cache import (
    load_channels,
    load_tokens,
    planes_of,
    settled,
    shifted,
)
from ciuic_kernels.triton._launch import start

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CHANGING = ("heads", "rows", "queries", "all_rows", "splits", "mask_b", "mask_q")
"""Arguments that differ from step to step, or between models: a kernel does not depend on which number they are."""


@triton.jit
def share_of(count, TILES: tl.constexpr):
    """The tiles ``[first, last)`` of a program, of all pages together."""
    total = tl.load(count) * TILES
    split, splits = tl.program_id(0), tl.num_programs(0)
    share = (total + splits - 1) // splits
    return split * share, tl.minimum((split + 1) * share, total)


@triton.jit
def page_at(pages, page):
    """(tokens that count, position of token 0, capacity)."""
    at = pages + 3 * page
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def tiles_of(page, tokens, begin, end, T: tl.constexpr, TILES: tl.constexpr):
    """The tiles ``[first, last)`` of a page that are in a share and have tokens."""
    used = (tokens + T - 1) // T
    return tl.maximum(begin - page * TILES, 0), tl.minimum(tl.minimum(end - page * TILES, TILES), used)


@triton.jit
def tokens_seen(
    mask,
    batch,
    query,
    token,
    tokens,
    position,
    mask_b,
    mask_q,
    mask_t,
    T: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Which tokens of a tile a query sees, bool ``[M, T]``, and which some query sees, bool ``[T]``.

    Args:
        query: int32 ``[M]``, new tokens; ``token``: int32 ``[T]``, of the page.
        mask_b, mask_q, mask_t: strides of the mask in elements.
    """
    inside = token < tokens
    seen = (query >= 0)[:, None] & inside[None, :]
    if HAS_MASK:
        at = mask + batch * mask_b + query[:, None] * mask_q + (position + token)[None, :] * mask_t
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        inside = tl.max(seen.to(tl.int32), 0) > 0
    return seen, inside


@triton.jit
def softmax_step(scores, top, total):
    """(weights, what earlier sums fade by, highest score, sum of weights), in powers of two."""
    highest = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    fade = tl.exp2(top - highest)
    return weights, fade, highest, total * fade + tl.sum(weights, 1)


@triton.jit
def store_part(
    out, lse, sums, top, total, split, first, row, rows, all_rows, WIDTH: tl.constexpr, E: tl.constexpr
):
    """Mean of values and log2-sum-exp of some rows, of one split."""
    at = split.to(tl.int64) * all_rows + first + row
    column = tl.arange(0, E)
    whole = tl.where(total == 0.0, 1.0, total)
    mean = sums / whole[:, None]
    tl.store(
        out + at[:, None] * WIDTH + column[None, :],
        mean,
        mask=(row < rows)[:, None] & (column < WIDTH)[None, :],
    )
    tl.store(lse + at, tl.where(total == 0.0, LOWEST, top + tl.log2(whole)), mask=row < rows)


@triton.jit
def load_queries(query, first, row, rows, WIDTH: tl.constexpr, D: tl.constexpr):
    """``[M, D]``, zero past the rows and the width."""
    column = tl.arange(0, D)
    at = query + (first + row)[:, None] * WIDTH + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=CHANGING)
def heads_kernel(
    query,
    addresses,
    pages,
    count,
    mask,
    out,
    lse,
    scale,
    heads,
    rows,
    queries,
    all_rows,
    mask_b,
    mask_q,
    mask_t,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    OF_KEYS: tl.constexpr = planes_of(KEY_BITS) + 2
    PARTS: tl.constexpr = OF_KEYS + planes_of(VALUE_BITS) + 1
    GROUPS: tl.constexpr = 1 if VALUE_GROUP >= E else E // VALUE_GROUP
    DTYPE: tl.constexpr = query.dtype.element_ty
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    q = load_queries(query, head * rows, row, rows, KEY_WIDTH, D).to(tl.float32)
    channel = tl.arange(0, D)
    top = tl.full((M,), LOWEST, tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, E), tl.float32)
    begin, end = share_of(count, TILES)
    for page in range(begin // TILES, (end + TILES - 1) // TILES):
        tokens, position, capacity = page_at(pages, page)
        first, last = tiles_of(page, tokens, begin, end, T, TILES)
        for tile in tl.range(first, last, num_stages=STAGES):
            codes, factor, middle = load_channels(
                addresses, page, head, channel, tile, tokens, capacity, 0, PARTS, KEY_BITS, KEY_GROUP, KEY_WIDTH, T,
                DTYPE, PLAIN,
            )  # fmt: skip
            codes = settled(codes, PLAIN)
            factor, middle = tl.reshape(factor, (D,)), tl.reshape(middle, (D,))
            scores = tl.dot((q * factor[None, :]).to(DTYPE), codes)
            scores = (scores + tl.sum(q * middle[None, :], 1)[:, None]) * (scale * LOG2_E)
            token = tile * T + tl.arange(0, T)
            seen, read = tokens_seen(
                mask, head // heads, row % queries, token, tokens, position, mask_b, mask_q, mask_t, T, HAS_MASK
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
            weights, fade, top, total = softmax_step(scores, top, total)
            values, scales = load_tokens(
                addresses, page, head, token, tokens, capacity, read, OF_KEYS, PARTS, VALUE_BITS, VALUE_GROUP,
                VALUE_WIDTH, E, GROUPS > 1, DTYPE, PLAIN,
            )  # fmt: skip
            if GROUPS == 1:
                weights = weights * tl.reshape(scales, (1, T))
            sums = tl.dot(weights.to(DTYPE), values, sums * fade[:, None])
    store_part(out, lse, sums, top, total, tl.program_id(0), head * rows, row, rows, all_rows, VALUE_WIDTH, E)


@triton.jit(do_not_specialize=CHANGING)
def latents_kernel(
    query,
    query_rope,
    addresses,
    pages,
    count,
    mask,
    out,
    lse,
    scale,
    rows,
    queries,
    all_rows,
    mask_b,
    mask_q,
    mask_t,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    OF_KEYS: tl.constexpr = planes_of(KEY_BITS) + 1
    PARTS: tl.constexpr = OF_KEYS + planes_of(VALUE_BITS) + 2
    DTYPE: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    q = load_queries(query, batch * rows, row, rows, KEY_WIDTH, D)
    q_rope = load_queries(query_rope, batch * rows, row, rows, VALUE_WIDTH, E)
    channel = tl.arange(0, E)
    top = tl.full((M,), LOWEST, tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, D), tl.float32)
    begin, end = share_of(count, TILES)
    for page in range(begin // TILES, (end + TILES - 1) // TILES):
        tokens, position, capacity = page_at(pages, page)
        first, last = tiles_of(page, tokens, begin, end, T, TILES)
        for tile in tl.range(first, last, num_stages=STAGES):
            token = tile * T + tl.arange(0, T)
            seen, read = tokens_seen(
                mask, batch, row % queries, token, tokens, position, mask_b, mask_q, mask_t, T, HAS_MASK
            )
            latents, _ = load_tokens(
                addresses, page, batch, token, tokens, capacity, read, 0, PARTS, KEY_BITS, KEY_GROUP, KEY_WIDTH,
                D, True, DTYPE, PLAIN,
            )  # fmt: skip
            codes, factor, middle = load_channels(
                addresses, page, batch, channel, tile, tokens, capacity, OF_KEYS, PARTS, VALUE_BITS, VALUE_GROUP,
                VALUE_WIDTH, T, DTYPE, PLAIN,
            )  # fmt: skip
            scores = tl.dot(q_rope, shifted(codes, factor, middle, DTYPE, PLAIN))
            scores = tl.dot(q, tl.trans(latents), scores) * (scale * LOG2_E)
            scores = tl.where(seen, scores, float("-inf"))
            weights, fade, top, total = softmax_step(scores, top, total)
            sums = tl.dot(weights.to(DTYPE), latents, sums * fade[:, None])
    store_part(out, lse, sums, top, total, tl.program_id(0), batch * rows, row, rows, all_rows, KEY_WIDTH, D)


@triton.jit(do_not_specialize=CHANGING)
def merge_kernel(parts, part_lse, out, lse, all_rows, splits, WIDTH: tl.constexpr, E: tl.constexpr):
    """One row: partial means weighted by their sums, in order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, E)
    top = tl.full((), LOWEST, tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(part_lse + split * all_rows + row))
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((E,), tl.float32)
    for split in range(splits):
        at = split * all_rows + row
        of_part = tl.load(part_lse + at)
        weight = tl.where(of_part == LOWEST, 0.0, tl.exp2(of_part - top))
        total += weight
        sums += weight * tl.load(parts + at * WIDTH + column, mask=column < WIDTH, other=0.0)
    whole = tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * WIDTH + column, sums / whole, mask=column < WIDTH)
    tl.store(lse + row, tl.where(total == 0.0, LOWEST, (top + tl.log2(whole)) * LN_2))


def attend_packed(
    *,
    query: Tensor,
    query_rope: Tensor | None,
    addresses: Tensor,
    pages: Tensor,
    count: Tensor,
    mask: Tensor | None,
    scale: float,
    formats: tuple[int, int, int, int],
    width: int,
    shape: AttentionShape,
    launch: AttentionLaunch,
) -> tuple[Tensor, Tensor]:
    """See ``ciuic::attend_packed``.

    Args:
        query, query_rope: contiguous.
        formats: bits and group of keys, bits and group of values.
    """
    lead, device = query.shape[:3], query.device
    all_rows = query.shape[0] * query.shape[1] * query.shape[2]
    out = torch.empty(*lead, width, dtype=torch.float32, device=device)
    lse = torch.empty(lead, dtype=torch.float32, device=device)
    parts = torch.empty(launch.splits, all_rows, width, dtype=torch.float32, device=device)
    part_lse = torch.empty(launch.splits, all_rows, dtype=torch.float32, device=device)
    if all_rows == 0:
        return out, lse
    room = shape.tokens // max(1, pages.shape[0])
    strides = (0, 0, 0) if mask is None else mask.expand(lead[0], lead[2], -1).stride()
    settings = {
        "KEY_BITS": formats[0], "KEY_GROUP": formats[1], "VALUE_BITS": formats[2], "VALUE_GROUP": formats[3],
        "KEY_WIDTH": query.shape[-1], "M": launch.block_m, "T": launch.block_t,
        "TILES": max(1, ceil_div(room, launch.block_t)), "HAS_MASK": mask is not None,
        "STAGES": launch.num_stages, "PLAIN": interpreted(), "num_warps": launch.num_warps,
    }  # fmt: skip
    grid = (launch.splits, ceil_div(shape.rows, launch.block_m), shape.batch * shape.heads)
    seen = None if mask is None else mask.view(torch.uint8)
    if query_rope is None:
        start(
            heads_kernel, grid,
            query, addresses, pages, count, seen, parts, part_lse, scale, shape.heads, shape.rows, shape.queries,
            all_rows, *strides,
            VALUE_WIDTH=width, D=block_width(query.shape[-1]), E=block_width(width), **settings,
        )  # fmt: skip
    else:
        rope = query_rope.shape[-1]
        start(
            latents_kernel, grid,
            query, query_rope, addresses, pages, count, seen, parts, part_lse, scale, shape.rows, shape.queries,
            all_rows, *strides,
            VALUE_WIDTH=rope, D=block_width(query.shape[-1]), E=block_width(rope), **settings,
        )  # fmt: skip
    start(
        merge_kernel, (all_rows,),
        parts, part_lse, out, lse, all_rows, launch.splits, WIDTH=width, E=block_width(width), num_warps=1,
    )  # fmt: skip
    return out, lse
