"""``generate`` of a whole model, compressed and in bfloat16, each in a process that is ended when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BITS = 4.25
KINDS: tuple[tuple[str, float | None], ...] = (("ciuic", BITS), ("bf16", None))


@dataclass
class GenerateRow:
    """One model at one batch size.

    Attributes:
        model: ``ciuic`` or ``bf16``.
        graphs: whether ``torch.compile`` and CUDA graphs are on.
        tokens_per_second: of all sequences together, once generation is steady.
        peak_nbytes: allocated on the device.
    """

    model: str
    batch: int
    graphs: bool
    tokens_per_second: float | None = None
    peak_nbytes: int | None = None
    error: str = ""


def measure_generation(seconds: float, device: torch.device) -> tuple[list[GenerateRow], list[str]]:
    """Both models, half of the time each.

    Returns:
        rows, and what could not be measured, with the reason.
    """
    rows: list[GenerateRow] = []
    missing: list[str] = []
    for kind, bits in KINDS:
        lines, trouble = run_child(child_command(bits, device, seconds / len(KINDS)), seconds / len(KINDS))
        rows += [_row(kind, line) for line in lines]
        missing += [f"generate, {kind}: {trouble}"] if trouble else []
        missing += [
            f"generate, {kind}, batch {batch}, CUDA graphs {'on' if graphs else 'off'}: no time left"
            for batch, graphs in _runs()
            if not trouble
            and not any((r.batch, r.graphs) == (batch, graphs) for r in rows if r.model == kind)
        ]
    return rows, missing


def _runs() -> tuple[tuple[int, bool], ...]:
    from ciuic_hf.bench.kernels.generate import RUNS

    return RUNS


def _row(kind: str, line: dict[str, Any]) -> GenerateRow:
    known = {k: v for k, v in line.items() if k in GenerateRow.__dataclass_fields__}
    return GenerateRow(kind, **known)


def child_command(bits: float | None, device: torch.device, seconds: float) -> list[str]:
    """The command of one model, without its ``--out``."""
    command = [sys.executable, "-m", "ciuic_hf.bench.kernels.generate", "--device", str(device)]
    return [*command, "--seconds", f"{seconds:.0f}", *([] if bits is None else ["--bits", str(bits)])]


def run_child(command: list[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Run a measuring process for so long at most.

    Returns:
        the lines it wrote, and what went wrong with it: empty when it ended well.
    """
    with tempfile.TemporaryDirectory(prefix="ciuic-bench-") as folder:
        lines, log = Path(folder) / "lines.jsonl", Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as errors:
            child = subprocess.Popen(
                [*command, "--out", str(lines)], stdout=errors, stderr=errors, start_new_session=True
            )
            trouble = ""
            try:
                if child.wait(timeout=seconds) != 0:
                    trouble = f"ended with status {child.returncode}"
            except subprocess.TimeoutExpired:
                trouble = f"was ended after {seconds:.0f} seconds"
            finally:
                if child.poll() is None:  # its compiler's workers are in the same group
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if trouble.startswith("ended"):
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            trouble += f": {said[-1]}" if said else ""
        text = lines.read_text(encoding="utf-8") if lines.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")], trouble
