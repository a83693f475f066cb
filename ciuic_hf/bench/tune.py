"""``ciuic bench tune``: the fastest launch for each operator, size of matrix and number of tokens on this GPU.

One knob after another: tile and warps, then stages, then programs, beginning with what runs now. What runs now stays
unless something is more than 3 % faster, so that noise changes nothing. Weights are in the default 4.25-bit mix.
An option is timed only if it gives what the default gives. Sizes come in the order of their worth, and those that the
time does not reach keep their default.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ciuic_hf.bench.kernels.facts import slug
from ciuic_hf.bench.kernels.timing import CudaTimer, Timer, said_by
from ciuic_hf.bench.tune_times import BITS, Bucket, DeviceTimes, Option, buckets, default_option
from ciuic_kernels import tuning
from ciuic_kernels.device import device_facts
from ciuic_kernels.selection import DEFAULT_RULES, LINEAR

MARGIN = 1.03
BLOCK_MS, WARPS, STAGES, PROGRAMS = (8, 16, 32, 64), (1, 2, 4), (3, 4, 6, 8), (4, 8, 16)


@dataclass(frozen=True)
class Tuned:
    """The outcome for one bucket; ratios are of the old time to the new."""

    bucket: Bucket
    old: Option
    new: Option
    old_seconds: tuple[float, ...]
    new_seconds: tuple[float, ...]


@dataclass
class Tuning:
    """A sweep.

    Attributes:
        failed: options that could not be launched or gave other results, with the reason.
        left: sizes that keep their default, which it is, and the reason.
    """

    gpu: str
    triton: str
    outcomes: list[Tuned]
    failed: dict[str, str] = field(default_factory=dict)
    left: list[tuple[Bucket, Option, str]] = field(default_factory=list)
    interrupted: bool = False


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


def tune(
    device: torch.device, progress: Step, seconds: float = math.inf, timer: Timer | None = None
) -> Tuning:
    """Sweep the buckets on a CUDA device for so many seconds, or until Ctrl-C; what was found by then counts."""
    facts, deadline = device_facts(device), time.perf_counter() + seconds
    measure = DeviceTimes(device, facts, timer or CudaTimer(device, rounds=15, seconds=0.1))
    found = Tuning(facts.name, tuning.triton_minor(), [], measure.failed)
    todo = buckets()
    progress.start("tuning", len(todo))
    for bucket in todo:
        default, reason = default_option(bucket, facts, DEFAULT_RULES), ""
        if found.interrupted or time.perf_counter() > deadline:
            reason = "interrupted" if found.interrupted else "no time left"
        else:
            try:
                found.outcomes.append(tune_bucket(bucket, default, measure))
            except KeyboardInterrupt:
                found.interrupted, reason = True, "interrupted"
            except Exception as error:
                reason = said_by(error)
            progress.step(str(bucket))
        if reason:
            found.left.append((bucket, default, reason))
    return found


def table_path(gpu: str, triton: str) -> Path:
    """Where every later run finds the table of a GPU."""
    return tuning.user_path() / f"{slug(gpu)}-triton-{triton}.json"


def to_table(tuned: Tuning) -> dict[str, object]:
    """The JSON that ``ciuic_kernels.tuning`` reads, narrow rules before wide ones.

    A size that was left out is written with its default where a wider rule would take its place.
    """
    chosen = [(outcome.bucket, outcome.new) for outcome in tuned.outcomes]
    widest: dict[tuple[str, str], int] = {}
    for bucket, _ in chosen:
        key = bucket.op, bucket.size
        widest[key] = max(widest.get(key, 0), bucket.max_tokens)
    chosen += [(b, o) for b, o, _ in tuned.left if b.max_tokens < widest.get((b.op, b.size), 0)]
    rules = [
        {
            "op": bucket.op,
            "max_tokens": bucket.max_tokens,
            "size": bucket.size,
            "launch": list(option.launch) if option.launch else None,
            "programs": option.programs,
        }
        for bucket, option in sorted(chosen, key=lambda pair: pair[0].max_tokens)
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
    if tuned.left:
        yield Text("Left at their default:\n" + "\n".join(f"  {b}: {why}" for b, _, why in tuned.left))
    if tuned.failed:
        yield Text("Not chosen:\n" + "\n".join(f"  {o}: {why}" for o, why in tuned.failed.items()))


def _micro(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e6 * s:.1f}" for s in seconds)
