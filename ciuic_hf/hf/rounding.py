"""Encoding by a calibration while a model loads, and an account of what it did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.planning.moments import InputMoments
from ciuic_hf.report import Pruned, Rounded
from ciuic_kernels import BlockGrid, PackedTensor, codec_by_id
from ciuic_kernels.codec import PruningCodec
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.packing import allocate, decode_strips, decode_tensor, encode_matrix, encode_tensor
from ciuic_kernels.rounding import RoundingError, encode_matrix_rounded


@dataclass(frozen=True)
class Feedback:
    """How the errors of one matrix are passed on, float32 ``[K, K]``, and which matrix that is."""

    name: str
    index: int
    upper: Tensor


class Rounding:
    """Rounds the matrices of one load to the inputs that a calibration saw."""

    def __init__(self, moments: InputMoments) -> None:
        self.moments = moments
        self._error, self._matrices = RoundingError(), 0
        self._plain: dict[str, int] = {}
        self._pruned: dict[str, Pruned] = {}

    def feedback(self, name: str, index: int) -> Feedback | None:
        """For :meth:`encode`; None, which is counted, when the matrix met no token and is rounded to the nearest."""
        upper = self.moments.feedback(name, index)
        if upper is None:
            self._plain[name] = self._plain.get(name, 0) + 1
            return None
        self._matrices += 1
        return Feedback(name, index, upper)

    def encode(
        self,
        packed: PackedTensor,
        offsets: Tensor,
        index: int,
        rows: Tensor,
        feedback: Feedback,
        first_row: int,
    ) -> None:
        """As :func:`ciuic_kernels.rounding.encode_matrix_rounded`."""
        with torch.inference_mode(False), torch.no_grad():
            self._error += encode_matrix_rounded(packed, offsets, index, rows, feedback.upper, first_row)
            found = self._pruning(packed, offsets, index, rows, feedback, first_row)
        if found is not None:
            self._pruned[feedback.name] = self._pruned.get(feedback.name, Pruned()) + found

    def encode_parameter(self, name: str, weight: Tensor, codec_ids: Tensor) -> PackedTensor:
        """A whole parameter ``[N, K]`` or ``[E, N, K]``; codec ids uint8 ``[..., strips, kblocks]``."""
        packed, offsets = allocate(codec_ids, BlockGrid(tuple(weight.shape)), weight.device)
        for index, matrix in enumerate(weight if weight.dim() == 3 else weight[None]):
            feedback = self.feedback(name, index)
            if feedback is None:
                encode_matrix(packed, offsets, index, matrix)
            else:
                self.encode(packed, offsets, index, matrix, feedback, 0)
        return packed

    def _pruning(
        self,
        packed: PackedTensor,
        offsets: Tensor,
        index: int,
        rows: Tensor,
        feedback: Feedback,
        first_row: int,
    ) -> Pruned | None:
        """What sparse blocks cost in rows that are encoded, None where there are none."""
        grid, first = packed.grid, first_row // BLOCK_ROWS
        strips = BlockGrid(tuple(rows.shape)).strips
        tags = packed.tags.view(grid.matrices, grid.strips, grid.kblocks, 2)[index, first : first + strips]
        ids = tags[..., 0]
        if not any(isinstance(codec_by_id(i), PruningCodec) for i in ids.unique().tolist()):
            return None
        source, starts = rows.float(), offsets[index * grid.strips + first :][: strips + 1]
        shape = (rows.shape[0], rows.shape[1])
        stored = decode_strips(packed.arena, tags, starts, shape, range(strips), torch.float32)
        plain = decode_tensor(encode_tensor(rows, ids.contiguous()))
        factor = self.moments.factor(feedback.name, feedback.index).to(rows.device)
        sums = (
            float((difference @ factor.T).square().sum())
            for difference in (source, source - plain, source - stored)
        )
        return Pruned(*sums)

    def summary(self) -> Rounded:
        error = self._error
        return Rounded(self._matrices, dict(self._plain), error.nearest, error.stored, dict(self._pruned))
