"""Encoding by a calibration while a model loads, and an account of what it did."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_hf.planning.moments import InputMoments
from ciuic_hf.report import Rounded
from ciuic_kernels import PackedTensor
from ciuic_kernels.rounding import RoundingError, encode_matrix_rounded


class Rounding:
    """Rounds the matrices of one load to the inputs that a calibration saw."""

    def __init__(self, moments: InputMoments) -> None:
        self.moments = moments
        self._error, self._matrices = RoundingError(), 0
        self._plain: dict[str, int] = {}

    def feedback(self, name: str, index: int) -> Tensor | None:
        """For :meth:`encode`; None, which is counted, when the matrix met no token and is rounded to the nearest."""
        feedback = self.moments.feedback(name, index)
        if feedback is None:
            self._plain[name] = self._plain.get(name, 0) + 1
        else:
            self._matrices += 1
        return feedback

    def encode(
        self,
        packed: PackedTensor,
        offsets: Tensor,
        index: int,
        rows: Tensor,
        feedback: Tensor,
        first_row: int,
    ) -> None:
        """As :func:`ciuic_kernels.rounding.encode_matrix_rounded`."""
        with torch.inference_mode(False), torch.no_grad():
            self._error += encode_matrix_rounded(packed, offsets, index, rows, feedback, first_row)

    def summary(self) -> Rounded:
        return Rounded(self._matrices, dict(self._plain), self._error.nearest, self._error.stored)
