"""``ciuic bench tune``: the fastest launch for each operator, size of matrix and number of tokens on this GPU.

One knob after another: tile and warps, then stages, then programs, beginning with what runs now. What runs now stays
unless something is more than 3 % faster, so that noise changes nothing. Weights are in the default 4.25-bit mix.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ciuic_hf.bench.kernels.facts import slug
from ciuic_hf.bench.kernels.operands import Operand, activations, random_operand, routing
from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.bench.kernels.timing import Call, CudaTimer, Timer
from ciuic_kernels import tuning
from ciuic_kernels.device import DeviceFacts, device_facts
from ciuic_kernels.format import ceil_div
from ciuic_kernels.ops._products import dense_product
from ciuic_kernels.selection import DEFAULT_RULES, EXPERTS, LINEAR, Launch, Rule, choose

BITS = 4.25
MARGIN = 1.03
BLOCK_MS, WARPS, STAGES, PROGRAMS = (8, 16, 32, 64), (1, 2, 4), (3, 4, 6, 8), (4, 8, 16)


@dataclass(frozen=True)
class Option:
    """A launch to try; None is decode-then-GEMM."""

    launch: tuple[int, int, int] | None
    programs: int

    def __str__(self) -> str:
        if self.launch is None:
            return "decode, then GEMM"
        tile, warps, stages = self.launch
        return f"{tile} tokens, {warps} warps, {stages} stages, {self.programs} programs"


@dataclass(frozen=True)
class Bucket:
    """Sizes that share a rule.

    Attributes:
        max_tokens: of the rule: rows of x, or rows per expert.
        shape: the weight that stands for its class of sizes.
        tokens: what is timed, for experts routed rows; their times are weighed equally.
    """

    op: str
    size: str
    max_tokens: int
    shape: WeightShape
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tuned:
    """The outcome for one bucket; ratios are of the old time to the new."""

    bucket: Bucket
    old: Option
    new: Option
    old_seconds: tuple[float, ...]
    new_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Tuning:
    """A whole sweep; ``failed`` are options that could not be launched, with the reason."""

    gpu: str
    triton: str
    outcomes: list[Tuned]
    failed: dict[str, str] = field(default_factory=dict)


LINEAR_SHAPES = {
    "small": WeightShape("small matrix", 4096, 2048),
    "medium": WeightShape("V3 shared gate_up", 4096, 7168),
    "large": WeightShape("V3 dense gate_proj", 18432, 7168),
}
EXPERT_SHAPES = {
    "small": WeightShape("V2-Lite experts gate_up", 2816, 2048, 64, 6),
    "medium": WeightShape("V3 experts gate_up", 4096, 7168, 64, 8),
}
LINEAR_BUCKETS = (
    (8, (1, 8)),
    (16, (16,)),
    (32, (32,)),
    (64, (64,)),
    (128, (128,)),
    (256, (256,)),
    (512, (512,)),
)
EXPERT_BUCKETS = ((1, (8, 64)), (8, (512,)), (16, (1024,)), (32, (2048,)), (128, (8192,)))
"""``(largest number, what is timed)``: rows of x; for experts, rows of one of 64 experts, and of all."""


def buckets() -> Iterator[Bucket]:
    """What is tuned, in the order of the table; other sizes keep the default rules."""
    for op, shapes, ranges in (
        (LINEAR, LINEAR_SHAPES, LINEAR_BUCKETS),
        (EXPERTS, EXPERT_SHAPES, EXPERT_BUCKETS),
    ):
        for size, shape in shapes.items():
            for max_tokens, tokens in ranges:
                yield Bucket(op, size, max_tokens, shape, tokens)


def default_option(bucket: Bucket, facts: DeviceFacts, rules: Sequence[Rule]) -> Option:
    """What these rules run for a bucket."""
    choice = choose(bucket.op, bucket.max_tokens, bucket.shape.weights, torch.bfloat16, facts, rules)
    if choice.launch is None:
        return Option(None, 8)
    launch = choice.launch
    return Option(
        (launch.block_m, launch.num_warps, launch.num_stages), launch.programs // max(1, facts.processors)
    )


TimeOptions = Callable[[Bucket, Sequence[Option]], list[tuple[float, ...] | None]]
"""Seconds at each of the bucket's tokens for each option, measured in turn; None where one cannot be launched."""


