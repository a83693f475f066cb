"""Merging adapters into compressed weights: encoded again once, told what it cost, and undone bit for bit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ciuic_hf
from ciuic_hf import CiuicError
from ciuic_hf.modules.merging import add_to_packed
from ciuic_hf.modules.packed import TAGS
from ciuic_hf.modules.swap import compressed_modules
from ciuic_hf.planning.uniform import codec_ids
from ciuic_kernels.packing import decode_tensor, encode_tensor

peft = pytest.importorskip("peft", reason="the dev extra is not installed")

LINEARS = ["q_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def blocks(model: nn.Module) -> dict[str, Tensor]:
    """Arena and tags of every compressed parameter, copied."""
    return {
        f"{name.replace('.base_layer', '').removeprefix('base_model.model.')}.{p}": getattr(module, p)
        .detach()
        .clone()
        for name, module in compressed_modules(model)
        for parameter in module.packed_shapes
        for p in (parameter, parameter + TAGS)
    }


@pytest.fixture
def adapted(saved: Callable[[str], Path], load: Callable[..., Any]) -> Callable[..., Any]:
    """A compressed model with adapters that do something."""

    def make(family: str = "v3_bf16", **options: Any) -> Any:
        torch.manual_seed(4)
        options.setdefault("target_modules", LINEARS)
        options.setdefault("target_parameters", EXPERTS)
        config = peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, **options)
        return peft.get_peft_model(load(saved(family), dtype=torch.float32), config)

    return make


def expected_blocks(model: Any) -> dict[str, Tensor]:
    """Every adapted parameter with PEFT's own delta added in one piece and encoded with the codecs that it has."""
    expected = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        base, parameter = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        packed = base.packed(parameter)
        total = decode_tensor(packed) + sum(layer.get_delta_weight(a) for a in layer.active_adapters)
        again = encode_tensor(total, packed.tags[..., 0])
        path = f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{parameter}"
        expected |= {path: again.arena, path + TAGS: again.tags}
    return expected


