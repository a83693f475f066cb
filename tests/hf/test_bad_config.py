"""Settings that cannot be: one sentence that names the setting and the way out, before a file is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GptOssConfig, GptOssForCausalLM

from ciuic_hf import CiuicConfig, CiuicError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bit": 4}, ["bit", "takes bits, modules"]),
        ({"bits": 0.5}, ["bits", "between 1 and 16", "0.5"]),
        ({"bits": 17}, ["bits", "between 1 and 16", "17"]),
        ({"bits": float("nan")}, ["bits", "between 1 and 16", "nan"]),
        ({"bits": "4"}, ["must be a number such as 4.25", "'4'"]),
        ({"bits": "grid4_g64"}, ["'grid4_g64'", 'modules={"linear": "grid4_g32"}']),
        ({"bits": True}, ["bits", "True"]),
        ({"bits": None}, ["bits", "None"]),
        ({"modules": {"attention": 0}}, ["modules['attention']", "between 1 and 16"]),
        ({"modules": {"attention": "grid7"}}, ["modules['attention']", "grid7", "grid4_g32", "raw"]),
        ({"modules": {"attention": [4]}}, ["modules['attention']", "[4]"]),
        ({"modules": {3: 4}}, ["modules", "3"]),
        ({"modules": ["attention"]}, ["modules must map", "list"]),
        ({"quant_method": "gptq"}, ["ciuic", "gptq"]),
        ({"format_version": 99}, ["format version 99", "upgrade ciuic-hf"]),
        ({"format_version": "1"}, ["format version"]),
        ({"format_version": 0}, ["format version 0"]),
    ],
)
def test_values(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CiuicError) as caught:
        CiuicConfig(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_pattern_that_matches_nothing(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    with pytest.raises(CiuicError, match=r"'layers\.7\.' *\] matches no weight.*use a role.*part of a name"):
        load(checkpoint("v3_bf16"), 4, {"layers.7.": 8})
    with pytest.raises(CiuicError, match=r"'attn' *\] matches no weight"):
        load(checkpoint("v3_bf16"), 4, {"attn": 8, "self_attn": 5})


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors", None])
def test_an_already_quantized_source(
    method: str | None, checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    path = shutil.copytree(checkpoint("llama_untied"), tmp_path / "quantized")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method,
        "bits": 4,
        "load_in_4bit": method in ("bitsandbytes", None),
    }
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CiuicError, match=f"already quantized with {method or 'a method'}.*Load the original"):
        load(path, 4.25)


def test_fp8_of_another_kind(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    for index, block in enumerate((None, [128], [0, 128])):
        path = shutil.copytree(checkpoint("v3_fp8"), tmp_path / str(index))
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["weight_block_size"] = block
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CiuicError, match="weight_block_size"):
            load(path, 4.25)


def test_unsupported_experts(load: Callable[..., Any], tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_local_experts=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts_per_tok=2,
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(CiuicError, match=r'mlp\.experts.*cannot be compressed.*"experts": "raw"'):
        load(tmp_path, 4)
    model = load(tmp_path, 4, {"experts": "raw"})
    dense = load(tmp_path)
    for name, tensor in model.model.layers[0].mlp.experts.state_dict().items():
        assert torch.equal(tensor, dense.model.layers[0].mlp.experts.state_dict()[name])
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()


def test_splitting_over_processes(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    path = checkpoint("v3_bf16")
    config = AutoConfig.from_pretrained(path)
    config.distributed_config = {"tp_size": 2}  # what from_pretrained(distributed_config=...) leaves there
    with pytest.raises(CiuicError, match=r"split over processes yet.*device_map"):
        load(path, 4.25, config=config)
