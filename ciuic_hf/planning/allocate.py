"""Rate-distortion allocation: the choice of codecs that minimises a total error within a number of bytes.

A *unit* is one block, or many equal ones. Every codec offers it a number of bytes and an error. Of a unit only the
lower convex hull of these points matters: walking it from the cheapest codec up, each *step* costs bytes and
removes error, at a falling rate. All steps of all units are taken in the order of that rate as long as the budget
lasts, which is the Lagrangian optimum of Shoham and Gersho (IEEE Trans. ASSP 36(9), 1988); what is left of the
budget is filled by going on down the same order with the steps that still fit.

Both halves are one greedy rule, "take the steepest step that fits", so more budget never gives more error: a step
that only the larger budget can pay for fills it to the byte, at a rate no worse than what it displaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError

_BUCKET_SHIFT = 47  # of a float64: sign, 11 bits of exponent and 5 of mantissa remain, 32 buckets an octave
_BUCKETS = 1 << (63 - _BUCKET_SHIFT)
_WINDOW_STEPS = 1 << 20  # steps sorted at a time


@dataclass(frozen=True)
class Units:
    """What is to be decided.

    Attributes:
        kind: int64 ``[U]``, the row of ``nbytes`` and ``error`` that describes each unit.
        weight: float64 ``[U]``, what the error of one block of the unit is multiplied by, at least 0.
        nbytes: int64 ``[S, C]``, bytes of a block by codec.
        error: float64 ``[S, C]``, error of a block by codec, before the weight.
        count: int64 ``[U]``, blocks of each unit.
    """

    kind: Tensor
    weight: Tensor
    nbytes: Tensor
    error: Tensor
    count: Tensor

    def smallest_nbytes(self) -> int:
        """Bytes when every block takes its cheapest codec."""
        return int((self.nbytes.amin(dim=1)[self.kind] * self.count).sum())


@dataclass(frozen=True)
class Allocation:
    """A choice: of the blocks of unit u, ``upgraded[u]`` take codec ``high[u]`` and the rest ``low[u]``.

    Attributes:
        low, high: int64 ``[U]``, columns of ``Units.nbytes``; equal where nothing is upgraded.
        upgraded: int64 ``[U]``, below ``Units.count``.
        nbytes: bytes of all blocks, at most the budget.
        error: weighted error of all blocks.
        price: error that one more byte would save, 0 when nothing is left to improve.
    """

    low: Tensor
    high: Tensor
    upgraded: Tensor
    nbytes: int
    error: float
    price: float


@dataclass(frozen=True)
class _Hulls:
    """Of each kind the hull: codecs ``[S, H + 1]`` by rising bytes, bytes and slope (error a byte) of steps ``[S, H]``.

    Steps that a kind does not have cost 0 bytes.
    """

    codec: Tensor
    cost: Tensor
    slope: Tensor


def allocate(units: Units, budget: int) -> Allocation:
    """Minimise ``sum(weight * error)`` with ``sum(nbytes) <= budget``.

    The same input gives the same choice everywhere. Time grows linearly with units; beyond the input about 30
    bytes a unit are held.

    Raises:
        CiuicError: when even the cheapest codecs do not fit.
        ValueError: for a negative or non-finite error or weight.
    """
    _check(units)
    smallest = units.smallest_nbytes()
    if smallest > budget:
        raise CiuicError(
            f"The smallest choice of codecs takes {smallest:,} bytes and the budget is {budget:,}; "
            "give it more, or compress fewer weights."
        )
    hulls = _find_hulls(units.nbytes, units.error)
    fill = _Fill(units, hulls, budget - smallest)
    price = fill.run()
    level, upgraded = fill.level.long(), fill.upgraded
    low = hulls.codec[units.kind, level]
    high = torch.where(upgraded > 0, hulls.codec[units.kind, (level + 1).clamp(max=hulls.cost.shape[1])], low)
    nbytes, error = _total(units, low, high, upgraded)
    assert nbytes <= budget
    return Allocation(low, high, upgraded, nbytes, error, price)


def _check(units: Units) -> None:
    for name, values in (("error", units.error), ("weight", units.weight)):
        if values.numel() and not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(f"Every {name} must be finite and at least 0.")


def _find_hulls(nbytes: Tensor, error: Tensor) -> _Hulls:
    """Gift wrapping, all kinds at once: from each point the steepest step, the longest of equals."""
    kinds = torch.arange(len(nbytes))
    cheapest = nbytes == nbytes.amin(dim=1, keepdim=True)
    here = torch.where(cheapest, error, torch.inf).argmin(dim=1)
    codecs, costs, slopes = [here], [], []
    while True:
        cost = nbytes - nbytes[kinds, here, None]
        gain = error[kinds, here, None] - error
        slope = torch.where((cost > 0) & (gain > 0), gain / cost.clamp(min=1), -1.0)
        steepest = slope.amax(dim=1, keepdim=True)
        best = torch.where(slope == steepest, cost, -1).argmax(dim=1)
        moves = steepest[:, 0] > 0
        if not bool(moves.any()):
            break
        costs.append(torch.where(moves, cost[kinds, best], 0))
        slopes.append(torch.where(moves, steepest[:, 0], 0.0))
        here = torch.where(moves, best, here)
        codecs.append(here)
    shape = (len(nbytes), 0)
    return _Hulls(
        torch.stack(codecs, dim=1),
        torch.stack(costs, dim=1) if costs else torch.zeros(shape, dtype=torch.int64),
        torch.stack(slopes, dim=1) if slopes else torch.zeros(shape, dtype=torch.float64),
    )


class _Fill:
    """Takes steps, steepest first, until none fits.

    Attributes:
        level: int8 ``[U]``, steps that all blocks of the unit have taken.
        upgraded: int64 ``[U]``, blocks that have taken one more; such a unit takes no further step.
        room: bytes left.
        _limit: int8 ``[U]``, the rank of the first step that the unit cannot take.
    """

    def __init__(self, units: Units, hulls: _Hulls, room: int) -> None:
        self.units, self.hulls, self.room = units, hulls, room
        self.level = torch.zeros(len(units.kind), dtype=torch.int8)
        self.upgraded = torch.zeros(len(units.kind), dtype=torch.int64)
        self._limit = torch.full((len(units.kind),), 127, dtype=torch.int8)

    def run(self) -> float:
        """Fill the room; returns the rate of the first step that did not fit."""
        nbytes, steps = self._histogram()
        passed = nbytes.flip(0).cumsum(0)  # bytes of the steepest bucket, of the two steepest, ...
        whole = int((passed <= self.room).sum())
        first = _BUCKETS - whole  # the flattest bucket that fits with all its steps, and those above it
        self._take_all(first)
        self.room -= int(passed[whole - 1]) if whole else 0
        price = 0.0
        below = torch.cat([steps.new_zeros(1), steps.cumsum(0)])  # steps in all buckets under each
        stop, smallest = first, self._smallest_cost()
        while self.room >= smallest and int(below[stop]) > 0:
            steepest = int(torch.searchsorted(below, below[stop])) - 1  # of the buckets left that hold steps
            start = min(steepest, int(torch.searchsorted(below, below[stop] - _WINDOW_STEPS)))
            price = max(price, self._take_in_order(*self._gather(start, stop)))
            stop = start
        return price

    def _smallest_cost(self) -> int:
        costs = self.hulls.cost[self.hulls.cost > 0]
        return int(costs.min()) if len(costs) else 1

    def _slopes(self, rank: int) -> Tensor:
        return self.units.weight.double() * self.hulls.slope[self.units.kind, rank]

    def _histogram(self) -> tuple[Tensor, Tensor]:
        """Bytes and number of all steps by bucket of their rate, int64 ``[_BUCKETS]`` each; bucket 0 is rate 0."""
        nbytes = torch.zeros(_BUCKETS, dtype=torch.int64)
        steps = torch.zeros(_BUCKETS, dtype=torch.int64)
        for rank in range(self.hulls.cost.shape[1]):
            bucket = _bucket(self._slopes(rank))
            nbytes.index_add_(0, bucket, self.hulls.cost[self.units.kind, rank] * self.units.count)
            steps += torch.bincount(bucket, minlength=_BUCKETS)
        nbytes[0] = steps[0] = 0  # nothing is spent where nothing is gained
        return nbytes, steps

    def _take_all(self, first: int) -> None:
        """Every step of the buckets from ``first`` on."""
        for rank in range(self.hulls.cost.shape[1]):
            self.level += (_bucket(self._slopes(rank)) >= max(1, first)).to(torch.int8)

    def _gather(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Rate, bytes of one block, unit and rank of the steps in buckets ``[start, stop)``, steepest first."""
        slopes, costs, units, ranks = [], [], [], []
        for rank in range(self.hulls.cost.shape[1]):
            slope = self._slopes(rank)
            bucket = _bucket(slope)
            unit = ((bucket >= start) & (bucket < stop)).nonzero()[:, 0]
            slopes.append(slope[unit])
            costs.append(self.hulls.cost[self.units.kind[unit], rank])
            units.append(unit)
            ranks.append(torch.full_like(unit, rank, dtype=torch.int8))
        slope = torch.cat(slopes)
        order = slope.argsort(descending=True, stable=True)
        return slope[order], torch.cat(costs)[order], torch.cat(units)[order], torch.cat(ranks)[order]

    def _take_in_order(self, slope: Tensor, cost: Tensor, unit: Tensor, rank: Tensor) -> float:
        """Walk the steps, taking each that fits and whose unit took the one before; the rate of the first refused."""
        refused = 0.0
        while len(unit):
            # The room only shrinks: a step that costs more stays out, and with it all later ones of its unit.
            dear = cost > self.room
            if bool(dear.any()):
                refused = refused or float(slope[dear][0])
                self._limit.scatter_reduce_(0, unit[dear], rank[dear], "amin")
            slope, cost, unit, rank = _select(rank < self._limit[unit], slope, cost, unit, rank)
            total = (cost * self.units.count[unit]).cumsum(0)
            whole = int((total <= self.room).sum())
            self.level.index_add_(0, unit[:whole], torch.ones(whole, dtype=torch.int8))
            self.room -= int(total[whole - 1]) if whole else 0
            if whole == len(unit):
                break
            u = int(unit[whole])
            blocks = self.room // int(cost[whole])
            refused = refused or float(slope[whole])
            self.upgraded[u], self._limit[u] = blocks, rank[whole]
            self.room -= blocks * int(cost[whole])
            rest = torch.arange(len(unit)) > whole
            slope, cost, unit, rank = _select(rest, slope, cost, unit, rank)
        return refused


def _select(chosen: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    return tuple(column[chosen] for column in columns)


def _bucket(slope: Tensor) -> Tensor:
    return slope.view(torch.int64) >> _BUCKET_SHIFT


def _total(units: Units, low: Tensor, high: Tensor, upgraded: Tensor) -> tuple[int, float]:
    rest = units.count - upgraded
    nbytes = units.nbytes[units.kind, low] * rest + units.nbytes[units.kind, high] * upgraded
    error = units.error[units.kind, low] * rest + units.error[units.kind, high] * upgraded
    return int(nbytes.sum()), float((error * units.weight).sum())
