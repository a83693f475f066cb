"""``ciuic::expert_linear`` against one float64 product for every routed row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ciuic_kernels import ops
from tests.kernels.operands import EXPERT_SHAPES, Operand, activations, operand
from tests.kernels.samples import arranged, each_dtype, generator
from tests.kernels.tolerances import assert_product

pytestmark = pytest.mark.usefixtures("impl")


def assert_routed(y: Tensor, x: Tensor, ids: Tensor, w: Operand) -> None:
    """Row ``t * k + i`` is ``W[ids[t, i]] x``, or zeros where the id is no expert."""
    assert y.shape == (ids.numel(), w.rows)
    each = x if x.shape[0] == ids.numel() else x.repeat_interleave(ids.shape[1], dim=0)
    for row, expert in enumerate(ids.flatten().tolist()):
        if expert >= len(w.dense):
            assert not y[row].any()
        else:
            assert_product(y[row : row + 1], each[row : row + 1], w.dense[expert])


def routing(tokens: int, k: int, experts: int, seed: int = 3) -> Tensor:
    return torch.randint(experts, (tokens, k), generator=generator(seed))


@each_dtype
@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 2), (5, 1), (9, 3), (40, 2)])
@pytest.mark.parametrize("each_row", [False, True], ids=["x-per-token", "x-per-row"])
def test_product(shape: tuple[int, ...], tokens: int, k: int, each_row: bool, dtype: torch.dtype) -> None:
    w = operand(shape)
    ids = routing(tokens, k, shape[0])
    x = activations(tokens * k if each_row else tokens, w.cols, dtype=dtype)
    assert_routed(ops.expert_linear(x, ids, *w.stored, w.rows, w.cols), x, ids, w)


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 0], [0, 0], [0, 0]],  # one expert has every row, each row twice
        [[3, 3], [1, 3], [3, 1]],
        [[4, 4], [4, 4], [4, 4]],  # E: no expert at all
        [[0, 4], [4, 2], [4, 4]],
        [[2**40, 1], [5, 0], [4, 3]],  # anything from E on is no expert
    ],
    ids=str,
)
@pytest.mark.parametrize("each_row", [False, True])
def test_routings(ids: list[list[int]], each_row: bool) -> None:
    w = operand((4, 70, 300))
    x = activations(6 if each_row else 3, w.cols)
    chosen = torch.tensor(ids)
    assert_routed(ops.expert_linear(x, chosen, *w.stored, w.rows, w.cols), x, chosen, w)


def test_experts_with_few_and_many_rows() -> None:
    """One expert beyond what the fused kernel takes at once, others below, some ids no expert."""
    w = operand((4, 70, 300))
    ids = torch.tensor([[0]] * 30 + [[1]] * 5 + [[4]] * 2 + [[3]] * 12)
    ids = ids[torch.randperm(len(ids), generator=generator(0))]
    x = activations(len(ids), w.cols)
    assert_routed(ops.expert_linear(x, ids, *w.stored, w.rows, w.cols), x, ids, w)


@pytest.mark.parametrize("k", [1, 2])
def test_no_tokens(k: int) -> None:
    w = operand((4, 70, 300))
    y = ops.expert_linear(
        activations(0, w.cols), torch.zeros(0, k, dtype=torch.int64), *w.stored, w.rows, w.cols
    )
    assert y.shape == (0, w.rows)


@pytest.mark.usefixtures("poisoned_empty")
def test_only_routed_experts_are_read() -> None:
    """Other experts' records may hold anything, and no hole is left in the result."""
    w = operand((4, 70, 300))
    strips = w.tags.shape[1]
    arena = w.arena.clone()
    arena[int(w.derived.offsets[strips]) : int(w.derived.offsets[3 * strips])] = 255
    ids, x = torch.tensor([[0, 3]] * 5), activations(5, w.cols)
    y = ops.expert_linear(x, ids, arena, w.tags, *w.derived, w.rows, w.cols)
    assert_routed(y, x, ids, w)


@each_dtype
@pytest.mark.parametrize("tokens", [3, 40])
def test_repeatable(tokens: int, dtype: torch.dtype) -> None:
    w = operand((4, 70, 300))
    ids, x = routing(tokens, 2, 5), activations(tokens, w.cols, dtype=dtype)
    first, second = (ops.expert_linear(x, ids, *w.stored, w.rows, w.cols) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_strides(layout: str) -> None:
    w = operand((4, 70, 300))
    for tokens in (4, 50):
        ids, x = routing(tokens, 2, 5), activations(tokens, w.cols)
        y = ops.expert_linear(arranged(x, layout), ids.t().contiguous().t(), *w.stored, w.rows, w.cols)
        assert_routed(y, x, ids, w)
