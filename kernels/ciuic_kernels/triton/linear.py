"""``x @ W.T + bias`` straight from compressed blocks.

Grid: strips of 64 rows x parts of a strip x tiles of ``BM`` tokens. Traffic: every record once for each tile of
tokens, x once for each strip (from L2), and the partial sums of strips that several programs share. Those leave
their sums in a workspace, and the last to arrive adds them in order, so results do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.format import BLOCK_ROWS, ceil_div
from ciuic_kernels.selection import Launch
from ciuic_kernels.triton._blocks import ROWS, interpreted
from ciuic_kernels.triton._launch import start
from ciuic_kernels.triton._product import (
    add_blocks,
    next_run,
    part_of_strip,
    share_of_strip,
    store_rows,
    sum_of_parts,
    tile_of,
)
from ciuic_kernels.work import LINEAR_SLOTS, WorkShape, compiled_kinds


@triton.jit
def rows_of_x(x, tile, m, k, BM: tl.constexpr):
    """Pointers ``[1, BM]`` to the tokens of a tile; those past the end are the last one."""
    token = tile * BM + tl.arange(0, BM)
    return (x + tl.minimum(token, m - 1).to(tl.int64) * k)[None, :]


@triton.jit(noinline=True)
def linear_run(
    x,
    arena,
    work,
    sums,
    first,
    count,
    stored,
    strip,
    tile,
    m,
    n,
    k,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Blocks of one kind times a tile of tokens: added to ``sums`` if something is stored there, else stored."""
    total = tl.zeros((ROWS, BM), tl.float32)
    x_rows = rows_of_x(x, tile, m, k, BM)
    blocks = work + 2 * first.to(tl.int64)
    total = add_blocks(total, arena, blocks, count, x_rows, strip, n, k, KIND, BM, STAGES, PLAIN)
    at = tile_of(sums, BM)
    if stored > 0:
        total += tl.load(at)
    tl.store(at, total)


@triton.jit
def multiply_strip(
    x,
    arena,
    work,
    bias,
    out,
    workspace,
    counter,
    place,
    strip,
    part,
    tile,
    m,
    n,
    k,
    biased,
    parts,
    items,
    strips,
    items_at,
    strips_at,
    HAS_BIAS: tl.constexpr,
    KINDS: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One part of a strip times a tile of tokens; the last part to arrive stores the rows of ``out [m, n]``.

    Args:
        counter: pointer to the counter of the strip and tile.
        place: number of the strip and tile in the launch, which is where the workspace has their sums.
        biased: rows of ``bias``.
    """
    token = tile * BM + tl.arange(0, BM)
    x_rows = rows_of_x(x, tile, m, k, BM)
    matrix = strip.to(tl.int64) * 0
    MIXED: tl.constexpr = len(KINDS) > 1
    if MIXED:
        sums = workspace + (place.to(tl.int64) * parts + part) * (ROWS * BM)
        base, at, end = share_of_strip(work, matrix, strip, part, parts, items, strips, strips_at)
        item = work + items_at + 3 * base
        stored = part * 0
        for i in tl.static_range(len(KINDS)):
            first, count, at = next_run(item, at, end, KINDS[i])
            if count > 0:
                linear_run(
                    x, arena, work, sums, first, count, stored, strip, tile, m, n, k, KINDS[i], BM, STAGES, PLAIN
                )  # fmt: skip
                stored = 1 + part * 0
                tl.debug_barrier()  # the next function may give other elements to a thread
        total = tl.zeros((ROWS, BM), tl.float32)
        if stored == 0:
            tl.store(tile_of(sums, BM), total)
            tl.debug_barrier()
    elif len(KINDS) == 1:
        total = part_of_strip(
            arena, work, matrix, strip, part, parts, x_rows, n, k, items, strips, items_at, strips_at,
            KINDS[0], BM, STAGES, PLAIN,
        )  # fmt: skip
    else:
        total = tl.zeros((ROWS, BM), tl.float32)
    complete = parts == 1
    if parts > 1:
        total, complete = sum_of_parts(total, workspace, counter, place.to(tl.int64), part, parts, BM, MIXED)
    elif MIXED:
        total = tl.load(tile_of(sums, BM))
    if complete:
        if HAS_BIAS:
            row = strip * ROWS + tl.arange(0, ROWS)
            total += tl.load(bias + row, mask=row < biased, other=0.0).to(tl.float32)[:, None]
        store_rows(total, out, token, token < m, strip, n)


@triton.jit(do_not_specialize=["m", "parts", "items", "strips", "items_at", "strips_at", "counters_at"])
def linear_kernel(
    x,
    arena,
    work,
    bias,
    out,
    workspace,
    m,
    n,
    k,
    parts,
    items,
    strips,
    items_at,
    strips_at,
    counters_at,
    HAS_BIAS: tl.constexpr,
    KINDS: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    strip = tl.program_id(0)
    part = tl.program_id(1)
    tile = tl.program_id(2)
    place = tile * strips + strip
    counter = work + counters_at + place
    multiply_strip(
        x, arena, work, bias, out, workspace, counter, place, strip, part, tile, m, n, k, n, parts,
        items, strips, items_at, strips_at, HAS_BIAS, KINDS, BM, STAGES, PLAIN,
    )  # fmt: skip


def linear(
    *,
    x: Tensor,
    arena: Tensor,
    tags: Tensor,
    work: Tensor,
    kinds: list[int],
    bias: Tensor | None,
    rows: int,
    launch: Launch,
) -> Tensor:
    """``x [M, K] @ W.T + bias`` as ``[M, rows]`` of x's dtype.

    Args:
        x: float16 or bfloat16, contiguous.
        work, kinds: from ``work.build_work``.
        bias: ``[rows]`` or None.
    """
    shape, (tokens, cols) = WorkShape.of(work, tags), x.shape
    compiled = compiled_kinds(tuple(kinds))
    launch = launch.of_kinds(len(compiled))
    tiles = ceil_div(tokens, launch.block_m)
    parts = launch.parts(shape.strips, shape.items, tiles) if tiles <= LINEAR_SLOTS else 1
    out = x.new_empty(tokens, rows)
    sums = tiles * shape.strips * parts * BLOCK_ROWS * launch.block_m
    workspace = torch.empty(
        sums if parts > 1 or len(compiled) > 1 else 0, dtype=torch.float32, device=x.device
    )
    start(
        linear_kernel, (shape.strips, parts, tiles),
        x, arena, work, bias, out, workspace, tokens, rows, cols, parts,
        shape.items, shape.strips, shape.items_at, shape.strips_at, shape.counters_at,
        HAS_BIAS=bias is not None, KINDS=compiled, BM=launch.block_m, STAGES=launch.num_stages,
        PLAIN=interpreted(), num_warps=launch.num_warps,
    )  # fmt: skip
    return out
