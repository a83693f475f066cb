"""Arguments that do not fit are refused with a sentence, before memory is read."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import ops
from ciuic_kernels.ops._products import check_input
from tests.kernels.operands import activations, operand

pytestmark = pytest.mark.usefixtures("impl")
MATRIX, EXPERTS = operand((70, 300)), operand((4, 70, 300))
IDS = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize("cols", [1, 128, 256, 385, 3000])
@pytest.mark.parametrize("m", [1, 30])
def test_x_of_another_width(cols: int, m: int) -> None:
    message = f"x has {cols} features in its last dimension"
    with pytest.raises(ValueError, match=message):
        ops.linear(activations(m, cols), *MATRIX.stored, None, MATRIX.rows, MATRIX.cols)
    with pytest.raises(ValueError, match=message):
        ops.expert_linear(activations(2, cols), IDS, *EXPERTS.stored, EXPERTS.rows, EXPERTS.cols)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_x_that_is_not_floating_point(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 300, dtype=dtype)
    with pytest.raises(ValueError, match="x must be a floating-point tensor"):
        ops.linear(x, *MATRIX.stored, None, MATRIX.rows, MATRIX.cols)
    with pytest.raises(ValueError, match="x must be a floating-point tensor"):
        ops.expert_linear(x, IDS, *EXPERTS.stored, EXPERTS.rows, EXPERTS.cols)


def test_x_on_another_device() -> None:
    """On meta the operator itself would answer with its fake."""
    with pytest.raises(ValueError, match="x is on meta, the compressed weight on cpu"):
        check_input(torch.zeros(2, 300, device="meta"), 300, MATRIX.arena)


@pytest.mark.parametrize("ids", [[70], [-1], [0, 5, 70], [2**40]], ids=str)
def test_token_ids_outside_the_table(ids: list[int]) -> None:
    with pytest.raises(IndexError, match=r"Token ids must be in \[0, 70\)"):
        ops.embedding(torch.tensor(ids), *MATRIX.stored, MATRIX.rows, MATRIX.cols, torch.float32)


def test_negative_expert_ids() -> None:
    with pytest.raises(IndexError, match="Expert ids must not be negative, got -1"):
        ops.expert_linear(
            activations(1, 300), torch.tensor([[0, -1]]), *EXPERTS.stored, EXPERTS.rows, EXPERTS.cols
        )


@pytest.mark.parametrize(
    ("x_shape", "ids_shape"), [((3, 300), (2, 2)), ((2, 300), (4,)), ((300,), (1, 2)), ((1, 2, 300), (2, 2))]
)
def test_x_that_does_not_match_the_routing(x_shape: tuple[int, ...], ids_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expert_linear needs x \[T, K\] or \[T \* k, K\]"):
        ops.expert_linear(
            activations(*x_shape),
            torch.zeros(ids_shape, dtype=torch.int64),
            *EXPERTS.stored,
            EXPERTS.rows,
            EXPERTS.cols,
        )


@pytest.mark.parametrize("cols", [299, 257, 301, 384])
def test_x_of_another_width_within_the_last_block(cols: int) -> None:
    """A record would be read as one of another width: wrong numbers, or bytes past the arena's end."""
    with pytest.raises(ValueError, match=f"x has {cols} features"):
        ops.linear(activations(1, cols), *MATRIX.stored, None, MATRIX.rows, MATRIX.cols)
