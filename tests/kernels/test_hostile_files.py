"""Files that lie: whatever is done to tags and arena, loading says FormatError or reads only what is there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_kernels import BlockGrid, PackedTensor, all_codecs, codec_by_id
from ciuic_kernels.layout import MAX_EXPONENT, FormatError, block_nbytes, strip_offsets, validate
from ciuic_kernels.packing import decode_tensor
from tests.kernels.samples import generator, implementation, packed_sample, shapes

KNOWN = {codec.id for codec in all_codecs()}


def changed(packed: PackedTensor, place: int, byte: int, value: int) -> PackedTensor:
    """One byte of the tags (0: codec, 1: exponent) of one block set to a value."""
    tags = packed.tags.clone()
    tags.view(-1, 2)[place % (tags.numel() // 2), byte] = value
    return dataclasses.replace(packed, tags=tags)


@settings(max_examples=30)
@given(
    shape=shapes(), place=st.integers(0, 10**6), tag=st.integers(0, 255).filter(lambda tag: tag not in KNOWN)
)
def test_unknown_codec(shape: tuple[int, ...], place: int, tag: int) -> None:
    with pytest.raises(FormatError, match=f"Block tag {tag} is not a codec"):
        validate(changed(packed_sample(shape), place, 0, tag))


@settings(max_examples=30)
@given(shape=shapes(), place=st.integers(0, 10**6), exponent=st.integers(MAX_EXPONENT + 1, 255))
def test_exponent_that_is_not_finite(shape: tuple[int, ...], place: int, exponent: int) -> None:
    with pytest.raises(FormatError, match=f"scale exponent {exponent}"):
        validate(changed(packed_sample(shape), place, 1, exponent))


@settings(max_examples=30)
@given(shape=shapes(), place=st.integers(0, 10**6), tag=st.sampled_from(sorted(KNOWN)))
def test_another_codec(shape: tuple[int, ...], place: int, tag: int) -> None:
    """Either the sizes no longer add up, or the record has the size of the other codec and is read as such."""
    packed = packed_sample(shape)
    other = changed(packed, place, 0, tag)
    sizes = block_nbytes(packed.tags[..., 0], packed.grid), block_nbytes(other.tags[..., 0], packed.grid)
    if int(sizes[0].sum()) == int(sizes[1].sum()):
        assert decode_tensor(other).shape == shape
    else:
        with pytest.raises(FormatError, match="damaged or truncated"):
            validate(other)


@settings(max_examples=30)
@given(shape=shapes(), delta=st.integers(-64, 64).filter(bool))
def test_truncated_or_extended_arena(shape: tuple[int, ...], delta: int) -> None:
    packed = packed_sample(shape)
    size = max(0, packed.arena.numel() + delta)
    if size == packed.arena.numel():
        return
    arena = torch.zeros(size, dtype=torch.uint8)
    with pytest.raises(FormatError, match="damaged or truncated"):
        validate(dataclasses.replace(packed, arena=arena))


@pytest.mark.parametrize(
    "tags",
    [
        torch.zeros(2, 3, 3, dtype=torch.uint8),
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        torch.zeros(1, 2, 3, 2, dtype=torch.uint8),
        torch.zeros(12, dtype=torch.uint8),
        torch.zeros((), dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(2, 3, 2, dtype=torch.int8),
        torch.zeros(2, 3, 2, dtype=torch.int64),
        torch.zeros(2, 3, 2),
    ],
    ids=lambda tags: f"{tags.dtype}-{list(tags.shape)}",
)
def test_tags_of_the_wrong_shape_or_dtype(tags: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=r"must be uint8 \[2, 3, 2\]"):
        strip_offsets(tags, BlockGrid((70, 300)), 0)


@pytest.mark.parametrize(
    "arena",
    [torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(16), torch.zeros(16, dtype=torch.int8)],
    ids=lambda arena: f"{arena.dtype}-{list(arena.shape)}",
)
def test_arena_of_the_wrong_shape_or_dtype(arena: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="1-D uint8"):
        validate(dataclasses.replace(packed_sample((70, 300)), arena=arena))


@settings(max_examples=50)
@given(shape=shapes(), seed=st.integers(0, 2**32), nbytes=st.integers(0, 1 << 20))
def test_random_tags(shape: tuple[int, ...], seed: int, nbytes: int) -> None:
    grid = BlockGrid(shape)
    tags = torch.randint(256, grid.tags_shape, dtype=torch.uint8, generator=generator(seed))
    try:
        offsets = strip_offsets(tags, grid, nbytes)
    except FormatError:
        return
    sizes = block_nbytes(tags[..., 0], grid)
    assert int(offsets[0]) == 0 and int(offsets[-1]) == nbytes == int(sizes.sum())


@settings(max_examples=50)
@given(shape=shapes(), seed=st.integers(0, 2**16))
def test_valid_tags_point_inside(shape: tuple[int, ...], seed: int) -> None:
    packed = packed_sample(shape, seed)
    grid, offsets = packed.grid, validate(packed)
    ids = packed.tags.view(grid.matrices * grid.strips, grid.kblocks, 2)[..., 0]
    assert int(offsets[0]) == 0 and int(offsets[-1]) == packed.arena.numel()
    for strip, start in enumerate(offsets[:-1].tolist()):
        rows = grid.strip_rows(strip % grid.strips)
        for kblock, codec_id in enumerate(ids[strip].tolist()):
            nbytes = codec_by_id(codec_id).record_nbytes(rows, grid.block_cols(kblock))
            assert start % 16 == 0 and start + nbytes <= packed.arena.numel()
            start += -(-nbytes // 16) * 16
        assert start == int(offsets[strip + 1])


@pytest.mark.usefixtures("compiled")
@settings(max_examples=15)
@given(shape=shapes(), seed=st.integers(0, 2**16))
def test_any_bytes_decode_to_the_same(shape: tuple[int, ...], seed: int) -> None:
    """A damaged arena of the right size is not noticed, and read alike by both implementations."""
    packed = packed_sample(shape, seed)
    packed.arena.random_(0, 256, generator=generator(seed))
    for dtype in (torch.float32, torch.bfloat16):
        decoded = {}
        for name in ("compiled", "reference"):
            with implementation(name):
                decoded[name] = decode_tensor(packed, dtype)
        assert torch.equal(decoded["compiled"].nan_to_num(7.0), decoded["reference"].nan_to_num(7.0))
