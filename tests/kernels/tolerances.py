"""Assertions on the bound of ``ciuic_kernels.tolerances``: the only tolerance of a product in these tests."""

from __future__ import annotations

from torch import Tensor

from ciuic_kernels.tolerances import exact_product, product_bound


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
    assert_within(result, exact_product(x, weight, bias), product_bound(x, weight, bias))
