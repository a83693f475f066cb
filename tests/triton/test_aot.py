"""A selection of all kernels, compiled ahead of time for GPUs that this machine need not have.

The rules are in ``gate.py``, the budgets in ``budgets.json``; the whole matrix is in ``test_aot_matrix.py``.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.triton import budgets
from tests.triton.cases import Case, fast_cases
from tests.triton.gate import violations
from tests.triton.known import rules_of
from tests.triton.measurement import Measurement, measure_all
from tests.triton.versions import installed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton on this platform"
)


@pytest.fixture(scope="module")
def measured() -> dict[Case, Measurement]:
    return measure_all(fast_cases())


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=rules_of(installed(), case)) for case in fast_cases()]
)
def test_kernel_keeps_the_rules(measured: dict[Case, Measurement], case: Case) -> None:
    assert violations(case, measured[case], installed()) == []


@pytest.mark.parametrize("case", fast_cases(), ids=str)
def test_kernel_costs_what_is_stored(measured: dict[Case, Measurement], case: Case) -> None:
    budget = budgets.stored(budgets.read(), installed(), case)
    assert budgets.disagreements(case, measured[case], budget) == []
