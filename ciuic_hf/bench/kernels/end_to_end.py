"""``generate`` of a whole model, compressed and in bfloat16, each in a process that is ended when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BITS = 4.25
POLL_SECONDS = 0.2
KINDS: tuple[tuple[str, float | None], ...] = (("ciuic", BITS), ("bf16", None))


@dataclass
class GenerateRow:
    """One model at one batch size.

    Attributes:
        model: ``ciuic`` or ``bf16``.
        graphs: whether ``torch.compile`` and CUDA graphs are on.
        skipped: compiled functions that torch ran without a graph all the same.
        tokens_per_second: of all sequences together, once generation is steady.
        peak_nbytes: allocated on the device.
    """

    model: str
    batch: int
    graphs: bool
    tokens_per_second: float | None = None
    peak_nbytes: int | None = None
    skipped: int = 0
    error: str = ""


@dataclass
class FillRow:
    """What generation took of the device's memory, and what the planner had said.

    Attributes:
        bits: per weight.
        context: tokens of each sequence, prompts that went in at once and answers together; ``tokens``: of all.
        predicted_nbytes: of the plan: weights, tables, cache, and what is alive at the largest moment.
        peak_nbytes: allocated on the device.
    """

    bits: float
    context: int
    tokens: int
    predicted_nbytes: int = 0
    peak_nbytes: int | None = None
    error: str = ""

    @property
    def ratio(self) -> float | None:
        """Of the prediction; the promise of ``memory=`` is 0.97 to 1."""
        return (
            self.peak_nbytes / self.predicted_nbytes if self.peak_nbytes and self.predicted_nbytes else None
        )


def measure_generation(
    seconds: float, device: torch.device, keep: Callable[[GenerateRow | FillRow], None]
) -> list[str]:
    """Both models, half of the time each.

    Args:
        keep: called with each row as soon as it is measured.

    Returns:
        what could not be measured, with the reason.
    """
    missing: list[str] = []
    for kind, bits in KINDS:
        lines: list[dict[str, Any]] = []

        def take(line: dict[str, Any], kind: str = kind, lines: list[dict[str, Any]] = lines) -> None:
            lines.append(line)
            keep(_row(kind, line))

        share = seconds / len(KINDS)
        trouble = run_child(child_command(bits, device, share), share, take)
        missing += [f"generate, {kind}: {trouble}"] if trouble else []
        missing += [
            f"generate, {kind}, batch {batch}, CUDA graphs {'on' if graphs else 'off'}: {text}"
            for batch, graphs in _runs()
            for text in [_why_missing(lines, batch, graphs)]
            if text
        ]
    return missing


def _runs() -> tuple[tuple[int, bool], ...]:
    from ciuic_hf.bench.kernels.generate import RUNS

    return RUNS


def _why_missing(lines: Sequence[dict[str, Any]], batch: int, graphs: bool) -> str:
    found = [line for line in lines if (line.get("batch"), line.get("graphs")) == (batch, graphs)]
    return str(found[0].get("error", "")) if found else "no time left"


def _row(kind: str, line: dict[str, Any]) -> GenerateRow | FillRow:
    if "context" in line:
        return FillRow(**line)
    known = {k: v for k, v in line.items() if k in GenerateRow.__dataclass_fields__}
    return GenerateRow(kind, **known)


def child_command(bits: float | None, device: torch.device, seconds: float) -> list[str]:
    """The command of one model, without its ``--out``."""
    command = [sys.executable, "-m", "ciuic_hf.bench.kernels.generate", "--device", str(device)]
    return [*command, "--seconds", f"{seconds:.0f}", *([] if bits is None else ["--bits", str(bits)])]


def run_child(command: list[str], seconds: float, take: Callable[[dict[str, Any]], None]) -> str:
    """Run a measuring process for so long at most.

    Args:
        take: called with each line that it writes, as soon as it is there.

    Returns:
        what went wrong with it: empty when it ended well.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="ciuic-bench-") as folder:
        path, log = Path(folder) / "lines.jsonl", Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as said:
            child = subprocess.Popen(
                [*command, "--out", str(path)], stdout=said, stderr=said, start_new_session=True
            )
            try:
                taken = 0
                while child.poll() is None and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
                    taken = _take_lines(path, taken, take)
            finally:
                status = child.poll()
                if status is None:  # its compiler's workers are in the same group
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            _take_lines(path, taken, take)
        if status is None:
            return f"was ended after {seconds:.0f} seconds"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return "" if status == 0 else ": ".join([f"ended with status {status}", *last])


def _take_lines(path: Path, taken: int, take: Callable[[dict[str, Any]], None]) -> int:
    """Hand on the whole lines after the first ``taken``; how many have been taken then."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    for line in whole[taken:]:
        take(json.loads(line))
    return len(whole)
