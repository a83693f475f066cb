"""Memory of a load: the compressed model and one checkpoint tensor, never the model twice.

Measured in processes of their own, because memory that an earlier test has freed hides what a load takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ciuic_hf.demo.config import BENCHMARK_CONFIG
from ciuic_hf.demo.synthetic import random_deepseek_v3
from ciuic_hf.memory import anonymous_nbytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(anonymous_nbytes() is None, reason="this system does not tell anonymous memory"),
]

# 98 million weights: 196 MB in bfloat16, the largest tensor (embeddings) 16 MB.
SHAPE: dict[str, Any] = BENCHMARK_CONFIG | {
    "vocab_size": 8000,
    "num_hidden_layers": 3,
    "n_routed_experts": 24,
}

# What a load needs beside model and tensor, whatever the size of the model: float32 copies of the one matrix that is
# being dequantized and merged, the encoder's scratch, the allocator's pools. Measured above the compressed model:
# 8 to 10 MB from bf16, where the tensor itself is mapped, and 23 to 29 MB from FP8, of which the largest tensor and
# the 5 % allow 20. Loading a tiny model again takes 0.3 MB.
NOISE_NBYTES = 16 << 20

LOAD = """
import json, sys
import torch
torch.set_num_threads(1)
import ciuic_hf
from ciuic_hf.memory import PeakMemory
from transformers import AutoModelForCausalLM
path, warm_up = sys.argv[1:]
config = ciuic_hf.CiuicConfig(bits=4.25)
AutoModelForCausalLM.from_pretrained(warm_up, quantization_config=config)  # imports, kernels, thread pools
with PeakMemory(interval=0.001) as peak:
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
report = model.ciuic_report
print(json.dumps({"peak": peak.nbytes, "compressed": report.nbytes, "dense": report.dense_nbytes}))
"""


def measured(path: Path, warm_up: Path) -> dict[str, int]:
    """Peak and sizes of one load in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), str(warm_up)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def largest_tensor(path: Path) -> int:
    """Bytes of the largest tensor in the files."""
    sizes = []
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        sizes += [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
    return max(sizes)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_peak(fp8: bool, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    random_deepseek_v3(tmp_path, fp8=fp8, **SHAPE, max_shard_size=60_000_000)
    result = measured(tmp_path, checkpoint("v3_fp8" if fp8 else "v3_bf16"))
    bound = 1.05 * result["compressed"] + largest_tensor(tmp_path) + NOISE_NBYTES
    assert bound < 0.6 * result["dense"], "the model is too small to tell streaming from loading it twice"
    assert result["peak"] <= bound, result
