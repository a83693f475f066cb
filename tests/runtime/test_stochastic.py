"""Groups with stochastic rounding: bounded, unbiased, exact where they promise it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciuic_hf.runtime.stochastic import BITS, PackedGroups, pack, pack_any, packed_nbytes, unpack
from ciuic_kernels.cpu import groups as compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setenv("CIUIC_IMPL", "reference")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(
    values: torch.Tensor, bits: int, group: int, seed: int | None = 0, signed: bool = False
) -> PackedGroups:
    result = pack(values, bits, group, None if seed is None else generator(seed), signed=signed)
    assert result is not None
    return result


def steps(groups: PackedGroups) -> torch.Tensor:
    """The step of each value [numel]."""
    return groups.step.float().repeat_interleave(groups.group)[: groups.numel]


def sample(numel: int, scale: int, shift: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    scale = min(scale, 1) if dtype == torch.float16 else scale
    return ((torch.randn(numel, generator=generator(seed)) + shift) * 10.0**scale).to(dtype)


samples = st.builds(
    sample,
    numel=st.integers(0, 70_000),
    scale=st.integers(-30, 3),
    shift=st.sampled_from([0.0, 0.0, 3.0, -100.0]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)


shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared_fixture
@given(samples, st.sampled_from(BITS), st.sampled_from([32, 64, 128]), st.booleans())
def test_no_value_moves_further_than_a_step(
    values: torch.Tensor, bits: int, group: int, signed: bool
) -> None:
    for seed, most in ((0, 1.0), (None, 0.5)):
        groups = packed(values, bits, group, seed, signed)
        restored = unpack(groups)
        assert restored.shape == values.shape and restored.dtype == values.dtype
        assert groups.nbytes == packed_nbytes(values.numel(), bits, group, signed=signed)
        # the dtype of the result rounds once more
        kind = torch.finfo(values.dtype)
        rounding = kind.eps * (values.float().abs() + steps(groups) + kind.smallest_normal)
        error = (restored.float() - values.float()).abs()
        assert (error <= most * steps(groups) * (1 + 1e-4) + rounding + 1e-37).all()


@shared_fixture
@given(samples, st.sampled_from(BITS))
def test_the_step_is_no_larger_than_the_range_asks_for(values: torch.Tensor, bits: int) -> None:
    whole = values[: values.numel() // 64 * 64].float().view(-1, 64)
    groups = packed(whole.flatten(), bits, 64)
    span = whole.amax(1) - whole.amin(1) if len(whole) else whole.sum(1)
    # low is rounded down by up to 2^-7 of itself, the step up by as much
    bound = (span + whole.abs().amax(1) * 2**-7 if len(whole) else span) / (2**bits - 1) * (1 + 2**-6)
    assert (groups.step.float() <= bound + 2.0**-125).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_the_expectation_is_the_value(bits: int, signed: bool) -> None:
    values = torch.randn(256, generator=generator(1)) + 0.3
    draws = torch.stack([unpack(packed(values, bits, 64, seed, signed)) for seed in range(2000)])
    step = steps(packed(values, bits, 64, 0, signed))
    # A draw has a standard deviation of at most half a step: six of them for the mean of 2000, over 256 values.
    assert ((draws.mean(0) - values).abs() < 6 * 0.5 * step / 2000**0.5).all()
    assert (draws.std(0) > 0).float().mean() > 0.9


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_where_there_is_nothing_to_round(bits: int, dtype: torch.dtype) -> None:
    zeros = torch.zeros(300, dtype=dtype)
    constant = torch.full((300,), 1.5, dtype=dtype)
    assert torch.equal(unpack(packed(zeros, bits, 64)), zeros)
    assert torch.equal(unpack(packed(constant, bits, 64)), constant)
    sparse = torch.randn(300).to(dtype) * (torch.arange(300) % 3 == 0)
    assert (unpack(packed(sparse, bits, 64, signed=True))[sparse == 0] == 0).all()
    positive = sparse.abs()
    assert (unpack(packed(positive, bits, 64))[positive == 0] == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "extremes"),
    [
        (torch.float32, (2.0**119, -(2.0**119))),
        (torch.float32, (1e-45, -1e-38)),
        (torch.bfloat16, (1e-40, 2e-38)),
        (torch.float16, (65504.0, -65504.0)),
        (torch.float16, (6e-8, 0.0)),
    ],
)
def test_extremes_stay_finite(
    bits: int, signed: bool, dtype: torch.dtype, extremes: tuple[float, float]
) -> None:
    values = torch.tensor(extremes, dtype=dtype).repeat(50)
    for seed in range(5):
        groups = packed(values, bits, 32, seed, signed)
        restored = unpack(groups)
        assert restored.isfinite().all()
        assert ((restored.double() - values.double()).abs() <= steps(groups).double() * 1.01).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("signed", [False, True])
def test_what_cannot_be_packed_is_told(bad: float, signed: bool) -> None:
    values = torch.randn(100_000)
    values[70_001] = bad
    assert pack(values, 4, 64, generator(), signed=signed) is None
    groups, finite = pack_any(values, 4, 64, generator(), signed=signed)
    assert not finite
    around = slice(70_001 // 64 * 64, 70_001 // 64 * 64 + 64)
    restored = unpack(groups)
    if bad != 3e38:
        assert not restored[70_001].isfinite()
    restored[around] = 0
    assert restored.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_a_seed_repeats_and_another_does_not(bits: int) -> None:
    values = torch.randn(5000)
    assert torch.equal(packed(values, bits, 64).codes, packed(values, bits, 64).codes)
    assert not torch.equal(packed(values, bits, 64).codes, packed(values, bits, 64, 1).codes)


def test_codes_lie_as_the_diagram_says() -> None:
    values = torch.arange(16.0)
    groups = packed(values, 4, 16, None)
    assert groups.step.item() == 1.0078125 and groups.low is not None and groups.low.item() == 0
    codes = groups.codes[0].int()
    assert torch.equal(torch.cat([codes & 15, codes >> 4]), torch.arange(16).int())


@pytest.mark.skipif(not compiled.usable(torch.device("cpu"), torch.float32, 64), reason="needs a C compiler")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_compiled_and_reference_agree_bit_for_bit(
    bits: int, signed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (torch.randn(100_037) * 10 ** torch.randn(100_037)).to(dtype)
    results = []
    for implementation in ("", "reference"):
        monkeypatch.setenv("CIUIC_IMPL", implementation)
        groups = packed(values, bits, 64, None, signed)
        drawn = packed(values, bits, 64, 0, signed)
        results.append((groups, unpack(groups), drawn))
    (one, restored, drawn), (other, expected, drawn_too) = results
    for name in ("codes", "step") + (() if signed else ("low",)):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(restored, expected)
    assert torch.equal(drawn.step, drawn_too.step)


def test_threads_do_not_change_what_is_drawn() -> None:
    values, threads = torch.randn(300_000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = packed(values, 4, 64)
        torch.set_num_threads(2)
        assert torch.equal(packed(values, 4, 64).codes, one.codes)
    finally:
        torch.set_num_threads(threads)


def test_draws_of_neighbours_and_of_tensors_are_independent() -> None:
    """Of values halfway between two codes, whether each goes up."""
    values = torch.tensor([0.0, 15.0]).repeat(8)[None].repeat(40_000, 1)
    values[:, 1:-1] = 7.5
    draws = generator()
    ups = []
    for _ in range(2):
        groups = pack(values.flatten(), 4, 16, draws)
        assert groups is not None
        ups.append((unpack(groups).view(-1, 16)[:, 1:-1] > 7.5).double() - 0.5)
    together = torch.cat(ups, 1)
    share = together.mean(0)
    # The step is 1.0078, the next bfloat16 above 1: 7.5 goes up with probability 0.44, not 0.5, and its standard
    # deviation over 40,000 draws is 0.25 %.
    assert ((share + 0.058).abs() < 0.015).all()
    centred = together - share
    correlation = (centred.T @ centred) / len(centred) / centred.var(0).mean()
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 6 / 40_000**0.5
    serial = (centred[1:] * centred[:-1]).mean(0) / centred.var(0)
    assert serial.abs().max() < 6 / 40_000**0.5
