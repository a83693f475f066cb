"""DeepSeek-V3's FP8 weight format: e4m3 elements with one fp32 scale per 128 x 128 block.

Source: arXiv 2412.19437, section 3.3, and the layout of its published files: W = W_fp8 * scale_inv, block by
block, with scale_inv [ceil(N/128), ceil(K/128)] stored beside the weight as `<name>_scale_inv`. Blocks at the
bottom and right edges may be partial; their scale comes from the elements that exist.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

BLOCK = 128
E4M3_MAX = 448.0  # the largest finite e4m3fn value (arXiv 2209.05433, table 1)


def _blocks(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """[N, K] as [ceil(N/block), block, ceil(K/block), block], padded with zeros: they raise no maximum."""
    rows, cols = matrix.shape
    if rows % block or cols % block:
        matrix = pad(matrix, (0, -cols % block, 0, -rows % block))
    return matrix.view(-(-rows // block), block, -(-cols // block), block)


def quantize_fp8_block(
    weight: torch.Tensor, block: int = BLOCK, ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes weight [N, K] to (float8_e4m3fn [N, K], scale_inv fp32 [ceil(N/block), ceil(K/block)]).

    scale_inv = max|W| / 448 per block, or 1 for a block of zeros. With `ue8m0` (DeepSeek-V3.1 on) it is
    rounded up to a power of two, so that 448 is still not exceeded.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(weight.shape)}")
    rows, cols = weight.shape
    tiles = _blocks(weight.float(), block)
    scale = tiles.abs().amax(dim=(1, 3)) / E4M3_MAX
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        exact = (mantissa == 0.5).to(exponent.dtype)  # already a power of two, 2**(exponent - 1)
        scale = torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent - exact), scale)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = tiles / scale[:, None, :, None]
    # Rounding in the division may land just above 448, which e4m3fn has no infinity for: it would become NaN.
    scaled = scaled.clamp_(-E4M3_MAX, E4M3_MAX)
    fp8 = scaled.view(scale.shape[0] * block, scale.shape[1] * block)[:rows, :cols].to(torch.float8_e4m3fn)
    return fp8.contiguous(), scale


def dequantize_fp8_block(fp8: torch.Tensor, scale_inv: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """The fp32 matrix [N, K] that (fp8 [N, K], scale_inv [ceil(N/block), ceil(K/block)]) stands for."""
    rows, cols = fp8.shape
    expanded = scale_inv.repeat_interleave(block, dim=0)[:rows].repeat_interleave(block, dim=1)[:, :cols]
    return fp8.float() * expanded
