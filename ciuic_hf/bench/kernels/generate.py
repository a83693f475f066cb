"""One model generating text, in a process of its own: ``python -m ciuic_hf.bench.kernels.generate``.

The model has the sizes of DeepSeek-V2-Lite and random weights, made on the device: nothing is downloaded, written or
compressed. One JSON line is appended to a file for each batch size, with and without CUDA graphs; of the compressed
model also one for the memory that a long prompt takes, beside what the planner says. The parent ends this process when
its time is over, and keeps the lines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from ciuic_hf.bench.kernels.operands import random_packed
from ciuic_hf.bench.kernels.timing import said_by
from ciuic_hf.config import CompressionIntent
from ciuic_hf.hf.choosing import uniform_choice
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.modules.siblings import group_siblings
from ciuic_hf.modules.swap import compressed_modules, swap_in
from ciuic_hf.modules.targets import find_targets
from ciuic_kernels import BlockGrid
from ciuic_kernels.layout import arena_nbytes

# deepseek-ai/DeepSeek-V2-Lite, config.json
V2_LITE: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
}

FILL_CONTEXT, FILL_BATCH = 4096, 8
PROMPT_TOKENS = 32
NEW_TOKENS = 64
RUNS = ((1, False), (1, True), (8, False), (32, False), (8, True), (32, True))
"""(batch, CUDA graphs), the most important first."""


def random_model(
    sizes: dict[str, Any], bits: float | None, device: torch.device, model_type: str = "deepseek_v2"
) -> Any:
    """A model with random weights on a device, compressed to ``bits`` or, when None, in bfloat16."""
    model = _empty_model(sizes, model_type)
    if bits is not None:
        _compress(model, bits, device)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                module._parameters[name] = _random_parameter(parameter, device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    for _, packed in compressed_modules(model):
        packed.prepare()
    group_siblings(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _skipped_graphs() -> int:
    """How many compiled functions run without a CUDA graph though one was asked for; torch says so in its log only."""
    from torch._dynamo.utils import counters  # imports the compiler

    return int(counters["inductor"]["cudagraph_skips"])


def _empty_model(sizes: dict[str, Any], model_type: str) -> Any:
    """With parameters on the meta device."""
    config = AutoConfig.for_model(model_type, **sizes)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _compress(model: Any, bits: float, device: torch.device) -> None:
    """Give every parameter that a load would compress random records."""
    targets, _ = find_targets(model, CompressionIntent(bits=bits))
    sizes = [
        (t.name, t.shape, arena_nbytes(t.codec_ids, BlockGrid(t.shape[-2:])) * BlockGrid(t.shape).matrices)
        for t in targets
    ]
    swap_in(model, sizes, torch.bfloat16)
    modules = dict(compressed_modules(model))
    for seed, target in enumerate(targets):
        packed = random_packed(target.shape, target.codec_ids, device, seed)
        modules[target.module_name].set_packed(target.parameter, packed)


def _random_parameter(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Ones for a vector (a norm's gain), else Gaussian."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    values = values.fill_(1.0) if parameter.dim() == 1 else values.normal_(0, 0.02)
    return nn.Parameter(values, requires_grad=False)


class StepClock(LogitsProcessor):
    """The time of the second half of the steps of a ``generate``; the first half compiles and records graphs."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step, self.times = steps, 0, dict[int, float]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step in (self.steps // 2, self.steps):
            if scores.device.type == "cuda":
                torch.cuda.synchronize(scores.device)
            self.times[self.step] = time.perf_counter()
        return scores

    @property
    def seconds(self) -> float:
        """Of one step."""
        first, last = self.steps // 2, self.steps
        return (self.times[last] - self.times[first]) / (last - first)


def measure_batch(model: Any, batch: int, graphs: bool, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Tokens per second of all sequences, greedy, on a static cache; peak memory of the device."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).to(device)
    clock = StepClock(new_tokens)
    torch.compiler.reset()  # no shape is dynamic because another batch came before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started, skipped = time.perf_counter(), _skipped_graphs()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=not graphs,
        logits_processor=LogitsProcessorList([clock]),
    )
    if out.shape != (batch, PROMPT_TOKENS + new_tokens):
        raise RuntimeError(
            f"generate gave {list(out.shape)} tokens for {batch} x {PROMPT_TOKENS} and {new_tokens} new"
        )
    if graphs and not hasattr(model, "_compiled_call"):
        raise RuntimeError("transformers did not compile this model, so there are no CUDA graphs")
    return {
        "batch": batch,
        "graphs": graphs,
        "skipped": _skipped_graphs() - skipped,
        "tokens_per_second": batch / clock.seconds,
        "peak_nbytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "total_seconds": time.perf_counter() - started,
    }


def predicted_nbytes(sizes: dict[str, Any], bits: float, context: int, batch: int, model_type: str) -> int:
    """What the planner says that generation with compressed weights takes of a GPU's memory."""
    config = CiuicConfig(bits=bits, policy="uniform")
    model = _empty_model(sizes, model_type)
    return sum(uniform_choice(model, config, torch.bfloat16, context, batch).budget().values())


def measure_fill(
    model: Any,
    sizes: dict[str, Any],
    bits: float,
    context: int = FILL_CONTEXT,
    batch: int = FILL_BATCH,
    model_type: str = "deepseek_v2",
) -> dict[str, Any]:
    """Peak memory of long prompts that go in at once, with transformers' own cache, and the planner's prediction."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (batch, context - 2), generator=generator).to(device)
    predicted = predicted_nbytes(sizes, bits, context, batch, model_type)
    torch.compiler.reset()  # frees the memory of CUDA graphs
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    return {
        "bits": bits,
        "context": context,
        "tokens": context * batch,
        "predicted_nbytes": predicted,
        "peak_nbytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def measure_model(
    model: Any,
    seconds: float,
    runs: tuple[tuple[int, bool], ...] = RUNS,
    new_tokens: int = NEW_TOKENS,
    fill: Callable[[Any], dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """A line for each run that fits in the time; compiling again is expected to take as long as it did before.

    Args:
        fill: measures memory, after the first two runs.
    """
    deadline, longest = time.perf_counter() + seconds, {True: 0.0, False: 0.0}
    for place, (batch, graphs) in enumerate(runs):
        if place == 2 and fill is not None:
            try:
                yield fill(model)
            except Exception as error:
                yield {"bits": 0.0, "context": 0, "tokens": 0, "error": said_by(error)}
        if time.perf_counter() + longest[graphs] > deadline:
            continue
        started = time.perf_counter()
        try:
            yield measure_batch(model, batch, graphs, new_tokens)
        except Exception as error:
            yield {"batch": batch, "graphs": graphs, "error": said_by(error)}
        longest[graphs] = max(longest[graphs], time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, help="compressed to this; bfloat16 without it")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    model = random_model(V2_LITE, arguments.bits, torch.device(arguments.device))
    with arguments.out.open("a", encoding="utf-8") as out:  # generate() turns gradients off
        left = arguments.seconds - (time.perf_counter() - started)
        fill = None if arguments.bits is None else partial(measure_fill, sizes=V2_LITE, bits=arguments.bits)
        for line in measure_model(model, left, fill=fill):
            out.write(json.dumps(line) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
