"""``ciuic::dequantize``: a compressed parameter as a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.format import BlockGrid
from ciuic_kernels.ops._define import define
from ciuic_kernels.ops._products import Matrix


def dequantize(
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode every matrix.

    Args:
        arena: uint8 ``[nbytes]``.
        tags: uint8 ``[strips, kblocks, 2]`` or ``[E, strips, kblocks, 2]``.
        offsets, work, kinds: from ``derived.derive``.

    Returns:
        ``[rows, cols]`` or ``[E, rows, cols]`` of ``dtype``, each value rounded once from float32.
    """
    grid = BlockGrid((*tags.shape[:-3], rows, cols))
    out = torch.empty(grid.shape, dtype=dtype, device=arena.device)
    for index, dense in enumerate(out.view(grid.matrices, rows, cols)):
        matrix = Matrix(arena, tags, offsets, work, kinds, rows, cols, index)
        matrix.decode(range(grid.strips), dtype, out=dense)
    return out


def _fake(
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    return arena.new_empty((*tags.shape[:-3], rows, cols), dtype=dtype)


dequantize_op = define(dequantize, _fake)
