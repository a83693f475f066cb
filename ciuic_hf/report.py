"""What a compression did: every parameter, what was left alone and why, bytes, time and peak memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ciuic_hf.config import ROLES

ROLE_ORDER = {
    role: i for i, role in enumerate(("embeddings", "attention", "mlp", "shared_experts", "experts"))
}


def human_bytes(nbytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1024 or unit == "TiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.{0 if nbytes >= 100 else 1}f} {unit}"
        nbytes /= 1024
    raise AssertionError


def human_count(count: float) -> str:
    """``79626240`` -> ``79.6 M``."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            return f"{count:.0f}" if not unit else f"{count:.{0 if count >= 100 else 1}f}{unit}"
        count /= 1000
    raise AssertionError


def printable(text: str) -> str:
    """Text from a file for a terminal: without control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


@dataclass(frozen=True)
class CompressedParameter:
    """One compressed parameter.

    Attributes:
        weights: number of weights.
        nbytes: everything stored: arena and tags.
        dense_nbytes: bytes of the same weights in the model's dtype.
        codecs: codec name -> number of blocks.
        relative_error: ||decoded - weight|| / ||weight|| where weights were dropped while their values were at hand.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    weights: int
    nbytes: int
    dense_nbytes: int
    codecs: dict[str, int] = field(default_factory=dict)
    relative_error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class KeptParameter:
    """One parameter that stays as it is, and why."""

    name: str
    reason: str
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Pruned:
    """What sparse blocks cost at the outputs of a parameter: mean squares, summed and weighted as in ``Rounded``.

    Attributes:
        energy: of the outputs of the original weights.
        by_magnitude: of the error if each block stored its largest weights.
        stored: of the error as it was stored, with the loss made good by the weights that stay.
    """

    energy: float = 0.0
    by_magnitude: float = 0.0
    stored: float = 0.0

    def __add__(self, other: Pruned) -> Pruned:
        return Pruned(
            self.energy + other.energy, self.by_magnitude + other.by_magnitude, self.stored + other.stored
        )

    @property
    def relative_error(self) -> float:
        """||error|| / ||output||, as stored."""
        return math.sqrt(self.stored / self.energy) if self.energy else 0.0

    @property
    def relative_error_by_magnitude(self) -> float:
        """The same if each block stored its largest weights."""
        return math.sqrt(self.by_magnitude / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Rounded:
    """What rounding by a calibration did in one load.

    Attributes:
        matrices: rounded for their inputs, every expert counted.
        plain: parameter -> matrices of it that the calibration knows nothing of (experts that met too few tokens,
            embeddings, lm_head), rounded to the nearest.
        nearest, stored: mean squared error at the outputs of those that were rounded, summed over outputs and weighted
            by how much they matter: when rounded to the nearest, and as stored.
        pruned: parameter with sparse blocks -> what they cost.
    """

    matrices: int
    plain: dict[str, int]
    nearest: float
    stored: float
    pruned: dict[str, Pruned] = field(default_factory=dict)

    def __str__(self) -> str:
        whole = self.matrices + sum(self.plain.values())
        ratio = self.stored / self.nearest if self.nearest else 1.0
        text = f"Rounded for calibrated inputs: {self.matrices} of {whole} matrices, {ratio:.2f}x the error at outputs."
        if self.plain:
            named = ", ".join(f"{name} ({count})" for name, count in list(self.plain.items())[:3])
            more = f" and {len(self.plain) - 3} more" if len(self.plain) > 3 else ""
            text += f" Not calibrated: {named}{more}."
        return text + self._pruning()

    def _pruning(self) -> str:
        if not self.pruned:
            return ""
        whole = sum(self.pruned.values(), Pruned())
        worst = max(self.pruned, key=lambda name: self.pruned[name].relative_error)
        return (
            f"\nSparse blocks in {len(self.pruned)} weights: {100 * whole.relative_error:.1f} % error at outputs, "
            f"{100 * whole.relative_error_by_magnitude:.1f} % if pruned by magnitude alone; "
            f"most in {worst}, {100 * self.pruned[worst].relative_error:.1f} %."
        )


@dataclass
class Report:
    """Everything that a load or an inspection found.

    Attributes:
        seconds: wall time of the load or of compressing in place (``did`` says which), None for an inspection.
        peak_nbytes: highest memory above the start of that (``peak_of`` says which memory), None if unknown.
        rounded: what rounding by a calibration did, None without one.
        prompt: how prompts go in while generating, where a load chose that or was told.
    """

    compressed: list[CompressedParameter]
    kept: list[KeptParameter]
    source: str = ""
    seconds: float | None = None
    peak_nbytes: int | None = None
    peak_of: str = ""
    did: str = "Loaded"
    rounded: Rounded | None = None
    prompt: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the model as it is now."""
        return sum(p.nbytes for p in self.compressed) + sum(p.nbytes for p in self.kept)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the model without compression."""
        return sum(p.dense_nbytes for p in self.compressed) + sum(p.nbytes for p in self.kept)

    def bits_per_weight(self, roles: Iterable[str] = ROLES) -> float:
        """Bits per weight, everything stored counted, over the compressed parameters of some roles."""
        chosen = [p for p in self.compressed if p.role in set(roles)]
        weights = sum(p.weights for p in chosen)
        return 8 * sum(p.nbytes for p in chosen) / weights if weights else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "source": self.source,
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "bits_per_weight": self.bits_per_weight() if self.compressed else None,
            "seconds": self.seconds,
            "peak_nbytes": self.peak_nbytes,
            "peak_of": self.peak_of,
            "rounded": asdict(self.rounded) if self.rounded else None,
            "compressed": [vars(p) | {"bits_per_weight": p.bits_per_weight} for p in self.compressed],
            "kept": [vars(p) for p in self.kept],
        }

    def __rich__(self) -> Group:
        table = Table(title=self.source or None, title_justify="left", box=box.ROUNDED)
        table.add_column("role", no_wrap=True)
        for heading in ("weights", "bits", "before", "after"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("how, or why not", overflow="fold")
        for row in [*self._compressed_rows(), *self._kept_rows()]:
            table.add_row(*(Text(printable(cell)) for cell in row))
        table.add_section()
        ratio = f"{self.dense_nbytes / max(1, self.nbytes):.2f}x smaller"
        table.add_row(*_row("total", self._weights(), self.dense_nbytes, self.nbytes, ratio))
        notes = [str(self.rounded)] if self.rounded else []
        notes += [self.prompt] if self.prompt else []
        notes += [self._run()] if self.seconds is not None else []
        return Group(table, *map(Text, notes))

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _weights(self) -> int:
        return sum(p.weights for p in self.compressed) + sum(p.weights for p in self.kept)

    def _run(self) -> str:
        peak = (
            f", peak {human_bytes(self.peak_nbytes)} ({self.peak_of})" if self.peak_nbytes is not None else ""
        )
        return f"{self.did} in {self.seconds:.1f} s{peak}."

    def _compressed_rows(self) -> list[tuple[str, ...]]:
        by_role: dict[str, list[CompressedParameter]] = defaultdict(list)
        for parameter in self.compressed:
            by_role[parameter.role].append(parameter)
        rows: list[tuple[str, ...]] = []
        for role in sorted(by_role, key=lambda r: (ROLE_ORDER.get(r, len(ROLE_ORDER)), r)):
            group = by_role[role]
            weights, before = sum(p.weights for p in group), sum(p.dense_nbytes for p in group)
            rows.append(_row(role, weights, before, sum(p.nbytes for p in group), _how(group)))
        return rows

    def _kept_rows(self) -> list[tuple[str, ...]]:
        by_reason: dict[str, list[KeptParameter]] = defaultdict(list)
        for parameter in self.kept:
            by_reason[parameter.reason].append(parameter)
        rows: list[tuple[str, ...]] = []
        for reason, group in sorted(by_reason.items()):
            nbytes = sum(p.nbytes for p in group)
            rows.append(_row("kept", sum(p.weights for p in group), nbytes, nbytes, reason))
        return rows


def _row(role: str, weights: int, before: int, after: int, how: str) -> tuple[str, ...]:
    bits = f"{8 * after / max(1, weights):.2f}"
    return role, human_count(weights), bits, human_bytes(before), human_bytes(after), how


def _how(group: list[CompressedParameter]) -> str:
    errors = [p.relative_error for p in group if p.relative_error is not None]
    if not errors:
        return _codec_shares(group)
    return f"{_codec_shares(group)}; error up to {100 * max(errors):.1f}%"


def _codec_shares(group: list[CompressedParameter]) -> str:
    blocks: dict[str, int] = defaultdict(int)
    for parameter in group:
        for codec, count in parameter.codecs.items():
            blocks[codec] += count
    total = sum(blocks.values())
    shares = sorted(blocks.items(), key=lambda item: -item[1])
    return ", ".join(f"{codec} {100 * count / total:.0f}%" for codec, count in shares if count)
