"""How far a product with compressed weights may be from the exact one: one bound for every operator and device.

With u the unit roundoff of x's dtype, a result may carry up to four roundings to that dtype: of the decoded weight,
of a band of the matrix or an expert's part, of their sum, and of the sum with a bias. (A fused product rounds a weight
in up to three steps, which are less than 2.6 u together, and its sum once.) The sum of K terms in float32 adds at most
K 2^-24 in any order, and a few more for scales that are multiplied in late. All are relative to
``|x| |W|``; weights below the normal range of float16 have an absolute error of their own. The bound is rigorous: it
holds for every input. Tests and ``ciuic bench kernels`` compare with it and with nothing looser.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
ROUNDINGS = 4
LATE_SCALES = 8


def product_bound(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Largest allowed ``|error|`` of ``x [M, K] @ weight [N, K].T + bias`` as float64 ``[M, N]``."""
    absolute = x.double().abs()
    magnitude = absolute @ weight.double().abs().t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    relative = ROUNDINGS * UNIT_ROUNDOFF[x.dtype] + (x.shape[-1] + LATE_SCALES) * 2.0**-24
    return relative * magnitude + SMALLEST[x.dtype] * (1 + absolute.sum(-1, keepdim=True))


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [M, K] @ weight [N, K].T + bias`` as float64 ``[M, N]``."""
    exact = x.double() @ weight.double().t()
    return exact if bias is None else exact + bias.double()
