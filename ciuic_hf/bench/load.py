"""Peak memory and time of loading a 640 M DeepSeek-V3, against a plain bf16 load of the same weights.

Every load is a process of its own that imports everything first, so neither imports nor the memory of another load
are counted. Peak is anonymous memory above the start of the load (pages of memory-mapped files are left out).
The runs of all kinds alternate.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.progress import track
from rich.table import Table

from ciuic_hf.bench.machine import machine_name
from ciuic_hf.checkpoint import check_files, checkpoint_files
from ciuic_hf.demo.publish import BENCHMARK_CONFIG, random_deepseek_v3
from ciuic_hf.report import human_bytes

_CHILD = """
import json, sys, time, warnings
import torch, ciuic_hf
from transformers import AutoModelForCausalLM, logging
from ciuic_hf.memory import PeakMemory
warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
path, bits = sys.argv[1], float(sys.argv[2])
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from ciuic_kernels.cpu import native
native.available()
config = {"quantization_config": ciuic_hf.CiuicConfig(bits=bits, policy="uniform")} if bits else {}
peak, start = PeakMemory(interval=0.002).start(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **config)
if not bits:
    for p in model.parameters():  # a plain load maps what it need not merge: touch it, as a forward pass would
        p.view(-1)[:: 2048].sum()
seconds = time.perf_counter() - start
peak.stop()
stored = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak": peak.nbytes, "stored": stored}))
"""


@dataclass
class LoadRow:
    """One kind of load.

    Attributes:
        seconds, peak_nbytes: medians.
        stored_nbytes: parameters of the loaded model.
        overhead: (peak - stored - largest checkpoint tensor) / stored; the promise is at most 0.05.
    """

    name: str
    seconds: float
    peak_nbytes: int
    stored_nbytes: int
    largest_tensor_nbytes: int
    machine: str

    @property
    def overhead(self) -> float:
        return (self.peak_nbytes - self.stored_nbytes - self.largest_tensor_nbytes) / self.stored_nbytes


def measure_loads(cache: Path, repeats: int) -> list[LoadRow]:
    """Write the models under ``cache`` (2 GB, once) and load each kind ``repeats`` times."""
    bf16, fp8 = cache / "deepseek-640m-bf16", cache / "deepseek-640m-fp8"
    for path, is_fp8 in ((bf16, False), (fp8, True)):
        if not (path / "config.json").exists():
            random_deepseek_v3(path, fp8=is_fp8, **BENCHMARK_CONFIG)
    kinds: list[tuple[str, Path, float]] = [
        ("plain bf16", bf16, 0),
        ("8 bits from bf16", bf16, 8),
        ("4.25 bits from bf16", bf16, 4.25),
        ("8 bits from FP8", fp8, 8),
        ("4.25 bits from FP8", fp8, 4.25),
    ]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in kinds}
    for name, path, bits in track(kinds * repeats, description="Loading", transient=True):
        runs[name].append(_run(path, bits))
    return [_row(name, path, runs[name]) for name, path, _ in kinds]


def _run(path: Path, bits: float) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, str(path), str(bits)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"Loading {path} at {bits} bits failed: {result.stderr.strip()[-2000:]}")
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def _row(name: str, path: Path, runs: list[dict[str, float]]) -> LoadRow:
    largest = max(header.nbytes for header in check_files(checkpoint_files(path)))
    return LoadRow(
        name,
        statistics.median(run["seconds"] for run in runs),
        int(statistics.median(run["peak"] for run in runs)),
        int(runs[0]["stored"]),
        largest,
        machine_name(),
    )


def table(rows: list[LoadRow]) -> Table:
    """Ratios to the plain load, which is the first row."""
    plain = rows[0]
    shown = Table(title=f"Loading a 640 M DeepSeek-V3\n{plain.machine}", box=box.ROUNDED)
    for heading in ("load", "model", "peak", "peak vs plain", "over model + tensor", "time", "time vs plain"):
        shown.add_column(heading, justify="left" if heading == "load" else "right")
    for row in rows:
        shown.add_row(
            row.name,
            human_bytes(row.stored_nbytes),
            human_bytes(row.peak_nbytes),
            f"{row.peak_nbytes / plain.peak_nbytes:.2f}x",
            f"{100 * row.overhead:+.1f} %",
            f"{row.seconds:.1f} s",
            f"{row.seconds / plain.seconds:.2f}x",
        )
    return shown
