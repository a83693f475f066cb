"""LoRA on compressed Linears, embeddings and experts is that of PEFT on the same weights uncompressed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ciuic_hf
from ciuic_hf.modules.swap import compressed_modules, restore_dense

peft = pytest.importorskip("peft", reason="the dev extra is not installed")
layers = pytest.importorskip("ciuic_hf.hf.adapters.layers")

LINEARS = ["q_b_proj", "o_proj", "kv_b_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")


def lora(**options: Any) -> Any:
    """LoRA that does something from the start."""
    options.setdefault("target_modules", LINEARS)
    options.setdefault("target_parameters", EXPERTS)
    return peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)


@pytest.fixture
def pair(saved: Callable[[str], Path], load: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A compressed model and the same weights uncompressed, in float32."""

    def make(family: str = "v3_bf16") -> tuple[Any, Any]:
        return tuple(
            model if i == 0 else model.dequantize()
            for i, model in enumerate(load(saved(family), dtype=torch.float32) for _ in range(2))
        )  # type: ignore[return-value]

    return make


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def loss_and_gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in adapters(model).items()}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_parameters": EXPERTS[1:]}], ids=str)
@pytest.mark.parametrize("family", ["v3_bf16", "deepseek_v2", "qwen3_moe"])
def test_logits_and_gradients_are_those_of_peft(
    family: str, options: dict[str, Any], pair: Callable[..., Any], ids: Tensor
) -> None:
    if family == "qwen3_moe":
        options = options | {"target_modules": ["q_proj", "o_proj"]}
    compressed, dense = (peft.get_peft_model(model, lora(**options)) for model in pair(family))
    assert {n: p.shape for n, p in adapters(compressed).items()} == {
        n: p.shape for n, p in adapters(dense).items()
    }
    dense.load_state_dict({n: p.detach() for n, p in adapters(compressed).items()}, strict=False)
    logits, gradients = loss_and_gradients(compressed, ids)
    expected, expected_gradients = loss_and_gradients(dense, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert any(".experts." in name for name in gradients)
    for name, gradient in gradients.items():
        reference = expected_gradients[name]
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-7, name
    assert all(not p.requires_grad for n, p in compressed.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("trained_on", ["compressed", "dense"])
def test_adapters_are_exchanged_with_an_uncompressed_model(
    trained_on: str, pair: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    models = dict(zip(("compressed", "dense"), pair(), strict=True))
    other = models["dense" if trained_on == "compressed" else "compressed"]
    trained = peft.get_peft_model(models[trained_on], lora())
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=1e-3, atol=1e-4)


def test_through_transformers_own_methods(pair: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    compressed, dense = pair()
    compressed.add_adapter(lora())
    logits = compressed(ids).logits
    compressed.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    dense.load_adapter(tmp_path)
    torch.testing.assert_close(dense(ids).logits, logits, rtol=1e-3, atol=1e-4)
    compressed.disable_adapters()
    plain = compressed(ids).logits
    compressed.delete_adapter("default")
    assert torch.equal(compressed(ids).logits, plain)


def test_several_adapters(pair: Callable[..., Any], ids: Tensor) -> None:
    compressed, dense = (peft.get_peft_model(model, lora()) for model in pair())
    for model in (compressed, dense):
        model.add_adapter("second", lora())
    dense.load_state_dict({n: p.detach() for n, p in adapters(compressed).items()}, strict=False)
    for active in ("second", "default", ["default", "second"]):
        for model in (compressed, dense):
            model.base_model.set_adapter(active)
        torch.testing.assert_close(compressed(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
    with compressed.disable_adapter(), dense.disable_adapter():
        torch.testing.assert_close(compressed(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_an_adapter_starts_where_the_model_is(
    init: bool | str, pair: Callable[..., Any], ids: Tensor
) -> None:
    compressed, _ = pair()
    logits = compressed(ids).logits
    config = peft.LoraConfig(r=4, target_modules=LINEARS, target_parameters=EXPERTS, init_lora_weights=init)
    assert torch.equal(peft.get_peft_model(compressed, config)(ids).logits, logits)


def test_embeddings(pair: Callable[..., Any], ids: Tensor) -> None:
    config = {"target_modules": ["embed_tokens", "lm_head"], "target_parameters": None}
    compressed, dense = (peft.get_peft_model(model, lora(**config)) for model in pair())
    dense.load_state_dict({n: p.detach() for n, p in adapters(compressed).items()}, strict=False)
    torch.testing.assert_close(compressed(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_adapters(
    autocast: bool, saved: Callable[[str], Path], load: Callable[..., Any], ids: Tensor
) -> None:
    """In float32 unless PEFT is told not to, then in that of the model; as over uncompressed weights."""
    model = load(saved("v3_bf16"), dtype=torch.bfloat16)
    wrapped = peft.get_peft_model(model, lora(), autocast_adapter_dtype=autocast)
    assert {p.dtype for p in adapters(wrapped).values()} == {torch.float32 if autocast else torch.bfloat16}
    logits, gradients = loss_and_gradients(wrapped, ids)
    assert logits.dtype == torch.bfloat16 and all(g is not None for g in gradients.values())


def test_only_part_of_a_model_is_compressed(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], ids: Tensor
) -> None:
    """PEFT's own layers serve what is kept."""
    model = load(
        checkpoint("v3_bf16"), 4.25, modules={"experts": "raw", "o_proj": "raw"}, dtype=torch.float32
    )
    wrapped = peft.get_peft_model(model, lora())
    layer = wrapped.base_model.model.model.layers[-1]
    assert type(layer.self_attn.o_proj) is peft.tuners.lora.Linear
    assert type(layer.mlp.experts) is peft.tuners.lora.layer.ParamWrapper
    assert all(g is not None for g in loss_and_gradients(wrapped, ids)[1].values())


def test_a_model_that_is_dequantized_under_its_adapters(pair: Callable[..., Any], ids: Tensor) -> None:
    wrapped = peft.get_peft_model(pair()[0], lora())
    logits = wrapped(ids).logits
    restore_dense(wrapped, torch.float32)
    assert next(compressed_modules(wrapped), None) is None
    torch.testing.assert_close(wrapped(ids).logits, logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(wrapped.merge_and_unload()(ids).logits, logits, rtol=1e-3, atol=1e-4)


def test_all_linear_finds_the_compressed_ones(pair: Callable[..., Any], ids: Tensor) -> None:
    """All but the head, as PEFT has it."""
    options = {"target_modules": "all-linear", "target_parameters": None, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(pair("llama_untied")[0], lora(**options))
    linears = [m for m in wrapped.modules() if isinstance(m, ciuic_hf.CiuicLinear)]
    adapted = [m for m in wrapped.modules() if isinstance(m, layers.Linear)]
    assert len(adapted) == len(linears) - 1 == 14 and not hasattr(wrapped.base_model.model.lm_head, "lora_A")
    assert all(g is not None for g in loss_and_gradients(wrapped, ids)[1].values())


def test_copies(pair: Callable[..., Any], ids: Tensor) -> None:
    wrapped = peft.get_peft_model(pair()[0], lora())
    assert torch.equal(copy.deepcopy(wrapped)(ids).logits, wrapped(ids).logits)


def test_generation(saved: Callable[[str], Path], load: Callable[..., Any], ids: Tensor) -> None:
    wrapped = peft.get_peft_model(load(saved("v3_bf16")), lora(task_type="CAUSAL_LM")).eval()
    out = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    again = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(out, again) and out.shape == (2, 16)


def test_a_user_s_own_layer_is_left_to_him(pair: Callable[..., Any]) -> None:
    class Mine(peft.tuners.lora.Linear):
        pass

    config = lora(target_parameters=None)
    config._register_custom_module({ciuic_hf.CiuicLinear: Mine})
    wrapped = peft.get_peft_model(pair()[0], config)
    assert type(wrapped.base_model.model.model.layers[0].self_attn.o_proj) is Mine
