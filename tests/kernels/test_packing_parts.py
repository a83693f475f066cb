"""A parameter may be encoded as it arrives: by rows, by expert, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_kernels import BlockGrid
from ciuic_kernels.layout import strip_offsets
from ciuic_kernels.packing import allocate, decode_strips, decode_tensor, encode_matrix, encode_tensor
from tests.kernels.samples import IMPLEMENTATIONS, implementation, mixed_ids, packed_sample, weights

pytestmark = pytest.mark.usefixtures("compiled")
each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


@each_implementation
@settings(max_examples=15)
@given(rows=st.integers(1, 300), cols=st.integers(1, 200), strips=st.integers(1, 3), seed=st.integers(0, 999))
def test_rows_in_chunks(name: str, rows: int, cols: int, strips: int, seed: int) -> None:
    source = weights((rows, cols), seed, dtype=torch.float16)
    ids, step = mixed_ids((rows, cols), seed), 64 * strips
    with implementation(name):
        whole = encode_tensor(source, ids)
        packed, offsets = allocate(ids, BlockGrid((rows, cols)), "cpu")
        packed.arena.fill_(255)
        for first in reversed(range(0, rows, step)):
            encode_matrix(packed, offsets, 0, source[first : first + step], first)
    assert torch.equal(packed.tags, whole.tags) and torch.equal(packed.arena, whole.arena)


@each_implementation
@settings(max_examples=15)
@given(
    experts=st.integers(1, 4), rows=st.integers(1, 100), cols=st.integers(1, 200), seed=st.integers(0, 999)
)
def test_expert_by_expert(name: str, experts: int, rows: int, cols: int, seed: int) -> None:
    shape = (experts, rows, cols)
    source, ids = weights(shape, seed, dtype=torch.float16), mixed_ids(shape, seed)
    with implementation(name):
        whole = encode_tensor(source, ids)
        packed, offsets = allocate(ids, BlockGrid(shape), "cpu")
        for index in reversed(range(experts)):
            encode_matrix(packed, offsets, index, source[index].clone())
        single = [encode_tensor(source[i], ids[i]) for i in range(experts)]
    assert torch.equal(packed.tags, whole.tags) and torch.equal(packed.arena, whole.arena)
    assert torch.equal(torch.cat([part.arena for part in single]), whole.arena)
    assert torch.equal(torch.stack([part.tags for part in single]), whole.tags)


@each_implementation
@pytest.mark.parametrize("strips", [range(0, 1), range(1, 3), range(2, 4), range(0, 4)], ids=str)
def test_decoding_some_strips(name: str, strips: range) -> None:
    shape = (240, 300)
    packed = packed_sample(shape)
    offsets = strip_offsets(packed.tags, packed.grid, packed.arena.numel())
    with implementation(name):
        whole = decode_tensor(packed)
        part = decode_strips(packed.arena, packed.tags, offsets, shape, strips, torch.float32)
    assert torch.equal(part, whole[strips.start * 64 : strips.stop * 64])
