"""What linear and expert_linear share: dense products strip by strip, and inputs for the compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ciuic_kernels.cpu import native
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.packing import decode_strips

SCRATCH_WEIGHTS = 4 << 20
"""Weights decoded at a time for a dense product: bounds the scratch at 8 MB in bfloat16."""

NATIVE_ROWS = 12
"""Rows of x up to which the fused kernel beats decode-then-GEMM on a CPU (docs/adr/003)."""


def check_input(x: Tensor, cols: int, arena: Tensor) -> None:
    """Raises ValueError when ``x`` cannot be multiplied with a matrix of ``cols`` columns on the arena's device."""
    if x.shape[-1] != cols:
        raise ValueError(
            f"x has {x.shape[-1]} features in its last dimension, the compressed weight needs {cols}."
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}.")
    if x.device != arena.device:
        raise ValueError(f"x is on {x.device}, the compressed weight on {arena.device}; move one of them.")


def dense_strips(
    arena: Tensor, tags: Tensor, offsets: Tensor, rows: int, cols: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """One matrix as dense bands ``(row slice, [band, cols])``, each within the scratch bound."""
    step = max(1, SCRATCH_WEIGHTS // (cols * BLOCK_ROWS))
    for first in range(0, tags.shape[0], step):
        strips = range(first, min(first + step, tags.shape[0]))
        band = decode_strips(arena, tags, offsets, (rows, cols), strips, dtype)
        yield slice(first * BLOCK_ROWS, first * BLOCK_ROWS + band.shape[0]), band


def dense_product(
    x: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, rows: int, out: Tensor | None = None
) -> Tensor:
    """``x [M, K] @ W.T`` into ``[M, rows]`` of x's dtype, one band of W at a time."""
    if out is None:
        out = x.new_empty(x.shape[0], rows)
    for band, weight in dense_strips(arena, tags, offsets, rows, x.shape[1], x.dtype):
        if weight.shape[0] == rows:
            return torch.mm(x, weight.t(), out=out)
        out[:, band] = torch.mm(x, weight.t())
    return out


def dense_transposed_product(grad: Tensor, arena: Tensor, tags: Tensor, offsets: Tensor, cols: int) -> Tensor:
    """``grad [M, N] @ W`` into ``[M, cols]``: the gradient with respect to x."""
    total = torch.zeros(grad.shape[0], cols, dtype=torch.float32, device=grad.device)
    for band, weight in dense_strips(arena, tags, offsets, grad.shape[1], cols, grad.dtype):
        total += torch.mm(grad[:, band], weight)
    return total.to(grad.dtype)


def fused_product(
    x: Tensor,
    fan: int,
    groups: tuple[Tensor, Tensor, Tensor],
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    rows: int,
) -> Tensor:
    """``native.products`` for any float dtype: ``[M * fan, rows]`` of x's dtype."""
    direct = x if x.dtype in native.DIRECT else x.float()
    return native.products(direct.contiguous(), fan, groups, arena, tags, offsets, rows).to(x.dtype)
