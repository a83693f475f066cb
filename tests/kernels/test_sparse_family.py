"""The 120 sparse codecs as a family: ids, names, sizes, and which one holds how many weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_kernels import all_codecs, codec_by_id, codec_by_name
from ciuic_kernels.codecs.sparse import CAPACITIES, SPARSE, SparseCodec, sparse_codec_for

WIDTHS = (2, 3, 4, 5, 6, 8)
sizes = st.tuples(st.integers(1, 64), st.integers(1, 128))


def test_ids_and_names() -> None:
    expected = [(128 + 20 * i + d - 1, f"sparse{k}_d{d}") for i, k in enumerate(WIDTHS) for d in range(1, 21)]
    assert [(c.id, c.name) for c in all_codecs() if isinstance(c, SparseCodec)] == expected
    for codec_id, name in expected:
        assert codec_by_id(codec_id) is codec_by_name(name)


@given(size=sizes)
def test_sizes(size: tuple[int, int]) -> None:
    """Each part of a record is whole bytes, and a weight more never makes a record smaller."""
    rows, cols = size
    for k in WIDTHS:
        records = []
        for d in CAPACITIES:
            codec = SPARSE[k, d]
            slots = codec.slots(rows, cols)
            assert slots == -(-rows * cols * d // 32) and 1 <= slots <= rows * cols
            planes = {3: (2, 1), 5: (4, 1), 6: (4, 2), 8: (4, 4)}.get(k, (k,))
            parts = [rows * -(-cols // 8), rows, *(-(-slots * p // 8) for p in planes)]
            assert codec.part_nbytes(rows, cols) == parts
            records.append(codec.record_nbytes(rows, cols))
        assert records == sorted(records)


def test_bits_of_full_blocks() -> None:
    for codec in SPARSE.values():
        assert codec.bits == 8 * codec.record_nbytes(64, 128) / (64 * 128)
        assert codec.slots(64, 128) == 256 * codec.capacity
    assert SPARSE[4, 7].bits == 1.9375


@given(size=sizes, width=st.sampled_from(WIDTHS), share=st.floats(0, 1))
def test_the_smallest_codec_that_holds_them(size: tuple[int, int], width: int, share: float) -> None:
    rows, cols = size
    nnz = round(share * rows * cols)
    holding = [SPARSE[width, d] for d in CAPACITIES if SPARSE[width, d].slots(rows, cols) >= nnz]
    assert sparse_codec_for(nnz, rows, cols, width) == (holding[0] if holding else None)


@pytest.mark.parametrize(("nnz", "width", "message"), [(-1, 4, "-1"), (13, 4, "13"), (3, 7, "got 7")])
def test_counts_and_widths_that_cannot_be(nnz: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_codec_for(nnz, 3, 4, width)


def test_each_holds_what_it_says() -> None:
    """A block with as many weights as there are slots loses none; with one more, the smallest."""
    for codec in SPARSE.values():
        slots = codec.slots(6, 50)
        block = torch.zeros(1, 6, 50)
        order = torch.randperm(300)
        block.view(-1)[order[: slots + 1]] = 1.0
        block.view(-1)[order[slots]] = 0.5
        decoded = codec.decode(*codec.encode(block), 6, 50)
        assert torch.equal(decoded != 0, block == 1.0)
