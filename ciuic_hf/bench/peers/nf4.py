"""bitsandbytes NF4, the common 4-bit format, as a peer to compare with: its values, computed without it.

NF4 (Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E) gives each group of 64 consecutive weights of
the flattened matrix its largest magnitude as a float32 scale, and each weight the nearest of 16 fixed levels
in [-1, 1]: 4 + 32 / 64 = 4.5 bits per weight. Double quantization (scales in 8 bits) is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
BITS_PER_WEIGHT = 4 + 32 / GROUP

# QLoRA, appendix E: quantiles of N(0, 1) scaled to [-1, 1], 8 below zero, 7 above, and an exact zero.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_roundtrip(weight: Tensor) -> Tensor:
    """`weight`, any floating dtype and shape, quantized to NF4 and back; same dtype, shape and device.

    Equals `dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))` of bitsandbytes on a CPU
    bit for bit, down to its order of operations: a product with 1 / absmax, not a quotient, except in a
    shorter last group.
    """
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=weight.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    flat = weight.detach().reshape(-1).float()
    whole = flat.numel() // GROUP * GROUP
    groups = flat[:whole].reshape(-1, GROUP)
    absmax = groups.abs().amax(dim=1, keepdim=True)
    scaled = (groups * (1.0 / absmax.clamp(min=1e-38))).clamp(-1, 1)
    parts = [(levels[torch.bucketize(scaled, midpoints)] * absmax).reshape(-1)]
    if whole < flat.numel():
        rest = flat[whole:]
        largest = rest.abs().amax().clamp(min=1e-38)
        parts.append(levels[torch.bucketize((rest / largest).clamp(-1, 1), midpoints)] * largest)
    return torch.cat(parts).reshape(weight.shape).to(weight.dtype)
