"""``ciuic::linear`` against a float64 product with the decoded weights."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import ops
from ciuic_kernels.ops._products import Matrix
from tests.kernels.operands import SHAPES, activations, operand
from tests.kernels.samples import LAYOUTS, arranged, each_dtype
from tests.kernels.tolerances import assert_product

ROWS_OF_X = [0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 17, 40]
pytestmark = pytest.mark.usefixtures("impl")


@each_dtype
@pytest.mark.parametrize("m", ROWS_OF_X)
def test_product(m: int, dtype: torch.dtype) -> None:
    """Every shape, with and without a bias."""
    for shape in SHAPES:
        w = operand(shape)
        x = activations(m, w.cols, dtype=dtype)
        bias = activations(w.rows, dtype=dtype, seed=2)
        assert_product(ops.linear(x, *w.stored, None, w.rows, w.cols), x, w.dense)
        assert_product(ops.linear(x, *w.stored, bias, w.rows, w.cols), x, w.dense, bias)


@each_dtype
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 7), (2, 0), (0, 3)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    w = operand((70, 300))
    x = activations(*lead, w.cols, dtype=dtype)
    y = ops.linear(x, *w.stored, None, w.rows, w.cols)
    assert y.shape == (*lead, w.rows)
    assert_product(y, x, w.dense)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [3, 20])
def test_strides_of_x(layout: str, m: int) -> None:
    w = operand((70, 300))
    x = activations(2, m, w.cols)
    y = ops.linear(arranged(x, layout), *w.stored, None, w.rows, w.cols)
    assert y.is_contiguous()
    assert_product(y, x, w.dense)


def test_expanded_x() -> None:
    w = operand((70, 300))
    x = activations(1, w.cols).expand(4, -1)
    assert_product(ops.linear(x, *w.stored, None, w.rows, w.cols), x, w.dense)


@each_dtype
@pytest.mark.parametrize("m", [1, 7, 30])
def test_repeatable(m: int, dtype: torch.dtype) -> None:
    w = operand((150, 576))
    x = activations(m, w.cols, dtype=dtype)
    assert torch.equal(
        ops.linear(x, *w.stored, None, w.rows, w.cols), ops.linear(x, *w.stored, None, w.rows, w.cols)
    )


def test_rows_of_x_do_not_mix() -> None:
    """NaN in one row stays there."""
    w = operand((150, 576))
    for m in (3, 12, 30):
        x = activations(m, w.cols)
        x[1] = float("nan")
        y = ops.linear(x, *w.stored, None, w.rows, w.cols)
        assert y[1].isnan().all() and not y[0].isnan().any() and not y[2:].isnan().any()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("m", [1, 5, 12, 40])
def test_no_hole_is_left(m: int) -> None:
    for shape in SHAPES:
        w = operand(shape)
        x = activations(m, w.cols)
        assert_product(ops.linear(x, *w.stored, None, w.rows, w.cols), x, w.dense)


@each_dtype
def test_bias_of_another_dtype(dtype: torch.dtype) -> None:
    """The result has x's dtype."""
    w = operand((70, 300))
    x, bias = activations(3, w.cols, dtype=dtype), activations(w.rows, seed=2)
    assert_product(ops.linear(x, *w.stored, bias, w.rows, w.cols), x, w.dense, bias)


def test_matrix_larger_than_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense product decodes band by band; the bands are of about the same size and make up the whole."""
    monkeypatch.setattr("ciuic_kernels.ops._products.SCRATCH_WEIGHTS", 4 * 64 * 300)
    w = operand((330, 300))
    assert [band.stop for band, _ in Matrix(*w.stored, w.rows, w.cols).bands(torch.float32)] == [192, 330]
    x = activations(20, w.cols).requires_grad_()
    y = ops.linear(x, *w.stored, None, w.rows, w.cols)
    assert_product(y.detach(), x.detach(), w.dense)
    grad = activations(20, w.rows, seed=2)
    y.backward(grad)
    assert x.grad is not None
    assert_product(x.grad, grad, w.dense.t())
