"""References for quality, and the bound on speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.planning.forecast import active_share, reference_quality, tokens_per_second
from ciuic_hf.presets import read_preset


@pytest.mark.parametrize("point", read_preset("quality")["points"])
def test_what_was_measured_is_what_is_said(point: dict[str, float]) -> None:
    found = reference_quality(point["bits"])
    assert found is not None
    assert found["kl"] == pytest.approx(point["kl"])
    assert found["top1"] == pytest.approx(point["top1"])


@given(st.floats(3, 16), st.floats(0, 4))
def test_more_bits_are_never_worse(bits: float, more: float) -> None:
    here, there = reference_quality(bits), reference_quality(bits + more)
    assert here is not None and there is not None
    assert there["kl"] <= here["kl"] * (1 + 1e-9)
    assert there["top1"] >= here["top1"] - 1e-9


@given(st.floats(1, 2.99))
def test_nothing_is_said_where_nothing_was_measured(bits: float) -> None:
    assert reference_quality(bits) is None


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 4096))
def test_the_share_of_experts(experts: int, routed: int, batch: int) -> None:
    """One token reads its own; more tokens read more, all in the end, and never more than each its own."""
    share = active_share(experts, routed, batch)
    assert active_share(experts, routed, 1) == pytest.approx(min(1, routed / experts))
    assert active_share(experts, routed, 1) - 1e-12 <= share <= min(1, batch * routed / experts) + 1e-12


def test_the_roofline() -> None:
    assert tokens_per_second(20e9, batch=4, gb_per_s=2000) == pytest.approx(400)
