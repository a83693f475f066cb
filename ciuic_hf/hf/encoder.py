"""Encoding one parameter matrix by matrix, as a checkpoint gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import fp8
from ciuic_hf.hf.rounding import Feedback, Rounding
from ciuic_hf.memory import release_freed_memory
from ciuic_hf.modules.packed import TAGS
from ciuic_kernels import BlockGrid, PackedTensor
from ciuic_kernels.packing import FLOAT_DTYPES, NotFiniteError, allocate, encode_matrix

Part = tuple[Tensor, Tensor | None]
"""A weight ``[N, K]`` as the checkpoint has it, with its scales if it is FP8."""

_TRIM_WEIGHTS = 1 << 20  # temporaries of smaller parameters are not worth the call


@dataclass(frozen=True)
class Recipe:
    """How one parameter is compressed.

    Attributes:
        name: full parameter name, for messages.
        shape: logical shape ``(N, K)`` or ``(E, N, K)``.
        codec_ids: uint8 ``[strips, kblocks]``, the same for every matrix, or ``[E, strips, kblocks]``.
        block: FP8 block size, None when the checkpoint is not FP8.
        rounding: how codes are chosen; None rounds to the nearest.
    """

    name: str
    shape: tuple[int, ...]
    codec_ids: Tensor
    block: fp8.Block | None
    rounding: Rounding | None = None


class Encoder:
    """Encodes the matrices of one parameter as they arrive."""

    def __init__(self, recipe: Recipe) -> None:
        self.name, self.grid = recipe.name, BlockGrid(tuple(recipe.shape))
        self.block, self.rounding = recipe.block, recipe.rounding
        self.codec_ids = recipe.codec_ids.expand(self.grid.tags_shape[:-1])
        self._packed: PackedTensor | None = None
        self._offsets = torch.empty(0)

    def add(self, index: int, parts: list[Part]) -> None:
        """Encode matrix ``index`` ``[N, K]``, given as parts that follow each other in whole strips of 64 rows.

        Raises:
            CiuicError: for a bad shape, dtype or value.
        """
        check_shape(self.name, self.grid, parts)
        feedback = self.rounding.feedback(self.name, index) if self.rounding else None
        start = 0
        for weight, scale in parts:
            self._encode(index, start, weight, scale, feedback)
            start += weight.shape[0]

    def _encode(
        self, index: int, start: int, weight: Tensor, scale: Tensor | None, feedback: Feedback | None
    ) -> None:
        try:
            for first, rows in self._float_rows(weight, scale, whole=feedback is not None):
                self._store(index, start + first, rows, feedback)
        except NotFiniteError:
            raise CiuicError(
                f"{self.name} holds NaN or infinite weights; repair the checkpoint, or keep this weight as it is with "
                f'modules={{"{self.name}": "raw"}}.'
            ) from None
        except ValueError as error:
            raise CiuicError(f"{self.name}: {error}") from None

    def _store(self, index: int, first: int, rows: Tensor, feedback: Feedback | None) -> None:
        """Encode rows of matrix ``index`` to their place, which begins at row ``first``. Raises ValueError."""
        if self._packed is None:
            self._packed, self._offsets = allocate(self.codec_ids, self.grid, rows.device)
        self._put(self._packed, self._offsets, index, rows, feedback, first)

    def _put(
        self,
        packed: PackedTensor,
        offsets: Tensor,
        index: int,
        rows: Tensor,
        feedback: Feedback | None,
        first: int = 0,
    ) -> None:
        if self.rounding is None or feedback is None:
            encode_matrix(packed, offsets, index, rows, first)
        else:
            self.rounding.encode(packed, offsets, index, rows, feedback, first)

    def _float_rows(self, weight: Tensor, scale: Tensor | None, whole: bool) -> Iterable[tuple[int, Tensor]]:
        """Rows to encode at a time and the first one's number; ``whole``: all, which is faster to round."""
        if scale is not None:
            assert self.block is not None
            if whole:
                return [(0, fp8.dequantize(self.name, weight, scale, self.block))]
            fp8.check_scales(self.name, weight, scale, self.block)
            return fp8.row_chunks(weight, fp8.scale_values(scale), self.block)
        if weight.dtype not in FLOAT_DTYPES:
            raise CiuicError(
                f"{self.name} is {weight.dtype} without scales; Ciuic compresses bf16, fp16, fp32 and block-scaled FP8."
            )
        return [(0, weight)]

    def finish(self) -> dict[str, Tensor]:
        """Arena and tags under their parameter names."""
        assert self._packed is not None
        if self.grid.numel > _TRIM_WEIGHTS and self._packed.arena.device.type == "cpu":
            release_freed_memory()
        return {self.name: self._packed.arena, self.name + TAGS: self._packed.tags}


def check_shape(name: str, grid: BlockGrid, parts: list[Part]) -> None:
    """Raise CiuicError unless parts below each other are one matrix of a parameter."""
    rows = sum(weight.shape[0] for weight, _ in parts)
    if rows != grid.rows or any(weight.shape[1:] != (grid.cols,) for weight, _ in parts):
        found = [list(weight.shape) for weight, _ in parts]
        raise CiuicError(
            f"{name} is {list(grid.shape)} in this model but the checkpoint has "
            f"{found[0] if len(found) == 1 else found}."
        )
