"""Quality against bytes on SmolLM2, a trained LM, beside bitsandbytes NF4 on the same text.

Reference: the bf16 weights computed in float32. Candidates are computed in float32 as well, so that only the
weights differ. Every Linear is compressed; embeddings are at 8 bits for Ciuic and untouched for NF4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from ciuic_hf.bench.peers import BITS_PER_WEIGHT, nf4_roundtrip_
from ciuic_hf.bench.quality import compare, reference_logprobs, text_ids
from ciuic_hf.bench.smollm2 import materialize
from ciuic_hf.config import LINEAR_ROLES
from ciuic_hf.hf.config import CiuicConfig


@dataclass
class QualityRow:
    """One candidate. ``bits_per_weight`` counts everything stored of the Linears."""

    name: str
    bits_per_weight: float
    kl: float
    perplexity: float
    top1_agreement: float
    tokens: int


def measure_quality(
    cache: Path,
    bits: Iterable[float],
    tokens: int,
    sensitivity: Path | None = None,
    calibration: Path | None = None,
) -> list[QualityRow]:
    """The reference, NF4, and Ciuic at each of ``bits`` by every policy; more with measurements of this model."""
    policies: dict[str, dict[str, Any]] = {"uniform": {"policy": "uniform"}, "by kind": {}}
    if sensitivity is not None:
        policies["measured"] = {"sensitivity": sensitivity}
    if calibration is not None:
        policies["calibrated"] = {"calibration": calibration}
    path = materialize(cache / "smollm2")
    logging.disable_progress_bar()
    ids = text_ids(AutoTokenizer.from_pretrained(path), tokens)
    dense = _load(path)
    reference = reference_logprobs(dense, ids)
    rows = [_row("bf16", 16.0, dense, reference)]
    nf4_roundtrip_(dense)
    rows.append(_row("bitsandbytes NF4, group 64", BITS_PER_WEIGHT, dense, reference))
    del dense
    candidates = [(asked, name) for asked in bits for name in policies]
    for asked, name in track(candidates, description="Measuring", transient=True):
        model = _load(path, quantization_config=CiuicConfig(bits=asked, **policies[name]))
        stored = model.ciuic_report.bits_per_weight(LINEAR_ROLES)
        rows.append(_row(f"Ciuic, {asked:g} bits, {name}", stored, model, reference))
    return rows


def _load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def _row(name: str, bits: float, model: Any, reference: Any) -> QualityRow:
    quality = compare(reference, model)
    return QualityRow(name, bits, quality.kl, quality.perplexity, quality.top1_agreement, quality.tokens)


def table(rows: list[QualityRow]) -> Table:
    """KL also as a ratio to NF4, the second row."""
    nf4 = rows[1]
    shown = Table(title=f"SmolLM2 135M, {nf4.tokens} tokens of English technical prose", box=box.ROUNDED)
    for heading in ("weights", "bits", "KL", "KL vs NF4", "perplexity", "same top-1"):
        shown.add_column(heading, justify="left" if heading == "weights" else "right")
    for row in rows:
        shown.add_row(
            row.name, f"{row.bits_per_weight:.2f}", f"{row.kl:.4f}", f"{row.kl / nf4.kl:.2f}x",
            f"{row.perplexity:.2f}", f"{100 * row.top1_agreement:.1f} %",
        )  # fmt: skip
    return shown
