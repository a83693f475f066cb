"""Where every record of an arena lies, derived from the tags and checked against the arena."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ciuic_kernels.codec import all_codecs, codec_by_id, codec_count
from ciuic_kernels.format import (
    BLOCK_COLS,
    BLOCK_ROWS,
    MAX_MATRIX_BYTES,
    BlockGrid,
    PackedTensor,
    aligned,
)

MAX_EXPONENT = 244  # the largest block exponent whose weights are finite (codecs/grid.py)


class FormatError(ValueError):
    """Tags, sizes or bytes that do not add up to a valid compressed parameter."""


def record_size_table(grid: BlockGrid) -> Tensor:
    """int64 ``[256, 2, 2]``: aligned record bytes by codec id, last strip or not, last kblock or not; -1 = unknown."""
    return _size_table(codec_count(), grid.strip_rows(grid.strips - 1), grid.block_cols(grid.kblocks - 1))


@lru_cache(maxsize=256)
def _size_table(codecs: int, last_rows: int, last_cols: int) -> Tensor:
    """``codecs``, how many there are, makes a codec that is registered later count."""
    table = torch.full((256, 2, 2), -1, dtype=torch.int64, device="cpu")
    for codec in all_codecs():
        for i, rows in enumerate((BLOCK_ROWS, last_rows)):
            for j, cols in enumerate((BLOCK_COLS, last_cols)):
                table[codec.id, i, j] = aligned(codec.record_nbytes(rows, cols))
    return table


def block_nbytes(codec_ids: Tensor, grid: BlockGrid) -> Tensor:
    """Record bytes of each block.

    Args:
        codec_ids: uint8 ``[..., strips, kblocks]``.

    Returns:
        int64 ``[matrices, strips, kblocks]``.

    Raises:
        FormatError: for an id that no codec has.
    """
    ids = codec_ids.reshape(grid.matrices, grid.strips, grid.kblocks).long()
    table = record_size_table(grid).to(ids.device)
    nbytes = table[ids, 0, 0]
    nbytes[:, -1, :] = table[ids[:, -1, :], 1, 0]
    nbytes[:, :, -1] = table[ids[:, :, -1], 0, 1]
    nbytes[:, -1, -1] = table[ids[:, -1, -1], 1, 1]
    if int(nbytes.min()) < 0:
        unknown = int(ids[nbytes < 0][0])
        try:
            codec_by_id(unknown)
        except ValueError as error:
            raise FormatError(str(error)) from None
    return nbytes


def planned_offsets(codec_ids: Tensor, grid: BlockGrid) -> Tensor:
    """Byte offset of every strip for a choice of codecs, before there are tags.

    Returns:
        int64 ``[matrices * strips + 1]`` on the CPU, shared between calls: do not write to it. The last entry is
        the size of the arena.
    """
    # The layers of a model repeat a few shapes, and so their choices.
    return _planned_offsets(codec_ids.cpu().contiguous().numpy().tobytes(), grid)


@lru_cache(maxsize=256)
def _planned_offsets(codec_ids: bytes, grid: BlockGrid) -> Tensor:
    ids = torch.frombuffer(bytearray(codec_ids), dtype=torch.uint8)
    return _running_sum(block_nbytes(ids, grid).sum(dim=2))


def _running_sum(sizes: Tensor) -> Tensor:
    """int64 ``[n + 1]``: where each of ``sizes`` starts, and where the last one ends."""
    offsets = torch.zeros(sizes.numel() + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes.flatten(), dim=0, out=offsets[1:])
    return offsets


def arena_nbytes(codec_ids: Tensor, grid: BlockGrid) -> int:
    """Bytes of the arena that these blocks need."""
    return int(planned_offsets(codec_ids, grid)[-1])


def strip_offsets(tags: Tensor, grid: BlockGrid, nbytes: int) -> Tensor:
    """Byte offset of every strip in the arena, validated.

    Args:
        tags: uint8 ``[..., strips, kblocks, 2]``.
        nbytes: size of the arena.

    Returns:
        int64 ``[matrices * strips + 1]`` on the device of ``tags``; the last entry is ``nbytes``.

    Raises:
        FormatError: when tags have the wrong shape, name no codec, hold a scale exponent that is not finite, or
            do not add up to ``nbytes``. Nothing that passes can make a kernel read outside the arena.
    """
    if tuple(tags.shape) != grid.tags_shape or tags.dtype != torch.uint8:
        raise FormatError(
            f"Tags of a parameter {list(grid.shape)} must be uint8 {list(grid.tags_shape)}, "
            f"got {tags.dtype} {list(tags.shape)}."
        )
    if int(tags[..., 1].max()) > MAX_EXPONENT:
        raise FormatError(
            f"A block has scale exponent {int(tags[..., 1].max())}; the largest is {MAX_EXPONENT}."
        )
    sizes = block_nbytes(tags[..., 0], grid)
    if int(sizes.sum(dim=(1, 2)).max()) > MAX_MATRIX_BYTES:
        raise FormatError(f"A matrix needs more than {MAX_MATRIX_BYTES} bytes; split it or use fewer bits.")
    offsets = _running_sum(sizes.sum(dim=2))
    if int(offsets[-1]) != nbytes:
        raise FormatError(
            f"The tags describe {int(offsets[-1])} bytes of blocks but the arena has {nbytes}. "
            "The file is damaged or truncated."
        )
    return offsets


def validate(packed: PackedTensor) -> Tensor:
    """Check a PackedTensor and return its strip offsets. Raises FormatError."""
    if packed.arena.dtype != torch.uint8 or packed.arena.dim() != 1:
        raise FormatError(f"An arena must be 1-D uint8, got {packed.arena.dtype} {list(packed.arena.shape)}.")
    return strip_offsets(packed.tags, packed.grid, packed.arena.numel())
