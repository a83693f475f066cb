"""The block format: how a matrix is cut into blocks and where each block's record lies.

A weight matrix ``[N, K]`` is cut into blocks of 64 output rows x 128 input columns. Blocks at the lower and
right edge are smaller and store no padding. Each block is one *record* in the *arena*, a 1-D uint8 tensor that
holds all records of a parameter in order (matrix, strip of 64 rows, block of 128 columns), each padded to 16
bytes. The *tags*, uint8 ``[..., strips, kblocks, 2]``, hold two bytes for each block: its codec id and its scale
exponent. Offsets are never stored: they are the running sum of the record sizes, so no file can make them point
outside the arena. See ``docs/checkpoint-format.md`` for every byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT_VERSION = 1
BLOCK_ROWS = 64
BLOCK_COLS = 128
ALIGNMENT = 16
MAX_MATRIX_BYTES = 1 << 32  # a block pointer has 28 bits of 16-byte units


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the 16-byte alignment of records."""
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of ``matrices`` equal matrices of shape ``[rows, cols]``. Pure integers.

    ``shape`` is the logical shape of the parameter: ``[N, K]``, or ``[E, N, K]`` for fused experts.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(
                f"A block grid needs a shape [N, K] or [E, N, K] of positive sizes, got {list(self.shape)}."
            )

    @property
    def matrices(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def strips(self) -> int:
        return ceil_div(self.rows, BLOCK_ROWS)

    @property
    def kblocks(self) -> int:
        return ceil_div(self.cols, BLOCK_COLS)

    @property
    def blocks(self) -> int:
        """Blocks of one matrix."""
        return self.strips * self.kblocks

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def tags_shape(self) -> tuple[int, ...]:
        lead = self.shape[:1] if len(self.shape) == 3 else ()
        return (*lead, self.strips, self.kblocks, 2)

    @property
    def tags_nbytes(self) -> int:
        return self.matrices * self.blocks * 2

    def strip_rows(self, strip: int) -> int:
        """Rows of one strip: 64, fewer in the last."""
        return min(BLOCK_ROWS, self.rows - strip * BLOCK_ROWS)

    def block_cols(self, kblock: int) -> int:
        """Columns of one block: 128, fewer in the last."""
        return min(BLOCK_COLS, self.cols - kblock * BLOCK_COLS)


@dataclass
class PackedTensor:
    """One compressed parameter.

    Attributes:
        shape: logical shape, ``(N, K)`` or ``(E, N, K)``.
        arena: uint8 ``[nbytes]``, all block records.
        tags: uint8 ``[..., strips, kblocks, 2]``, (codec id, scale exponent) of each block.
    """

    shape: tuple[int, ...]
    arena: Tensor
    tags: Tensor

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(tuple(self.shape))

    @property
    def nbytes(self) -> int:
        return self.arena.numel() + self.tags.numel()

    @property
    def bits_per_weight(self) -> float:
        """Everything stored x 8 / weights."""
        return 8 * self.nbytes / self.grid.numel


def empty_packed(grid: BlockGrid, arena_nbytes: int, device: torch.device | str) -> PackedTensor:
    """An uninitialised PackedTensor of the right sizes."""
    return PackedTensor(
        grid.shape,
        torch.empty(arena_nbytes, dtype=torch.uint8, device=device),
        torch.empty(grid.tags_shape, dtype=torch.uint8, device=device),
    )
