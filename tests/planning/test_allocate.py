"""The allocator on random problems: never over budget, monotone, close to the optimum, the same every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.allocate import Allocation, Units, allocate
from ciuic_hf.planning.uniform import LADDER
from ciuic_kernels import codec_by_name

SIZES = [0, 64, 128, 1088, 2176, 2304, 3328, 4352, 16384]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of tiny problems: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Units, int]:
    """Any bytes, any errors (also such that grow with the bytes), weights over six decades, and a budget that fits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds, codecs, count = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    largest = draw(st.sampled_from([1, 3, 200]))
    pick = torch.randint(len(SIZES), (kinds, codecs), generator=generator)
    nbytes = torch.tensor(SIZES)[pick]
    error = 10 ** (-6 * torch.rand(kinds, codecs, generator=generator, dtype=torch.float64))
    weight = 10 ** (6 * torch.rand(count, generator=generator, dtype=torch.float64) - 3)
    weight[torch.rand(count, generator=generator) < 0.1] = 0.0
    units = Units(
        kind=torch.randint(kinds, (count,), generator=generator),
        weight=weight,
        nbytes=nbytes,
        error=error,
        count=torch.randint(1, largest + 1, (count,), generator=generator),
    )
    smallest = units.smallest_nbytes()
    most = int((nbytes.amax(dim=1)[units.kind] * units.count).sum())
    return units, smallest + int(draw(st.floats(0, 1.05)) * (most - smallest))


def real_bytes(units: Units, found: Allocation) -> int:
    total = 0
    for u, kind in enumerate(units.kind.tolist()):
        rest = int(units.count[u] - found.upgraded[u])
        assert rest >= 0 and int(found.upgraded[u]) >= 0
        total += rest * int(units.nbytes[kind, found.low[u]])
        total += int(found.upgraded[u]) * int(units.nbytes[kind, found.high[u]])
    return total


@settings(max_examples=1000)
@given(problems())
def test_never_over_budget_and_bytes_are_what_they_say(problem: tuple[Units, int]) -> None:
    units, budget = problem
    found = allocate(units, budget)
    assert found.nbytes == real_bytes(units, found) <= budget


@settings(max_examples=1000)
@given(problems(), st.integers(0, 3000))
def test_more_budget_never_gives_more_error(problem: tuple[Units, int], extra: int) -> None:
    units, budget = problem
    assert allocate(units, budget + extra).error <= allocate(units, budget).error * (1 + 1e-12)


@settings(max_examples=300)
@given(problems())
def test_what_is_left_pays_for_no_further_step_of_a_block(problem: tuple[Units, int]) -> None:
    """With single blocks: no unit can move to a richer codec of less error with the room left, along its hull."""
    units, budget = problem
    units = Units(units.kind, units.weight, units.nbytes, units.error, torch.ones_like(units.count))
    if units.smallest_nbytes() > budget:
        return
    found = allocate(units, budget)
    room = budget - found.nbytes
    for u, kind in enumerate(units.kind.tolist()):
        bytes_of, error_of = units.nbytes[kind].tolist(), units.error[kind].tolist()
        at = int(found.high[u] if found.upgraded[u] else found.low[u])
        step = [c for c in range(len(bytes_of)) if error_of[c] < error_of[at] and bytes_of[c] > bytes_of[at]]
        if step and units.weight[u] > 0:
            steepest = max(step, key=lambda c: (error_of[at] - error_of[c]) / (bytes_of[c] - bytes_of[at]))
            assert bytes_of[steepest] - bytes_of[at] > room


def optimum(units: Units, budget: int, unit_bytes: int = 64) -> float:
    """The least error by a dynamic programme over bytes, for units of one block each."""
    states = budget // unit_bytes + 1
    best = torch.zeros(states, dtype=torch.float64)
    for kind, weight in zip(units.kind.tolist(), units.weight.tolist(), strict=True):
        following = torch.full_like(best, torch.inf)
        for nbytes, error in zip(units.nbytes[kind].tolist(), units.error[kind].tolist(), strict=True):
            shift = nbytes // unit_bytes
            if shift < states:
                candidate = best[: states - shift] + weight * error
                following[shift:] = torch.minimum(following[shift:], candidate)
        best = following
    return float(best.min())


