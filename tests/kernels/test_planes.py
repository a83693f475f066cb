"""Bit planes: codes to words in tiles, and back."""

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
    codes = torch.randint(1 << width, (2, rows, cols), dtype=torch.uint8, generator=generator(seed))
    packed = pack_plane(codes, width)
    assert packed.shape == (2, rows * 2 * ceil_div(cols * width, 16)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_plane(packed, width, rows, cols), codes)


@given(width=st.sampled_from(WIDTHS), cols=st.integers(1, 128))
def test_bits_past_the_last_column_are_zero(width: int, cols: int) -> None:
    full = torch.full((1, cols), (1 << width) - 1, dtype=torch.uint8)
    assert sum(int(byte).bit_count() for byte in pack_plane(full, width)) == cols * width


@pytest.mark.parametrize("bits", PLANES)
def test_planes_of_a_width_add_up(bits: int) -> None:
    assert sum(PLANES[bits]) == bits and all(4 % width == 0 for width in PLANES[bits])


def test_the_place_of_every_code() -> None:
    """Two words a row: word w holds columns 2 j + w, in the order of its nibbles, then in their upper halves."""
    codes = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 1, 2]], dtype=torch.uint8)
    first, second = 0 | 2 << 4 | 3 << 8 | 1 << 12 | 2 << 2, 1 | 3 << 4 | 2 << 8 | 1 << 12
    assert pack_plane(codes, 2).tolist() == [*first.to_bytes(2, "little"), *second.to_bytes(2, "little")]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_a_full_tile_is_sixteen_bytes(width: int) -> None:
    """Each tile of a block is 64 such rows, and holds its own columns only."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[3, 70] = 1
    packed = pack_plane(codes, width).reshape(width, 64, 16)
    assert packed.nonzero()[:, :2].tolist() == [[70 * width // 128, 3]]


@given(pair=st.sampled_from([(4, 2), (4, 1), (2, 1)]), place=st.integers(0, 3))
def test_planes_join_by_nibbles(pair: tuple[int, int], place: int) -> None:
    """Codes 4 i .. 4 i + 3 of a word are in its four nibbles, whatever the width: kernels join them with one mask."""
    for width in pair:
        codes = torch.zeros(1, 128 // width, dtype=torch.uint8)
        codes[0, 8 * place :: 32] = (1 << width) - 1  # codes j = place, place + 4, ... of word 0
        packed = pack_plane(codes, width)
        assert int(packed[0]) | int(packed[1]) << 8 == 0xF << 4 * place
