"""What linear and expert_linear share: a matrix as dense bands, and inputs for the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import use_triton
from ciuic_kernels.format import BLOCK_ROWS, ceil_div
from ciuic_kernels.packing import decode_strips

SCRATCH_WEIGHTS = 4 << 20
"""Weights decoded at a time for a dense product: 8 MB in bfloat16 stay in a CPU's cache."""

GPU_SCRATCH_WEIGHTS = 64 << 20
"""The same on a GPU, 128 MB: bands that stay in its cache have too few rows to fill it (docs/adr/024)."""

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


def reshaped(fresh: Tensor, lead: torch.Size) -> Tensor:
    """``[M, N]`` as ``[*lead, N]`` and not as a view: autograd lets nobody write in place to an operator's view."""
    return torch.ops.aten._unsafe_view.default(fresh, [*lead, fresh.shape[1]])


def row_fan(operator: str, x: Tensor, expert_ids: Tensor) -> int:
    """How many expert rows each row of x serves: k for x ``[T, K]``, 1 for ``[T * k, K]``. Raises ValueError."""
    if x.dim() != 2 or expert_ids.dim() != 2 or x.shape[0] not in (expert_ids.shape[0], expert_ids.numel()):
        raise ValueError(
            f"{operator} needs x [T, K] or [T * k, K] and expert_ids [T, k], "
            f"got {list(x.shape)} and {list(expert_ids.shape)}."
        )
    return expert_ids.shape[1] if x.shape[0] == expert_ids.shape[0] else 1


class Matrix(NamedTuple):
    """One matrix ``[rows, cols]`` of a compressed parameter.

    Attributes:
        arena, work, kinds: of the whole parameter.
        tags: uint8 of the parameter, ``[strips, kblocks, 2]`` or ``[E, strips, kblocks, 2]``.
        offsets: int64, strip offsets of the parameter.
        which: which of its matrices.
    """

    arena: Tensor
    tags: Tensor
    offsets: Tensor
    work: Tensor
    kinds: list[int]
    rows: int
    cols: int
    which: int = 0

    @property
    def strips(self) -> int:
        return self.tags.shape[-3]

    def decode(self, strips: range, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Some strips as ``[rows of the strips, cols]``, each value rounded once from float32."""
        if use_triton(self.arena.device):
            from ciuic_kernels.triton.dequantize import dequantize  # the first kernel imports Triton

            return dequantize(
                arena=self.arena, tags=self.tags, work=self.work, kinds=self.kinds, rows=self.rows,
                cols=self.cols, strips=strips, dtype=dtype, matrix=self.which, out=out,
            )  # fmt: skip
        tags = self.tags.view(-1, *self.tags.shape[-3:])[self.which]
        offsets = self.offsets[self.which * self.strips :]
        return decode_strips(self.arena, tags, offsets, (self.rows, self.cols), strips, dtype, out)

    def bands(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The matrix as dense bands ``(row slice, [band, cols])`` of about equal size, within the scratch bound."""
        scratch = SCRATCH_WEIGHTS if self.arena.device.type == "cpu" else GPU_SCRATCH_WEIGHTS
        most = max(1, scratch // (self.cols * BLOCK_ROWS))
        step = ceil_div(self.strips, ceil_div(self.strips, most))
        for first in range(0, self.strips, step):
            band = self.decode(range(first, min(first + step, self.strips)), dtype)
            yield slice(first * BLOCK_ROWS, first * BLOCK_ROWS + band.shape[0]), band


def dense_product(x: Tensor, matrix: Matrix, out: Tensor | None = None) -> Tensor:
    """``x [M, K] @ W.T`` into ``[M, N]`` of x's dtype, one band of W at a time."""
    if out is None:
        out = x.new_empty(x.shape[0], matrix.rows)
    for band, weight in matrix.bands(x.dtype):
        torch.mm(x, weight.t(), out=out[:, band])  # a GEMM writes rows that are apart as well as others
    return out


def dense_transposed_product(grad: Tensor, matrix: Matrix) -> Tensor:
    """``grad [M, N] @ W`` into ``[M, K]``: the gradient with respect to x."""
    total = None
    for band, weight in matrix.bands(grad.dtype):
        part = torch.mm(grad[:, band], weight)
        if weight.shape[0] == matrix.rows:
            return part
        total = part.float() if total is None else total.add_(part)
    assert total is not None
    return total.to(grad.dtype)


def fused_product(x: Tensor, fan: int, groups: tuple[Tensor, Tensor, Tensor], matrix: Matrix) -> Tensor:
    """``native.products`` for any float dtype: ``[M * fan, N]`` of x's dtype."""
    direct = x if x.dtype in native.DIRECT else x.float()
    y = native.products(
        direct.contiguous(), fan, groups, matrix.arena, matrix.tags, matrix.offsets, matrix.rows
    )
    return y.to(x.dtype)
