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
from ciuic_kernels.triton._product import part_of_strip, store_rows, sum_of_parts
from ciuic_kernels.work import LINEAR_SLOTS, WorkShape


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
    token = tile * BM + tl.arange(0, BM)
    x_rows = (x + tl.minimum(token, m - 1).to(tl.int64) * k)[None, :]
    matrix = strip.to(tl.int64) * 0
    total = part_of_strip(
        arena, work, matrix, strip, part, parts, x_rows, n, k, items, strips, items_at, strips_at,
        KINDS, BM, STAGES, PLAIN,
    )  # fmt: skip
    complete = parts == 1
    if parts > 1:
        slot = tile * strips + strip
        counter = work + counters_at + slot
        total, complete = sum_of_parts(total, workspace, counter, slot.to(tl.int64), part, parts, BM)
    if complete:
        if HAS_BIAS:
            row = strip * ROWS + tl.arange(0, ROWS)
            total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        store_rows(total, out, token, token < m, strip, n)


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
    tiles = ceil_div(tokens, launch.block_m)
    parts = launch.parts(shape.strips, shape.items, tiles) if tiles <= LINEAR_SLOTS else 1
    out = x.new_empty(tokens, rows)
    workspace = torch.empty(
        tiles * shape.strips * parts * BLOCK_ROWS * launch.block_m if parts > 1 else 0,
        dtype=torch.float32,
        device=x.device,
    )
    linear_kernel[(shape.strips, parts, tiles)](
        x, arena, work, bias, out, workspace, tokens, rows, cols, parts,
        shape.items, shape.strips, shape.items_at, shape.strips_at, shape.counters_at,
        HAS_BIAS=bias is not None, KINDS=tuple(kinds), BM=launch.block_m, STAGES=launch.num_stages,
        PLAIN=interpreted(), num_warps=launch.num_warps,
    )  # fmt: skip
    return out
