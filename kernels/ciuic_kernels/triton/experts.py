"""Products of routed rows with compressed fused experts ``[E, N, K]``: only experts that are routed to are read.

No list of experts ever reaches the host, so the grid is fixed by the number of rows alone and can be captured in a
CUDA graph. Two kernels, by the number P of pairs (row, expert):

few (P <= 64)   one program for each part of a strip and pair. The first pair of an expert serves all its pairs, up
                to ``BM`` (the next BM by the pair after them, and so on); programs of other pairs leave at once.
many            pairs are sorted by expert and cut into tiles of BM; one program for each strip and tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.format import BLOCK_ROWS
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
from ciuic_kernels.work import ROUTED_SLOTS, WorkShape, compiled_kinds

_SIZES = ["pairs", "fan", "experts", "parts", "items", "strips", "items_at", "strips_at", "counters_at"]


@triton.jit
def members_of(ids, pairs, expert, pair, BM: tl.constexpr, PAIRS: tl.constexpr):
    """The pairs that this pair's program serves.

    Returns:
        how many pairs of the same expert come before this one, how many there are, and int32 ``[BM]``: the pairs
        from this one on.
    """
    place = tl.arange(0, PAIRS)
    same = (tl.load(ids + place, mask=place < pairs, other=-1) == expert) & (place < pairs)
    before = tl.sum((same & (place < pair)).to(tl.int32), 0)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    wanted = before + tl.arange(0, BM)
    chosen = same[None, :] & (rank[None, :] == wanted[:, None])
    members = tl.sum(tl.where(chosen, place[None, :], 0), 1)
    return before, tl.sum(same.to(tl.int32), 0), members


@triton.jit
def rows_of_pairs(x, members, fan, k):
    """Pointers ``[1, BM]`` to the rows of x of some pairs, int32 ``[BM]``."""
    return (x + (members // fan).to(tl.int64) * k)[None, :]


@triton.jit(noinline=True)
def few_run(
    x,
    ids,
    arena,
    work,
    sums,
    first,
    count,
    stored,
    strip,
    pair,
    n,
    k,
    pairs,
    fan,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Blocks of one kind times the rows of a pair's expert, into ``sums`` like ``linear.linear_run``."""
    before, number, members = members_of(ids, pairs, tl.load(ids + pair), pair, BM, PAIRS)
    members = tl.where(tl.arange(0, BM) < number - before, members, pair)
    total = tl.zeros((ROWS, BM), tl.float32)
    blocks = work + 2 * first.to(tl.int64)
    x_rows = rows_of_pairs(x, members, fan, k)
    total = add_blocks(total, arena, blocks, count, x_rows, strip, n, k, KIND, BM, STAGES, PLAIN)
    at = tile_of(sums, BM)
    if stored > 0:
        total += tl.load(at)
    tl.store(at, total)


