"""Training with packed activations beside training without: bytes saved for backward, step time, final loss.

    python -m ciuic_hf.bench.training

A Llama of 2.8 M parameters learns the held-out books that the package has (Ruth, Esther, Jonah and two letters). The
copies of it take every step in turn, so that their times are of the same minutes of the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from ciuic_hf.bench.machine import machine_name
from ciuic_hf.demo import bf16_path, heldout_text
from ciuic_hf.runtime.activations import compress_activations

BATCH, LENGTH = 4, 128  # sequences and tokens of a step
_PEAK_LR = 2e-3
_LAST = 20  # steps whose mean is the final loss


@dataclass
class Run:
    """One copy of the model; ``bits`` 0 is plain training."""

    bits: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    original_nbytes: int = 0
    stored_nbytes: int = 0

    @property
    def final_loss(self) -> float:
        return statistics.mean(self.losses[-_LAST:])


def build_model() -> LlamaForCausalLM:
    """The same weights on each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def token_stream() -> Tensor:
    """int64 [tokens]: the held-out text under the demo model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(bf16_path())
    return torch.tensor(tokenizer.backend_tokenizer.encode(heldout_text(), add_special_tokens=False).ids)


def windows(stream: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [BATCH, LENGTH] from random places, without end."""
    while True:
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,), generator=generator)
        yield stream[starts[:, None] + torch.arange(LENGTH)]


def train(runs: list[Run], steps: int, seed: int = 0) -> None:
    """Fills the runs, step by step in turn; activations are counted in the last step."""
    batches = windows(token_stream(), torch.Generator().manual_seed(seed))
    models = [build_model() for _ in runs]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=_PEAK_LR) for model in models]
    schedules = [get_cosine_schedule_with_warmup(optimizer, 20, steps) for optimizer in optimizers]
    savers: list[Any] = [compress_activations(bits=run.bits) if run.bits else nullcontext() for run in runs]
    for step in range(steps):
        ids = next(batches)
        for run, model, optimizer, schedule, saver in zip(
            runs, models, optimizers, schedules, savers, strict=True
        ):
            if run.bits and step == steps - 1:
                saver.reset()
            began = time.perf_counter()
            with saver:
                loss = model(ids, labels=ids).loss
                loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.seconds.append(time.perf_counter() - began)
            run.losses.append(loss.item())
    for run, saver in zip(runs, savers, strict=True):
        if run.bits:
            run.original_nbytes, run.stored_nbytes = saver.original_nbytes, saver.stored_nbytes


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain, runs = Run(0), [Run(bits) for bits in args.bits]
    train([plain, *runs], args.steps)
    if args.json:
        print(json.dumps([asdict(run) for run in (plain, *runs)]))
        return
    print(f"{args.steps} steps of {BATCH * LENGTH} tokens, float32, {machine_name()}")
    print(f"plain: final loss {plain.final_loss:.4f}, {statistics.median(plain.seconds):.3f} s a step")
    for run in runs:
        slower = statistics.median(one / other for one, other in zip(run.seconds, plain.seconds, strict=True))
        print(
            f"{run.bits} bits: final loss {run.final_loss:.4f} ({run.final_loss / plain.final_loss - 1:+.2%}), "
            f"{run.original_nbytes / 1e6:.1f} MB saved for backward in {run.stored_nbytes / 1e6:.1f} MB "
            f"({run.original_nbytes / run.stored_nbytes:.2f}x), a step takes {slower:.2f}x"
        )


if __name__ == "__main__":
    main()
