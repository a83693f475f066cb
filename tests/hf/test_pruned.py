"""Checkpoints whose weights were pruned: blocks are stored sparsely where that is smaller, found while loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ciuic_hf import CiuicConfig, CiuicError, apply_ciuic_compression
from ciuic_hf.hf.choosing import choose
from ciuic_hf.hf.offline import compress_checkpoint
from ciuic_hf.modules.swap import compressed_modules
from tests.hf.conftest import read_files

FAMILIES = ["v3_bf16", "v3_fp8", "v3_fused", "qwen3_moe", "qwen2_tied", "gpt_neox"]
POLICY = "rate-distortion"
MATRICES = ("_proj", "dense", "query_key_value")


def is_pruned(name: str, tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and any(part in name for part in MATRICES) and "scale" not in name


@pytest.fixture
def pruned(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint, the smallest 80 % of each matrix zero, and all of the first expert."""

    def make(family: str, zeros: float = 0.8) -> Path:
        out = tmp_path / f"{family}-pruned"
        shutil.copytree(checkpoint(family), out)
        for file in out.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if is_pruned(name, tensor):
                    values = tensor.float()
                    small = values.abs() <= values.abs().flatten().quantile(zeros)
                    tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)[small] = 0
                if "layers.1.mlp.experts.0." in name and "scale" not in name:
                    tensor.view(torch.uint8).zero_()
            save_file(tensors, file, metadata={"format": "pt"})
        return out

    return make


def codecs_of(model: Any) -> set[str]:
    return {c for p in model.ciuic_report.compressed for c in p.codecs}


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_weights_are_found_and_stored_better_in_the_same_bytes(
    family: str, pruned: Callable[..., Path], load: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    path = pruned(family)
    by_weights, blind = load(path, 3, policy=POLICY), load(path, 3, policy="uniform")
    assert any(name.startswith("sparse") for name in codecs_of(by_weights))
    assert not any(name.startswith("sparse") for name in codecs_of(blind))
    reference = load(path, 8)(ids).logits.float()
    error, blind_error = ((m(ids).logits.float() - reference).norm() for m in (by_weights, blind))
    assert error < 0.5 * blind_error
    by_weights.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(ids).logits, by_weights(ids).logits)


def test_an_expert_without_weights_costs_nothing(
    pruned: Callable[..., Path], load: Callable[..., Any]
) -> None:
    model = load(pruned("v3_bf16", zeros=0.0), 4.25, policy=POLICY)
    layers = dict(compressed_modules(model))
    experts = layers["model.layers.1.mlp.experts"]
    tags = experts.gate_up_proj_tags
    assert (tags[0, ..., 0] == 0).all() and (tags[1:, ..., 0] != 0).all()


@pytest.mark.parametrize("family", ["v3_bf16", "qwen3_moe", "qwen2_tied"])
def test_a_model_in_memory_becomes_the_same(
    family: str,
    pruned: Callable[..., Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    path = pruned(family)
    load(path, 3, policy=POLICY).save_pretrained(tmp_path / "a" / "model")
    apply_ciuic_compression(load(path), bits=3).save_pretrained(tmp_path / "b" / "model")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("family", ["v3_bf16", "llama_untied"])
def test_a_dense_checkpoint_is_read_once(
    family: str, checkpoint: Callable[[str], Path], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ciuic_hf.hf.survey as survey

    monkeypatch.delattr(survey, "_count")
    assert not any(
        name.startswith(("sparse", "zero")) for name in codecs_of(load(checkpoint(family), 4, policy=POLICY))
    )


@pytest.mark.parametrize("family", ["v3_fp8", "qwen2_tied"])
def test_adaptive(
    family: str, pruned: Callable[..., Path], load: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    """Needs no bits, takes 8 for blocks with many weights, fewer for others, and saves and loads."""
    path = pruned(family)
    model = load(path, quantization_config=CiuicConfig(policy="adaptive"))
    tables = ("embeddings", "lm_head")
    codecs = {c for p in model.ciuic_report.compressed if p.role not in tables for c in p.codecs}
    assert any(name.startswith("sparse8") for name in codecs)
    assert all(name.startswith(("sparse8", "grid8", "zero", "raw")) for name in codecs)
    assert model.config.quantization_config.bits < 5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_adaptive_as_a_setting(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], pruned: Callable[..., Path]
) -> None:
    dense = load(checkpoint("v3_bf16"), 4.25, {"attention": "adaptive"}, policy=POLICY)
    assert {c for p in dense.ciuic_report.compressed if p.role == "attention" for c in p.codecs} == {
        "grid8_g32"
    }
    tables = load(pruned("qwen2_tied"), 4.25, {"embeddings": "adaptive"}, policy=POLICY)
    assert torch.isfinite(tables(torch.arange(8)[None]).logits).all()


def test_a_plan_without_weights_cannot_be_adaptive(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model = load(checkpoint("llama_untied"))
    with pytest.raises(CiuicError, match="looks at the weights"):
        choose(model, CiuicConfig(policy="adaptive"))


@pytest.mark.parametrize("family", ["v3_fp8", "qwen2_tied"])
def test_offline_compression_finds_the_same(
    family: str, pruned: Callable[..., Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    path = pruned(family)
    compress_checkpoint(path, tmp_path / "a" / "model", CiuicConfig(bits=3))
    load(path, 3, policy=POLICY).save_pretrained(tmp_path / "b" / "model")
    ours, theirs = (read_files(tmp_path / folder / "model") for folder in "ab")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
