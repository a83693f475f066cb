"""The work table: every block that is not empty in exactly one item, items of one kind and about one size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_kernels import BlockGrid, codec, codec_by_name
from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.codecs.sparse import FIRST_ID
from ciuic_kernels.codecs.zero import ZERO, ZeroCodec
from ciuic_kernels.layout import FormatError, block_nbytes
from ciuic_kernels.work import (
    ANY,
    ANY_SPARSE,
    MAX_EXACT,
    MAX_KBLOCKS,
    WorkShape,
    build_work,
    compiled_kinds,
    item_nbytes,
)
from tests.kernels.samples import mixed_ids, shapes

GRID_IDS = {codec.id for codec in GRIDS.values()}


def tags_of(ids: torch.Tensor) -> torch.Tensor:
    exponents = torch.arange(ids.numel(), dtype=torch.int64).remainder(240).to(torch.uint8).view_as(ids)
    return torch.stack([ids, exponents], dim=-1)


def kind_of(codec: int, grid: BlockGrid, strip: int, kblock: int) -> int:
    if codec >= FIRST_ID:
        return ANY_SPARSE
    full = grid.strip_rows(strip) == 64 and grid.block_cols(kblock) == 128
    return codec if full and codec in GRID_IDS else ANY


@given(shapes(), st.integers(0, 2**16), st.sampled_from([1, 4096, 1 << 20]))
def test_every_block_is_in_one_item(shape: tuple[int, ...], seed: int, target: int) -> None:
    grid = BlockGrid(shape)
    tags = tags_of(mixed_ids(shape, seed))
    nbytes = block_nbytes(tags[..., 0], grid)
    offsets = nbytes.flatten().cumsum(0) - nbytes.flatten()
    work, kinds = build_work(tags, grid, target)
    table = WorkShape.of(work, tags)
    assert work.dtype == torch.int32
    assert work.numel() == table.numel
    assert not work[table.counters_at :].any()
    blocks = work[: table.items_at].view(grid.matrices, grid.strips, grid.kblocks, 2)
    items = work[table.items_at : table.strips_at].view(grid.matrices, table.items, 3)
    spans = work[table.strips_at : table.counters_at].view(grid.matrices, grid.strips, 2)
    flat_tags = tags.reshape(grid.matrices, grid.strips, grid.kblocks, 2)
    seen_kinds = set()
    for matrix in range(grid.matrices):
        for strip in range(grid.strips):
            entries = blocks[matrix, strip].tolist()
            codec = {meta >> 16: meta & 255 for _, meta in entries}
            assert sorted(codec) == list(range(grid.kblocks))
            for at, meta in entries:
                kblock, place = meta >> 16, (matrix * grid.strips + strip) * grid.kblocks + (meta >> 16)
                assert [meta & 255, meta >> 8 & 255] == flat_tags[matrix, strip, kblock].tolist()
                assert at * 16 == int(offsets[place])
            covered = []
            first, number = spans[matrix, strip].tolist()
            for kind, block, count in items[matrix, first : first + number].tolist():
                inside = block - (matrix * grid.strips + strip) * grid.kblocks
                assert count >= 1 and inside >= 0
                run = [meta >> 16 for _, meta in entries[inside : inside + count]]
                assert {kind_of(codec[kblock], grid, strip, kblock) for kblock in run} == {kind}
                seen_kinds.add(kind)
                covered += run
            assert sorted(covered) == [kblock for kblock in sorted(codec) if codec[kblock] != ZERO.id]
    assert kinds == sorted(seen_kinds)


@pytest.mark.parametrize("name", ["grid2_g64", "grid4_g32", "grid8_g64"])
def test_items_are_balanced_and_the_table_is_small(name: str) -> None:
    """On a layer of DeepSeek-V3: no item over one and a half times the target, and at most 2 % more memory."""
    grid = BlockGrid((4096, 7168))
    tags = tags_of(torch.full(grid.tags_shape[:-1], codec_by_name(name).id, dtype=torch.uint8))
    nbytes = int(block_nbytes(tags[..., 0], grid).sum())
    target = item_nbytes(nbytes, 1, processors=132)
    work, _ = build_work(tags, grid, target)
    table = WorkShape.of(work, tags)
    items = work[table.items_at : table.strips_at].view(-1, 3)
    record = nbytes // grid.blocks
    assert int(items[:, 2].max()) * record <= 1.5 * max(target, record)
    assert int(items[:, 2].min()) * record >= 0.5 * target - record
    assert work.numel() * 4 <= 0.02 * nbytes


def test_a_codec_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, key in ((codec._BY_ID, 250), (codec._BY_NAME, "foreign")):
        monkeypatch.setitem(registry, key, ZeroCodec(250, "foreign"))
    tags = tags_of(torch.full((1, 1), 250, dtype=torch.uint8))
    with pytest.raises(FormatError, match="no GPU kernel for blocks of foreign"):
        build_work(tags, BlockGrid((64, 128)), 4096)


def test_what_int32_cannot_address_is_refused() -> None:
    wide = BlockGrid((1, (MAX_KBLOCKS + 1) * 128))
    ids = torch.full(wide.tags_shape[:-1], ZERO.id, dtype=torch.uint8)
    with pytest.raises(FormatError, match="columns"):
        build_work(tags_of(ids), wide, 4096)
    large = BlockGrid((4096, 1024, 4096 * 2))
    ids = torch.full(large.tags_shape[:-1], codec_by_name("raw_bf16").id, dtype=torch.uint8)
    with pytest.raises(FormatError, match="32 GiB"):
        build_work(tags_of(ids), large, 4096)


@given(st.sets(st.sampled_from([*sorted(GRID_IDS), ANY_SPARSE, ANY])))
def test_a_kernel_is_compiled_for_what_it_meets(kinds: set[int]) -> None:
    """In the order of the items, exactly while that is few kernels, else for the same kinds everywhere."""
    compiled = compiled_kinds(tuple(sorted(kinds)))
    assert list(compiled) == sorted(compiled) and set(compiled) >= kinds
    assert set(compiled) - GRID_IDS == kinds - GRID_IDS
    exact = len(kinds & GRID_IDS) <= MAX_EXACT
    assert set(compiled) & GRID_IDS == (kinds & GRID_IDS if exact else GRID_IDS)
