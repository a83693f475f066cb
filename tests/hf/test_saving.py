"""Saved and loaded again: the same bytes, the same model, and never random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import ciuic_hf
from ciuic_hf import CiuicConfig

FAMILIES = ["v3_bf16", "v3_fp8", "deepseek_v2", "deepseek_v32", "qwen2_tied", "llama_untied", "gpt_neox"]


def assert_same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Equal names, dtypes and bits."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_reload_is_exact_and_a_second_save_is_byte_identical(
    family: str,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = load(checkpoint(family), 4.25, {"layers.0.": 6.5})
    model.save_pretrained(tmp_path / "first" / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "first" / "model").glob("*.safetensors"))) > 1
    again = load(tmp_path / "first" / "model")
    assert_same_state(model, again)
    assert torch.equal(model(ids).logits, again(ids).logits)
    again.save_pretrained(tmp_path / "second" / "model", max_shard_size="60KB")
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


def test_masked_lm_with_a_bias_on_its_head(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load(checkpoint("bert"), 4.25, cls=AutoModelForMaskedLM)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, cls=AutoModelForMaskedLM)
    assert_same_state(model, again)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_tied_weights_are_stored_once(saved: Callable[[str], Path], stored_in: Callable[[Path], Any]) -> None:
    names = [name for name in stored_in(saved("qwen2_tied")) if "embed_tokens" in name or "lm_head" in name]
    assert sorted(names) == ["model.embed_tokens.weight", "model.embed_tokens.weight_tags"]


def test_names_metadata_and_config(saved: Callable[[str], Path], stored_in: Callable[[Path], Any]) -> None:
    path = saved("v3_fp8")
    stored = stored_in(path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert stored[name].dtype == torch.uint8 and stored[name].dim() == 1
    assert stored[name + "_tags"].dtype == torch.uint8 and stored[name + "_tags"].dim() == 4
    assert not any("weight_scale_inv" in key for key in stored)
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            # One entry: safetensors writes more in random order, and then no two saves are the same bytes.
            assert opened.metadata() == {"format": "pt"}
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "ciuic" and config["format_version"] == 1 and config["bits"] == 4.25
    assert config["parameters"][name]["shape"] == [4, 144, 144]
    assert config["parameters"][name]["arena_nbytes"] == stored[name].numel()
    assert "source_quantization" not in config


def test_config_round_trip(saved: Callable[[str], Path]) -> None:
    kept = json.loads((saved("v3_bf16") / "config.json").read_text())["quantization_config"]
    config = CiuicConfig.from_dict(dict(kept))
    assert config.to_dict() == kept
    assert json.loads(json.dumps(config.to_dict())) == kept
    intent = CiuicConfig(bits=3.3, modules={"lm_head": "raw", "layers.0.": 8})
    assert CiuicConfig.from_dict(intent.to_dict()).intent == intent.intent


@pytest.mark.parametrize("family", ["v3_fp8", "qwen2_tied"])
def test_reload_reports_the_same(
    family: str, checkpoint: Callable[[str], Path], saved: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    first, again = (load(checkpoint(family), 4.25).ciuic_report, load(saved(family)).ciuic_report)
    assert again.compressed == first.compressed
    assert again.kept == first.kept
    assert again.seconds is not None and isinstance(again, ciuic_hf.Report)


def test_a_config_given_for_a_compressed_checkpoint_does_not_change_it(
    saved: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    with pytest.warns(UserWarning, match="quantization_config"):
        other = load(saved("v3_bf16"), 8)
    assert_same_state(load(saved("v3_bf16")), other)
    assert other.hf_quantizer.quantization_config.bits == 4.25


def test_kept_tensors_survive_saving(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    model = load(checkpoint("v3_fp8"), 4.25, {"experts": "raw", "attention": "raw"})
    model.save_pretrained(tmp_path)
    assert_same_state(model, load(tmp_path))


def test_without_ciuic_the_load_fails(saved: Callable[[str], Path]) -> None:
    code = (
        "import sys, transformers\n"
        "assert 'ciuic_hf' not in sys.modules\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(saved('v3_fp8'))!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode != 0
    assert "Error" in done.stderr.strip().splitlines()[-1] or "size" in done.stderr


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_the_base_model_loads_from_the_checkpoint_of_the_whole(
    family: str, saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    base, whole = load(saved(family), cls=AutoModel), load(saved(family))
    assert torch.equal(base(ids)[0], whole.model(ids)[0])
    assert {p.name for p in base.ciuic_report.compressed} == {
        p.name.removeprefix("model.") for p in whole.ciuic_report.compressed if p.role != "lm_head"
    }
    base.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, cls=AutoModel)(ids)[0], base(ids)[0])
    if family == "qwen2_tied":  # everything that the whole model needs is in the base
        assert torch.equal(load(tmp_path)(ids).logits, whole(ids).logits)


def test_a_model_that_is_not_compressed_saves_as_ever(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    model = load(checkpoint("llama_untied"))
    (tmp_path / "note.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists() and (tmp_path / "note.txt").exists()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), type(model))