def tune_bucket(bucket: Bucket, default: Option, time_options: TimeOptions) -> Tuned:
    """The best option for a bucket; the default unless something is more than 3 % faster."""
    best, times = default, dict[Option, tuple[float, ...]]()
    for options in (_tiles, _stages, _programs):
        tried = [default, *(o for o in options(bucket, best) if o != default)]
        measured = {o: t for o, t in zip(tried, time_options(bucket, tried), strict=True) if t is not None}
        if default not in measured:
            raise RuntimeError(f"{default} could not be timed for {bucket.shape}.")
        ratios = {o: _cost(t, measured[default]) for o, t in measured.items()}
        leader = min(ratios, key=lambda o: (ratios[o], tried.index(o)))
        if leader != best and ratios[leader] * MARGIN < ratios.get(best, math.inf):
            best = leader
        times |= measured
    return Tuned(bucket, default, best, times[default], times[best])


def _cost(times: Sequence[float], base: Sequence[float]) -> float:
    """Geometric mean of times relative to the default's, measured in the same turn."""
    return math.exp(sum(math.log(t / b) for t, b in zip(times, base, strict=True)) / len(times))


def _tiles(bucket: Bucket, best: Option) -> list[Option]:
    """Tile and warps: no tile over twice the tokens; for plain weights of many tokens also decode-then-GEMM."""
    stages = best.launch[2] if best.launch else 4
    most = max(8, 2 * bucket.max_tokens)
    options = [
        Option((tile, warps, stages), best.programs) for tile in BLOCK_MS for warps in WARPS if tile <= most
    ]
    dense = [Option(None, best.programs)] if bucket.op == LINEAR and bucket.max_tokens >= 32 else []
    return options + dense


def _stages(bucket: Bucket, best: Option) -> list[Option]:
    del bucket
    if best.launch is None:
        return [best]
    tile, warps, _ = best.launch
    return [
        best,
        *(Option((tile, warps, stages), best.programs) for stages in STAGES if stages != best.launch[2]),
    ]


def _programs(bucket: Bucket, best: Option) -> list[Option]:
    del bucket
    if best.launch is None:
        return [best]
    return [best, *(Option(best.launch, programs) for programs in PROGRAMS if programs != best.programs)]


class Step(Protocol):
    """What ``tune`` tells of its progress."""

    def start(self, what: str, total: int | None) -> None: ...

    def step(self, what: str) -> None: ...


def tune(device: torch.device, progress: Step, timer: Timer | None = None) -> Tuning:
    """Sweep every bucket on a CUDA device."""
    facts, triton = device_facts(device), tuning.triton_minor()
    measure = DeviceTimes(device, facts, timer or CudaTimer(device, rounds=15, seconds=0.1))
    todo = list(buckets())
    progress.start("tuning", len(todo))
    outcomes = []
    for bucket in todo:
        outcomes.append(tune_bucket(bucket, default_option(bucket, facts, DEFAULT_RULES), measure))
        progress.step(f"{bucket.op}, {bucket.size}, up to {bucket.max_tokens} tokens")
    return Tuning(facts.name, triton, outcomes, measure.failed)


