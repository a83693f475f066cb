"""What happens to the weights of a sparse block: how far they move, and what moves them not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels.codecs.grid import LINEAR, scale_values
from ciuic_kernels.codecs.sparse import SPARSE, SparseCodec, largest
from tests.kernels.samples import SPARSE_SAMPLE, blocks
from tests.kernels.test_grid_bounds import SLACK, clipped, largest_reach, move

each_sparse = pytest.mark.parametrize("codec", SPARSE_SAMPLE, ids=lambda codec: codec.name)


def kept(codec: SparseCodec, batch: Tensor) -> Tensor:
    """The weights that have a slot, zeros for the others."""
    return torch.where(largest(batch, codec.slots(*batch.shape[1:])), batch, 0.0)


@each_sparse
@settings(max_examples=15)
@given(batch=blocks())
def test_no_stored_weight_moves_further_than_the_grid_allows(codec: SparseCodec, batch: Tensor) -> None:
    """The bound of grid codecs (``test_grid_bounds.py``), with a row for a group."""
    stored, (records, exponents) = kept(codec, batch), codec.encode(batch)
    error = (codec.decode(records, exponents, *batch.shape[1:]) - stored).abs()
    absmax, bits = stored.abs().amax(-1, keepdim=True).double(), codec.width
    below = (clipped(bits) + move(bits) * (1 - clipped(bits))) * absmax
    allowed = torch.maximum(below, move(bits) * largest_reach(bits, absmax, exponents))
    assert (error.double().amax(-1, keepdim=True) <= allowed * SLACK).all()
    assert (error[stored == 0] == 0).all()


@each_sparse
@settings(max_examples=15)
@given(batch=blocks())
def test_dropped_weights_change_nothing(codec: SparseCodec, batch: Tensor) -> None:
    """Pruning before encoding gives the same bytes."""
    for part, other in zip(codec.encode(batch), codec.encode(kept(codec, batch)), strict=True):
        assert torch.equal(part, other)


@each_sparse
@settings(max_examples=15)
@given(batch=blocks(kinds=("gaussian", "heavy", "sparse", "integers")), power=st.integers(-25, 40))
def test_powers_of_two(codec: SparseCodec, batch: Tensor, power: int) -> None:
    """Same record, exponent moved by the power."""
    assume(batch.flatten(1).abs().amax(-1).min() > 0)
    records, exponents = codec.encode(batch)
    scaled_records, scaled_exponents = codec.encode(batch * 2.0**power)
    assert torch.equal(records, scaled_records)
    assert torch.equal(scaled_exponents.int(), exponents.int() + power)


def test_a_capacity_that_suffices_is_as_good_as_a_larger_one() -> None:
    block = torch.randn(1, 64, 128).where(torch.rand(1, 64, 128) < 0.2, 0.0)
    decoded = [SPARSE[4, d].decode(*SPARSE[4, d].encode(block), 64, 128) for d in (7, 8, 20)]
    assert torch.equal(decoded[0], decoded[1]) and torch.equal(decoded[0], decoded[2])


@each_sparse
def test_the_largest_weight_of_a_row_meets_the_end_of_the_grid(codec: SparseCodec) -> None:
    """A row whose largest weight a scale can be, and nothing else, is exact, whatever its sign."""
    block = torch.zeros(1, 64, 128)
    end = 1 + LINEAR[codec.width]
    block[0, ::3, 5] = end * 1.78125
    block[0, 1::3, 127] = end * -0.5
    records, exponents = codec.encode(block)
    assert torch.equal(codec.decode(records, exponents, 64, 128), block)
    scales = scale_values(records[:, 1024:1088], exponents[:, None])
    assert torch.equal(scales[0, :2], torch.tensor([-1.78125, 0.5]))
    assert (records[0, 1024:1088][2::3] == 0).all()
