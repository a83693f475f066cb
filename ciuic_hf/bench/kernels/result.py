"""Everything that one run found, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ciuic_hf.bench.kernels.bar import BarLine, bar
from ciuic_hf.bench.kernels.end_to_end import FillRow, GenerateRow
from ciuic_hf.bench.kernels.facts import Machine
from ciuic_hf.bench.kernels.gate import Failure
from ciuic_hf.bench.kernels.others import OtherRow
from ciuic_hf.bench.kernels.products import CUBLAS, ProductRow
from ciuic_hf.bench.kernels.timing import Ceilings


@dataclass
class Result:
    """One run of ``ciuic bench kernels``.

    Attributes:
        cases: of the gate.
        failures: of the gate; with any, nothing else is measured.
        others: siblings, dequantize, attention; ``fills``: memory against the planner.
        state: ``running`` until the run is ``finished``, ``interrupted``, or ended by an error.
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
    others: list[OtherRow] = field(default_factory=list)
    fills: list[FillRow] = field(default_factory=list)
    state: str = "running"

    @property
    def green(self) -> bool:
        return self.cases > 0 and not self.failures

    def bar(self) -> list[BarLine]:
        """Empty when no speed was measured."""
        return bar(self.products, self.generated, self.ceilings) if self.ceilings else []

    def share(self, row: ProductRow | OtherRow) -> float | None:
        """Of the copy bandwidth of this run."""
        if row.seconds is None or self.ceilings is None:
            return None
        return row.nbytes / row.seconds / self.ceilings.copy_bandwidth

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Times in seconds, bandwidths in bytes a second."""
        return {
            "command": "ciuic bench kernels",
            "state": self.state,
            "machine": self.machine.to_dict(),
            "seconds": round(self.seconds, 1),
            "gate": {"cases": self.cases, "failures": [asdict(f) for f in self.failures]},
            "ceilings": asdict(self.ceilings) if self.ceilings else None,
            "bar": [asdict(line) | {"verdict": line.verdict} for line in self.bar()],
            "products": [self._product(row) for row in self.products],
            "others": [asdict(row) | {"share": self.share(row)} for row in self.others],
            "generate": [asdict(row) for row in self.generated],
            "memory": [asdict(row) | {"ratio": row.ratio} for row in self.fills],
            "not_measured": self.not_measured,
        }

    def write(self, path: Path) -> None:
        """Replace a file by this result, at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}-new")
        new.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        new.replace(path)

    def _product(self, row: ProductRow) -> dict[str, Any]:
        derived = {"bandwidth": row.bandwidth, "share": self.share(row), "ratio": row.ratio(CUBLAS)}
        return asdict(row) | derived