class DeviceTimes:
    """``TimeOptions`` on a GPU; keeps the compressed weight of the last shape.

    Attributes:
        failed: options that could not be launched, with the reason.
    """

    def __init__(self, device: torch.device, facts: DeviceFacts, timer: Timer) -> None:
        self.device, self.facts, self.timer = device, facts, timer
        self.failed: dict[str, str] = {}
        self._shape: WeightShape | None = None
        self._operand: Operand | None = None

    def __call__(self, bucket: Bucket, options: Sequence[Option]) -> list[tuple[float, ...] | None]:
        operand = self._of(bucket.shape)
        columns: list[list[float | None]] = []
        for tokens in bucket.tokens:
            calls = [self._call(bucket, operand, tokens, option) for option in options]
            with torch.inference_mode():
                timings = self.timer.medians(calls)
            self.failed |= {str(o): t.error for o, t in zip(options, timings, strict=True) if t.error}
            columns.append([timing.seconds for timing in timings])
        rows = list(zip(*columns, strict=True))
        return [None if None in row else tuple(t for t in row if t is not None) for row in rows]

    def _of(self, shape: WeightShape) -> Operand:
        if self._operand is None or self._shape != shape:
            self._operand = None
            self._operand, self._shape = random_operand(shape, BITS, self.device), shape
        return self._operand

    def _call(self, bucket: Bucket, operand: Operand, tokens: int, option: Option) -> Call:
        """A product with this launch, past the rules."""
        from ciuic_kernels.triton.experts import expert_linear  # imports Triton
        from ciuic_kernels.triton.linear import linear

        shape, packed = bucket.shape, operand.packed
        if bucket.op == LINEAR:
            x = activations(tokens, shape.cols, torch.bfloat16, self.device)
        else:
            drawn = routing(ceil_div(tokens, shape.routed), shape, self.device)
            ids = drawn.flatten()[:tokens].contiguous()
            x = activations(tokens, shape.cols, torch.bfloat16, self.device)
        if option.launch is None:
            return partial(dense_product, x, operand.matrix())
        launch = Launch(*option.launch, programs=option.programs * self.facts.processors)
        work, kinds = operand.derived.work, operand.derived.kinds
        if bucket.op == LINEAR:
            return partial(
                linear, x=x, arena=packed.arena, tags=packed.tags, work=work, kinds=kinds, bias=None,
                rows=shape.rows, launch=launch,
            )  # fmt: skip
        return partial(
            expert_linear, x=x, fan=1, expert_ids=ids, arena=packed.arena, tags=packed.tags, work=work, kinds=kinds,
            rows=shape.rows, launch=launch,
        )  # fmt: skip


def table_path(gpu: str, triton: str) -> Path:
    """Where every later run finds the table of a GPU."""
    return tuning.user_path() / f"{slug(gpu)}-triton-{triton}.json"


def to_table(tuned: Tuning) -> dict[str, object]:
    """The JSON that ``ciuic_kernels.tuning`` reads, narrow rules before wide ones."""
    rules = [
        {
            "op": outcome.bucket.op,
            "max_tokens": outcome.bucket.max_tokens,
            "size": outcome.bucket.size,
            "launch": list(outcome.new.launch) if outcome.new.launch else None,
            "programs": outcome.new.programs,
        }
        for outcome in tuned.outcomes
    ]
    return {
        "schema": tuning.SCHEMA,
        "gpu": tuned.gpu,
        "triton": tuned.triton,
        "command": "ciuic bench tune",
        "rules": rules,
    }


def write_table(tuned: Tuning, path: Path) -> None:
    """Write the table at once or not at all, and read it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(to_table(tuned), file, indent=1)
            file.write("\n")
        tuning.read_rules(Path(name))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    tuning.rules_for.cache_clear()


def report(tuned: Tuning) -> Iterator[RenderableType]:
    """Old and new launch of every bucket, with times in microseconds."""
    shown = Table(title=f"{tuned.gpu}, Triton {tuned.triton}, {BITS} bits", box=box.ROUNDED)
    for heading in ("operator", "size", "tokens", "default", "us", "chosen", "us", "faster"):
        shown.add_column(heading, justify="right" if heading in ("tokens", "us", "faster") else "left")
    for o in tuned.outcomes:
        base = [o.bucket.op, o.bucket.size, f"<= {o.bucket.max_tokens}", str(o.old), _micro(o.old_seconds)]
        if o.new == o.old:
            shown.add_row(*base, "the same", "", "")
        else:
            faster = 1 / _cost(o.new_seconds, o.old_seconds)
            shown.add_row(*base, str(o.new), _micro(o.new_seconds), f"{faster:.2f}x")
    yield shown
    changed = sum(o.new != o.old for o in tuned.outcomes)
    yield Text(f"{changed} of {len(tuned.outcomes)} launches changed; the default stays unless 3 % slower")
    if tuned.failed:
        yield Text("Not launched:\n" + "\n".join(f"  {o}: {why}" for o, why in tuned.failed.items()))


def _micro(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e6 * s:.1f}" for s in seconds)
