"""HQQ, half-quadratic quantization, as a peer to compare with: its values, computed without the package.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog, 2023).
Groups of 64 consecutive weights of the flattened matrix have a scale and a zero-point in fp16: k + 32 / 64 bits. The
scale is that of the group's range; the zero-point z minimises ``|W - (q - z) s|_p``, p = 0.7, which is split in two
by an auxiliary error E: a generalised soft threshold gives E, a mean gives z, and their coupling beta grows. Twenty
rounds at most; they end when the mean absolute error no longer falls. Bits 4 rounds its first zero-point.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
_ROUNDS, _NORM, _BETA, _GROWTH = 20, 0.7, 10.0, 1.01
_CHUNK_GROUPS = 4096


def bits_per_weight(width: int) -> float:
    """Codes, and scale and zero-point of a group in 16 bits each."""
    return width + 32 / GROUP


@torch.no_grad()
def hqq_roundtrip(weight: Tensor, width: int) -> Tensor:
    """``weight``, any floating dtype and shape of a multiple of 64 weights, to ``width`` bits and back."""
    groups = weight.detach().float().reshape(-1, GROUP)
    return (
        torch.cat([_groups(part, width) for part in groups.split(_CHUNK_GROUPS)])
        .view_as(weight)
        .to(weight.dtype)
    )


def _groups(values: Tensor, width: int) -> Tensor:
    """float32 ``[G, 64]`` -> what its codes stand for."""
    levels = 2**width - 1
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = (levels / (high - low).clamp_min(1e-12)).clamp_max(2e4)  # codes a unit of weight
    zero = -low * scale
    if width == 4:
        zero = zero.round()
    beta, best, best_zero = _BETA, torch.inf, zero
    for _ in range(_ROUNDS):
        codes = (values * scale + zero).round().clamp(0, levels)
        restored = (codes - zero) / scale
        error = float((values - restored).abs().mean())
        if error >= best:
            break
        best, best_zero = error, zero
        residual = _shrink(values - restored, beta)
        zero = (codes - (values - residual) * scale).mean(1, keepdim=True)
        beta *= _GROWTH
    step, zero = (1 / scale).half().float(), best_zero.half().float()
    codes = (values * scale + zero).round().clamp(0, levels)
    return (codes - zero) * step


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal step of the p-norm, approximately: ``sign(x) max(0, |x| - |x|^(p-1) / beta)``."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-12).pow(_NORM - 1) / beta).clamp_min(0)
