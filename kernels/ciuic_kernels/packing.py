"""Whole parameters: encode a matrix into an arena by a choice of codecs, and decode it again.

The choice is a uint8 tensor of codec ids ``[..., strips, kblocks]``. It fixes the size of every record before any
weight is seen, so arenas are allocated once and matrices (experts) can be encoded into them as they arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_kernels.codec import codec_by_id
from ciuic_kernels.codecs.raw16 import RAW_FP16
from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import use_native
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS, BlockGrid, PackedTensor, empty_packed
from ciuic_kernels.layout import block_nbytes, planned_offsets, strip_offsets

CHUNK_WEIGHTS = 1 << 20  # the torch encoder holds about ten float32 temporaries of this many weights
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NotFiniteError(ValueError):
    """A weight is NaN or infinite."""


def allocate(codec_ids: Tensor, grid: BlockGrid, device: torch.device | str) -> tuple[PackedTensor, Tensor]:
    """Arena and tags for a choice of codecs.

    Returns:
        the PackedTensor (tags filled, exponents and arena not yet) and its strip offsets int64 on the CPU.
    """
    offsets = planned_offsets(codec_ids, grid)
    packed = empty_packed(grid, int(offsets[-1]), device)
    packed.tags[..., 0] = codec_ids.reshape(grid.tags_shape[:-1]).to(packed.tags.device)
    packed.tags[..., 1] = 0
    return packed, offsets


def encode_matrix(
    packed: PackedTensor, offsets: Tensor, index: int, source: Tensor, first_row: int = 0
) -> None:
    """Encode rows of one matrix of ``packed`` in place.

    Args:
        offsets: from :func:`allocate`.
        index: which matrix (expert); 0 for a plain weight.
        source: float32, bfloat16 or float16 ``[rows, K]``; rows are whole strips, or reach the last row.
        first_row: where these rows go, a multiple of 64.

    Raises:
        NotFiniteError: when a weight is NaN or infinite.
        ValueError: for rows that do not fit the grid, or a raw_fp16 block of weights that are not float16.
        TypeError: for a source that is not one of the three dtypes.
    """
    grid, strips = packed.grid, packed.grid.strips
    if source.dtype not in FLOAT_DTYPES:
        raise TypeError(f"Weights to encode must be float32, bfloat16 or float16, got {source.dtype}.")
    _check_rows(grid, source, first_row)
    first, count = first_row // BLOCK_ROWS, -(-source.shape[0] // BLOCK_ROWS)
    tags = packed.tags.view(grid.matrices, strips, grid.kblocks, 2)[index, first : first + count]
    if source.dtype != RAW_FP16.dtype and bool((tags[..., 0] == RAW_FP16.id).any()):
        raise ValueError(f"{RAW_FP16.name} blocks keep float16 weights only, got {source.dtype}.")
    here = offsets[index * strips + first : index * strips + first + count + 1]
    if use_native(source.device):
        source = source if source.stride(-1) == 1 else source.contiguous()
        if not native.encode(source, tags, here, packed.arena):
            raise NotFiniteError("not finite")
        return
    rows = max(1, CHUNK_WEIGHTS // (grid.cols * BLOCK_ROWS)) * BLOCK_ROWS
    for start in range(0, source.shape[0], rows):
        strip = start // BLOCK_ROWS
        _encode_rows(source[start : start + rows].float(), tags[strip:], int(here[strip]), packed.arena)


def _check_rows(grid: BlockGrid, source: Tensor, first_row: int) -> None:
    """Raises ValueError unless ``source`` is whole strips of a matrix, or its last rows."""
    last_row = first_row + source.shape[0]
    whole = first_row % BLOCK_ROWS == 0 and (last_row % BLOCK_ROWS == 0 or last_row == grid.rows)
    if (
        source.dim() != 2
        or source.shape[1] != grid.cols
        or not whole
        or not 0 <= first_row <= last_row <= grid.rows
    ):
        raise ValueError(
            f"Rows {first_row} to {last_row} of shape {list(source.shape)} are not whole strips of a matrix "
            f"[{grid.rows}, {grid.cols}]."
        )


def _encode_rows(source: Tensor, tags: Tensor, offset: int, arena: Tensor) -> None:
    """Torch encoder of some strips: blocks of equal size and codec are one batch."""
    if not torch.isfinite(source).all():
        raise NotFiniteError("not finite")
    grid = BlockGrid(tuple(source.shape))
    ids = tags[: grid.strips, :, 0].cpu()
    starts = record_starts(ids, grid, offset)
    for blocks, rows, cols, strips, kblocks in edge_batches(source, grid):
        for codec_id in ids[strips, kblocks].unique().tolist():
            chosen = (ids[strips, kblocks] == codec_id).nonzero(as_tuple=True)
            on_device = tuple(i.to(source.device) for i in chosen)
            records, exponents = codec_by_id(codec_id).encode(blocks[on_device])
            tags[strips, kblocks, 1][on_device] = exponents
            scatter(
                arena,
                starts[strips, kblocks][chosen],
                records,
                codec_by_id(codec_id).record_nbytes(rows, cols),
            )


def record_starts(ids: Tensor, grid: BlockGrid, offset: int) -> Tensor:
    """int64 ``[strips, kblocks]``: byte offset of each record."""
    sizes = block_nbytes(ids, grid)[0]
    ends = sizes.flatten().cumsum(0)
    return (ends - sizes.flatten()).view_as(sizes) + offset


def edge_batches(source: Tensor, grid: BlockGrid) -> list[tuple[Tensor, int, int, slice, slice]]:
    """The blocks of a matrix by size: views ``[strips, kblocks, rows, cols]`` with their place in the grid."""
    full_strips, full_kblocks = grid.rows // BLOCK_ROWS, grid.cols // BLOCK_COLS
    bands = [(0, full_strips, BLOCK_ROWS), (full_strips, grid.strips, grid.rows - full_strips * BLOCK_ROWS)]
    panels = [
        (0, full_kblocks, BLOCK_COLS),
        (full_kblocks, grid.kblocks, grid.cols - full_kblocks * BLOCK_COLS),
    ]
    batches = []
    for s0, s1, rows in bands:
        for k0, k1, cols in panels:
            if s1 > s0 and k1 > k0:
                part = source[s0 * BLOCK_ROWS :, k0 * BLOCK_COLS :][: (s1 - s0) * rows, : (k1 - k0) * cols]
                blocks = part.unflatten(0, (s1 - s0, rows)).unflatten(2, (k1 - k0, cols)).transpose(1, 2)
                batches.append((blocks, rows, cols, slice(s0, s1), slice(k0, k1)))
    return batches


def scatter(arena: Tensor, starts: Tensor, records: Tensor, nbytes: int) -> None:
    """Write records uint8 ``[B, nbytes]`` to their offsets, and zeros into the padding behind them."""
    padded = torch.nn.functional.pad(records, (0, -nbytes % 16))
    if padded.shape[1]:
        places = starts.to(arena.device)[:, None] + torch.arange(padded.shape[1], device=arena.device)
        arena[places] = padded


def encode_tensor(source: Tensor, codec_ids: Tensor) -> PackedTensor:
    """Encode a whole ``[N, K]`` or ``[E, N, K]`` tensor on its device. Raises NotFiniteError."""
    packed, offsets = allocate(codec_ids, BlockGrid(tuple(source.shape)), source.device)
    for index, matrix in enumerate(source if source.dim() == 3 else source.unsqueeze(0)):
        encode_matrix(packed, offsets, index, matrix)
    return packed


def decode_strips(
    arena: Tensor,
    tags: Tensor,
    offsets: Tensor,
    shape: tuple[int, int],
    strips: range,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Some strips of one matrix as floats, into ``out`` if given (contiguous).

    Args:
        tags: uint8 ``[strips, kblocks, 2]`` of the matrix.
        offsets: int64 strip offsets of the matrix into ``arena``.
        shape: ``(N, K)`` of the matrix.

    Returns:
        ``[rows of the strips, K]`` of ``dtype``, rounded once from float32.
    """
    rows, cols = shape
    height = min(rows, strips.stop * BLOCK_ROWS) - strips.start * BLOCK_ROWS
    if out is None:
        out = torch.empty(height, cols, dtype=dtype, device=arena.device)
    if use_native(arena.device):
        direct = out if dtype in native.DIRECT else torch.empty(height, cols)
        native.dequantize(arena, tags, offsets, rows, cols, strips, direct)
        return out if direct is out else out.copy_(direct)
    grid = BlockGrid((height, cols))
    ids, exponents = tags[strips.start : strips.stop, :, 0].cpu(), tags[strips.start : strips.stop, :, 1]
    starts = record_starts(ids, grid, int(offsets[strips.start]))
    for blocks, height, width, band, panel in edge_batches(out, grid):
        for codec_id in ids[band, panel].unique().tolist():
            chosen = (ids[band, panel] == codec_id).nonzero(as_tuple=True)
            on_device = tuple(i.to(arena.device) for i in chosen)
            codec = codec_by_id(codec_id)
            first = starts[band, panel][chosen].to(arena.device)
            nbytes = codec.record_nbytes(height, width)
            records = arena[first[:, None] + torch.arange(nbytes, device=arena.device)]
            values = codec.decode(records, exponents[band, panel][on_device], height, width)
            blocks[on_device] = values.to(dtype)
    return out


def decode_tensor(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole parameter as floats, ``[N, K]`` or ``[E, N, K]``."""
    grid = packed.grid
    offsets = strip_offsets(packed.tags, grid, packed.arena.numel())
    tags = packed.tags.view(grid.matrices, grid.strips, grid.kblocks, 2)
    matrices = [
        decode_strips(
            packed.arena,
            tags[i],
            offsets[i * grid.strips :],
            (grid.rows, grid.cols),
            range(grid.strips),
            dtype,
        )
        for i in range(grid.matrices)
    ]
    return torch.stack(matrices) if len(grid.shape) == 3 else matrices[0]
