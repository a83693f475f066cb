"""``ciuic::embedding`` and ``ciuic::dequantize``: weights out, exactly."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import ops
from tests.kernels.operands import EXPERT_SHAPES, SHAPES, operand
from tests.kernels.samples import each_dtype, generator

pytestmark = pytest.mark.usefixtures("impl", "poisoned_empty")


@each_dtype
@pytest.mark.parametrize("shape", SHAPES + EXPERT_SHAPES, ids=str)
def test_dequantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = operand(shape)
    dense = ops.dequantize(*w.stored, w.rows, w.cols, dtype)
    assert dense.dtype == dtype and dense.is_contiguous()
    assert torch.equal(dense, w.dense.to(dtype))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (2, 9), (30,), (0,), (3, 0)], ids=str)
def test_embedding(shape: tuple[int, int], lead: tuple[int, ...], dtype: torch.dtype) -> None:
    w = operand(shape)
    ids = torch.randint(w.rows, lead, generator=generator(4))
    rows = ops.embedding(ids, *w.stored, w.rows, w.cols, dtype)
    assert rows.dtype == dtype and rows.shape == (*lead, w.cols)
    assert torch.equal(rows, w.dense.to(dtype)[ids])


def test_every_row_of_a_table() -> None:
    w = operand((150, 576))
    order = torch.randperm(w.rows, generator=generator(0))
    rows = ops.embedding(order, *w.stored, w.rows, w.cols, torch.float32)
    assert torch.equal(rows, w.dense[order])


@pytest.mark.parametrize("ids", [torch.tensor([3, 3, 149, 0], dtype=torch.int32), torch.arange(40)[::3]])
def test_kinds_of_ids(ids: torch.Tensor) -> None:
    """int32, repeated, strided."""
    w = operand((150, 576))
    rows = ops.embedding(ids, *w.stored, w.rows, w.cols, torch.float32)
    assert torch.equal(rows, w.dense[ids.long()])


def test_only_the_strips_asked_for_are_read() -> None:
    w = operand((150, 576))
    arena = w.arena.clone()
    arena[int(w.derived.offsets[1]) :] = 255
    rows = ops.embedding(torch.tensor([0, 63]), arena, w.tags, *w.derived, w.rows, w.cols, torch.float32)
    assert torch.equal(rows, w.dense[[0, 63]])
