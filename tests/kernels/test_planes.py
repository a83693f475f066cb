"""Bit planes: codes to bytes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_kernels.codecs.grid import PLANES, pack_plane, unpack_plane
from ciuic_kernels.format import ceil_div
from tests.kernels.samples import generator

WIDTHS = sorted({width for planes in PLANES.values() for width in planes})


@given(
    width=st.sampled_from(WIDTHS), rows=st.integers(1, 4), cols=st.integers(1, 128), seed=st.integers(0, 999)
)
def test_round_trip(width: int, rows: int, cols: int, seed: int) -> None:
    codes = torch.randint(1 << width, (rows, cols), dtype=torch.uint8, generator=generator(seed))
    packed = pack_plane(codes, width)
    assert packed.shape == (rows, ceil_div(cols * width, 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_plane(packed, width, cols), codes)


@given(width=st.sampled_from(WIDTHS), cols=st.integers(1, 128))
def test_bits_past_the_last_column_are_zero(width: int, cols: int) -> None:
    full = torch.full((1, cols), (1 << width) - 1, dtype=torch.uint8)
    assert sum(int(byte).bit_count() for byte in pack_plane(full, width)[0]) == cols * width


@pytest.mark.parametrize("bits", PLANES)
def test_planes_of_a_width_add_up(bits: int) -> None:
    assert sum(PLANES[bits]) == bits and all(8 % width == 0 for width in PLANES[bits])


def test_the_place_of_every_code() -> None:
    """Byte w holds columns j W + w in its bits [2 j, 2 j + 2)."""
    codes = torch.tensor([[0, 1, 2, 3, 3, 2, 1]], dtype=torch.uint8)
    low, high = 0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4
    assert pack_plane(codes, 2).tolist() == [[low, high]]
