"""The compiled kernels and the torch reference write and read the same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels import BlockGrid, PackedTensor
from ciuic_kernels.codec import Codec
from ciuic_kernels.packing import decode_tensor, encode_tensor
from tests.kernels.samples import (
    DTYPES,
    KINDS,
    LAYOUTS,
    arranged,
    each_codec,
    implementation,
    mixed_ids,
    refusing,
    shapes,
    weights,
)

pytestmark = pytest.mark.usefixtures("compiled")


def encode_with(name: str, source: Tensor, ids: Tensor) -> PackedTensor:
    with implementation(name):
        return encode_tensor(source, ids)


def decode_with(name: str, packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    with implementation(name):
        return decode_tensor(packed, dtype)


def assert_agreement(source: Tensor, ids: Tensor) -> None:
    compiled, reference = (encode_with(name, source, ids) for name in ("compiled", "reference"))
    assert torch.equal(compiled.tags, reference.tags)
    assert torch.equal(compiled.arena, reference.arena)
    for dtype in DTYPES:
        decoded = decode_with("compiled", compiled, dtype)
        assert decoded.dtype == dtype and decoded.shape == source.shape
        assert torch.equal(decoded, decode_with("reference", compiled, dtype))


@settings(max_examples=40)
@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_any_mixture_of_blocks(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, layout: str, seed: int
) -> None:
    source = arranged(weights(shape, seed, kind, dtype), layout)
    assert_agreement(source, mixed_ids(shape, seed, without=refusing(dtype)))


@each_codec
@pytest.mark.parametrize("shape", [(64, 128), (64, 64), (70, 192), (130, 300), (3, 31)], ids=str)
def test_one_codec(codec: Codec, shape: tuple[int, int]) -> None:
    dtype = torch.float16 if codec.name == "raw_fp16" else torch.float32
    ids = torch.full(BlockGrid(shape).tags_shape[:-1], codec.id, dtype=torch.uint8)
    assert_agreement(weights(shape, 11, "heavy", dtype), ids)


@each_codec
@pytest.mark.parametrize("exponent", [-140, -126, -100, 60, 126])
def test_the_ends_of_float32(codec: Codec, exponent: int) -> None:
    """Denormals, errors whose squares underflow or overflow, and the largest numbers."""
    if codec.name == "raw_fp16":
        pytest.skip("stores float16 weights only")
    source = (2 * torch.rand(70, 150) - 1) * 2.0**exponent
    source = source.ldexp(torch.randint(0, 2, source.shape)).clamp(-3.3e38, 3.3e38)
    assert source.isfinite().all()
    assert_agreement(source, torch.full((2, 2), codec.id, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(200, 1), (1, 200), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_a_single_row_or_column(shape: tuple[int, int], layout: str) -> None:
    """PyTorch leaves the stride of a dimension of size 1 arbitrary."""
    for source in (arranged(weights(shape, 3), layout), weights((1, 1), 3).expand(shape)):
        assert_agreement(source, mixed_ids(shape, 1, without=refusing(source.dtype)))
