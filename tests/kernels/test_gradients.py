"""Gradients flow to x and to the bias as through a dense layer with the decoded weights."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import ops
from tests.kernels.operands import activations, operand
from tests.kernels.samples import each_dtype, generator
from tests.kernels.tolerances import assert_product, assert_within, product_bound

pytestmark = pytest.mark.usefixtures("impl")


@each_dtype
@pytest.mark.parametrize("lead", [(1,), (5,), (2, 20), (0,)], ids=str)
def test_linear(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    w = operand((150, 576))
    x = activations(*lead, w.cols, dtype=dtype).requires_grad_()
    bias = activations(w.rows, dtype=dtype, seed=2).requires_grad_()
    grad = activations(*lead, w.rows, dtype=dtype, seed=5)
    ops.linear(x, *w.stored, bias, w.rows, w.cols).backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert_product(x.grad, grad, w.dense.t())
    ones = torch.ones(1, max(1, grad.numel() // w.rows), dtype=dtype)
    flat = grad.reshape(-1, w.rows) if grad.numel() else grad.new_zeros(1, w.rows)
    assert_product(bias.grad[None], ones, flat.t())


@each_dtype
def test_bias_alone_and_x_alone(dtype: torch.dtype) -> None:
    w = operand((70, 300))
    x, bias = activations(4, w.cols, dtype=dtype), activations(w.rows, dtype=dtype, seed=2)
    grad = activations(4, w.rows, dtype=dtype, seed=5)
    ops.linear(x, *w.stored, bias.requires_grad_(), w.rows, w.cols).backward(grad)
    assert bias.grad is not None and x.grad is None
    ops.linear(x.requires_grad_(), *w.stored, None, w.rows, w.cols).backward(grad)
    assert x.grad is not None
    assert_product(x.grad, grad, w.dense.t())


def test_bias_of_another_dtype() -> None:
    w = operand((70, 300))
    x, bias = activations(4, w.cols, dtype=torch.bfloat16), activations(w.rows).requires_grad_()
    ops.linear(x, *w.stored, bias, w.rows, w.cols).sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full_like(bias, 4.0))


@each_dtype
@pytest.mark.parametrize(
    ("tokens", "k", "each_row"), [(1, 2, False), (9, 3, False), (9, 3, True), (40, 2, False)]
)
def test_experts(tokens: int, k: int, each_row: bool, dtype: torch.dtype) -> None:
    """A row of x gets the sum over its experts; an id of E gives nothing."""
    w = operand((4, 70, 300))
    ids = torch.randint(5, (tokens, k), generator=generator(3))
    x = activations(tokens * k if each_row else tokens, w.cols, dtype=dtype).requires_grad_()
    grad = activations(tokens * k, w.rows, dtype=dtype, seed=5)
    ops.expert_linear(x, ids, *w.stored, w.rows, w.cols).backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    exact, bound = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for row, expert in enumerate(ids.flatten().tolist()):
        if expert < 4:
            target, part = row if each_row else row // k, grad[row : row + 1]
            exact[target] += (part.double() @ w.dense[expert].double())[0]
            bound[target] += product_bound(part, w.dense[expert].t())[0]
    assert_within(x.grad, exact, bound)


def test_no_tokens() -> None:
    w = operand((4, 70, 300))
    x = activations(0, w.cols).requires_grad_()
    ops.expert_linear(x, torch.zeros(0, 2, dtype=torch.int64), *w.stored, w.rows, w.cols).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, w.cols)


def test_the_compressed_weight_gets_no_gradient() -> None:
    w = operand((70, 300))
    y = ops.linear(activations(2, w.cols).requires_grad_(), *w.stored, None, w.rows, w.cols)
    y.sum().backward()
    assert w.arena.grad is None and not w.arena.requires_grad


def test_gradients_are_repeatable() -> None:
    w = operand((4, 70, 300))
    ids, results = torch.randint(4, (20, 3), generator=generator(3)), []
    for _ in range(2):
        x = activations(20, w.cols).requires_grad_()
        ops.expert_linear(x, ids, *w.stored, w.rows, w.cols).square().sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("lead", [(3,), (2, 20)], ids=str)
def test_a_result_can_be_written_to_in_place(lead: tuple[int, ...]) -> None:
    """As that of ``nn.Linear`` can; adapters do it."""
    w, e = operand((70, 300)), operand((4, 70, 300))
    x = activations(*lead, w.cols).requires_grad_()
    y = ops.linear(x, *w.stored, None, w.rows, w.cols)
    y += 1
    flat = x.reshape(-1, w.cols)
    z = ops.expert_linear(flat, torch.zeros(len(flat), 1, dtype=torch.int64), *e.stored, e.rows, e.cols)
    z += 1
    (y.sum() + z.sum()).backward()
    assert x.grad is not None and bool(x.grad.any())
