"""Perplexity of a published model on the held-out books, and a few words from it.

    python -m ciuic_hf.demo.evaluate --model models/bf16

The perplexity depends on the window of 256 tokens: longer contexts would lower it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from ciuic_hf.demo import heldout_text
from ciuic_hf.demo.config import BOS_ID
from ciuic_hf.demo.windows import encode

WINDOW = 256  # tokens; what the model was trained on
_PROMPTS = ("And it came to pass", "In the beginning", "The wicked man", "Then said Jesus")


def language_loss(model: Callable[..., Any], batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Next-token cross-entropy in nats of windows [B, T + 1] int64; the logits are taken to fp32."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def negative_log_likelihood(
    model: DeepseekV3ForCausalLM, stream: torch.Tensor, length: int = WINDOW
) -> float:
    """Summed over a stream [n] in nats, cut into windows that each start from BOS alone."""
    training = model.training
    model.eval()
    total = 0.0
    for part in torch.split(stream, length):
        window = torch.cat([torch.tensor([BOS_ID]), part])[None]
        total += float(language_loss(model, window, reduction="sum"))
    model.train(training)
    return total


def main() -> None:
    """Prints the perplexity per token, the bits per byte and greedy and sampled continuations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="so small a model gains nothing from more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    text = heldout_text()
    stream, _ = encode(tokenizer.backend_tokenizer, text)
    nats = negative_log_likelihood(model, stream)
    bits = nats / math.log(2) / len(text.encode())
    print(f"held-out perplexity {math.exp(nats / len(stream)):.2f} per token, {bits:.3f} bits per byte")
    for prompt in _PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}):
            torch.manual_seed(0)
            output = model.generate(
                **inputs, max_new_tokens=args.new_tokens, repetition_penalty=1.2, **settings
            )
            kind = "sampled" if settings["do_sample"] else "greedy"
            print(f"--- {kind}\n{tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
