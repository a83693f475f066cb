"""DeepSeek's FP8 originals: ``float8_e4m3fn`` weights with one scale for each block.

``W = weight.float() * weight_scale_inv`` with one scale for each ``[128, 128]`` block, the last ones smaller
(arXiv 2412.19437, section 3.3). The block size comes from the config and never from the shape of the grid of
scales, which does not determine it: 576 rows with 5 scales have blocks of 128, not of 115.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_kernels.cpu import native
from ciuic_kernels.dispatch import use_native
from ciuic_kernels.format import BLOCK_ROWS, ceil_div

SCALE_SUFFIX = "_scale_inv"
CHUNK_WEIGHTS = 1 << 20  # weights held as float32 at a time: 4 MB
Block = tuple[int, int]


def block_size(quantization: dict[str, Any]) -> Block:
    """The block of an ``fp8`` quantization_config. Raises CiuicError for another scheme."""
    block = quantization.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise CiuicError(
            f"The FP8 checkpoint has weight_block_size {block!r}; Ciuic reads block-scaled FP8 such as [128, 128]."
        )
    rows, cols = int(block[0]), int(block[1])
    if rows < 1 or cols < 1:
        raise CiuicError(f"weight_block_size {block!r} must be positive.")
    return rows, cols


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32; ``ue8m0`` bytes are powers of two, ``2^(b - 127)`` (OCP MX v1.0, section 5.4.1)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def check_scales(name: str, weight: Tensor, scale: Tensor, block: Block) -> None:
    """Raise CiuicError when the grid of scales does not belong to the weight."""
    expected = (ceil_div(weight.shape[-2], block[0]), ceil_div(weight.shape[-1], block[1]))
    if tuple(scale.shape[-2:]) != expected:
        raise CiuicError(
            f"{name} is {list(weight.shape)} with {list(scale.shape)} scales, but blocks of {list(block)} need "
            f"{list(expected)}; config.json's weight_block_size or the file is wrong."
        )


def dequantize_rows(weight: Tensor, scales: Tensor, block: Block, first: int, last: int) -> Tensor:
    """Rows ``[first, last)`` as float32 ``[rows, K]``; ``scales`` is float32 ``[ceil(N / b0), ceil(K / b1)]``."""
    if use_native(weight.device):
        return native.fp8_rows(weight.contiguous(), scales.contiguous(), block, first, last)
    rows = torch.arange(first, last, device=weight.device) // block[0]
    per_row, whole = scales[rows], weight.shape[1] // block[1]
    dense = weight[first:last].to(torch.float32)  # multiplied in place: this is what a load takes at its peak
    dense[:, : whole * block[1]].unflatten(1, (whole, block[1])).mul_(per_row[:, :whole, None])
    dense[:, whole * block[1] :].mul_(per_row[:, whole:])
    return dense


def row_chunks(weight: Tensor, scales: Tensor, block: Block) -> Iterator[tuple[int, Tensor]]:
    """``(first row, float32 rows)`` of an FP8 matrix, whole strips at a time, in bounded memory."""
    step = max(1, CHUNK_WEIGHTS // (weight.shape[1] * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, weight.shape[0], step):
        yield first, dequantize_rows(weight, scales, block, first, min(weight.shape[0], first + step))


def dequantize(name: str, weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """A whole FP8 matrix as float32. Raises CiuicError when the scales do not fit."""
    check_scales(name, weight, scale, block)
    return dequantize_rows(weight, scale_values(scale), block, 0, weight.shape[0])
