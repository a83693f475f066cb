"""A LoRA finetune of the demo model on text it has never seen, on bf16 weights and on compressed ones.

    python -m ciuic_hf.bench.finetune --bits 4

Products are computed in float32, which is exact on bf16 weights and on a CPU without bf16 units faster. The text is
Python's own reference manual as it comes with the interpreter (``pydoc_data.topics``); the model was trained on
the King James Bible alone. Both runs start from the same adapters and see the same windows.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ciuic_hf.demo import bf16_path
from ciuic_hf.demo.evaluate import language_loss, negative_log_likelihood
from ciuic_hf.demo.windows import BOS_ID
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.training import prepare_for_training

HELDOUT_SHARE = 0.05
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class Recipe:
    """One finetune; a step sees ``batch`` windows of ``length`` tokens."""

    steps: int = 120
    batch: int = 8
    length: int = 128
    rank: int = 8
    peak_lr: float = 4e-3
    heldout_tokens: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Losses in nats per token on text held out; ``merged`` with the adapters merged into the weights."""

    before: float
    after: float
    merged: float
    seconds: float


def manual_tokens() -> tuple[Tensor, Tensor]:
    """Python's reference manual as token streams [n] int64: to train on, and held out."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = AutoTokenizer.from_pretrained(bf16_path()).backend_tokenizer
    parts = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    ids = torch.tensor([i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids])
    heldout = int(HELDOUT_SHARE * len(ids))
    return ids[:-heldout], ids[-heldout:]


def with_adapters(model: Any, recipe: Recipe) -> Any:
    """The model with LoRA on attention and experts, prepared as a user would."""
    import peft

    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(ATTENTION),
        target_parameters=list(EXPERTS),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(prepare_for_training(model, gradient_checkpointing=False), config)


def train(model: nn.Module, stream: Tensor, recipe: Recipe) -> None:
    """AdamW over random windows, the learning rate falling to zero with a cosine."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.peak_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    )
    chooser = torch.Generator().manual_seed(recipe.seed)
    offsets = torch.arange(recipe.length)
    model.train()
    for _ in range(recipe.steps):
        starts = torch.randint(len(stream) - recipe.length, (recipe.batch, 1), generator=chooser)
        batch = torch.cat([torch.full_like(starts, BOS_ID), stream[starts + offsets]], dim=1)
        torch.autograd.backward(language_loss(model, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def finetune(bits: float | None, recipe: Recipe) -> Outcome:
    """Finetune the demo model compressed to ``bits``, or in bf16 with None."""
    from transformers import AutoModelForCausalLM

    stream, heldout = manual_tokens()
    heldout = heldout[: recipe.heldout_tokens]
    config = None if bits is None else CiuicConfig(bits=bits)
    model = AutoModelForCausalLM.from_pretrained(bf16_path(), quantization_config=config, dtype=torch.float32)

    def loss(of: Any) -> float:
        return negative_log_likelihood(of, heldout, recipe.length) / len(heldout)

    before = loss(model)
    adapted = with_adapters(model, recipe)
    started = time.perf_counter()
    train(adapted, stream, recipe)
    seconds = time.perf_counter() - started
    after = loss(adapted)
    return Outcome(before, after, loss(adapted.merge_and_unload()), seconds)


def main() -> None:
    """Prints the losses of both runs side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    recipe = Recipe(steps=args.steps)
    print(f"{'weights':10} {'before':>8} {'after':>8} {'merged':>8} {'seconds':>8}   loss, nats per token")
    outcomes = []
    for name, bits in (("bf16", None), (f"{args.bits:g} bits", args.bits)):
        run = finetune(bits, recipe)
        outcomes.append(run)
        print(
            f"{name:10} {run.before:8.4f} {run.after:8.4f} {run.merged:8.4f} {run.seconds:8.0f}", flush=True
        )
    print(f"compressed / bf16 after the finetune: {outcomes[1].after / outcomes[0].after:.4f}")


if __name__ == "__main__":
    main()
