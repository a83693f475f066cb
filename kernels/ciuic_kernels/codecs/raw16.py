"""``raw_bf16`` and ``raw_fp16``: the block's weights as they are, 16 bits each.

Record of a block ``[rows, cols]``: rows x cols little-endian 16-bit floats, row by row. The exponent byte is 0.
Exact for weights of that dtype; anything else is rounded to nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_kernels.codec import register_codec


@dataclass(frozen=True)
class Raw16Codec:
    """See the module docstring."""

    id: int
    name: str
    dtype: torch.dtype
    bits: float = 16.0

    def record_nbytes(self, rows: int, cols: int) -> int:
        return 2 * rows * cols

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        # clone, as contiguous() leaves the strides of a single element alone, and view() wants them to be 1.
        dense = blocks.to(self.dtype).clone(memory_format=torch.contiguous_format)
        records = dense.view(torch.uint8).flatten(1)
        return records, torch.zeros(blocks.shape[0], dtype=torch.uint8, device=blocks.device)

    def decode(self, records: Tensor, exponents: Tensor, rows: int, cols: int) -> Tensor:
        # clone: a slice of an arena may start at an address that a 16-bit view does not allow.
        return records.clone().view(self.dtype).to(torch.float32).reshape(-1, rows, cols)


RAW_BF16 = register_codec(Raw16Codec(1, "raw_bf16", torch.bfloat16))
RAW_FP16 = register_codec(Raw16Codec(2, "raw_fp16", torch.float16))
