"""``apply_ciuic_compression`` on transformers models: the bytes of from_pretrained, and everything that comes after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_hf import CiuicConfig, CiuicError, apply_ciuic_compression
from ciuic_hf.modules.swap import compressed_modules

ARTICLE: dict[str, Any] = {"linear": "quant4", "attention": 6, "embeddings": "quant8", "lm_head": "quant8"}
FAMILIES = ["v3_bf16", "qwen2_tied", "qwen3_moe", "gpt_neox", "bert", "deepseek_v2"]


@pytest.fixture
def applied(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> Callable[..., Any]:
    def make(family: str, modules: Any = ARTICLE, dtype: torch.dtype = torch.bfloat16) -> Any:
        from transformers import BertForMaskedLM

        classes = {"cls": BertForMaskedLM} if family == "bert" else {}
        model = load(checkpoint(family), dtype=dtype, **classes)
        return apply_ciuic_compression(model, modules)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_from_pretrained(
    family: str,
    applied: Callable[..., Any],
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = applied(family)
    loaded = type(model).from_pretrained(checkpoint(family), quantization_config=CiuicConfig(modules=ARTICLE))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert [vars(p) for p in model.ciuic_report.compressed] == [
        vars(p) for p in loaded.ciuic_report.compressed
    ]
    assert {k.name: k.reason for k in model.ciuic_report.kept} == {
        k.name: k.reason for k in loaded.ciuic_report.kept
    }
    model.save_pretrained(tmp_path / "a" / "model")
    loaded.save_pretrained(tmp_path / "b" / "model")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    again = type(model).from_pretrained(tmp_path / "a" / "model")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_what_comes_after(
    family: str, applied: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    model = applied(family)
    expected = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(ids, max_new_tokens=4, do_sample=False), generated)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids).logits, expected)
    twin.save_pretrained(tmp_path / "twin")
    dense = twin.dequantize()
    assert next(compressed_modules(dense), None) is None
    # A model that was turned back can be compressed again.
    assert next(compressed_modules(apply_ciuic_compression(dense, bits=6)), None) is not None


def test_a_model_made_from_scratch_saves_and_loads(ids: torch.Tensor, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = {"vocab_size": 300, "hidden_size": 160, "intermediate_size": 264, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 40}
    experts = {"moe_intermediate_size": 72, "num_experts": 4, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, **heads, **experts)).eval()
    apply_ciuic_compression(model, {"attention": 8})
    model.save_pretrained(tmp_path / "model")
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_lora_trains(applied: Callable[..., Any], ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    model = applied("v3_bf16", dtype=torch.float32)
    logits = model(ids).logits.detach()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    wrapped.train()
    assert torch.equal(wrapped(ids).logits, logits)
    before = {n: p.clone() for n, p in wrapped.named_parameters() if p.dtype == torch.uint8}
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and before
    assert all(torch.equal(p, before[n]) for n, p in wrapped.named_parameters() if n in before)


def test_a_model_from_fp8_files(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    with pytest.raises(CiuicError, match="compressed by Ciuic already"):
        apply_ciuic_compression(load(checkpoint("v3_fp8"), 4.25))


def test_an_offloaded_model(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    device_map = {"model": "disk", "lm_head": "cpu"}
    model = load(checkpoint("v3_bf16"), device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(CiuicError, match=r"not in memory .* compress while loading"):
        apply_ciuic_compression(model)