def matrix_problem(seed: int, blocks: int, spread: float) -> Units:
    """Blocks of one matrix with the sizes of the real codecs and the error of k bits, sensitivities log-normal."""
    generator = torch.Generator().manual_seed(seed)
    codecs = [codec_by_name(name) for name in LADDER]
    nbytes = torch.tensor([[codec.record_nbytes(64, 128) for codec in codecs]])
    error = torch.tensor([[2.0 ** (-2 * codec.bits) for codec in codecs]], dtype=torch.float64)
    weight = (spread * torch.randn(blocks, generator=generator, dtype=torch.float64)).exp()
    ones = torch.ones(blocks, dtype=torch.int64)
    return Units(torch.zeros(blocks, dtype=torch.int64), weight, nbytes, error, ones)


@pytest.mark.parametrize("bits", [2.3, 3.1, 4.25, 5.7])
@pytest.mark.parametrize(("seed", "blocks", "spread"), [(0, 150, 0.5), (1, 250, 1.5), (2, 400, 1.0)])
def test_within_half_a_percent_of_the_optimum(seed: int, blocks: int, spread: float, bits: float) -> None:
    units = matrix_problem(seed, blocks, spread)
    budget = int(bits * 8192 / 8) * blocks
    assert allocate(units, budget).error <= 1.005 * optimum(units, budget)


@given(problems())
def test_groups_do_as_well_as_their_blocks_one_by_one(problem: tuple[Units, int]) -> None:
    """A group of n equal blocks gives up at most the steps behind one partly taken step."""
    units, budget = problem
    single = Units(
        units.kind.repeat_interleave(units.count),
        units.weight.repeat_interleave(units.count),
        units.nbytes,
        units.error,
        torch.ones(int(units.count.sum()), dtype=torch.int64),
    )
    grouped, blocks = allocate(units, budget), allocate(single, budget)
    step = int((units.nbytes.amax(dim=1) - units.nbytes.amin(dim=1)).max())
    assert grouped.error <= allocate(single, max(budget - step, single.smallest_nbytes())).error * (1 + 1e-9)
    assert blocks.error <= grouped.error * (1 + 1e-9)


def test_too_small_a_budget_is_refused_with_both_numbers() -> None:
    units = matrix_problem(0, 10, 1.0)
    units = Units(units.kind, units.weight, units.nbytes[:, 1:], units.error[:, 1:], units.count)
    with pytest.raises(CiuicError, match=r"takes 21,760 bytes and the budget is 21,759"):
        allocate(units, 21_759)
    assert allocate(units, 21_760).nbytes == 21_760


def test_nothing_to_decide() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    units = Units(
        empty,
        empty.double(),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.float64),
        empty,
    )
    found = allocate(units, 0)
    assert (found.nbytes, found.error, found.price) == (0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_no_weight_is_refused(bad: float) -> None:
    units = matrix_problem(0, 3, 1.0)
    units.weight[1] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        allocate(units, 100_000)


def test_a_budget_for_everything_takes_the_best_of_everything() -> None:
    units = matrix_problem(3, 20, 1.0)
    found = allocate(units, 10**9)
    assert set(found.low.tolist()) == {len(LADDER) - 1} and found.price == 0.0


def test_a_block_without_weight_takes_no_bytes() -> None:
    units = matrix_problem(3, 20, 1.0)
    units.weight[7] = 0.0
    assert int(allocate(units, 10**9).low[7]) == LADDER.index("zero")


def test_the_same_input_gives_the_same_choice() -> None:
    units = matrix_problem(4, 500, 0.0)
    one, other = allocate(units, 1_500_000), allocate(units, 1_500_000)
    assert torch.equal(one.low, other.low) and torch.equal(one.upgraded, other.upgraded)
