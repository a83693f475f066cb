"""The policy ``adaptive``: which rule applies, and what storing the mean is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ciuic_hf.compressor.adaptive import adaptive_choice, adaptive_compress
from ciuic_hf.compressor.compressor import BLOCK_DTYPES, CiuicCompressor

GENERATOR = torch.Generator().manual_seed(0)


def with_zeros(share: float) -> torch.Tensor:
    tensor = torch.randn(200, 300, generator=GENERATOR)
    tensor.view(-1)[torch.randperm(60_000, generator=GENERATOR)[: round(share * 60_000)]] = 0
    return tensor


@pytest.mark.parametrize("dtype", BLOCK_DTYPES)
def test_the_rule(dtype: torch.dtype) -> None:
    normal = torch.randn(200, 300, generator=GENERATOR)
    assert adaptive_choice(with_zeros(0.81).to(dtype)) is None
    assert adaptive_choice(with_zeros(0.79).to(dtype)) == 8
    assert adaptive_choice((normal + 10.5).to(dtype)) == 4
    assert adaptive_choice((-normal - 10.5).to(dtype)) == 4
    assert adaptive_choice((normal + 9.5).to(dtype)) == 8
    assert adaptive_choice(normal.to(dtype)) == 8


@pytest.mark.parametrize("numpy", [False, True])
def test_narrow_tensors_keep_their_spread(numpy: bool) -> None:
    spread = torch.randn(200, 300, generator=GENERATOR)
    tensor = spread * 0.05 + 1
    compressor = CiuicCompressor()
    compressed = adaptive_compress(tensor.numpy() if numpy else tensor, compressor)
    assert set(compressed.codecs) == {"grid4_g32"} and abs(compressed.mean - 1) < 1e-3
    found = torch.as_tensor(np.asarray(compressor.decompress_tensor(compressed)))
    assert ((found - tensor).norm() / (spread * 0.05).norm()) < 0.09  # as well as 4 bits do around zero


def test_zeros_stay_zero_and_cost_little() -> None:
    tensor = with_zeros(0.9)
    tensor[:64, :128] = 0
    compressor = CiuicCompressor()
    compressed = adaptive_compress(tensor, compressor)
    found = compressor.decompress_tensor(compressed)
    assert (found[tensor == 0] == 0).all() and compressed.codecs["zero"] == 1
    assert (found - tensor).norm() / tensor.norm() < 0.01
    assert (
        compressed.bits_per_weight < 2.5 and compressed.compression_ratio == compressed.bits_per_weight / 32
    )


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("ratio", [0.12, 0.25, 0.5])
def test_sparse_tensors_stay_below_the_ratio_and_lose_nothing_more(share: float, ratio: float) -> None:
    tensor = with_zeros(share)
    dense = torch.where(tensor == 0, torch.randn(200, 300, generator=GENERATOR), tensor)
    errors = []
    for source in (tensor, dense):
        compressed = CiuicCompressor(ratio).compress_tensor(source)
        assert compressed.nbytes <= ratio * source.nbytes
        found = CiuicCompressor().decompress_tensor(compressed)
        errors.append(float((found - source).norm() / source.norm()))
        assert (found[source == 0] == 0).all()
    assert errors[0] <= errors[1] * 1.1 or errors[0] < 0.006  # 8 bits are the most that sparse blocks get


def test_the_threshold_is_relative() -> None:
    """Small numbers are not taken for zeros, and what is tiny beside its block may be dropped."""
    tensor = with_zeros(0.9) * 1e-9
    found = CiuicCompressor(0.5, 1e-3).decompress_tensor(CiuicCompressor(0.5, 1e-3).compress_tensor(tensor))
    assert (found - tensor).norm() / tensor.norm() < 0.01
    noisy = tensor + torch.randn(200, 300, generator=GENERATOR) * 1e-13
    sizes = [CiuicCompressor(0.5, threshold).compress_tensor(noisy).nbytes for threshold in (0.0, 1e-2)]
    assert sizes[1] < 0.2 * sizes[0]


def test_what_is_never_rounded_passes() -> None:
    for tensor in (torch.arange(9), torch.zeros(0, 4), torch.ones(3, dtype=torch.bool)):
        compressed = adaptive_compress(tensor, CiuicCompressor())
        assert torch.equal(CiuicCompressor().decompress_tensor(compressed), tensor)
