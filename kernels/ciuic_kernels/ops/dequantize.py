"""``ciuic::dequantize``: a compressed parameter as a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.format import BlockGrid
from ciuic_kernels.ops._define import define
from ciuic_kernels.packing import decode_strips


def dequantize(
    arena: Tensor, tags: Tensor, offsets: Tensor, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """Decode every matrix.

    Args:
        arena: uint8 ``[nbytes]``.
        tags: uint8 ``[strips, kblocks, 2]`` or ``[E, strips, kblocks, 2]``.
        offsets: int64 ``[matrices * strips + 1]``, from ``layout.strip_offsets``.

    Returns:
        ``[rows, cols]`` or ``[E, rows, cols]`` of ``dtype``, each value rounded once from float32.
    """
    lead = tuple(tags.shape[:-3])
    grid = BlockGrid((*lead, rows, cols))
    by_matrix = tags.view(grid.matrices, grid.strips, grid.kblocks, 2)
    out = torch.empty(grid.shape, dtype=dtype, device=arena.device)
    for i, dense in enumerate(out.view(grid.matrices, rows, cols)):
        here = offsets[i * grid.strips :]
        decode_strips(arena, by_matrix[i], here, (rows, cols), range(grid.strips), dtype, out=dense)
    return out


def _fake(arena: Tensor, tags: Tensor, offsets: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return arena.new_empty((*tags.shape[:-3], rows, cols), dtype=dtype)


dequantize_op = define(dequantize, _fake)
