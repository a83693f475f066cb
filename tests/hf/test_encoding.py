"""Every compressed tensor is encode(source), bit for bit, whatever family, file format and path it came by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

CAUSAL = ["deepseek_v2", "deepseek_v32", "qwen2_tied", "llama_untied", "qwen3_moe", "gpt_neox"]
V3_BF16 = ["v3_bf16", "v3_fused"]
V3_FP8 = ["v3_fp8", "v3_ue8m0", "v3_e8m0_dtype", "v3_e8m0_bytes", "v3_wide_fp8", "v3_mtp"]


def compressible(model: nn.Module) -> set[str]:
    """Names of what must be compressed in a dense model: Linears, fused experts, the embedding table."""
    kept = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]
    linears = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    experts = {n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n}
    tables = {f"{n}.weight" for n, m in model.named_modules() if m is model.get_input_embeddings()}
    return {name for name in linears | experts | tables if not any(part in name for part in kept)}


def assert_whole(model: Any, dense: Any, source: dict[str, Tensor]) -> None:
    """All that can be compressed is, and the rest equals the source in value and the plain load in dtype."""
    wanted = compressible(dense)
    found = set(model.hf_quantizer.quantization_config.parameters)
    assert found == wanted
    for name, parameter in dense.state_dict().items():
        if name not in wanted:
            here = model.state_dict()[name]
            assert here.dtype == parameter.dtype, name
            assert torch.equal(here, source.get(name, parameter).to(here.dtype)), name


@pytest.mark.parametrize("family", CAUSAL + V3_BF16)
def test_bf16_families(
    family: str,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    source_of: Callable[[Path], dict[str, Tensor]],
    assert_encoded: Callable[..., None],
    uniform: Callable[[float], Any],
) -> None:
    path = checkpoint(family)
    model, source = load(path, 4.5), source_of(path)
    assert_encoded(model, source, uniform(4.5))
    assert_whole(model, load(path), source)


@pytest.mark.parametrize("family", V3_FP8)
def test_fp8_sources(
    family: str,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    source_of: Callable[[Path], dict[str, Tensor]],
    assert_encoded: Callable[..., None],
    uniform: Callable[[float], Any],
) -> None:
    path = checkpoint(family)
    model, source = load(path, 5.0), source_of(path)
    assert_encoded(model, source, uniform(5.0))
    kept = {n: p for n, p in model.state_dict().items() if p.dtype != torch.uint8}
    assert any(n.endswith("mlp.gate.weight") for n in kept)
    assert all(torch.equal(p, source[n]) for n, p in kept.items())
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32


def test_fp8_and_bf16_files_of_one_model_differ_only_by_fp8(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    fp8, bf16 = load(checkpoint("v3_fp8"), 8), load(checkpoint("v3_bf16"), 8)
    for layer in (fp8.model.layers[1].mlp.experts, bf16.model.layers[1].mlp.experts):
        assert layer.gate_up_proj.dtype == torch.uint8
    ours = fp8.model.layers[1].mlp.experts.dequantize("down_proj", torch.float32)
    theirs = bf16.model.layers[1].mlp.experts.dequantize("down_proj", torch.float32)
    assert (ours - theirs).norm() / theirs.norm() < 0.05


def test_ue8m0_scales_mean_the_same_in_every_dtype(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    states = [load(checkpoint(f), 4).state_dict() for f in ("v3_ue8m0", "v3_e8m0_dtype", "v3_e8m0_bytes")]
    for other in states[1:]:
        assert all(torch.equal(states[0][name], tensor) for name, tensor in other.items())


def test_mtp_tensors_are_ignored(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    with_mtp, without = load(checkpoint("v3_mtp"), 4.25), load(checkpoint("v3_fp8"), 4.25)
    assert with_mtp.state_dict().keys() == without.state_dict().keys()
    assert len(with_mtp.model.layers) == len(without.model.layers)


def test_masked_lm(
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    source_of: Callable[[Path], dict[str, Tensor]],
    assert_encoded: Callable[..., None],
    uniform: Callable[[float], Any],
) -> None:
    path = checkpoint("bert")
    model, source = load(path, 4.5, cls=AutoModelForMaskedLM), source_of(path)
    assert_encoded(model, source, uniform(4.5))
    assert_whole(model, load(path, cls=AutoModelForMaskedLM), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_asked_for_changes_what_is_kept_not_what_is_compressed(
    dtype: torch.dtype,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    source_of: Callable[[Path], dict[str, Tensor]],
    assert_encoded: Callable[..., None],
    uniform: Callable[[float], Any],
) -> None:
    for family in ("v3_bf16", "v3_fp8"):
        path = checkpoint(family)
        model = load(path, 4.25, dtype=dtype)
        assert_encoded(model, source_of(path), uniform(4.25))
        assert model.model.norm.weight.dtype == dtype
        assert model(torch.tensor([[3, 5]])).logits.dtype == dtype
