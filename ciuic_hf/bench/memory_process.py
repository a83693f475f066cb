"""One setting in a process of its own: measures the sizes that it is asked for.

    python -m ciuic_hf.bench.memory_process MODEL SETTING DEVICE

A line ``batch length`` on standard input is answered by one line of JSON: peak bytes and seconds.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ciuic_hf.bench.memory_settings import CHUNK_TOKENS, NEW_TOKENS, Setting
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.training import prepare_for_training
from ciuic_hf.memory import PeakMemory, release_freed_memory
from ciuic_hf.runtime.activations import compress_activations

_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_WARM = (1, 64)

Step = Callable[[Tensor], None]


def load(path: str, setting: Setting, device: str) -> Any:
    """The model of a setting in bf16, or compressed, without adapters."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if setting.weight_bits:
        options["quantization_config"] = CiuicConfig(
            bits=setting.weight_bits, cache_bits=setting.cache_bits or None
        )
    if device != "cpu":
        options["device_map"] = device
    return AutoModelForCausalLM.from_pretrained(path, **options)


def training(model: Any, setting: Setting) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """LoRA of rank 8 on the attention of every layer, and one step of AdamW."""
    import peft

    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(_ATTENTION), task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(prepare_for_training(model, setting.checkpointing), lora).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    def step(ids: Tensor) -> None:
        bits = setting.activation_bits
        with compress_activations(bits=bits) if bits else nullcontext():
            adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return adapted, optimizer, step


def generation(model: Any) -> Step:
    """``generate`` to the full length, the prompt in chunks of CHUNK_TOKENS over the batch."""
    model.eval()

    def step(ids: Tensor) -> None:
        prompt = ids[:, : ids.shape[1] - NEW_TOKENS]
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0, prefill_chunk_size=max(1, CHUNK_TOKENS // len(ids)),
        )  # fmt: skip

    return step


def held_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_nbytes(step: Step, ids: Tensor, held: Iterable[Tensor]) -> int:
    """What is held before a step, and the peak of the step above it.

    On a CPU a plain model's weights are pages of the mapped file, which its process does not own: what is held is
    the sizes of the tensors. On a GPU it is what the allocator says.
    """
    gc.collect()
    release_freed_memory()
    before = torch.cuda.memory_allocated(ids.device) if ids.is_cuda else held_nbytes(held)
    with PeakMemory(interval=0.001) as peak:
        step(ids)
    if peak.nbytes is None:
        raise RuntimeError("Peak memory cannot be measured: there is neither a CUDA device nor /proc.")
    return before + peak.nbytes


def main() -> None:
    """Answers sizes until standard input ends."""
    from transformers import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path, setting, device = sys.argv[1], Setting(**json.loads(sys.argv[2])), sys.argv[3]
    torch.manual_seed(0)
    model = load(path, setting, device)
    if setting.work == "train":
        owner, optimizer, step = training(model, setting)
    else:
        owner, optimizer, step = model, None, generation(model)
    vocabulary = model.config.vocab_size
    step(torch.randint(5, vocabulary, _WARM, device=device))  # what is made once is not a step's
    for line in sys.stdin:
        batch, length = map(int, line.split())
        ids = torch.randint(5, vocabulary, (batch, length), device=device)
        states = [s for state in optimizer.state.values() for s in state.values()] if optimizer else []
        began = time.perf_counter()
        nbytes = peak_nbytes(step, ids, [*owner.parameters(), *owner.buffers(), *states])
        print(json.dumps({"nbytes": nbytes, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
