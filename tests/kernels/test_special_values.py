"""Weights at the edges of float32: outliers, denormals, the largest numbers."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels.codec import Codec
from ciuic_kernels.codecs.grid import GRIDS, LINEAR, GridCodec
from ciuic_kernels.layout import MAX_EXPONENT
from tests.kernels.samples import each_codec
from tests.kernels.test_grid_bounds import clipped, half_step, move

LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).smallest_normal
each_grid = pytest.mark.parametrize("codec", GRIDS.values(), ids=lambda codec: codec.name)


def round_trip(codec: Codec, block: torch.Tensor) -> torch.Tensor:
    records, exponents = codec.encode(block[None])
    assert int(exponents.max()) <= MAX_EXPONENT
    return codec.decode(records, exponents, *block.shape)[0]


@each_grid
@pytest.mark.parametrize("value", [1.03125, -0.75, 1.96875, -(2.0**-60), 1.53125 * 2.0**100])
def test_a_constant_that_an_outermost_level_can_be_is_exact(codec: GridCodec, value: float) -> None:
    block = torch.full((64, 128), (1 + LINEAR[codec.width]) * value)
    assert torch.equal(round_trip(codec, block), block)


@each_grid
def test_an_outlier_costs_only_its_own_group(codec: GridCodec) -> None:
    block = 0.02 * torch.randn(64, 128)
    clean = round_trip(codec, block)
    block[5, 70] = 2.0  # 100 sigma, within the seven octaves that scales of one block span
    decoded = round_trip(codec, block)
    assert abs(decoded[5, 70] - 2.0) <= 2.0 * max(clipped(codec.width), half_step(codec.width) * 1.25)
    others = torch.ones(64, 128, dtype=torch.bool)
    first = 70 // codec.group * codec.group
    others[5, first : first + codec.group] = False
    assert torch.equal(decoded[others], clean[others])


@each_grid
def test_an_outlier_of_any_size_leaves_no_nonsense(codec: GridCodec) -> None:
    """Groups more than seven octaves below their block's largest weight lose precision, never sign or range."""
    block = 0.02 * torch.randn(64, 128)
    block[0, 0] = -1e30
    decoded = round_trip(codec, block)
    assert decoded.isfinite().all()
    assert (decoded[1:].abs() <= 1e30 / 2**7).all(), "the reach of the smallest scale of the block"
    assert abs(decoded[0, 0] / -1e30 - 1) <= max(clipped(codec.width), half_step(codec.width) * 1.25)


@each_grid
def test_denormals(codec: GridCodec) -> None:
    """The smallest scale is the smallest normal number: below its reach the grid is absolute."""
    block = (1 + LINEAR[codec.width]) * TINY * (2 * torch.rand(64, 128) - 1)
    decoded = round_trip(codec, block)
    allowed = (1 + LINEAR[codec.width]) * TINY * move(codec.width)
    assert ((decoded - block).abs() <= allowed * (1 + 1e-3)).all()


@each_grid
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers(codec: GridCodec, sign: int) -> None:
    """Finite up to float32's maximum, and clipped to the outermost level of the largest scale there is."""
    mantissa = 1.96875 if sign > 0 else 1.9375  # weights of one sign have scales of the other
    largest = mantissa * 2.0 ** (MAX_EXPONENT + 7 - 127) * (1 + LINEAR[codec.width])
    for magnitude in (LARGEST, largest, 0.9 * largest):
        block = torch.zeros(64, 128)
        block[:, ::7] = sign * magnitude
        decoded = round_trip(codec, block)
        error = (decoded[:, ::7] / min(magnitude, largest) - sign).abs()
        assert (error <= max(clipped(codec.width), half_step(codec.width) * 1.25)).all()
        assert (decoded[block == 0] == 0).all()


@each_codec
def test_a_few_weights_in_a_zero_block(codec: Codec) -> None:
    """What a codec keeps of a lonely weight does not depend on where it is."""
    kept = set()
    for row, col in [(0, 0), (31, 77), (63, 127)]:
        block = torch.zeros(64, 128)
        block[row, col] = 0.3
        decoded = round_trip(codec, block)
        kept.add(float(decoded[row, col]))
        decoded[row, col] = 0
        assert (decoded == 0).all()
    assert len(kept) == 1