def almost_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Sums in another order move a weight over a rounding boundary now and then."""
    return ours.shape == theirs.shape and float((ours != theirs).float().mean()) < 0.01


def test_merging_encodes_the_sum_with_the_same_codecs(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted()
    before, expected = blocks(model), expected_blocks(model)
    merged = blocks(model.merge_and_unload())
    assert any(".experts." in name for name in expected)
    for name, old in before.items():
        if name in expected:
            assert almost_equal(merged[name], expected[name]), name
        else:
            assert torch.equal(merged[name], old), name


def test_what_is_left_is_a_compressed_model(adapted: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    model = adapted().merge_and_unload()
    assert not any("lora" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_at_sixteen_bits_the_merged_model_computes_the_same(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], ids: Tensor
) -> None:
    modules = {"linear": "raw_bf16", "experts": "raw_bf16"}
    model = load(checkpoint("v3_bf16"), 8, modules=modules, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=LINEARS, target_parameters=EXPERTS, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    logits = wrapped(ids).logits
    merged = wrapped.merge_and_unload()(ids).logits
    assert (merged - logits).norm() < 0.03 * logits.norm()


def test_unmerging_is_exact_and_adapters_merge_once_together(
    adapted: Callable[..., Any], ids: Tensor
) -> None:
    model = adapted()
    before, logits = blocks(model), model(ids).logits
    model.merge_adapter()
    together = blocks(model)
    assert not torch.equal(model(ids).logits, logits)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks(model).items())
    assert torch.equal(model(ids).logits, logits)
    model.add_adapter("second", model.peft_config["default"])
    model.merge_adapter(["default"])
    assert all(torch.equal(tensor, together[name]) for name, tensor in blocks(model).items())
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    one_by_one = blocks(model)
    model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    assert all(torch.equal(tensor, one_by_one[name]) for name, tensor in blocks(model).items())


def test_disabling_a_merged_adapter_takes_it_out(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted()
    with model.disable_adapter():
        plain = model(ids).logits
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)


def test_unload_changes_nothing(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted()
    before = blocks(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks(model.unload()).items())


def test_what_it_cost_is_told_once(adapted: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    parameters = len(expected_blocks(model)) // 2
    with caplog.at_level(logging.WARNING):
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()
    first, second = (record.getMessage() for record in caplog.records)
    assert f"Merged default into {parameters} compressed weights" in first and "stay for unmerging" in first
    assert "stay" not in second
    percent = float(re.search(r"by ([\d.]+)%", second)[1])  # type: ignore[index]
    assert 1 < percent < 20


def test_the_cost_is_the_error_by_definition() -> None:
    weight, change = torch.randn(2, 130, 200), 0.1 * torch.randn(2, 130, 200)
    packed = encode_tensor(weight, codec_ids((130, 200), 4.25).expand(2, -1, -1))
    merged, cost = add_to_packed(packed, lambda matrix, rows: change[matrix, rows], "weight")
    wanted = decode_tensor(packed) + change
    error = (decode_tensor(merged) - wanted).double()
    assert cost.weights == weight.numel()
    assert cost.relative_error == pytest.approx(float(error.norm() / wanted.double().norm()), rel=1e-5)
    assert cost.error_of_change == pytest.approx(float(error.norm() / change.double().norm()), rel=1e-5)


def test_experts_without_a_change_keep_their_bytes() -> None:
    weight = torch.randn(3, 70, 200)
    packed = encode_tensor(weight, codec_ids((70, 200), 4.25).expand(3, -1, -1))
    merged, cost = add_to_packed(
        packed, lambda matrix, rows: torch.ones(70, 200)[rows] if matrix == 1 else None, "w"
    )
    assert cost.weights == 70 * 200
    old, new = decode_tensor(packed), decode_tensor(merged)
    assert torch.equal(old[0], new[0]) and torch.equal(old[2], new[2]) and not torch.equal(old[1], new[1])


def test_a_broken_adapter_is_refused_and_nothing_is_merged(adapted: Callable[..., Any], ids: Tensor) -> None:
    model = adapted(target_modules=["o_proj"], target_parameters=None)
    before = blocks(model)
    layers = model.base_model.model.model.layers
    layers[0].self_attn.o_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(CiuicError, match="would hold NaN or infinity after merging"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks(model).items())
    assert not layers[0].self_attn.o_proj.merged


def test_offloaded_weights_are_not_merged(adapted: Callable[..., Any]) -> None:
    layer = adapted().base_model.model.model.layers[0].self_attn.o_proj
    layer.base_layer._hf_hook = SimpleNamespace(offload=True)
    with pytest.raises(CiuicError, match="load the model without offloading"):
        layer.merge()


def test_tied_embeddings_stay_tied(adapted: Callable[..., Any], ids: Tensor) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted("qwen2_tied", target_modules=["embed_tokens"], target_parameters=None)
        merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings and torch.isfinite(merged(ids).logits).all()


def test_a_bias_is_merged_and_restored(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = ciuic_hf.apply_ciuic_compression(nn.Sequential(nn.Linear(256, 192)), bits=8)
    bias = model[0].bias.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    x = torch.randn(3, 256)
    y = wrapped(x)
    wrapped.merge_adapter()
    assert (wrapped(x) - y).norm() < 0.02 * y.norm()
    wrapped.unmerge_adapter()
    assert torch.equal(wrapped.base_model.model[0].base_layer.bias, bias)


def test_a_constructed_linear_merges_in_either_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 256)
    for train in (True, False):
        model = nn.Sequential(ciuic_hf.CiuicLinear(256, 192, setting=8))
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        )
        wrapped.train(train)
        y = wrapped(x)
        wrapped.merge_adapter()
        assert (wrapped(x) - y).norm() < 0.02 * y.norm()
        wrapped.train(not train)
        with pytest.raises(CiuicError, match="in its other mode"):
            wrapped.unmerge_adapter()
