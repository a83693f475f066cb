"""Training adapters on a compressed model: checkpointing, autocast, accumulation, Trainer, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import ciuic_hf
from ciuic_hf import CiuicError
from ciuic_hf.modules.swap import compressed_modules

peft = pytest.importorskip("peft", reason="the dev extra is not installed")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture
def base(saved: Callable[[str], Path], load: Callable[..., Any]) -> Callable[..., Any]:
    def make(dtype: torch.dtype = torch.float32) -> Any:
        return load(saved("v3_bf16"), dtype=dtype)

    return make


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_b_proj", "o_proj"],
        target_parameters=EXPERTS,
        task_type="CAUSAL_LM",
        **options,
    )
    return peft.get_peft_model(model, config)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("prepare", [ciuic_hf.prepare_for_training, peft.prepare_model_for_kbit_training])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_gives_the_same_gradients(
    prepare: Callable[..., Any], reentrant: bool | None, base: Callable[..., Any], ids: Tensor
) -> None:
    expected = gradients(adapted(base(), init_lora_weights=False).train(), ids)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    prepared = prepare(base(), gradient_checkpointing_kwargs=options)
    model = adapted(prepared, init_lora_weights=False).train()
    assert model.base_model.model.model.gradient_checkpointing
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prepare", [ciuic_hf.prepare_for_training, peft.prepare_model_for_kbit_training])
def test_preparing_freezes_and_casts_nothing(prepare: Callable[..., Any], base: Callable[..., Any]) -> None:
    model = base(torch.bfloat16)
    before = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    assert prepare(model) is model
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert not any(p.requires_grad for p in model.parameters())
    assert not prepare(base(torch.bfloat16), False).model.gradient_checkpointing


def test_peft_prepares_other_models_as_ever(
    checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model = peft.prepare_model_for_kbit_training(load(checkpoint("llama_untied"), dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_preparing_a_model_without_checkpointing() -> None:
    model = ciuic_hf.apply_ciuic_compression(torch.nn.Sequential(torch.nn.Linear(256, 256)), bits=8)
    with pytest.raises(CiuicError, match="Sequential has no gradient checkpointing"):
        ciuic_hf.prepare_for_training(model)
    assert not ciuic_hf.prepare_for_training(model, gradient_checkpointing=False)[0].bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, base: Callable[..., Any], ids: Tensor) -> None:
    exact = gradients(adapted(base(), init_lora_weights=False), ids)
    model = adapted(base(dtype), init_lora_weights=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - exact[name]).norm() < 0.3 * exact[name].norm() + 1e-4, name


def test_accumulated_gradients_are_those_of_the_whole_batch(base: Callable[..., Any], ids: Tensor) -> None:
    model = adapted(base(), init_lora_weights=False)
    whole = gradients(model, ids)
    model.zero_grad()
    for half in ids:
        (model(input_ids=half[None], labels=half[None]).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-6)


def trainer(model: Any, out: Path, **options: Any) -> Trainer:
    torch.manual_seed(5)
    rows = torch.randint(2, 290, (16, 12))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        out, per_device_train_batch_size=2, max_steps=6, save_steps=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, seed=0, disable_tqdm=True, logging_steps=1, save_strategy="steps", **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True}], ids=str
)
def test_trainer_saves_adapters_and_resumes_exactly(
    options: dict[str, Any], base: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapted(base())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    rows = torch.stack([row["input_ids"] for row in trainer(model, tmp_path).train_dataset])
    before = model.eval()(input_ids=rows, labels=rows).loss.item()
    trainer(model, tmp_path, **options).train()
    assert model.eval()(input_ids=rows, labels=rows).loss.item() < before - 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    names = {file.name for file in (tmp_path / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    resumed = adapted(base())
    trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = trained(model)
    for name, tensor in trained(resumed).items():
        torch.testing.assert_close(tensor, expected[name])
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-6")
    loaded = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in loaded.items())


def test_trainer_refuses_a_compressed_model_without_adapters(
    base: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(base(), tmp_path)


def test_trainer_with_transformers_own_adapters(
    base: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    model = base()
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["o_proj"], target_parameters=EXPERTS))
    trainer(model, tmp_path).train()
    assert {file.name for file in (tmp_path / "checkpoint-6").glob("*.safetensors")} == {
        "adapter_model.safetensors"
    }
    other = base()
    other.load_adapter(tmp_path / "checkpoint-6")
    torch.testing.assert_close(other(ids).logits, model.eval()(ids).logits, rtol=1e-3, atol=1e-3)
    assert next(compressed_modules(other), None) is not None


def test_compiled_without_a_graph_break(base: Callable[..., Any], ids: Tensor) -> None:
    import warnings

    model = adapted(base(), init_lora_weights=False)
    expected = gradients(model, ids)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about itself
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.compiler.reset()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_finetune_at_four_bits_gets_where_bf16_gets() -> None:
    """Real text, real model: LoRA on attention and experts, losses in nats per token within 2 %."""
    from ciuic_hf.bench.finetune import Recipe, finetune

    recipe = Recipe()
    dense, compressed = finetune(None, recipe), finetune(4.0, recipe)
    assert dense.after < 0.8 * dense.before
    assert compressed.after < 1.02 * dense.after
    assert compressed.after < compressed.merged < compressed.before
