"""``bits`` counts everything stored: never more than asked, and hardly less where there are blocks enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_hf.config import LINEAR_ROLES

WEIGHTS = (*LINEAR_ROLES, "experts")


@pytest.mark.parametrize("bits", [2.25, 3.0, 4.25, 4.5, 5.7, 8.0, 11.0])
def test_bits_of_large_matrices_are_within_one_percent(
    bits: float, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    report = load(checkpoint("llama_wide"), bits).ciuic_report
    assert 0.99 * bits <= report.bits_per_weight(WEIGHTS) <= bits
    assert report.bits_per_weight(["embeddings", "lm_head"]) <= 8


@pytest.mark.parametrize("bits", [1.0, 2.0, 4.25, 16.0])
def test_no_matrix_is_over_its_bits(
    bits: float, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    report = load(checkpoint("v3_fp8"), bits).ciuic_report
    for parameter in report.compressed:
        limit = 8 if parameter.role in ("embeddings", "lm_head") else bits
        assert parameter.bits_per_weight <= limit, parameter.name


def stored_nbytes(model: torch.nn.Module) -> int:
    """Parameters and the buffers that a checkpoint keeps; tied tensors once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_report_counts_what_is_in_memory(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    for family in ("v3_bf16", "qwen2_tied", "gpt_neox"):
        model = load(checkpoint(family), 4.25)
        report = model.ciuic_report
        assert report.nbytes == stored_nbytes(model)
        for parameter in report.compressed:
            arena, tags = (model.get_parameter(parameter.name + end) for end in ("", "_tags"))
            assert parameter.nbytes == arena.numel() + tags.numel()
            assert sum(parameter.codecs.values()) == tags.numel() // 2


def test_report_knows_the_dense_size(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    dense = load(checkpoint("v3_bf16"))
    report = load(checkpoint("v3_bf16"), 4.25).ciuic_report
    assert report.dense_nbytes == stored_nbytes(dense)


def test_report_explains_itself(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    report = load(checkpoint("v3_bf16"), 4.25, {"attention": "raw"}).ciuic_report
    reasons = {k.name: k.reason for k in report.kept}
    assert "attention" in reasons["model.layers.0.self_attn.o_proj.weight"]
    assert "Router" in reasons["model.layers.1.mlp.gate.weight"]
    assert "norm" in reasons["model.norm.weight"]
    assert report.seconds > 0 and report.peak_nbytes is not None
    text = str(report)
    assert all(word in text for word in ("experts", "embeddings", "kept", "total", "grid"))
    assert report.to_dict()["nbytes"] == report.nbytes


@pytest.mark.parametrize("family", ["v3_bf16", "v3_fp8"])
def test_sixteen_bits_lose_nothing(
    family: str, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    """At 16 bits weights stay as they are; FP8 becomes the model's dtype."""
    tables = {"embeddings": "raw", "lm_head": "raw"}
    model = load(checkpoint(family), 16.0, tables)
    dense = load(checkpoint("v3_bf16"))
    tokens = torch.tensor([[5, 7, 11]])
    if family == "v3_bf16":
        assert torch.equal(model(tokens).logits, dense(tokens).logits)
    else:
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert torch.isfinite(model(tokens).logits).all()
