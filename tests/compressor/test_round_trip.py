"""What compressing and decompressing any tensor promises: same kind, shape and dtype; bytes within the ratio; error."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ciuic_hf.compressor.compressed import CompressedTensor
from ciuic_hf.compressor.compressor import BLOCK_DTYPES, CiuicCompressor

SHAPES = [(), (0,), (1,), (129,), (3, 0, 2), (65, 130), (1000, 3), (3, 1000), (2, 3, 5, 70), (8193,)]
EXACT = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.complex64, torch.float8_e4m3fn]
RELATIVE_ERROR = {0.5: 0.023, 0.3: 0.17}
"""Frobenius, normal weights. The bound is that of the next lower width, 6 and 3 bits: a single block has to take it."""


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", BLOCK_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_floats_keep_shape_dtype_and_ratio(shape: tuple[int, ...], dtype: torch.dtype, ratio: float) -> None:
    tensor, compressor = normal(shape, dtype), CiuicCompressor(ratio)
    compressed = compressor.compress_tensor(tensor)
    decompressed = compressor.decompress_tensor(compressed)
    assert (decompressed.shape, decompressed.dtype) == (tensor.shape, dtype)
    assert relative_error(decompressed, tensor) < RELATIVE_ERROR[ratio]
    stored = sum(t.numel() for name, t in compressed.state_dict().items() if name != "header")
    assert compressed.nbytes == stored
    if compressed.raw is None:
        assert compressed.nbytes <= ratio * tensor.numel() * tensor.itemsize
        assert compressed.bits_per_weight == 8 * stored / tensor.numel()
    else:
        assert torch.equal(decompressed, tensor) and tensor.numel() < 200


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_else_is_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (normal(shape, torch.float32) * 50).to(dtype) if dtype.itemsize else torch.empty(0)
    decompressed = CiuicCompressor(0.1).decompress_tensor(CiuicCompressor(0.1).compress_tensor(tensor))
    assert decompressed.dtype == dtype and decompressed.shape == tensor.shape
    assert torch.equal(decompressed.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", BLOCK_DTYPES)
def test_a_ratio_of_one_is_exact(dtype: torch.dtype) -> None:
    tensor = normal((70, 200), dtype)
    tensor[0, 0] = float("nan")
    decompressed = CiuicCompressor(1.0).decompress_tensor(CiuicCompressor(1.0).compress_tensor(tensor))
    assert torch.equal(decompressed.view(torch.uint8), tensor.view(torch.uint8))


LAYOUTS: dict[str, Any] = {
    "transposed": lambda t: t.t(),
    "every other row": lambda t: t[::2],
    "every third column": lambda t: t[:, ::3],
    "expanded": lambda t: t[:1].expand(64, -1),
    "channels last": lambda t: t.view(5, 4, 10, 13).to(memory_format=torch.channels_last),
    "a parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_in_memory_does_not_matter(layout: str) -> None:
    tensor = LAYOUTS[layout](normal((20, 130), torch.bfloat16))
    compressor = CiuicCompressor(0.5)
    expected = compressor.compress_tensor(tensor.detach().contiguous())
    found = compressor.compress_tensor(tensor)
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in expected.state_dict().items())
    decompressed = compressor.decompress_tensor(found)
    assert type(decompressed) is torch.Tensor and decompressed.is_contiguous()
    assert not decompressed.requires_grad and decompressed.shape == tensor.shape


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "bool", "complex128", "uint64"])
def test_numpy_comes_back_as_numpy(dtype: str) -> None:
    array = (np.random.default_rng(0).standard_normal((40, 70)) * 9).astype(dtype)
    compressor = CiuicCompressor(0.5)
    for source in (array, array[::-1, ::2], np.asfortranarray(array), array[3, 4:5].reshape(())):
        read_only = source.copy()
        read_only.flags.writeable = False
        found = compressor.decompress_tensor(compressor.compress_tensor(read_only))
        assert isinstance(found, np.ndarray) and (found.dtype, found.shape) == (source.dtype, source.shape)
        exact = compressor.decompress_tensor(compressor.compress_tensor(source))
        np.testing.assert_array_equal(found, exact)
        np.testing.assert_allclose(
            found.astype(complex), source.astype(complex), atol=1.2
        )  # half a step at 6 bits
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(found, source)


@settings(max_examples=60, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from([np.float16, np.float32]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=16),
    ),
    ratio=st.floats(0.2, 1.0),
)
def test_any_finite_values_come_back_within_a_step(array: np.ndarray, ratio: float) -> None:
    compressor = CiuicCompressor(ratio)
    compressed = compressor.compress_tensor(array)
    found = compressor.decompress_tensor(compressed)
    assert (found.dtype, found.shape) == (array.dtype, array.shape) and np.isfinite(found).all()
    if compressed.raw is None:
        assert compressed.nbytes <= ratio * array.nbytes
    else:
        np.testing.assert_array_equal(found, array)
    if array.size and ratio >= 0.6:  # at least 8 bits: a step is at most 1.6 % of the largest value
        bound = 0.02 * float(np.abs(array.astype(np.float64)).max())
        assert np.abs(found.astype(np.float64) - array.astype(np.float64)).max(initial=0) <= bound + 1e-30


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 200), cols=st.integers(1, 300))
def test_more_bytes_are_never_worse(seed: int, rows: int, cols: int) -> None:
    tensor = normal((rows, cols), torch.float16, seed)
    errors, sizes = [], []
    for ratio in (0.15, 0.25, 0.5, 0.75, 1.0):
        compressed = CiuicCompressor(ratio).compress_tensor(tensor)
        if compressed.raw is None or ratio == 1.0:
            errors.append(relative_error(CiuicCompressor().decompress_tensor(compressed), tensor))
            sizes.append(compressed.nbytes)
    assert sizes == sorted(sizes) and errors[-1] == 0
    assert all(next_ <= previous * 1.01 for previous, next_ in itertools.pairwise(errors))


def test_extremes_stay_finite() -> None:
    """Up to 2^125, where the outermost level of the largest scale lies for the flattest grid."""
    compressor = CiuicCompressor(0.5)
    for dtype in BLOCK_DTYPES:
        largest = min(torch.finfo(dtype).max, 2.0**125)
        tensor = torch.cat([normal((300,), dtype), torch.tensor([largest, -largest], dtype=dtype)])
        found = compressor.decompress_tensor(compressor.compress_tensor(tensor))
        assert torch.isfinite(found).all() and abs(float(found[-2]) / largest - 1) < 0.1


@pytest.mark.parametrize("dtype", BLOCK_DTYPES)
def test_constants_cost_almost_nothing(dtype: torch.dtype) -> None:
    for value in (0.0, 3.0, -0.125):
        tensor = torch.full((3, 70, 200), value, dtype=dtype)
        compressed = CiuicCompressor().compress_tensor(tensor)
        assert torch.equal(CiuicCompressor().decompress_tensor(compressed), tensor)
        assert compressed.nbytes < 30 and compressed.codecs == {"zero": 6}


def test_blocks_that_matter_least_are_dropped_first() -> None:
    """Below two bits not all blocks can be kept."""
    tensor = (
        normal((640, 128), torch.float16) * torch.logspace(-3, 0, 10).repeat_interleave(64)[:, None].half()
    )
    compressed = CiuicCompressor(0.07).compress_tensor(tensor)
    kept = CiuicCompressor().decompress_tensor(compressed).view(10, -1).abs().amax(1) > 0
    assert 0 < kept.sum() < 10 and kept.tolist() == sorted(kept.tolist())


def test_the_source_and_the_result_are_not_shared() -> None:
    for tensor in (normal((70, 200), torch.float32), torch.arange(20)):
        for ratio in (0.5, 1.0):
            compressed = CiuicCompressor(ratio).compress_tensor(tensor)
            expected = CiuicCompressor().decompress_tensor(compressed).clone()
            CiuicCompressor().decompress_tensor(compressed).zero_()
            tensor = tensor.clone()
            assert torch.equal(CiuicCompressor().decompress_tensor(compressed), expected)


@pytest.mark.parametrize("source", [normal((9, 50), torch.bfloat16) + 100, torch.arange(7), np.ones((2, 90))])
def test_saving(source: Any, tmp_path: Any) -> None:
    compressed = CiuicCompressor().compress_tensor(source)
    compressed.save(tmp_path / "t.safetensors")
    expected = compressed.state_dict()
    for again in (
        CompressedTensor.load(tmp_path / "t.safetensors"),
        CompressedTensor.from_state_dict(expected),
        pickle.loads(pickle.dumps(compressed)),
    ):
        assert repr(again) == repr(compressed)
        assert all(torch.equal(t, expected[name]) for name, t in again.state_dict().items())
        found, before = (CiuicCompressor().decompress_tensor(c) for c in (again, compressed))
        assert type(found) is type(before) and bool((found == before).all())
