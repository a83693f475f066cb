"""Whole models on the GPU kernels, which Triton's interpreter runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton.interpreted import gpu_kernels, needs_interpreter

pytestmark = needs_interpreter


@pytest.mark.parametrize("family", ["v3_fp8", pytest.param("qwen2_tied", marks=pytest.mark.slow)])
def test_logits_of_a_model(
    family: str, saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    """Attention, experts, tied and untied tables: the logits of the decoded model, to float16 rounding."""
    exact = load(saved(family), dtype=torch.float32).dequantize()
    short = ids[:1, :6]
    with gpu_kernels(), torch.no_grad():
        model = load(saved(family), dtype=torch.float16)
        assert model.hf_quantizer.is_compileable
        logits = model(short).logits
        expected = exact(short).logits
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.02  # weights, activations and sums in float16, through two layers
    assert logits.isfinite().all()
