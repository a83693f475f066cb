"""Decode and prefill speed on the CPU: a compressed model against the same model in bf16, in one process.

The two models take turns, so that whatever else the machine does falls on both; medians are compared. Decode is
one token on top of a cache; prefill is a prompt without a cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, logging

from ciuic_hf.bench.machine import machine_name
from ciuic_hf.bench.smollm2 import materialize
from ciuic_hf.demo.publish import BENCHMARK_CONFIG, random_deepseek_v3
from ciuic_hf.hf.cache_name import cache_name
from ciuic_hf.hf.config import CiuicConfig

PREFILL_TOKENS = (64, 512)
CONTEXT = 64


@dataclass
class SpeedRow:
    """Medians in seconds of one piece of work, for both models."""

    model: str
    work: str
    bf16_seconds: float
    ciuic_seconds: float
    machine: str

    @property
    def speedup(self) -> float:
        return self.bf16_seconds / self.ciuic_seconds


def measure_decode(cache: Path, bits: float, repeats: int) -> list[SpeedRow]:
    """Both models of the table; files are made under ``cache`` once."""
    deepseek = cache / "deepseek-640m-bf16"
    if not (deepseek / "config.json").exists():
        random_deepseek_v3(deepseek, fp8=False, **BENCHMARK_CONFIG)
    smollm2 = materialize(cache / "smollm2")
    logging.disable_progress_bar()
    return [
        *measure_model("SmolLM2 135M", smollm2, bits, repeats),
        *measure_model("DeepSeek-V3 640M, 48 experts", deepseek, bits, repeats),
    ]


def measure_model(name: str, path: Path, bits: float, repeats: int) -> list[SpeedRow]:
    """Decode one token and prefill prompts with both models in turn."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    compressed = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=CiuicConfig(bits=bits, policy="uniform")
    )
    rows = [_interleave(name, "decode, 1 token", _decoder(dense), _decoder(compressed), repeats)]
    for tokens in PREFILL_TOKENS:
        fewer = max(3, repeats // 4)
        pair = _prefill(dense, tokens), _prefill(compressed, tokens)
        rows.append(_interleave(name, f"prefill, {tokens} tokens", *pair, fewer))
    return rows


def _ids(model: Any, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)


def _decoder(model: Any) -> Callable[[], None]:
    """One step of greedy decoding on a cache that keeps growing."""
    with torch.inference_mode():
        state = model(_ids(model, CONTEXT), use_cache=True, logits_to_keep=1)
    cache, token = state[cache_name()], state.logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        with torch.inference_mode():
            out = model(token, use_cache=True, **{cache_name(): cache})
            token = out.logits[:, -1:].argmax(-1)

    return step


def _prefill(model: Any, tokens: int) -> Callable[[], None]:
    ids = _ids(model, tokens)

    def run() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1)

    return run


def _interleave(
    model: str, work: str, dense: Callable[[], None], ours: Callable[[], None], repeats: int
) -> SpeedRow:
    times: tuple[list[float], list[float]] = ([], [])
    dense()
    ours()
    for _ in track(range(repeats), description=f"{model}: {work}", transient=True):
        for run, seconds in zip((dense, ours), times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return SpeedRow(model, work, statistics.median(times[0]), statistics.median(times[1]), machine_name())


def table(rows: list[SpeedRow]) -> Table:
    """Times and ratios."""
    shown = Table(title=f"bf16 against Ciuic, interleaved medians\n{rows[0].machine}", box=box.ROUNDED)
    for heading in ("model", "work", "bf16", "Ciuic", "speed-up"):
        shown.add_column(heading, justify="left" if heading in ("model", "work") else "right")
    for row in rows:
        times = (f"{1e3 * row.bf16_seconds:.1f} ms", f"{1e3 * row.ciuic_seconds:.1f} ms")
        shown.add_row(row.model, row.work, *times, f"{row.speedup:.2f}x")
    return shown
