"""Compressed gradients: sums that do not drift, edits that are refused, an accumulator for any optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ciuic_hf import (
    CiuicCompressor,
    CiuicError,
    CompressedGradient,
    StochasticCompressor,
    compress_gradients,
)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def micro_gradients(count: int = 64, correlated: float = 0.0) -> list[Tensor]:
    """Independent gradients of a matrix whose rows differ in size a hundredfold, or with a common direction."""
    generator = torch.Generator().manual_seed(1)
    rows = 10 ** (2 * torch.rand(96, 1, generator=generator) - 1)
    common = torch.randn(96, 300, generator=generator) * correlated
    return [rows * (torch.randn(96, 300, generator=generator) + common) for _ in range(count)]


def summed(compressor: object, gradients: list[Tensor], feedback_bits: int) -> CompressedGradient:
    total = CompressedGradient(compressor, gradients[0], feedback_bits=feedback_bits)  # type: ignore[arg-type]
    for gradient in gradients[1:]:
        total.add_(gradient)
    return total


@pytest.mark.parametrize(("bits", "feedback_bits"), [(8, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("correlated", [0.0, 1.0])
def test_64_additions_stay_within_a_percent(bits: int, feedback_bits: int, correlated: float) -> None:
    gradients = micro_gradients(correlated=correlated)
    exact = torch.stack(gradients).double().sum(0)
    total = summed(StochasticCompressor(bits, stochastic=False), gradients, feedback_bits)
    assert relative(total.decompress(), exact) < 0.01
    assert exact.numel() * 4 / total.nbytes > 1.9


@pytest.mark.parametrize(("bits", "fewer"), [(8, 3.9), (4, 7.0)])
def test_without_feedback_bytes_are_few_and_the_error_is_noise(bits: int, fewer: float) -> None:
    gradients = micro_gradients(16)
    exact = torch.stack(gradients).double().sum(0)
    draws = []
    for seed in range(16):
        total = summed(StochasticCompressor(bits, seed=seed), gradients, 0)
        assert exact.numel() * 4 / total.nbytes > fewer
        draws.append(total.decompress())
    one = sum(relative(draw, exact) for draw in draws) / 16
    assert relative(torch.stack(draws).mean(0), exact) < 1.2 * one / 4


def test_tiny_additions_are_not_lost() -> None:
    """Rounding to the nearest without a feedback would stay where it is."""
    start, small = torch.ones(128), torch.full((128,), 1e-4)
    start[0] = 4
    total = CompressedGradient(StochasticCompressor(8, stochastic=False), start)
    for _ in range(200):
        total.add_(small)
    assert ((total.decompress() - start) / 0.02 - 1).abs().mean() < 0.35
    stuck = CompressedGradient(StochasticCompressor(8, stochastic=False), start, feedback_bits=0)
    first = stuck.decompress()
    for _ in range(200):
        stuck.add_(small)
    assert torch.equal(stuck.decompress(), first)


def test_with_the_block_compressor_of_this_package() -> None:
    gradients = micro_gradients(8)
    total = summed(CiuicCompressor(compression_ratio=0.25), gradients, 4)
    assert relative(total.decompress(), torch.stack(gradients).double().sum(0)) < 0.01
    assert total.nbytes < gradients[0].nbytes * 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 129), (3, 5, 70)])
def test_shapes_and_dtypes_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape).to(dtype)
    compressed = CompressedGradient(StochasticCompressor(8), gradient)
    compressed += gradient
    compressed = compressed.add_(CompressedGradient(StochasticCompressor(4, stochastic=False), gradient))
    restored = compressed.decompress()
    assert compressed.shape == gradient.shape == restored.shape and restored.dtype == dtype
    torch.testing.assert_close(restored.float(), 3 * gradient.float(), rtol=0.02, atol=0.04)
    assert restored.data_ptr() != compressed.decompress().data_ptr() or restored.numel() == 0


def test_transposed_gradients_and_copies() -> None:
    gradient = torch.randn(40, 30).t()
    compressed = CompressedGradient(StochasticCompressor(8, stochastic=False), gradient)
    torch.testing.assert_close(compressed.decompress(), gradient, rtol=0, atol=0.01)
    for same in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed.compressed))):
        assert same.nbytes > 0


def test_zeros_stay_zeros() -> None:
    gradient = torch.randn(64, 64) * (torch.arange(64) % 2)
    total = CompressedGradient(StochasticCompressor(4), gradient)
    for _ in range(10):
        total.add_(gradient)
    assert (total.decompress()[:, ::2] == 0).all()


def test_nan_and_infinity_arrive_so_that_a_loss_scaler_sees_them() -> None:
    gradient = torch.randn(64, 64)
    total = CompressedGradient(StochasticCompressor(4), gradient)
    bad = gradient.clone()
    bad[3, 4], bad[5, 6] = float("inf"), float("nan")
    total.add_(bad)
    restored = total.decompress()
    assert restored[3, 4] == float("inf") and restored[5, 6].isnan()
    assert restored.isfinite().sum() == restored.numel() - 2
    assert total.add_(gradient).decompress()[3, 4] == float("inf")
    refusing = CompressedGradient(CiuicCompressor(0.25), gradient)
    before = refusing.decompress()
    with pytest.raises(CiuicError, match="NaN"):
        refusing.add_(bad)
    assert torch.equal(refusing.decompress(), before)


@pytest.mark.parametrize(
    "edit",
    [
        lambda gradient: gradient.mul_(2),
        lambda gradient: gradient.zero_(),
        lambda gradient: gradient.clamp_(-1, 1),
        lambda gradient: gradient.__setitem__(0, 1.0),
        lambda gradient: exec("gradient *= 2", {"gradient": gradient}),
        lambda gradient: exec("gradient -= 2", {"gradient": gradient}),
        lambda gradient: exec("gradient /= 2", {"gradient": gradient}),
    ],
)
def test_edits_in_place_are_refused(edit: Callable[[CompressedGradient], object]) -> None:
    gradient = CompressedGradient(StochasticCompressor(8), torch.randn(300))
    before = gradient.decompress()
    with pytest.raises(CiuicError, match="no other edit in place"):
        edit(gradient)
    assert torch.equal(gradient.decompress(), before)
    with pytest.raises(AttributeError, match="decompress"):
        gradient.mean()


def test_bad_input_is_refused() -> None:
    gradient = CompressedGradient(StochasticCompressor(8), torch.randn(3, 4))
    for bad, message in (
        (torch.randn(4, 3), r"\[4, 3\] cannot be added to one of \[3, 4\]"),
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.randn(3, 4).to_sparse(), "sparse"),
        (2.0, "float"),
    ):
        with pytest.raises(CiuicError, match=message):
            gradient.add_(bad)  # type: ignore[arg-type]
    for call in (
        lambda: StochasticCompressor(3),
        lambda: CompressedGradient(StochasticCompressor(8), torch.randn(3), feedback_bits=5),
        lambda: compress_gradients(nn.Linear(2, 2), bits=16),
    ):
        with pytest.raises(CiuicError, match="is one of 8, 4, 2"):
            call()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 50))


def backward(model: nn.Module, seed: int) -> None:
    ids = torch.randint(0, 50, (256,), generator=torch.Generator().manual_seed(seed))
    (nn.functional.cross_entropy(model(ids), (ids * 7 + 3) % 50) / 64).backward()


def test_the_accumulator_gives_the_sum_of_64_micro_batches() -> None:
    exact, model = network(), network()
    with compress_gradients(model, bits=8) as accumulator:
        for seed in range(64):
            backward(exact, seed)
            backward(model, seed)
            assert all(parameter.grad is None for parameter in model.parameters())
        held, whole = accumulator.nbytes, accumulator.original_nbytes
    assert whole == sum(parameter.nbytes for parameter in model.parameters()) and held < whole / 2.3
    assert accumulator.nbytes == 0
    for got, expected in zip(model.parameters(), exact.parameters(), strict=True):
        assert got.grad is not None and expected.grad is not None
        assert relative(got.grad, expected.grad) < 0.01
    backward(model, 64)  # its hooks are gone
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_stepping_piece_by_piece_is_the_same_step(
    optimizer: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciuic_hf.runtime.gradients._STEP_NBYTES", 1000)
    models = [network(), network()]
    optimizers = [optimizer(model.parameters(), lr=0.01) for model in models]  # type: ignore[call-arg]
    accumulators = [compress_gradients(model, bits=4) for model in models]
    for step in range(3):
        for seed in range(4):
            for model in models:
                backward(model, 10 * step + seed)
        accumulators[0].restore()
        optimizers[0].step()
        optimizers[0].zero_grad()
        accumulators[1].step(optimizers[1])
        assert all(p.grad is None for p in models[1].parameters())
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    next(models[1].parameters()).grad = torch.zeros(50, 64)
    with pytest.raises(CiuicError, match="stepped more than once"):
        accumulators[1].step(optimizers[1])


@pytest.mark.parametrize(("bits", "feedback_bits"), [(8, 4), (4, 4), (8, 0)])
def test_training_with_it_reaches_the_same_loss(bits: int, feedback_bits: int) -> None:
    losses = []
    for compressed in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        accumulator = (
            compress_gradients(model, bits=bits, feedback_bits=feedback_bits) if compressed else None
        )
        for step in range(25):
            for seed in range(4):
                backward(model, 4 * step + seed)
            if accumulator:
                accumulator.restore()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ids = torch.arange(50)
        losses.append(nn.functional.cross_entropy(model(ids), (ids * 7 + 3) % 50).item())
    assert losses[1] < losses[0] * 1.01 + 0.005


def test_misuse_of_the_accumulator_is_refused() -> None:
    model = network()
    backward(model, 0)
    with pytest.raises(CiuicError, match="zero_grad"):
        compress_gradients(model)
    model = nn.Sequential(nn.Embedding(50, 64, sparse=True), nn.Linear(64, 50))
    compress_gradients(model)
    with pytest.raises(CiuicError, match="dense"):
        backward(model, 0)
    accumulator = compress_gradients(network())
    backward(model := network(), 0)
    accumulator.clear()
    assert accumulator.nbytes == 0 and next(model.parameters()).grad is not None
