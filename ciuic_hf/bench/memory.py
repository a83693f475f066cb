"""The batch and the sequence that fit where 4 x 512 fit plain: LoRA training and generation of a DeepSeek-V3.

The budget is the measured peak of the plain bf16 model at batch 4 and 512 tokens. Then pieces are switched on one
after the other, and for each the largest batch at 512 tokens and the longest sequence at batch 4 are searched whose
measured peak is not above the budget. Each setting is a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.table import Table

from ciuic_hf.bench.machine import machine_name
from ciuic_hf.bench.memory_search import largest_measured, largest_within
from ciuic_hf.bench.memory_settings import BATCH, LENGTH, MODEL, Setting, settings
from ciuic_hf.errors import CiuicError
from ciuic_hf.report import human_bytes

BATCH_CAP, LENGTH_CAP = 8 * BATCH, 8 * LENGTH
LENGTH_STEP = 128
GOAL = 4  # times the batch, times the sequence: what the plain run is measured at too

Measure = Callable[[int, int], int]


class Progress(Protocol):
    """What shows how far a run is."""

    def start(self, what: str, total: int | None) -> None: ...
    def step(self, what: str) -> None: ...


@dataclass(frozen=True)
class MemoryRow:
    """One setting; every size was run.

    Attributes:
        budget_nbytes: peak of the plain setting at BATCH x LENGTH.
        batches, lengths: peak in bytes of every batch at LENGTH, and of every length at BATCH, that was measured.
        batch, length: the largest that fits; None when the setting does not even fit at BATCH x LENGTH.
    """

    setting: Setting
    budget_nbytes: int
    batches: dict[int, int]
    lengths: dict[int, int]
    machine: str

    @property
    def batch(self) -> int | None:
        return largest_measured(self.batches, self.budget_nbytes)

    @property
    def length(self) -> int | None:
        return largest_measured(self.lengths, self.budget_nbytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"batch": self.batch, "length": self.length}


def measure_memory(
    cache: Path, progress: Progress, *, device: str = "cpu", checkpointing: bool = False
) -> list[MemoryRow]:
    """Writes the model under ``cache`` (77 MB, once) and runs every setting.

    Raises:
        CiuicError: when PEFT is not installed, or peaks cannot be measured here.
    """
    require(device)
    path = cache / "deepseek-memory-bf16"
    if not (path / "config.json").exists():
        from ciuic_hf.demo.synthetic import random_deepseek_v3

        progress.start("writing the model", None)
        random_deepseek_v3(path, fp8=False, **MODEL)
    chosen = settings(checkpointing)
    rows: list[MemoryRow] = []
    budgets: dict[str, int] = {}
    for place, setting in enumerate(chosen, 1):
        progress.start(f"{place} of {len(chosen)}, {setting.work}: {setting.name}", None)
        with _Process(path, setting, device, progress) as process:
            rows.append(measure_row(setting, process.peak_nbytes, budgets.get(setting.work)))
        budgets.setdefault(setting.work, rows[-1].budget_nbytes)
    return rows


def require(device: str) -> None:
    """Raises CiuicError when the run could not measure or train."""
    if importlib.util.find_spec("peft") is None:
        raise CiuicError("ciuic bench memory trains adapters with PEFT: pip install 'ciuic-hf[peft]'.")
    if device == "cpu" and not Path("/proc/self/status").exists():
        raise CiuicError("Peaks on a CPU are read from /proc, which this system lacks; run it on Linux.")


def measure_row(setting: Setting, measure: Measure, budget: int | None) -> MemoryRow:
    """Search both axes; without a budget the setting is the plain one and sets it.

    Args:
        measure: batch and length -> peak in bytes.
    """
    first = measure(BATCH, LENGTH)
    if budget is None:
        batches = {BATCH: first, GOAL * BATCH: measure(GOAL * BATCH, LENGTH)}
        lengths = {LENGTH: first, GOAL * LENGTH: measure(BATCH, GOAL * LENGTH)}
        return MemoryRow(setting, first, batches, lengths, machine_name())

    def of_batch(batch: int) -> int:
        return first if batch == BATCH else measure(batch, LENGTH)

    def of_length(length: int) -> int:
        return first if length == LENGTH else measure(BATCH, length)

    batches = largest_within(of_batch, budget, BATCH, 1, BATCH_CAP)
    lengths = largest_within(of_length, budget, LENGTH, LENGTH_STEP, LENGTH_CAP)
    return MemoryRow(setting, budget, batches, lengths, machine_name())


class _Process:
    """A process that holds one setting's model and measures sizes."""

    def __init__(self, path: Path, setting: Setting, device: str, progress: Progress) -> None:
        self.setting, self.progress = setting, progress
        command = [sys.executable, "-m", "ciuic_hf.bench.memory_process", str(path)]
        command += [json.dumps(asdict(setting)), device]
        # glibc would keep freed blocks of up to 32 MiB, which are most of these: docs/adr/012.
        environment = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        }
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def peak_nbytes(self, batch: int, length: int) -> int:
        """One run.

        Raises:
            RuntimeError: when the process ended; it has said why on standard error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{batch} {length}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer below says so
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.setting.work}, {self.setting.name}: {batch} x {length} ended early.")
        nbytes: int = json.loads(answer)["nbytes"]
        self.progress.step(f"{self.setting.work}: {self.setting.name}, {batch} x {length}")
        return nbytes


_TITLES = {"train": "One LoRA training step", "generate": "generate, prompt and decoding"}


def table(rows: list[MemoryRow], work: str) -> Table:
    """The rows of one kind of work."""
    chosen = [row for row in rows if row.setting.work == work]
    budget = chosen[0].budget_nbytes
    shown = Table(
        title=f"{_TITLES[work]} in {human_bytes(budget)}: what fits\n{chosen[0].machine}", box=box.ROUNDED
    )
    for heading in (
        "",
        f"peak at {BATCH} x {LENGTH}",
        f"batch at {LENGTH}",
        "peak",
        f"length at {BATCH}",
        "peak",
    ):
        shown.add_column(heading, justify="left" if not heading else "right")
    for row in chosen:
        shown.add_row(
            row.setting.name,
            human_bytes(row.batches[BATCH]),
            *_cells(row.batch, row.batches, BATCH_CAP),
            *_cells(row.length, row.lengths, LENGTH_CAP),
        )
    plain = chosen[0]
    batch, length = GOAL * BATCH, GOAL * LENGTH
    shown.caption = (
        f"Plain takes {human_bytes(plain.batches[batch])} at {batch} x {LENGTH} and "
        f"{human_bytes(plain.lengths[length])} at {BATCH} x {length}. "
        f"Larger than {BATCH_CAP} x {LENGTH} and {BATCH} x {LENGTH_CAP} was not tried (≥)."
    )
    return shown


def _cells(size: int | None, measured: dict[int, int], cap: int) -> tuple[str, str]:
    """The largest size that fits and its peak."""
    if size is None:
        return "does not fit", human_bytes(min(measured.values()))
    return f"{'≥ ' if size == cap else ''}{size}", human_bytes(measured[size])
