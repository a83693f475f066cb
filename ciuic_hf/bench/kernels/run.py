"""One run from the gate to the bar: the order is that of importance, and what does not fit is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ciuic_hf.bench.kernels.end_to_end import measure_generation
from ciuic_hf.bench.kernels.facts import machine_of
from ciuic_hf.bench.kernels.gate import Case, Failure, gate_cases, run_gate
from ciuic_hf.bench.kernels.huge import check_huge, needed_nbytes
from ciuic_hf.bench.kernels.peers import Peer
from ciuic_hf.bench.kernels.products import FORMATS, Format, fitting, installed_peers, measure_shape
from ciuic_hf.bench.kernels.result import Result
from ciuic_hf.bench.kernels.shapes import STANDARD, TOKENS, WeightShape, standard
from ciuic_hf.bench.kernels.timing import CudaTimer, Timer, measure_ceilings

GENERATION_SECONDS = 280.0
REST_SECONDS = 30.0
DTYPES = (torch.bfloat16, torch.float16)
FIRST = ("V3 dense gate_proj", "V3 shared gate_up", "V3 experts gate_up", "V3 experts down")
"""The weights that the bar speaks of."""


class Progress(Protocol):
    """Where a run says what it does; ``ciuic_hf.cli.bench`` shows it."""

    def start(self, what: str, total: int | None) -> None:
        """Something new, of so many steps."""
        ...

    def step(self, what: str) -> None:
        """One of them is done."""
        ...


class Budget:
    """The time of a run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start, self._seconds = clock, clock(), seconds

    @property
    def used(self) -> float:
        return self._clock() - self._start

    @property
    def left(self) -> float:
        return self._seconds - self.used


@dataclass(frozen=True)
class Plan:
    """Products to time together: one weight, some formats, some numbers of tokens, some peers."""

    shape: WeightShape
    formats: tuple[Format, ...]
    tokens: tuple[int, ...]
    peers: tuple[Peer, ...] = ()


def run_bench(device: torch.device, progress: Progress, *, seconds: float, quick: bool) -> Result:
    """The whole run on a CUDA device.

    Args:
        seconds: what all of it may take; the gate runs whatever it takes.
        quick: only what the bar says of products, and no text generation.
    """
    budget, result = Budget(seconds), Result(machine_of(device))
    run_whole_gate(result, device, progress)
    if result.green:
        timer = CudaTimer(device)
        progress.start("device limits", None)
        result.ceilings = measure_ceilings(timer, device)
        measure(result, device, timer, progress, budget, quick=quick)
    result.seconds = budget.used
    return result


def run_whole_gate(result: Result, device: torch.device, progress: Progress) -> None:
    """Small cases of everything, then what needs memory."""
    cases: list[Case] = list(gate_cases(DTYPES))
    progress.start("gate: every kernel against float64", len(cases))
    result.failures = run_gate(cases, device, progress.step)
    result.cases = len(cases)
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed_nbytes():
        result.not_measured.append(
            f"gate, parameters of over 2^31 bytes: {needed_nbytes() / 2**30:.1f} GiB are not free"
        )
        return
    progress.start("gate: parameters of over 2^31 bytes", len(DTYPES))
    for dtype in DTYPES:
        try:
            result.failures += check_huge(device, dtype)
        except Exception as error:
            result.failures.append(
                Failure(f"over 2^31 bytes, {dtype}", f"raised {type(error).__name__}: {error}")
            )
        result.cases += 1
        progress.step(str(dtype))
    torch.cuda.empty_cache()


def measure(
    result: Result, device: torch.device, timer: Timer, progress: Progress, budget: Budget, *, quick: bool
) -> None:
    """Products of the bar, text generation, other libraries, then all other weights."""
    peers, absent = installed_peers()
    result.not_measured += [f"{name}: not installed" for name in absent]
    first, compared, rest = plans(peers, quick=quick)
    _run_plans(result, first, device, timer, progress, budget)
    if quick:
        result.not_measured.append("generate, other weights: left out by --quick")
    elif budget.left < REST_SECONDS:
        result.not_measured.append("generate: no time left")
    else:
        seconds = min(GENERATION_SECONDS, budget.left - REST_SECONDS * (1 + bool(compared)))
        progress.start(f"generate: two models, up to {seconds:.0f} s", None)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        rows, missing = measure_generation(seconds, device)
        result.generated += rows
        result.not_measured += missing
    _run_plans(result, [*compared, *rest], device, timer, progress, budget)


def plans(peers: Sequence[Peer], *, quick: bool) -> tuple[list[Plan], list[Plan], list[Plan]]:
    """What the bar speaks of; the same beside installed peers; everything else."""
    formats = FORMATS[:1] + FORMATS[2:4] if quick else FORMATS
    first = [Plan(standard(name), formats, TOKENS) for name in FIRST]
    small = tuple(tokens for tokens in TOKENS if tokens <= 64)
    compared = [Plan(standard(name), FORMATS[:1], small, tuple(peers)) for name in FIRST[:2]] if peers else []
    if quick:
        return first, compared, []
    return first, compared, [Plan(s, FORMATS, TOKENS) for s in STANDARD if s.name not in FIRST]


def _run_plans(
    result: Result,
    chosen: Sequence[Plan],
    device: torch.device,
    timer: Timer,
    progress: Progress,
    budget: Budget,
) -> None:
    """Time plans one after the other; what has no time left is listed by weight."""
    progress.start("products", sum(len(plan.formats) * len(plan.tokens) for plan in chosen))
    for plan in chosen:
        done, total = 0, len(plan.formats) * len(plan.tokens)
        if budget.left <= 0:
            result.not_measured.append(f"{plan.shape.name}: no time left")
            continue
        try:
            shape = fitting(plan.shape, _free_nbytes(device))
            rows = measure_shape(shape, plan.formats, plan.tokens, timer, device, plan.peers)
            for row in rows:
                result.products.append(row)
                result.not_measured += [f"{row.name}, {row.bits:g} bits, {row.tokens} tokens, {name}: {error}"
                                        for name, error in row.errors.items()]  # fmt: skip
                done += 1
                progress.step(f"{row.name}, {row.bits:g} bits, {row.tokens} tokens")
                if budget.left <= 0 and done < total:
                    result.not_measured.append(
                        f"{plan.shape.name}: no time left after {done} of {total} rows"
                    )
                    break
        except torch.OutOfMemoryError:
            result.not_measured.append(f"{plan.shape.name}: out of memory after {done} of {total} rows")


def _free_nbytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 33
