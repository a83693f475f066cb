"""The bar that kernels are held to, as a table: floor, goal, what was measured. The worst case counts, not the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ciuic_hf.bench.kernels.end_to_end import GenerateRow
from ciuic_hf.bench.kernels.products import CUBLAS, ProductRow
from ciuic_hf.bench.kernels.shapes import LARGE
from ciuic_hf.bench.kernels.timing import Ceilings

DECODE = (1, 2, 4, 8)
GATE_UP, DOWN = "V3 experts gate_up", "V3 experts down"


@dataclass(frozen=True)
class BarLine:
    """One requirement.

    Attributes:
        measured: in the unit of floor and goal, None when nothing was measured.
        unit: ``of copy bandwidth``, ``x cuBLAS`` and so on.
        of: the case that the number comes from.
    """

    what: str
    unit: str
    floor: float
    goal: float
    measured: float | None
    of: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "goal" if self.measured >= self.goal else "floor" if self.measured >= self.floor else "not met"


Measure = Callable[[ProductRow], float | None]


def bar(
    products: Sequence[ProductRow], generated: Sequence[GenerateRow], ceilings: Ceilings
) -> list[BarLine]:
    """All lines, in the order of the issue."""
    linear = [row for row in products if len(row.shape) == 2]
    four = [row for row in linear if row.bits == 4]
    large = [row for row in four if row.weights >= LARGE]
    decode = [row for row in large if row.tokens in DECODE]
    medium = [row for row in four if row.shape == (4096, 7168) and row.tokens in DECODE]
    low = [row for row in linear if row.bits in (2, 3) and row.weights >= LARGE and row.tokens in DECODE]
    small_batch = [row for row in large if 16 <= row.tokens <= 64]
    prefill = [row for row in large if row.tokens >= 2048]

    def share(row: ProductRow) -> float | None:
        return None if row.bandwidth is None else row.bandwidth / ceilings.copy_bandwidth

    def worst(
        what: str, unit: str, goals: tuple[float, float], rows: Iterable[ProductRow], of: Measure
    ) -> BarLine:
        return _worst(what, unit, goals, [(of(row), row) for row in rows])

    return [
        worst("4-bit decode, large", "of copy bandwidth", (0.65, 0.85), decode, share),
        worst("4-bit decode, large", "x cuBLAS", (2.5, 3.4), decode, ProductRow.ratio),
        worst("4-bit decode, 4096 x 7168", "of copy bandwidth", (0.45, 0.70), medium, share),
        worst("4-bit decode, 4096 x 7168", "x cuBLAS", (1.8, 2.6), medium, ProductRow.ratio),
        worst("2- and 3-bit decode, large", "of copy bandwidth", (0.50, 0.75), low, share),
        _experts(products, ceilings),
        worst("4-bit, 16 to 64 tokens, large", "x cuBLAS", (1.5, 2.5), small_batch, ProductRow.ratio),
        worst("4-bit prefill, 2048 tokens and more, large", "x cuBLAS", (0.9, 1.0), prefill, ProductRow.ratio),
        worst("any weight, any tokens", "x cuBLAS", (0.95, 1.0), products, ProductRow.ratio),
        worst("4-bit, 1 to 64 tokens", "x best peer", (1.0, 1.3), [r for r in four if r.tokens <= 64], _to_best_peer),
        _generation(generated),
    ]  # fmt: skip


def _worst(
    what: str, unit: str, goals: tuple[float, float], values: Iterable[tuple[float | None, ProductRow]]
) -> BarLine:
    known = [(value, row) for value, row in values if value is not None]
    if not known:
        return BarLine(what, unit, *goals, None)
    value, row = min(known, key=lambda pair: pair[0])
    return BarLine(what, unit, *goals, value, str(row))


def _to_best_peer(row: ProductRow) -> float | None:
    """How many times faster than the fastest other 4-bit library."""
    times = [seconds for name, seconds in row.peers.items() if name != CUBLAS]
    return min(times) / row.seconds if times and row.seconds is not None else None


def _experts(products: Sequence[ProductRow], ceilings: Ceilings) -> BarLine:
    """Both products of one token's experts together: the time that their bytes need, over the time they take."""
    what, unit, goals = "4-bit experts, 8 of 256, 1 token", "of the bytes' floor", (0.55, 0.80)
    rows = [r for r in products if r.name in (GATE_UP, DOWN) and r.tokens == 1 and r.bits == 4]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    if len(seconds) != 2:
        return BarLine(what, unit, *goals, None)
    floor = sum(row.nbytes for row in rows) / ceilings.copy_bandwidth
    return BarLine(what, unit, *goals, floor / sum(seconds), f"{rows[0].shape[0]} experts in memory")


def _generation(generated: Sequence[GenerateRow]) -> BarLine:
    what, unit, goals = "generate, batch 1, CUDA graphs", "x bf16", (2.2, 3.0)
    speeds = {row.model: row.tokens_per_second for row in generated if row.batch == 1 and row.graphs}
    ours, dense = speeds.get("ciuic"), speeds.get("bf16")
    if ours is None or dense is None:
        return BarLine(what, unit, *goals, None)
    return BarLine(what, unit, *goals, ours / dense, f"{ours:.0f} tokens/s")
