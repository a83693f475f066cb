"""``zero``: a block whose weights are all zero. Its record is empty; its exponent byte is 0.

Encoding a block that is not zero with it drops the block, which is what a plan that says so wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_kernels.codec import register_codec


@dataclass(frozen=True)
class ZeroCodec:
    """See the module docstring."""

    id: int = 0
    name: str = "zero"
    bits: float = 0.0

    def record_nbytes(self, rows: int, cols: int) -> int:
        return 0

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        batch = blocks.shape[0]
        empty = torch.empty(batch, 0, dtype=torch.uint8, device=blocks.device)
        return empty, torch.zeros(batch, dtype=torch.uint8, device=blocks.device)

    def decode(self, records: Tensor, exponents: Tensor, rows: int, cols: int) -> Tensor:
        return torch.zeros(records.shape[0], rows, cols, device=records.device)


ZERO = register_codec(ZeroCodec())
