"""Whole models on the GPU kernels, which Triton's interpreter runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_kernels.triton import linear, linears
from tests.triton.interpreted import gpu_kernels, needs_interpreter

pytestmark = needs_interpreter


@pytest.mark.parametrize(
    "family", ["v3_small", *(pytest.param(f, marks=pytest.mark.slow) for f in ("v3_fp8", "qwen2_tied"))]
)
def test_logits_of_a_model(
    family: str, saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    """Attention, experts, tied and untied tables: the logits of the decoded model, to float16 rounding."""
    exact = load(saved(family), dtype=torch.float32).dequantize()
    short = ids[:1, :2]
    with gpu_kernels(), torch.no_grad():
        model = load(saved(family), dtype=torch.float16)
        assert model.hf_quantizer.is_compileable
        logits = model(short).logits
        expected = exact(short).logits
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.02  # weights, activations and sums in float16, through two layers
    assert logits.isfinite().all()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are started for linears, in order."""
    seen: list[str] = []
    for module in (linear, linears):

        def start(kernel: Any, *arguments: Any, _start: Any = module.start, **settings: Any) -> None:
            seen.append(kernel.fn.__name__)
            _start(kernel, *arguments, **settings)

        monkeypatch.setattr(module, "start", start)
    return seen


@pytest.mark.parametrize(
    ("family", "groups", "grouped"),
    [
        ("qwen2_small", 4, 10),
        pytest.param("qwen2_tied", 4, 10, marks=pytest.mark.slow),
        pytest.param("llama_untied", 4, 10, marks=pytest.mark.slow),
        pytest.param("deepseek_v2", 4, 8, marks=pytest.mark.slow),
        pytest.param("v3_fp8", 6, 12, marks=pytest.mark.slow),
    ],
)
def test_siblings_share_launches(
    family: str,
    groups: int,
    grouped: int,
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    ids: torch.Tensor,
    launches: list[str],
) -> None:
    """The second token costs fewer launches than the first, and is the same to rounding."""
    with gpu_kernels(), torch.no_grad():
        model = load(saved(family), dtype=torch.float16)
        launches.clear()  # of compiling
        first = model(ids[:1, :2], use_cache=False).logits
        before = list(launches)
        launches.clear()
        second = model(ids[:1, :2], use_cache=False).logits
    assert "linears_kernel" not in before
    assert launches.count("linears_kernel") == groups
    assert len(before) - len(launches) == grouped - groups
    assert (first - second).norm() / first.norm() < 0.01


@pytest.mark.slow
def test_siblings_share_launches_under_adapters(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, launches: list[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    with gpu_kernels(), torch.no_grad():
        model = load(saved("llama_untied"), dtype=torch.float16)
        expected = model(ids[:1, :2], use_cache=False).logits
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"])).eval()
        launches.clear()
        logits = wrapped(ids[:1, :2], use_cache=False).logits
    assert launches.count("linears_kernel") == 4
    assert (logits - expected).norm() / expected.norm() < 0.01
