"""``ciuic::expert_low_rank``: rows and gradients as ``scale * B_e A_e x`` in float64 gives them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels import ops
from tests.kernels.operands import activations
from tests.kernels.samples import generator

SCALE = 1.5


def factors(
    experts: int, rank: int, rows: int, cols: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``a [E, R, K]`` and ``b [E, N, R]``, b with the strides that PEFT's layout gives it."""
    a = activations(experts, rank, cols, dtype=dtype, seed=7)
    b = activations(rows, rank * experts, dtype=dtype, seed=8)
    return a, b.unflatten(1, (rank, experts)).permute(2, 0, 1)


def routing(tokens: int, k: int, experts: int) -> Tensor:
    """Ids with -1 and ``experts`` among them, which are no experts."""
    return torch.randint(-1, experts + 1, (tokens, k), generator=generator(3))


def by_definition(x: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    each = x if x.shape[0] == ids.numel() else x.repeat_interleave(ids.shape[1], dim=0)
    rows = [
        SCALE * (b[e] @ (a[e] @ row)) if 0 <= e < len(a) else row.new_zeros(b.shape[1])
        for row, e in zip(each.double(), ids.flatten().tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, b.shape[1], dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12), k=st.integers(1, 3), experts=st.integers(1, 9), rank=st.integers(1, 5),
    rows=st.integers(1, 9), cols=st.integers(1, 9), each_row=st.booleans(),
)  # fmt: skip
def test_rows_and_gradients(
    tokens: int, k: int, experts: int, rank: int, rows: int, cols: int, each_row: bool
) -> None:
    ids = routing(tokens, k, experts)
    x = activations(tokens * k if each_row else tokens, cols, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *factors(experts, rank, rows, cols))]
    y = ops.expert_low_rank(leaves[0], ids, leaves[1], leaves[2], SCALE)
    exact = by_definition(leaves[0], ids, leaves[1], leaves[2])
    torch.testing.assert_close(y, exact)
    grad = activations(tokens * k, rows, dtype=torch.float64, seed=5)
    ours = torch.autograd.grad(y, leaves, grad)
    if tokens:
        theirs = torch.autograd.grad(exact, leaves, grad, materialize_grads=True)
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, reference)
    else:
        assert not any(bool(g.any()) for g in ours)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_of_x(tokens: int, x_dtype: torch.dtype) -> None:
    """x is taken as it is and computed with in the factors' dtype; only the result is rounded."""
    x, ids = activations(tokens, 24, dtype=x_dtype), routing(tokens, 2, 4)
    a, b = factors(4, 3, 10, 24, dtype=torch.float32)
    y = ops.expert_low_rank(x, ids, a, b, SCALE)
    assert y.dtype == x_dtype
    exact = by_definition(x, ids, a.double(), b.double())
    unit = torch.finfo(x_dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=2 * unit, atol=2 * unit * float(exact.abs().max()))


def test_repeatable() -> None:
    x, ids, (a, b) = activations(40, 24), routing(40, 2, 4), factors(4, 3, 10, 24, dtype=torch.float32)
    first, second = (ops.expert_low_rank(x, ids, a, b, SCALE) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 25)}, r"needs a \[E, R, 25\] and b \[E, N, R\]"),
        ({"b": torch.zeros(4, 10, 2)}, r"got \[4, 3, 24\] and \[4, 10, 2\]"),
        ({"b": torch.zeros(3, 10, 3)}, r"needs a \[E, R, 24\]"),
        ({"a": torch.zeros(3, 24)}, r"needs a \[E, R, 24\]"),
        ({"a": torch.zeros(4, 3, 24, dtype=torch.float16)}, "a and b of one dtype"),
        ({"x": torch.zeros(2, 24, dtype=torch.int64)}, "must be floating-point"),
        ({"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, r"expert_low_rank needs x \[T, K\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    a, b = factors(4, 3, 10, 24, dtype=torch.float32)
    given_: dict[str, Tensor] = {
        "x": torch.zeros(2, 24), "expert_ids": torch.zeros(2, 2, dtype=torch.int64), "a": a, "b": b
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.expert_low_rank(*(given_ | change).values(), SCALE)
