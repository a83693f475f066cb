"""Every byte of an arena is accounted for, and every weight of a decoded tensor is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels import BlockGrid, PackedTensor, codec_by_id, codec_by_name
from ciuic_kernels.layout import strip_offsets
from ciuic_kernels.packing import allocate, decode_tensor, encode_matrix
from tests.kernels.samples import (
    IMPLEMENTATIONS,
    each_dtype,
    implementation,
    mixed_ids,
    packed_sample,
    shapes,
    weights,
)


def stored_bits(name: str, rows: int, cols: int) -> int:
    """Payload of a block by the tables of the format, written out again: 16-byte units are added by the caller."""
    if name == "zero":
        return 0
    if name.startswith("raw"):
        return 16 * rows * cols
    if name.startswith("sparse"):
        width, capacity = (int(part) for part in name.removeprefix("sparse").split("_d"))
        slots = (rows * cols * capacity + 31) // 32
        return 8 * (rows * ((cols + 7) // 8 + 1) + sum((slots * p + 7) // 8 for p in plane_widths(width)))
    width, group = (int(part) for part in name.removeprefix("grid").split("_g"))
    return (
        8 * rows * (sum((cols * p + 15) // 16 * 2 for p in plane_widths(width)) + (cols + group - 1) // group)
    )


def plane_widths(width: int) -> tuple[int, ...]:
    return {3: (2, 1), 5: (4, 1), 6: (4, 2), 8: (4, 4)}.get(width, (width,))


def records(packed: PackedTensor) -> list[tuple[str, int, int, int]]:
    """``(codec, first byte, bytes used, bytes with padding)`` of every block, from the tags alone."""
    grid, at, found = packed.grid, 0, []
    ids = packed.tags[..., 0].flatten().tolist()
    for block, codec_id in enumerate(ids):
        strip, kblock = divmod(block % grid.blocks, grid.kblocks)
        rows, cols = min(64, grid.rows - 64 * strip), min(128, grid.cols - 128 * kblock)
        name = codec_by_id(codec_id).name
        bits = stored_bits(name, rows, cols)
        padded = (bits + 127) // 128 * 16
        found.append((name, at, bits // 8, padded))
        at += padded
    return found


@pytest.mark.usefixtures("compiled")
@settings(max_examples=25)
@given(shape=shapes(), seed=st.integers(0, 2**16), name=st.sampled_from(IMPLEMENTATIONS))
def test_size_and_padding(shape: tuple[int, ...], seed: int, name: str) -> None:
    """Nothing but records, each padded to 16 bytes with zeros, even where the arena held other bytes before."""
    source, ids = weights(shape, seed, dtype=torch.float16), mixed_ids(shape, seed)
    with implementation(name):
        packed, offsets = allocate(ids, BlockGrid(shape), "cpu")
        packed.arena.fill_(0xAB)
        for index, matrix in enumerate(source if len(shape) == 3 else [source]):
            encode_matrix(packed, offsets, index, matrix)
    found = records(packed)
    assert packed.arena.numel() == sum(padded for *_, padded in found)
    for _, at, used, padded in found:
        assert not packed.arena[at + used : at + padded].any()
    assert packed.nbytes == packed.arena.numel() + 2 * len(found)
    assert packed.bits_per_weight == pytest.approx(8 * packed.nbytes / source.numel())


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(("name", "dtype"), [("raw_bf16", torch.bfloat16), ("raw_fp16", torch.float16)])
@pytest.mark.parametrize("shape", [(70, 200), (2, 65, 129), (1, 1)], ids=str)
def test_raw_blocks_are_exact(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Bit for bit, signed zeros and denormals too."""
    bits = torch.randint(0, 0x7F00 if name == "raw_bf16" else 0x7BFF, shape, dtype=torch.int16)
    source = (bits | (torch.randint(0, 2, shape) << 15).to(torch.int16)).view(dtype)
    ids = torch.full(BlockGrid(shape).tags_shape[:-1], codec_by_name(name).id, dtype=torch.uint8)
    packed, offsets = allocate(ids, BlockGrid(shape), "cpu")
    for index, matrix in enumerate(source if len(shape) == 3 else [source]):
        encode_matrix(packed, offsets, index, matrix)
    assert torch.equal(decode_tensor(packed, dtype).view(torch.int16), source.view(torch.int16))


@each_dtype
@pytest.mark.usefixtures("impl", "poisoned_empty")
@pytest.mark.parametrize("shape", [(64, 128), (150, 300), (2, 70, 576)], ids=str)
def test_no_hole_is_left(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Buffers are NaN (bytes: 255) before they are written."""
    packed = packed_sample(shape)
    assert decode_tensor(packed, dtype).isfinite().all()
    for name, at, used, padded in records(packed):
        assert not packed.arena[at + used : at + padded].any()
        assert name != "zero" or padded == 0
    assert not packed.tags[..., 1][packed.tags[..., 0] <= 2].any(), "zero and raw blocks have exponent 0"


@pytest.mark.usefixtures("impl")
def test_decoded_once_rounded(impl: str) -> None:
    """The 16-bit results are the float32 ones, rounded to nearest even."""
    packed = packed_sample((150, 300))
    exact: Tensor = decode_tensor(packed)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(decode_tensor(packed, dtype), exact.to(dtype))


def test_offsets_of_allocate() -> None:
    packed, offsets = allocate(mixed_ids((2, 70, 300), 0), BlockGrid((2, 70, 300)), "cpu")
    packed.tags[..., 1] = 0
    assert torch.equal(offsets, strip_offsets(packed.tags, packed.grid, packed.arena.numel()))
