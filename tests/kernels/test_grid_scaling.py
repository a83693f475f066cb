"""A grid codec does not know how large weights are: powers of two pass through it exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels.codecs.grid import GRIDS, GridCodec
from tests.kernels.samples import blocks

each_grid = pytest.mark.parametrize("codec", GRIDS.values(), ids=lambda codec: codec.name)


@each_grid
@settings(max_examples=15)
@given(batch=blocks(kinds=("gaussian", "heavy", "sparse", "integers")), power=st.integers(-25, 40))
def test_powers_of_two(codec: GridCodec, batch: Tensor, power: int) -> None:
    """Same record, exponent moved by the power; within the range where no square of an error underflows."""
    assume(batch.flatten(1).abs().amax(-1).min() > 0)
    records, exponents = codec.encode(batch)
    scaled_records, scaled_exponents = codec.encode(batch * 2.0**power)
    assert torch.equal(records, scaled_records)
    assert torch.equal(scaled_exponents.int(), exponents.int() + power)
    decoded = codec.decode(records, exponents, *batch.shape[1:])
    scaled = codec.decode(scaled_records, scaled_exponents, *batch.shape[1:])
    assert torch.equal(scaled, decoded * 2.0**power)
