"""How far a product with compressed weights may be from the exact one: one table for every operator.

With u the unit roundoff of x's dtype, a result may carry up to four roundings to that dtype: of the decoded weight,
of a band of the matrix or an expert's part, of their sum, and of the sum with a bias. The sum of K terms in float32
adds at most K 2^-24 in any order, and a few more for scales that are multiplied in late. All are relative to
``|x| |W|``; weights below the normal range of float16 have an absolute error of their own. The bound is rigorous: it
holds for every input, and it is the only tolerance of a product in these tests.
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


def assert_within(result: Tensor, exact: Tensor, bound: Tensor) -> None:
    """No NaN, and nowhere further from the float64 result than the bound."""
    assert result.shape == exact.shape
    excess = (result.double() - exact).abs() - bound
    assert not excess.isnan().any(), "the result has NaN"
    assert (excess <= 0).all(), f"off by {float(excess.max()):.3g} more than the bound allows"


def assert_product(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """``result`` is ``x @ weight.T + bias`` in x's dtype, within the bound; leading dimensions are flattened."""
    assert result.dtype == x.dtype
    x, result = x.reshape(-1, x.shape[-1]), result.reshape(-1, result.shape[-1])
    exact = x.double() @ weight.double().t()
    if bias is not None:
        exact = exact + bias.double()
    assert_within(result, exact, product_bound(x, weight, bias))
