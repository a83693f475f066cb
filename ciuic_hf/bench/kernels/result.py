"""Everything that one run found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ciuic_hf.bench.kernels.bar import BarLine, bar
from ciuic_hf.bench.kernels.end_to_end import GenerateRow
from ciuic_hf.bench.kernels.facts import Machine
from ciuic_hf.bench.kernels.gate import Failure
from ciuic_hf.bench.kernels.products import CUBLAS, ProductRow
from ciuic_hf.bench.kernels.timing import Ceilings


@dataclass
class Result:
    """One run of ``ciuic bench kernels``.

    Attributes:
        cases: of the gate.
        failures: of the gate; with any, nothing else is measured.
        not_measured: what did not fit, is not installed or went wrong, each with its reason.
    """

    machine: Machine
    cases: int = 0
    failures: list[Failure] = field(default_factory=list)
    ceilings: Ceilings | None = None
    products: list[ProductRow] = field(default_factory=list)
    generated: list[GenerateRow] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def green(self) -> bool:
        return self.cases > 0 and not self.failures

    def bar(self) -> list[BarLine]:
        """Empty when no speed was measured."""
        return bar(self.products, self.generated, self.ceilings) if self.ceilings else []

    def share(self, row: ProductRow) -> float | None:
        """Of the copy bandwidth of this run."""
        if row.bandwidth is None or self.ceilings is None:
            return None
        return row.bandwidth / self.ceilings.copy_bandwidth

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Times in seconds, bandwidths in bytes a second."""
        return {
            "command": "ciuic bench kernels",
            "machine": self.machine.to_dict(),
            "seconds": round(self.seconds, 1),
            "gate": {"cases": self.cases, "failures": [asdict(f) for f in self.failures]},
            "ceilings": asdict(self.ceilings) if self.ceilings else None,
            "bar": [asdict(line) | {"verdict": line.verdict} for line in self.bar()],
            "products": [self._product(row) for row in self.products],
            "generate": [asdict(row) for row in self.generated],
            "not_measured": self.not_measured,
        }

    def _product(self, row: ProductRow) -> dict[str, Any]:
        derived = {"bandwidth": row.bandwidth, "share": self.share(row), "ratio": row.ratio(CUBLAS)}
        return asdict(row) | derived
