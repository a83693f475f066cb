"""ActivationCompressionCallback under a Trainer, alone and with LoRA on compressed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ciuic_hf import ActivationCompressionCallback, CiuicError, apply_ciuic_compression


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def trained(
    subject: torch.nn.Module, folder: Path, callback: ActivationCompressionCallback | None, **more: object
):  # type: ignore[no-untyped-def]
    ids = torch.arange(64)[None] * torch.arange(1, 9)[:, None] % 128
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **more,  # type: ignore[arg-type]
    )
    trainer = Trainer(subject, arguments, train_dataset=rows, callbacks=[callback] if callback else None)
    return trainer.train().training_loss


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_a_trainer_reaches_the_same_loss(tmp_path: Path, more: dict[str, object]) -> None:
    callback, subject = ActivationCompressionCallback(bits=4), model()
    loss = trained(subject, tmp_path, callback, **more)
    assert loss == pytest.approx(trained(model(), tmp_path, None, **more), rel=0.02)
    assert callback.compression is not None and callback.compression.ratio > 2.5
    assert not subject._forward_hooks and not subject._forward_pre_hooks


def test_lora_on_compressed_weights(tmp_path: Path) -> None:
    losses = []
    for callback in (None, ActivationCompressionCallback(bits=4)):
        subject = apply_ciuic_compression(model(), {"linear": 4.25})
        torch.manual_seed(1)
        lora = get_peft_model(subject, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        losses.append(trained(lora, tmp_path, callback))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_bad_bits_are_refused_before_training() -> None:
    with pytest.raises(CiuicError, match="8, 4 or 2 bits"):
        ActivationCompressionCallback(bits=5)
