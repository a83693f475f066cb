"""The memory formula against processes that generate: weights and everything beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ciuic_hf.demo.config import BENCHMARK_CONFIG
from ciuic_hf.demo.synthetic import random_deepseek_v3

_LLAMA: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# Values narrower than keys, as in the originals: a CPU then forms all scores.
_V3: dict[str, Any] = BENCHMARK_CONFIG | {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "vocab_size": 8192,
    "v_head_dim": 48,
}
_SCRIPT = """
import gc, json, sys
from dataclasses import replace
import torch
from transformers import AutoModelForCausalLM
from ciuic_hf import CiuicConfig
from ciuic_hf.hf.choosing import run_of
from ciuic_hf.memory import PeakMemory, release_freed_memory
from ciuic_hf.planning.memory import footprint

path, context, batch, attention = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
bits, chunk = (int(value) or None for value in sys.argv[5:7])
torch.set_num_threads(1)
config = CiuicConfig(bits=4.25, policy="uniform", cache_bits=bits)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, attn_implementation=attention)
ids = torch.arange(batch * (context - 2)).view(batch, -1) % 1000 + 5
options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
options["prefill_chunk_size"] = chunk
with torch.no_grad():
    model.generate(ids[:, :16], **options)
    gc.collect()
    release_freed_memory()
    with PeakMemory(0.001) as peak:
        model.generate(ids, **options)
run = replace(run_of(model, model.dtype, "cpu", bits), prefill_chunk=chunk)
found = footprint(model.config.to_dict(), context, batch, run)
print(json.dumps([peak.nbytes, found.total, model.ciuic_report.nbytes]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(LlamaConfig(**_LLAMA)).to(torch.bfloat16).save_pretrained(root / "llama")
    random_deepseek_v3(root / "v3", fp8=False, **_V3)
    return {"llama": root / "llama", "v3": root / "v3"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures by /proc")
@pytest.mark.parametrize(
    ("name", "context", "batch", "attention", "bits", "chunk"),
    [
        ("llama", 2048, 1, "sdpa", 0, 0),
        ("llama", 1024, 2, "eager", 0, 0),
        ("v3", 1024, 1, "sdpa", 0, 0),
        ("v3", 1024, 2, "eager", 0, 0),
        ("llama", 2048, 1, "sdpa", 4, 0),
        ("v3", 1024, 1, "sdpa", 4, 0),
        ("v3", 1024, 2, "sdpa", 2, 0),
        ("llama", 4098, 1, "sdpa", 0, 512),
        ("llama", 2050, 2, "eager", 0, 256),
        ("v3", 2050, 1, "sdpa", 0, 256),
        ("v3", 1026, 2, "eager", 0, 256),
        ("llama", 4098, 1, "sdpa", 4, 512),
        ("v3", 4098, 1, "sdpa", 4, 512),
        ("v3", 2050, 2, "sdpa", 2, 256),
    ],
)
def test_the_peak_is_the_predicted_one(
    name: str, context: int, batch: int, attention: str, bits: int, chunk: int, models: dict[str, Path]
) -> None:
    """Within 3 %, weights counted, with an allocator that gives large blocks back: those of these sizes glibc keeps."""
    arguments = map(str, (models[name], context, batch, attention, bits, chunk))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        env=os.environ
        | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    measured, predicted, weights = json.loads(done.stdout.splitlines()[-1])
    assert predicted + weights == pytest.approx(measured + weights, rel=0.03)
