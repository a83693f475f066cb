"""The numpy decoder that the format's specification ships reads what the library writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_kernels import BlockGrid, PackedTensor, all_codecs
from ciuic_kernels.codec import Codec
from ciuic_kernels.codecs.grid import LINEAR, MAX_EXPONENT, PLANES
from ciuic_kernels.format import aligned
from ciuic_kernels.packing import decode_tensor, encode_tensor

DECODER = Path(__file__).parents[2] / "docs" / "reference_decoder.py"


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_decoder", DECODER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constants(decoder: ModuleType) -> None:
    assert decoder.LINEAR == LINEAR and decoder.PLANES == PLANES


@pytest.mark.parametrize("shape", [(64, 128), (1, 1), (130, 300), (576, 192), (3, 70, 200)])
def test_equal_bit_for_bit(decoder: ModuleType, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(shape, generator=generator)
    known = torch.tensor([codec.id for codec in all_codecs() if codec.name != "raw_fp16"], dtype=torch.uint8)
    ids = known[torch.randint(len(known), BlockGrid(shape).tags_shape[:-1], generator=generator)]
    packed = encode_tensor(weights, ids)
    read = decoder.decode(packed.arena.numpy(), packed.tags.numpy(), shape)
    assert np.array_equal(read, decode_tensor(packed).numpy())


@settings(max_examples=30)
@given(
    codec=st.sampled_from([codec for codec in all_codecs() if not codec.name.startswith("raw")]),
    rows=st.integers(1, 64),
    cols=st.integers(1, 128),
    exponent=st.integers(0, MAX_EXPONENT),
    seed=st.integers(0, 999),
)
def test_random_records(
    decoder: ModuleType, codec: Codec, rows: int, cols: int, exponent: int, seed: int
) -> None:
    """Any bytes, as a damaged file may hold them."""
    nbytes = codec.record_nbytes(rows, cols)
    arena = torch.randint(
        256, (aligned(nbytes),), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    tags = torch.tensor([[[codec.id, exponent]]], dtype=torch.uint8)
    read = decoder.decode(arena.numpy(), tags.numpy(), (rows, cols))
    assert np.array_equal(read, decode_tensor(PackedTensor((rows, cols), arena, tags)).numpy())
