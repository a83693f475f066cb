"""Adding a change to a compressed parameter: decode, add, encode again with the codecs that the blocks have.

Decoded weights are one band of strips at a time, so beside the old blocks there are the new ones and a few megabytes.
Rounding again costs accuracy, which is measured on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_kernels import PackedTensor
from ciuic_kernels.codecs.raw16 import RAW_FP16
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.layout import planned_offsets
from ciuic_kernels.packing import CHUNK_WEIGHTS, NotFiniteError, decode_strips, encode_matrix

Change = Callable[[int, slice], Tensor | None]
"""``(matrix, rows) -> float32 [rows, K]`` to add there, or None for nothing."""


@dataclass
class MergeCost:
    """What encoding again cost, over the weights whose blocks changed.

    Attributes:
        weights: how many there are.
        error: sum of squares of what was stored minus what was wanted.
        wanted: sum of squares of the weights with the change.
        change: sum of squares of the change alone.
    """

    weights: int = 0
    error: float = 0.0
    wanted: float = 0.0
    change: float = 0.0

    def __iadd__(self, other: MergeCost) -> Self:
        self.weights += other.weights
        self.error += other.error
        self.wanted += other.wanted
        self.change += other.change
        return self

    @property
    def relative_error(self) -> float:
        """Norm of the rounding over the norm of the weights."""
        return math.sqrt(self.error / self.wanted) if self.wanted else 0.0

    @property
    def error_of_change(self) -> float:
        """Norm of the rounding over the norm of the change."""
        return math.sqrt(self.error / self.change) if self.change else 0.0


def add_to_packed(packed: PackedTensor, change: Change, name: str) -> tuple[PackedTensor, MergeCost]:
    """A parameter with a change added, in new memory and the same codecs; bands without a change keep their bytes.

    Args:
        name: for messages.

    Raises:
        CiuicError: when a sum is NaN or infinite; the parameter is then as it was.
    """
    grid, cost = packed.grid, MergeCost()
    merged = PackedTensor(packed.shape, packed.arena.clone(), packed.tags.clone())
    offsets = planned_offsets(packed.tags[..., 0], grid)
    tags = packed.tags.view(grid.matrices, grid.strips, grid.kblocks, 2)
    for matrix in range(grid.matrices):
        here = offsets[matrix * grid.strips :].to(packed.arena.device)
        dtype = torch.float16 if bool((tags[matrix, ..., 0] == RAW_FP16.id).any()) else torch.float32
        for strips in _bands(grid.strips, grid.cols):
            rows = slice(strips.start * BLOCK_ROWS, min(strips.stop * BLOCK_ROWS, grid.rows))
            added = change(matrix, rows)
            if added is None or not bool(added.any()):
                continue
            shape = (grid.rows, grid.cols)
            wanted = decode_strips(packed.arena, tags[matrix], here, shape, strips, torch.float32)
            wanted += added
            try:
                encode_matrix(merged, offsets, matrix, wanted.to(dtype), rows.start)
            except NotFiniteError:
                raise CiuicError(
                    f"{name} would hold NaN or infinity after merging; the adapter is broken, nothing was merged here."
                ) from None
            merged_tags = merged.tags.view_as(tags)[matrix]
            stored = decode_strips(merged.arena, merged_tags, here, shape, strips, torch.float32)
            cost += MergeCost(wanted.numel(), _square(stored - wanted), _square(wanted), _square(added))
    return merged, cost


def _bands(strips: int, cols: int) -> list[range]:
    step = max(1, CHUNK_WEIGHTS // (cols * BLOCK_ROWS))
    return [range(first, min(first + step, strips)) for first in range(0, strips, step)]


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
