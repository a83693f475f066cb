"""One run from the gate to the bar: sections in the order of their worth, and what does not fit is said.

Nothing that was measured is lost: the result is saved after every step, a section that fails becomes a sentence, and
Ctrl-C ends the run with what there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ciuic_hf.bench.kernels import others
from ciuic_hf.bench.kernels.end_to_end import FillRow, GenerateRow, measure_generation
from ciuic_hf.bench.kernels.facts import machine_of
from ciuic_hf.bench.kernels.gate import FULL, SMALL, Case, Failure, Sizes, gate_cases
from ciuic_hf.bench.kernels.huge import check_huge, needed_nbytes
from ciuic_hf.bench.kernels.others import OtherRow
from ciuic_hf.bench.kernels.peers import Peer
from ciuic_hf.bench.kernels.products import FORMATS, Format, fitting, installed_peers, measure_shape
from ciuic_hf.bench.kernels.result import Result
from ciuic_hf.bench.kernels.shapes import STANDARD, TOKENS, WeightShape, standard
from ciuic_hf.bench.kernels.timing import CudaTimer, Timer, measure_ceilings, said_by
from ciuic_hf.bench.kernels.workers import compile_cases, run_gate

GENERATION_SECONDS = 260.0
REST_SECONDS = 45.0
"""What generation leaves for the sections after it."""

DTYPES = (torch.bfloat16, torch.float16)
DECODE = tuple(tokens for tokens in TOKENS if tokens <= 64)
PREFILL = tuple(tokens for tokens in TOKENS if tokens > 64)
FIRST = ("V3 dense gate_proj", "V3 shared gate_up", "V3 experts gate_up", "V3 experts down")
"""The weights that the bar speaks of."""

Save = Callable[[Result], None]


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

    def __str__(self) -> str:
        first, last = self.tokens[0], self.tokens[-1]
        beside = " beside other libraries" if self.peers else ""
        return f"{self.shape.name} at {first} to {last} tokens{beside}"


@dataclass(frozen=True)
class Bench:
    """What every section needs.

    Attributes:
        result: where they leave what they find.
        save: called whenever there is more of it.
    """

    result: Result
    device: torch.device
    timer: Timer
    progress: Progress
    budget: Budget
    save: Save


def run_bench(
    device: torch.device,
    progress: Progress,
    *,
    seconds: float,
    quick: bool,
    save: Save = lambda _: None,
    timer: Callable[[torch.device], Timer] = CudaTimer,
) -> Result:
    """The whole run on a CUDA device.

    Args:
        seconds: what all of it may take; the gate runs whatever it takes.
        quick: only what the bar says of products, and no text generation.
        save: called with what there is so far, after every step.
        timer: makes what measures.
    """
    budget, result = Budget(seconds), Result(machine_of(device))

    def keep(result: Result) -> None:
        result.seconds = budget.used
        save(result)

    try:
        run_whole_gate(result, device, progress)
        keep(result)
        if result.green:
            progress.start("device limits", None)
            bench = Bench(result, device, timer(device), progress, budget, keep)
            result.ceilings = measure_ceilings(bench.timer, device)
            keep(result)
            measure(bench, quick=quick)
        result.state = "finished"
    except KeyboardInterrupt:
        result.state = "interrupted"
    except Exception as error:
        result.state = f"ended by {said_by(error)}"
    keep(result)
    return result


def run_gate_only(device: torch.device, progress: Progress) -> Result:
    """A small gate in this process alone, with kernels compiled beforehand: for compute-sanitizer."""
    result = Result(machine_of(device), state="gate only")
    cases = list(gate_cases(DTYPES[:1], SMALL))
    progress.start(f"compiling for {len(cases)} cases", None)
    compile_cases(cases, device, SMALL)
    _run_cases(result, cases, device, progress, SMALL, workers=0)
    return result


def _run_cases(
    result: Result,
    cases: Sequence[Case],
    device: torch.device,
    progress: Progress,
    sizes: Sizes,
    workers: int | None = None,
) -> None:
    progress.start("gate: every kernel against float64", len(cases))
    result.failures = run_gate(cases, device, progress.step, workers, sizes)
    result.cases = len(cases)


def run_whole_gate(result: Result, device: torch.device, progress: Progress) -> None:
    """Small cases of everything, then what needs memory."""
    _run_cases(result, list(gate_cases(DTYPES)), device, progress, FULL)
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


def measure(bench: Bench, *, quick: bool) -> None:
    """Decoding, then what else a step does, prompts, text generation, other libraries, all other weights."""
    peers, absent = installed_peers()
    result = bench.result
    result.not_measured += [f"{name}: not installed" for name in absent]
    decode, prefill, compared, rest = plans(peers, quick=quick)
    products = partial(_run_plans, bench)
    sections: list[tuple[str, Callable[[], None]]] = [
        ("decoding", partial(products, decode)),
        ("attention, siblings, dequantize", partial(_run_others, bench)),
        ("prompts", partial(products, prefill)),
        ("generate", partial(_run_generation, bench)),
        ("other libraries", partial(products, compared)),
        ("other weights", partial(products, rest)),
    ]
    for name, section in sections:
        if quick and name in ("attention, siblings, dequantize", "generate", "other weights"):
            result.not_measured.append(f"{name}: left out by --quick")
            continue
        try:
            section()
        except Exception as error:
            result.not_measured.append(f"{name}: ended by {said_by(error)}")
        bench.save(result)


def plans(peers: Sequence[Peer], *, quick: bool) -> tuple[list[Plan], list[Plan], list[Plan], list[Plan]]:
    """What the bar speaks of: few tokens, many tokens; the same beside installed peers; everything else."""
    formats = FORMATS[:1] + FORMATS[2:4] if quick else FORMATS
    decode, prefill = (
        [Plan(standard(name), formats, tokens) for name in FIRST] for tokens in (DECODE, PREFILL)
    )
    compared = [Plan(standard(name), FORMATS[:1], DECODE, tuple(peers)) for name in FIRST[:2]]
    return (
        decode,
        prefill,
        compared if peers else [],
        [Plan(shape, FORMATS, TOKENS) for shape in STANDARD if shape.name not in FIRST],
    )


def _run_generation(bench: Bench) -> None:
    seconds = min(GENERATION_SECONDS, bench.budget.left - REST_SECONDS)
    if seconds <= 0:
        bench.result.not_measured.append("generate: no time left")
        return
    bench.progress.start(f"generate: two models, up to {seconds:.0f} s", None)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # for the other processes

    def keep(row: GenerateRow | FillRow) -> None:
        kept: list[Any] = bench.result.generated if isinstance(row, GenerateRow) else bench.result.fills
        kept.append(row)
        bench.save(bench.result)

    bench.result.not_measured += measure_generation(seconds, bench.device, keep)


def _run_others(bench: Bench) -> None:
    """Attention first: nothing else reads a cache."""
    given = bench.timer, bench.device
    kinds: list[tuple[str, Iterator[OtherRow]]] = [
        ("attention", others.measure_attention(others.CACHES, others.LENGTHS, others.CACHED_BITS, *given)),
        ("siblings", others.measure_siblings(others.FAMILIES, FORMATS[:2], others.SIBLING_TOKENS, *given)),
        ("dequantize", others.measure_decoding(others.DECODED, FORMATS, *given)),
    ]
    bench.progress.start("attention, siblings, dequantize", None)
    for kind, rows in kinds:
        done, note = 0, ""
        try:
            for row in rows:
                bench.result.others.append(row)
                bench.result.not_measured += [f"{row}, {name}: {text}" for name, text in row.errors.items()]
                done += 1
                bench.progress.step(str(row))
                if bench.budget.left <= 0:
                    note = "no time left"
                    break
        except Exception as error:
            note = said_by(error)
        if note:
            bench.result.not_measured.append(f"{kind}: {note} after {done} rows")
        bench.save(bench.result)


def _run_plans(bench: Bench, chosen: Sequence[Plan]) -> None:
    """Time plans one after the other; what has no time left, or fails, is listed by weight."""
    bench.progress.start("products", sum(len(plan.formats) * len(plan.tokens) for plan in chosen))
    for plan in chosen:
        if bench.budget.left <= 0:
            bench.result.not_measured.append(f"{plan}: no time left")
            continue
        done, total, note = 0, len(plan.formats) * len(plan.tokens), ""
        try:
            shape = fitting(plan.shape, _free_nbytes(bench.device))
            for row in measure_shape(shape, plan.formats, plan.tokens, bench.timer, bench.device, plan.peers):
                bench.result.products.append(row)
                bench.result.not_measured += [f"{row}, {name}: {error}" for name, error in row.errors.items()]
                done += 1
                bench.progress.step(str(row))
                if bench.budget.left <= 0 and done < total:
                    note = "no time left"
                    break
        except torch.OutOfMemoryError:
            note = "out of memory"
        except Exception as error:
            note = said_by(error)
        if note:
            bench.result.not_measured.append(f"{plan}: {note} after {done} of {total} rows")
        bench.save(bench.result)


def _free_nbytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 33
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
