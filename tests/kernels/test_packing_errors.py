"""Weights that cannot be encoded are refused, by both implementations alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.packing import NotFiniteError, allocate, encode_matrix, encode_tensor
from tests.kernels.samples import (
    DTYPES,
    IMPLEMENTATIONS,
    implementation,
    mixed_ids,
    refusing,
    shapes,
    weights,
)

BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.usefixtures("compiled")
@settings(max_examples=40)
@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from(BAD),
    place=st.integers(0, 10**6),
    name=st.sampled_from(IMPLEMENTATIONS),
)
def test_not_finite_anywhere(
    shape: tuple[int, ...], dtype: torch.dtype, bad: float, place: int, name: str
) -> None:
    """Whatever codec the block has, a zero block included."""
    source = weights(shape, 1, dtype=dtype)
    source.view(-1)[place % source.numel()] = bad
    with implementation(name), pytest.raises(NotFiniteError):
        encode_tensor(source, mixed_ids(shape, place, without=refusing(dtype)))


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_fp16_takes_float16_only(dtype: torch.dtype) -> None:
    """Another dtype could overflow to infinity; NotFiniteError would blame the weights."""
    ids = torch.full((1, 1), codec_by_name("raw_fp16").id, dtype=torch.uint8)
    with pytest.raises(ValueError, match="raw_fp16 blocks keep float16 weights only") as caught:
        encode_tensor(weights((4, 4), 0, dtype=dtype), ids)
    assert not isinstance(caught.value, NotFiniteError)


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
        encode_tensor(torch.zeros(4, 4).to(dtype), mixed_ids((4, 4), 0))


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(
    ("shape", "first_row"),
    [
        ((150, 301), 0),  # too wide: would write past its records
        ((150, 299), 0),
        ((214, 300), 0),  # too tall
        ((64, 300), 128),
        ((64, 300), 32),  # not at a strip
        ((64, 300), -64),
        ((63, 300), 0),  # ends within a strip
        ((300,), 0),
    ],
    ids=str,
)
def test_rows_that_do_not_fit(shape: tuple[int, ...], first_row: int) -> None:
    packed, offsets = allocate(mixed_ids((150, 300), 0), BlockGrid((150, 300)), "cpu")
    with pytest.raises(ValueError, match="not whole strips"):
        encode_matrix(packed, offsets, 0, torch.zeros(shape, dtype=torch.float16), first_row)


@pytest.mark.usefixtures("impl")
def test_an_unknown_codec_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="Block tag 250"):
        encode_tensor(weights((4, 4), 0), torch.full((1, 1), 250, dtype=torch.uint8))
