"""The routed experts' outputs are summed some tokens at a time, which nobody can tell from the result."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.modules import experts


@given(
    tokens=st.integers(0, 40),
    routed=st.integers(1, 8),
    hidden=st.integers(1, 70),
    limit=st.integers(1, 4000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1 << 30),
)
def test_parts_are_the_whole(tokens, routed, hidden, limit, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(tokens, routed, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, routed, generator=generator)
    whole = experts.weighted_sum(outputs, weights, dtype)
    with patch.object(experts, "SUMMED", limit):
        parts = experts.weighted_sum(outputs, weights, dtype)
    assert torch.equal(parts, whole) and parts.dtype == dtype


def test_gradients_reach_outputs_and_weights() -> None:
    outputs = torch.randn(9, 2, 5, requires_grad=True)
    weights = torch.rand(9, 2, requires_grad=True)
    with patch.object(experts, "SUMMED", 1):
        experts.weighted_sum(outputs, weights, torch.float32).sum().backward()
    assert torch.allclose(outputs.grad, weights.detach()[..., None].expand(9, 2, 5))
    assert torch.allclose(weights.grad, outputs.detach().sum(-1))
