"""What merging adapters into compressed weights cost, told in one line for a whole model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ciuic_hf.modules.merging import MergeCost
from ciuic_hf.report import human_bytes

logger = logging.getLogger(__name__)


@dataclass
class _Total:
    parameters: int = 0
    adapters: dict[str, None] = field(default_factory=dict)
    cost: MergeCost = field(default_factory=MergeCost)
    kept_nbytes: int = 0

    def add(self, adapters: Sequence[str], cost: MergeCost, kept_nbytes: int) -> None:
        self.parameters += 1
        self.adapters |= dict.fromkeys(adapters)
        self.cost += cost
        self.kept_nbytes += kept_nbytes


_total: ContextVar[_Total | None] = ContextVar("ciuic_merge_total", default=None)


def record(adapters: Sequence[str], cost: MergeCost, kept_nbytes: int) -> None:
    """Count the merge of one parameter; outside :func:`summed` it is told at once.

    Args:
        kept_nbytes: size of the old blocks, kept so that unmerging is exact.
    """
    total = _total.get()
    if total is not None:
        total.add(adapters, cost, kept_nbytes)
        return
    alone = _Total()
    alone.add(adapters, cost, kept_nbytes)
    _tell(alone, unloads=False)


@contextmanager
def summed(unloads: bool) -> Iterator[None]:
    """Tell what all merges inside cost together, in one line at the end.

    Args:
        unloads: whether the adapters, and with them the old blocks, are dropped.
    """
    total = _Total()
    token = _total.set(total)
    try:
        yield
    finally:
        _total.reset(token)
    if total.parameters:
        _tell(total, unloads)


def _tell(total: _Total, unloads: bool) -> None:
    cost = total.cost
    rounding = (
        f"rounding changed the merged weights by {cost.relative_error:.2%} of their norm, "
        f"{cost.error_of_change:.2g} times the norm of what the adapters add"
        if cost.weights
        else "no weight changed"
    )
    kept = "" if unloads else f" The blocks of before, {human_bytes(total.kept_nbytes)}, stay for unmerging."
    logger.warning(
        "Merged %s into %d compressed weights by encoding them again: %s.%s",
        ", ".join(total.adapters),
        total.parameters,
        rounding,
        kept,
    )
