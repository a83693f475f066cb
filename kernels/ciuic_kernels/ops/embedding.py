"""``ciuic::embedding``: rows of a compressed table."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import use_native, use_triton
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.ops._define import define
from ciuic_kernels.packing import decode_strips


def embedding(
    ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gather rows of a compressed table ``[rows, cols]``; only the strips that are asked for are read.

    Args:
        ids: int64 or int32, any shape, each in ``[0, rows)``.
        arena, tags, offsets, work, kinds: as in ``ciuic::linear``.

    Returns:
        ``[*ids.shape, cols]`` of ``dtype``.

    Raises:
        IndexError: for an id outside the table (on a GPU it would need a synchronisation; there it gives NaN).
    """
    flat = ids.reshape(-1).long()
    if flat.device.type == "cpu" and flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < rows):
        raise IndexError(f"Token ids must be in [0, {rows}), got {int(flat.min())} to {int(flat.max())}.")
    if use_triton(arena.device):
        from ciuic_kernels.triton.embedding import embedding as gather  # the first kernel imports Triton

        rows_of_ids = gather(
            ids=flat.contiguous(),
            arena=arena,
            tags=tags,
            work=work,
            kinds=kinds,
            rows=rows,
            cols=cols,
            dtype=dtype,
        )
        return rows_of_ids.view(*ids.shape, cols)
    if use_native(arena.device):
        out = native.gather(arena, tags, offsets, rows, cols, flat.contiguous(), dtype)
        return out.view(*ids.shape, cols)
    out = torch.empty(flat.numel(), cols, dtype=dtype, device=arena.device)
    strips = flat // BLOCK_ROWS
    for strip in strips.unique().tolist():
        here = strips == strip
        band = decode_strips(arena, tags, offsets, (rows, cols), range(strip, strip + 1), dtype)
        out[here] = band[flat[here] % BLOCK_ROWS]
    return out.view(*ids.shape, cols)


def _fake(
    ids: Tensor,
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    work: Tensor,
    kinds: list[int],
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    return arena.new_empty((*ids.shape, cols), dtype=dtype)


embedding_op = define(embedding, _fake)
