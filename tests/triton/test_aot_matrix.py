"""All compilations, with the first and the last supported Triton and the one in constraints.txt; and the hard bar."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.triton import budgets
from tests.triton.cases import PREFILL, WEIGHTS, Case
from tests.triton.gate import violations
from tests.triton.known import rules_of
from tests.triton.measurement import ROOT, Measurement, measure_all
from tests.triton.versions import FIRST, LAST, PINNED, RELEASES, location

DECODE_BAR = {2: 3.0, 3: 3.4, 4: 3.3, 5: 3.8, 6: 3.8, 8: 4.8}
PREFILL_BAR = 6.0
BAR_ARCHES = (80, 89, 90)


@cache
def measured(minor: str) -> dict[Case, Measurement]:
    return measure_all(
        [*budgets.cases_of(minor), *(prefill_cases() if minor == LAST else [])], location(minor)
    )


def prefill_cases() -> list[Case]:
    return [
        Case("linear", arch, "bf16", (kind,), PREFILL) for arch in BAR_ARCHES for kind in WEIGHTS.values()
    ]


MATRIX = [(minor, case) for minor in RELEASES for case in budgets.cases_of(minor)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minor", "case"),
    [pytest.param(minor, case, id=f"{minor} {case}", marks=rules_of(minor, case)) for minor, case in MATRIX],
)
def test_kernel_keeps_the_rules(minor: str, case: Case) -> None:
    assert violations(case, measured(minor)[case], minor) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minor", "case"), [pytest.param(minor, case, id=f"{minor} {case}") for minor, case in MATRIX]
)
def test_kernel_costs_what_is_stored(minor: str, case: Case) -> None:
    budget = budgets.stored(budgets.read(), minor, case)
    assert budgets.disagreements(case, measured(minor)[case], budget) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", BAR_ARCHES)
@pytest.mark.parametrize("width", DECODE_BAR)
def test_decode_keeps_the_bar(width: int, arch: int) -> None:
    """Whatever the file says: bfloat16, groups of 64, up to 8 tokens, the newest Triton."""
    (loop,) = measured(LAST)[Case("linear", arch, "bf16", (WEIGHTS[width],))].loops
    assert loop.per_weight <= DECODE_BAR[width]


@pytest.mark.slow
@pytest.mark.parametrize("case", prefill_cases(), ids=str)
def test_prefill_keeps_the_bar(case: Case) -> None:
    (loop,) = measured(LAST)[case].loops
    assert loop.per_weight <= PREFILL_BAR


@pytest.mark.slow
@pytest.mark.parametrize("case", prefill_cases(), ids=str)
def test_prefill_of_every_width_keeps_the_rules(case: Case) -> None:
    assert violations(case, measured(LAST)[case], LAST) == []


def test_the_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (triton,) = (line for line in project["dependencies"] if line.startswith("triton"))
    assert triton.startswith(f"triton>={FIRST},")
    pins = Path(ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"triton=={RELEASES[PINNED]}" in pins
