"""Where records lie: offsets equal a plain sum over the blocks, and stay inside the arena."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_kernels import BlockGrid, codec_by_id
from ciuic_kernels.layout import FormatError, arena_nbytes, block_nbytes, strip_offsets
from tests.kernels.samples import mixed_ids, shapes


def naive_sizes(shape: tuple[int, ...], ids: torch.Tensor) -> list[list[int]]:
    """Aligned record bytes of every block, by strip, in the order of the arena."""
    matrices = shape[0] if len(shape) == 3 else 1
    rows, cols = shape[-2:]
    flat, at, sizes = ids.flatten().tolist(), 0, []
    for _ in range(matrices):
        for top in range(0, rows, 64):
            strip = []
            for left in range(0, cols, 128):
                nbytes = codec_by_id(flat[at]).record_nbytes(min(64, rows - top), min(128, cols - left))
                strip.append((nbytes + 15) // 16 * 16)
                at += 1
            sizes.append(strip)
    return sizes


def tags_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([ids, torch.zeros_like(ids)], dim=-1)


@settings(max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 999))
def test_offsets_equal_a_plain_sum(shape: tuple[int, ...], seed: int) -> None:
    grid, ids = BlockGrid(shape), mixed_ids(shape, seed)
    sizes = naive_sizes(shape, ids)
    total = sum(map(sum, sizes))
    assert arena_nbytes(ids, grid) == total
    assert block_nbytes(ids, grid).flatten().tolist() == [n for strip in sizes for n in strip]
    offsets = strip_offsets(tags_of(ids), grid, total).tolist()
    assert offsets == [sum(map(sum, sizes[:i])) for i in range(len(sizes) + 1)]
    assert offsets[-1] == total and all(offset % 16 == 0 for offset in offsets)


@given(shape=shapes())
def test_grid_of_blocks(shape: tuple[int, ...]) -> None:
    """Blocks cover every weight once."""
    grid = BlockGrid(shape)
    heights, widths = map(grid.strip_rows, range(grid.strips)), map(grid.block_cols, range(grid.kblocks))
    assert sum(heights) * sum(widths) * grid.matrices == grid.numel
    assert grid.blocks == grid.strips * grid.kblocks
    assert sum(map(grid.strip_rows, range(grid.strips))) == grid.rows
    assert sum(map(grid.block_cols, range(grid.kblocks))) == grid.cols
    assert grid.tags_nbytes == torch.zeros(grid.tags_shape, dtype=torch.uint8).numel()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (), (1, 2, 3, 4), (2, -1)])
def test_a_shape_without_weights_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positive sizes"):
        BlockGrid(shape)


def test_a_matrix_beyond_the_block_pointers_is_refused() -> None:
    """2^28 records of 16 bytes are the reach of a block pointer; nothing is allocated to find out."""
    grid = BlockGrid((64 * 512, 128 * 513))
    ids = torch.ones(grid.tags_shape[:-1], dtype=torch.uint8)
    nbytes = arena_nbytes(ids, grid)
    assert nbytes > 1 << 32
    with pytest.raises(FormatError, match="more than"):
        strip_offsets(tags_of(ids), grid, nbytes)
    experts = BlockGrid((2, 64 * 512, 128 * 512))
    ids = torch.ones(experts.tags_shape[:-1], dtype=torch.uint8)
    assert strip_offsets(tags_of(ids), experts, 1 << 33)[-1] == 1 << 33
