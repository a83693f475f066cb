"""The uniform plan on any shape: within the budget, close to it, monotone and the same every time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.uniform import LADDER, codec_ids
from ciuic_kernels import BlockGrid, all_codecs, codec_by_id, codec_by_name
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS
from ciuic_kernels.layout import arena_nbytes, block_nbytes

SIDES = st.integers(1, 700)
BITS = st.floats(1, 16)


def stored(ids: torch.Tensor, grid: BlockGrid) -> int:
    """Arena and tags in bytes."""
    return arena_nbytes(ids, grid) + grid.tags_nbytes


def plan(rows: int, cols: int, bits: float) -> tuple[torch.Tensor, BlockGrid]:
    """The plan; shapes whose tags alone are too much are no examples."""
    grid = BlockGrid((rows, cols))
    assume(grid.tags_nbytes <= int(bits * grid.numel / 8))
    return codec_ids(grid.shape, bits), grid


def test_codecs_that_lose_weights_are_not_mixed_into_a_rate() -> None:
    left_out = {codec.name for codec in all_codecs()} - set(LADDER)
    assert left_out == {"raw_fp16"} | {f"sparse{k}_d{d}" for k in (2, 3, 4, 5, 6, 8) for d in range(1, 21)}


@given(SIDES, SIDES, BITS)
def test_never_over_budget(rows: int, cols: int, bits: float) -> None:
    ids, grid = plan(rows, cols, bits)
    assert ids.dtype == torch.uint8 and tuple(ids.shape) == (grid.strips, grid.kblocks)
    assert 8 * stored(ids, grid) <= bits * grid.numel


@given(SIDES, SIDES, BITS)
def test_misses_the_budget_by_less_than_the_largest_upgrade(rows: int, cols: int, bits: float) -> None:
    ids, grid = plan(rows, cols, bits)
    sizes = {name: block_nbytes(torch.full_like(ids, codec_by_name(name).id), grid)[0] for name in LADDER}
    used = sorted({codec_by_id(i).name for i in ids.unique().tolist()}, key=LADDER.index)
    assert len(used) <= 2
    if len(used) == 2:
        assert LADDER.index(used[1]) == LADDER.index(used[0]) + 1
    else:
        above = LADDER.index(used[0]) + 1
        used.append(LADDER[min(above, len(LADDER) - 1)])
    largest = int((sizes[used[1]] - sizes[used[0]]).max())
    missed = int(bits * grid.numel / 8) - stored(ids, grid)
    assert missed < largest or used[0] == used[1] == LADDER[-1]


@given(SIDES, SIDES, BITS, BITS)
def test_more_bits_never_store_less(rows: int, cols: int, one: float, other: float) -> None:
    """Where blocks at the edge are smaller, to within the upgrade of one block, which both may miss the budget by."""
    few, many = sorted((one, other))
    ids, grid = plan(rows, cols, few)
    sizes = [block_nbytes(torch.full_like(ids, codec_by_name(name).id), grid)[0] for name in LADDER]
    upgrade = max(int((more - less).max()) for less, more in pairwise(sizes))
    assert stored(ids, grid) < stored(codec_ids(grid.shape, many), grid) + upgrade


@given(st.integers(1, 6), st.integers(1, 4), BITS, BITS)
def test_more_bits_never_store_less_in_whole_blocks(
    strips: int, kblocks: int, one: float, other: float
) -> None:
    few, many = sorted((one, other))
    ids, grid = plan(strips * BLOCK_ROWS, kblocks * BLOCK_COLS, few)
    assert stored(ids, grid) <= stored(codec_ids(grid.shape, many), grid)


@given(SIDES, SIDES, BITS)
def test_deterministic(rows: int, cols: int, bits: float) -> None:
    first, grid = plan(rows, cols, bits)
    first = first.clone()
    codec_ids.cache_clear()
    assert torch.equal(first, codec_ids(grid.shape, bits))


@pytest.mark.parametrize("bits", [2.1, 3.0, 4.25, 6.2, 9.0])
def test_richer_blocks_are_spread_evenly(bits: float) -> None:
    """Every quarter of a large matrix has its share of the richer codec."""
    ids = codec_ids((4096, 4096), bits).flatten()
    richest = max(ids.unique().tolist(), key=lambda i: codec_by_id(i).bits)
    shares = [(quarter == richest).float().mean().item() for quarter in ids.chunk(4)]
    assert max(shares) - min(shares) < 0.01


@pytest.mark.parametrize("name", ["zero", "raw_fp16", "grid5_g32"])
def test_a_named_codec_fills_the_matrix(name: str) -> None:
    assert codec_ids((200, 300), name).unique().tolist() == [codec_by_name(name).id]


def test_a_matrix_too_small_for_its_tags_is_refused() -> None:
    with pytest.raises(CiuicError, match=r"\[1, 3\].*raw"):
        codec_ids((1, 3), 4.0)