@triton.jit(do_not_specialize=_SIZES)
def few_kernel(
    x,
    ids,
    arena,
    work,
    out,
    workspace,
    n,
    k,
    pairs,
    fan,
    experts,
    parts,
    items,
    strips,
    items_at,
    strips_at,
    counters_at,
    KINDS: tl.constexpr,
    BM: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    strip = tl.program_id(0)
    part = tl.program_id(1)
    pair = tl.program_id(2)
    expert = tl.load(ids + pair)
    slot = tl.arange(0, BM)
    if (expert < 0) | (expert >= experts):
        if part == 0:
            store_rows(tl.zeros((ROWS, BM), tl.float32), out, slot * 0 + pair, slot == 0, strip, n)
    else:
        before, count, members = members_of(ids, pairs, expert, pair, BM, PAIRS)
        if before % BM == 0:
            valid = slot < count - before
            members = tl.where(valid, members, pair)
            place = pair * strips + strip
            MIXED: tl.constexpr = len(KINDS) > 1
            if MIXED:
                sums = workspace + (place.to(tl.int64) * parts + part) * (ROWS * BM)
                base, at, end = share_of_strip(
                    work, expert.to(tl.int64), strip, part, parts, items, strips, strips_at
                )
                item = work + items_at + 3 * base
                stored = part * 0
                for i in tl.static_range(len(KINDS)):
                    first, number, at = next_run(item, at, end, KINDS[i])
                    if number > 0:
                        few_run(
                            x, ids, arena, work, sums, first, number, stored, strip, pair, n, k, pairs, fan,
                            KINDS[i], BM, PAIRS, STAGES, PLAIN,
                        )  # fmt: skip
                        stored = 1 + part * 0
                        tl.debug_barrier()  # the next function may give other elements to a thread
                total = tl.zeros((ROWS, BM), tl.float32)
                if stored == 0:
                    tl.store(tile_of(sums, BM), total)
                    tl.debug_barrier()
            elif len(KINDS) == 1:
                total = part_of_strip(
                    arena, work, expert.to(tl.int64), strip, part, parts, rows_of_pairs(x, members, fan, k), n, k,
                    items, strips, items_at, strips_at, KINDS[0], BM, STAGES, PLAIN,
                )  # fmt: skip
            else:
                total = tl.zeros((ROWS, BM), tl.float32)
            complete = parts == 1
            if parts > 1:
                counter = work + counters_at + place
                total, complete = sum_of_parts(
                    total, workspace, counter, place.to(tl.int64), part, parts, BM, MIXED
                )
            elif MIXED:
                total = tl.load(tile_of(sums, BM))
            if complete:
                store_rows(total, out, members, valid, strip, n)


@triton.jit(noinline=True)
def many_run(
    x,
    order,
    arena,
    work,
    out,
    first,
    count,
    strip,
    place,
    number,
    n,
    k,
    fan,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Blocks of one kind times a tile of pairs, added to their rows of ``out [P, n]``, float32."""
    valid = tl.arange(0, BM) < number
    members = tl.load(order + place + tl.arange(0, BM), mask=valid, other=0)
    total = tl.zeros((ROWS, BM), tl.float32)
    blocks = work + 2 * first.to(tl.int64)
    x_rows = rows_of_pairs(x, members, fan, k)
    total = add_blocks(total, arena, blocks, count, x_rows, strip, n, k, KIND, BM, STAGES, PLAIN)
    row = strip * ROWS + tl.arange(0, ROWS)
    at = out + members[None, :].to(tl.int64) * n + row[:, None]
    mask = (row < n)[:, None] & valid[None, :]
    tl.store(at, total + tl.load(at, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["fan", "experts", "items", "strips", "items_at", "strips_at"])
def many_kernel(
    x,
    order,
    tiles,
    arena,
    work,
    out,
    n,
    k,
    fan,
    experts,
    items,
    strips,
    items_at,
    strips_at,
    KINDS: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    strip = tl.program_id(0)
    tile = tiles + 3 * tl.program_id(1)
    expert = tl.load(tile)
    if expert < experts:
        place = tl.load(tile + 1)
        number = tl.load(tile + 2)
        if len(KINDS) > 1:
            base, at, end = share_of_strip(work, expert.to(tl.int64), strip, 0, 1, items, strips, strips_at)
            item = work + items_at + 3 * base
            for i in tl.static_range(len(KINDS)):
                first, count, at = next_run(item, at, end, KINDS[i])
                if count > 0:
                    many_run(
                        x, order, arena, work, out, first, count, strip, place, number, n, k, fan,
                        KINDS[i], BM, STAGES, PLAIN,
                    )  # fmt: skip
                    tl.debug_barrier()  # the next function may give other elements to a thread
        elif len(KINDS) == 1:
            valid = tl.arange(0, BM) < number
            members = tl.load(order + place + tl.arange(0, BM), mask=valid, other=0)
            total = part_of_strip(
                arena, work, expert.to(tl.int64), strip, 0, 1, rows_of_pairs(x, members, fan, k), n, k,
                items, strips, items_at, strips_at, KINDS[0], BM, STAGES, PLAIN,
            )  # fmt: skip
            store_rows(total, out, members, valid, strip, n)


def tiles_by_expert(expert_ids: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert and cut them into tiles, without the host learning how many.

    Args:
        expert_ids: int64 ``[P]``; ids outside ``[0, experts)`` are in no tile.

    Returns:
        int32 ``[P]``, pairs in the order of their experts, and int32 ``[T, 3]``: expert, first place in that order
        and number of pairs of each tile; T is an upper bound, spare tiles have expert ``experts``.
    """
    pairs = expert_ids.numel()
    clean = torch.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts)
    order = torch.argsort(clean, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=clean.device)
    counts.scatter_add_(0, clean, torch.ones_like(clean))
    starts = counts.cumsum(0) - counts
    tiles = (counts + block_m - 1) // block_m
    ends = tiles[:experts].cumsum(0)
    index = torch.arange(pairs // block_m + min(experts, pairs), device=clean.device)
    expert = torch.searchsorted(ends, index, right=True)
    inside = (index - (ends - tiles[:experts])[expert.clamp_max(experts - 1)]) * block_m
    count = (counts[expert] - inside).clamp(0, block_m)
    table = torch.stack([expert, starts[expert] + inside, count], dim=1)
    return order.to(torch.int32), table.to(torch.int32)


def expert_linear(
    *,
    x: Tensor,
    fan: int,
    expert_ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    launch: Launch,
) -> Tensor:
    """Row ``p // fan`` of ``x`` times the matrix of ``expert_ids[p]``, as ``[P, rows]`` of x's dtype.

    Args:
        x: float16 or bfloat16 ``[P / fan, K]``, contiguous.
        expert_ids: int64 ``[P]``; ids outside ``[0, E)`` give rows of zeros.
        work, kinds: from ``work.build_work``.
    """
    shape, pairs, cols = WorkShape.of(work, tags), expert_ids.numel(), x.shape[1]
    compiled = compiled_kinds(tuple(kinds))
    mixed = len(compiled) > 1
    launch = launch.of_kinds(len(compiled))
    settings = {
        "KINDS": compiled,
        "BM": launch.block_m,
        "STAGES": launch.num_stages,
        "PLAIN": interpreted(),
        "num_warps": launch.num_warps,
    }
    if pairs <= ROUTED_SLOTS:
        parts = launch.parts(shape.strips, shape.items, pairs)
        out = x.new_empty(pairs, rows)
        sums = pairs * shape.strips * parts * BLOCK_ROWS * launch.block_m if parts > 1 or mixed else 0
        workspace = torch.empty(sums, dtype=torch.float32, device=x.device)
        start(
            few_kernel, (shape.strips, parts, pairs),
            x, expert_ids, arena, work, out, workspace, rows, cols, pairs, fan, shape.matrices, parts,
            shape.items, shape.strips, shape.items_at, shape.strips_at, shape.counters_at,
            PAIRS=ROUTED_SLOTS, **settings,
        )  # fmt: skip
        return out
    # Functions of several kinds add to the result one after another, which only float32 keeps exact.
    out = x.new_zeros(pairs, rows, dtype=torch.float32 if mixed else x.dtype)
    order, tiles = tiles_by_expert(expert_ids, shape.matrices, launch.block_m)
    start(
        many_kernel, (shape.strips, tiles.shape[0]),
        x, order, tiles, arena, work, out, rows, cols, fan, shape.matrices,
        shape.items, shape.strips, shape.items_at, shape.strips_at, **settings,
    )  # fmt: skip
    return out.to(x.dtype)
