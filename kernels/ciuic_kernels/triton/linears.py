"""Up to three products ``x @ W.T + bias`` with the same x in one launch.

Grid: strips of 64 rows of all matrices, one matrix after another, x parts of a strip x tiles of ``BM`` tokens. A
program finds its matrix from its number and then does what a program of ``linear.py`` does. Traffic is theirs; what
is saved are launches, and a GPU that is not filled by a matrix of few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_kernels.format import BLOCK_ROWS, ceil_div
from ciuic_kernels.selection import MAX_SHARED, Launch
from ciuic_kernels.triton._blocks import COLS, ROWS, interpreted
from ciuic_kernels.triton._launch import start
from ciuic_kernels.triton.linear import multiply_strip
from ciuic_kernels.work import LINEAR_SLOTS, WorkShape, compiled_kinds


@triton.jit
def one_of(which, a, b, c):
    """The value or pointer of matrix ``which``."""
    return tl.where(which == 0, a, tl.where(which == 1, b, c))


@triton.jit(do_not_specialize=["m", "n_a", "n_b", "n_c", "parts", "items_a", "items_b", "items_c"])
def linears_kernel(
    x,
    arena_a,
    arena_b,
    arena_c,
    work_a,
    work_b,
    work_c,
    bias_a,
    bias_b,
    bias_c,
    out_a,
    out_b,
    out_c,
    workspace,
    m,
    n_a,
    n_b,
    n_c,
    k,
    parts,
    items_a,
    items_b,
    items_c,
    BIASED: tl.constexpr,
    KINDS: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """``BIASED`` has bit i set when matrix i has a bias; the pointers of the others may be any bias."""
    strip = tl.program_id(0)
    part = tl.program_id(1)
    tile = tl.program_id(2)
    place = tile * tl.num_programs(0) + strip
    strips_a = (n_a + ROWS - 1) // ROWS
    strips_b = (n_b + ROWS - 1) // ROWS
    which = (strip >= strips_a).to(tl.int32) + (strip >= strips_a + strips_b).to(tl.int32)
    strip -= one_of(which, 0, strips_a, strips_a + strips_b)
    arena = one_of(which, arena_a, arena_b, arena_c)
    work = one_of(which, work_a, work_b, work_c)
    out = one_of(which, out_a, out_b, out_c)
    n = one_of(which, n_a, n_b, n_c)
    items = one_of(which, items_a, items_b, items_c)
    bias = bias_a
    biased = 0
    if BIASED:
        bias = one_of(which, bias_a, bias_b, bias_c)
        biased = n * ((BIASED >> which) & 1)
    strips = (n + ROWS - 1) // ROWS  # the places of WorkShape
    items_at = 2 * strips * ((k + COLS - 1) // COLS)
    strips_at = items_at + 3 * items
    counter = work + strips_at + 2 * strips + tile * strips + strip
    multiply_strip(
        x, arena, work, bias, out, workspace, counter, place, strip, part, tile, m, n, k, biased, parts,
        items, strips, items_at, strips_at, BIASED != 0, KINDS, BM, STAGES, PLAIN,
    )  # fmt: skip


def linears(
    *,
    x: Tensor,
    arenas: Sequence[Tensor],
    tags: Sequence[Tensor],
    works: Sequence[Tensor],
    kinds: Sequence[int],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    launch: Launch,
) -> list[Tensor]:
    """``x [M, K] @ W.T + bias`` for two or three matrices, each ``[M, rows]`` of x's dtype and contiguous.

    Args:
        x: float16 or bfloat16, contiguous.
        works: from ``work.build_work``.
        kinds: of all of them together, ascending.
        biases: ``[rows]`` or None each, those that exist of one dtype.
        launch: for all of them together.
    """
    shapes = [WorkShape.of(*pair) for pair in zip(works, tags, strict=True)]
    tokens, cols = x.shape
    compiled = compiled_kinds(tuple(kinds))
    launch = launch.of_kinds(len(compiled))
    tiles, strips = ceil_div(tokens, launch.block_m), sum(shape.strips for shape in shapes)
    most = max(ceil_div(shape.items, shape.strips) for shape in shapes)
    parts = launch.parts(strips, most * strips, tiles) if tiles <= LINEAR_SLOTS else 1
    outs = [x.new_empty(tokens, n) for n in rows]
    shared = parts > 1 or len(compiled) > 1
    sums = tiles * strips * parts * BLOCK_ROWS * launch.block_m if shared else 0
    workspace = torch.empty(sums, dtype=torch.float32, device=x.device)
    any_bias = next((bias for bias in biases if bias is not None), None)
    biased = sum(1 << place for place, bias in enumerate(biases) if bias is not None)
    start(
        linears_kernel, (strips, parts, tiles),
        x, *_three(arenas), *_three(works), *_three([any_bias if b is None else b for b in biases]), *_three(outs),
        workspace, tokens, *_three(rows, 0), cols, parts, *_three([shape.items for shape in shapes], 0),
        BIASED=biased, KINDS=compiled, BM=launch.block_m, STAGES=launch.num_stages,
        PLAIN=interpreted(), num_warps=launch.num_warps,
    )  # fmt: skip
    return outs


def _three(values: Sequence[Any], missing: Any = None) -> list[Any]:
    """Two or three values as three: the last one again, or ``missing``, for a matrix that is not there."""
    spare = values[-1] if missing is None else missing
    return [*values, *[spare] * (MAX_SHARED - len(values))]
