"""How far a product with compressed weights may be from the exact one: one table for every operator.

With u the unit roundoff of x's dtype, a product may round the decoded weight (u), the sum (u) and the sum with the
bias (u); the sum of K terms in float32 adds at most K 2^-24 in any order, and a few more for scales that are
multiplied in late. All are relative to ``|x| |W|``, and weights below the normal range of float16 have an absolute
error of their own. The bound is rigorous: it holds for every input, and nothing else in the tests is a tolerance.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
ROUNDINGS = 3


def product_bound(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Largest allowed ``|error|`` of ``x [M, K] @ weight [N, K].T + bias`` as float64 ``[M, N]``."""
    absolute = x.double().abs()
    magnitude = absolute @ weight.double().abs().t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    relative = ROUNDINGS * UNIT_ROUNDOFF[x.dtype] + (x.shape[-1] + 8) * 2.0**-24
    return relative * magnitude + SMALLEST[x.dtype] * (1 + absolute.sum(-1, keepdim=True))


def assert_product(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """``result`` is ``x @ weight.T + bias`` in x's dtype, within the bound."""
    exact = x.double() @ weight.double().t()
    if bias is not None:
        exact = exact + bias.double()
    assert result.dtype == x.dtype and result.shape == exact.shape
    excess = (result.double() - exact).abs() - product_bound(x, weight, bias)
    assert not excess.isnan().any(), "the result has NaN"
    assert (excess <= 0).all(), f"off by {float(excess.max()):.3g} more than the bound allows"
