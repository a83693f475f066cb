"""A second reader of sparse records, written from the byte diagram alone, and what it does with hostile bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels import BlockGrid, PackedTensor, ops
from ciuic_kernels.codecs.sparse import SPARSE, SparseCodec
from ciuic_kernels.derived import derive
from ciuic_kernels.packing import decode_tensor, encode_tensor
from tests.kernels.samples import IMPLEMENTATIONS, SPARSE_SAMPLE, generator, implementation, weights
from tests.kernels.test_grid_record import read_weight, scale_of
from tests.kernels.tolerances import assert_product

each_sparse = pytest.mark.parametrize("codec", SPARSE_SAMPLE, ids=lambda codec: codec.name)
SIZES = [(2, 128), (3, 64), (3, 100), (5, 7), (1, 1), (64, 9)]


def read_field(plane: bytes, width: int, number: int) -> int:
    return int.from_bytes(plane, "little") >> (number * width) & ((1 << width) - 1)


def read_block(record: bytes, exponent: int, codec: SparseCodec, rows: int, cols: int) -> list[list[float]]:
    slots, row_bytes = -(-rows * cols * codec.capacity // 32), -(-cols // 8)
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 8: (4, 4)}.get(codec.width, (codec.width,))
    scales, at, planes = record[rows * row_bytes :][:rows], rows * row_bytes + rows, []
    for width in widths:
        planes.append(record[at : at + -(-slots * width // 8)])
        at += -(-slots * width // 8)
    assert at == len(record)
    values, number = [[0.0] * cols for _ in range(rows)], 0
    for r in range(rows):
        scale = scale_of(scales[r], exponent)
        for c in range(cols):
            if record[r * row_bytes + c // 8] >> (c % 8) & 1:
                if number < slots:
                    code = read_field(planes[0], widths[0], number)
                    if len(planes) == 2:
                        code |= read_field(planes[1], widths[1], number) << widths[0]
                    values[r][c] = read_weight(code, scale, codec.width)
                number += 1
    return values


def decoded_by(name: str, record: Tensor, exponent: int, codec: SparseCodec, rows: int, cols: int) -> Tensor:
    """One record through a whole parameter, as both implementations read it; nothing lies behind it."""
    arena = torch.nn.functional.pad(record, (0, -record.numel() % 16))
    packed = PackedTensor((rows, cols), arena, torch.tensor([[[codec.id, exponent]]], dtype=torch.uint8))
    with implementation(name):
        return decode_tensor(packed)


@each_sparse
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_decode_follows_the_byte_diagram(codec: SparseCodec, rows: int, cols: int) -> None:
    records, exponents = codec.encode(weights((1, rows, cols), 3, "heavy"))
    expected = read_block(bytes(records[0].tolist()), int(exponents[0]), codec, rows, cols)
    assert codec.decode(records, exponents, rows, cols)[0].tolist() == expected


@pytest.mark.usefixtures("compiled")
@each_sparse
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("fill", ["random", "full"])
def test_any_bytes_are_read_by_the_same_rule(
    codec: SparseCodec, name: str, rows: int, cols: int, fill: str
) -> None:
    """Set bits past the last column count for nothing; weights without a slot are zero."""
    record = torch.randint(
        256, (codec.record_nbytes(rows, cols),), dtype=torch.uint8, generator=generator(rows)
    )
    if fill == "full":
        record[: rows * -(-cols // 8)] = 255
    expected = read_block(bytes(record.tolist()), 127, codec, rows, cols)
    decoded = decoded_by(name, record, 127, codec, rows, cols)
    assert decoded.tolist() == expected
    assert int(decoded.count_nonzero()) <= codec.slots(rows, cols)


@pytest.mark.usefixtures("impl")
def test_a_full_bitmap_in_every_operator() -> None:
    """Rows, products and single rows of a hostile block are those of the decoded matrix."""
    shape, codec = (70, 200), SPARSE[4, 3]
    packed = encode_tensor(weights(shape, 0), torch.full((2, 2), codec.id, dtype=torch.uint8))
    packed.arena.fill_(255)
    dense = decode_tensor(packed)
    stored = (packed.arena, packed.tags, *derive(packed.tags, packed.grid, packed.arena.numel()))
    sizes = [codec.slots(r, c) for r in (64, 6) for c in (128, 72)]
    assert int(dense.count_nonzero()) == sum(sizes)
    order = torch.randperm(70)
    assert torch.equal(ops.embedding(order, *stored, *shape, torch.float32), dense[order])
    for rows in (1, 9, 20):
        x = torch.randn(rows, 200)
        assert_product(ops.linear(x, *stored, None, *shape), x, dense)


def test_the_bytes_of_a_small_block() -> None:
    """The examples of docs/checkpoint-format.md; of equal magnitudes the later are dropped."""
    block = torch.tensor([[[-4, -2, -1, 0, 1], [2, 3, 1, -1, 0.5]]])
    records, exponents = SPARSE[4, 16].encode(block)
    assert exponents.tolist() == [0x78]
    assert bytes(records[0].tolist()).hex(" ") == "07 03 f4 e7 30 25 00"
    records, exponents = SPARSE[3, 20].encode(block)
    assert bytes(records[0].tolist()).hex(" ") == "17 07 e2 cf 78 21 08"


@pytest.mark.usefixtures("compiled")
@settings(max_examples=25)
@given(
    rows=st.integers(1, 64),
    cols=st.integers(1, 128),
    place=st.sampled_from(sorted(SPARSE)),
    kind=st.sampled_from(["gaussian", "integers", "sparse", "rows"]),
    seed=st.integers(0, 999),
)
def test_what_is_kept(rows: int, cols: int, place: tuple[int, int], kind: str, seed: int) -> None:
    """The largest magnitudes, the first among equals; both implementations set the same bits."""
    codec, source = SPARSE[place], weights((rows, cols), seed, kind)
    by_size = sorted(enumerate(source.flatten().tolist()), key=lambda pair: (-abs(pair[1]), pair[0]))
    kept = {place for place, value in by_size[: codec.slots(rows, cols)] if value}
    ids = torch.full(BlockGrid((rows, cols)).tags_shape[:-1], codec.id, dtype=torch.uint8)
    for name in IMPLEMENTATIONS:
        with implementation(name):
            bitmap = encode_tensor(source, ids).arena[: rows * -(-cols // 8)].view(rows, -1).tolist()
        assert kept == {
            r * cols + c
            for r in range(rows)
            for c in range(8 * len(bitmap[0]))
            if bitmap[r][c // 8] >> c % 8 & 1
        }
