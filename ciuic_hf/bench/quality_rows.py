"""Quality against bits on a trained model, beside the formats of others on the same text.

Reference: the bf16 weights computed in float32. Candidates are computed in float32 as well, so that only the weights
differ. Every Linear and expert is compressed; embeddings and lm_head are at 8 bits for Ciuic and untouched for peers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from ciuic_hf.bench.peers.catalogue import PEERS, matrices, replace_weights
from ciuic_hf.bench.quality import ReferenceLogprobs, compare, reference_logprobs, text_ids
from ciuic_hf.bench.smollm2 import materialize
from ciuic_hf.config import LINEAR_ROLES
from ciuic_hf.demo import bf16_path, heldout_text
from ciuic_hf.hf.config import CiuicConfig

TITLES = {
    "smollm2": "SmolLM2 135M, English technical prose",
    "demo": "the demo's DeepSeek-V3 4 M, held-out verses",
}
DENSE, OURS, YARDSTICK = "bf16", "Ciuic", "NF4"
_WINDOWS = {"smollm2": 512, "demo": 256}


@dataclass
class QualityRow:
    """One candidate.

    Attributes:
        family: rows of one family are the same format at several bits.
        bits_per_weight: counts everything stored of Linears and experts.
        accuracy: how often the most probable token is the next one of the text.
        load_seconds: reading and encoding, of rows of Ciuic.
    """

    name: str
    bits_per_weight: float
    kl: float
    perplexity: float
    top1_agreement: float
    tokens: int
    family: str
    accuracy: float
    load_seconds: float | None = None


def measure_quality(
    cache: Path,
    bits: Iterable[float],
    tokens: int,
    sensitivity: Path | None = None,
    calibration: Path | None = None,
    model: str = "smollm2",
) -> list[QualityRow]:
    """The reference, every peer, and Ciuic at each of ``bits`` by every policy; more with measurements of the model.

    Args:
        model: a key of ``TITLES``.
    """
    policies: dict[str, dict[str, Any]] = {"uniform": {"policy": "uniform"}, "by kind": {}}
    if sensitivity is not None:
        policies["measured"] = {"sensitivity": sensitivity}
    if calibration is not None:
        policies["calibrated"] = {"calibration": calibration}
    logging.disable_progress_bar()
    path = bf16_path() if model == "demo" else materialize(cache / "smollm2")
    dense = _load(path)
    reference = reference_logprobs(dense, _ids(path, tokens, model), _WINDOWS[model])
    rows = [_row(DENSE, DENSE, 16.0, dense, reference)]
    original = {name: parameter.detach().clone() for name, parameter in matrices(dense).items()}
    for peer in track(PEERS, description="Peers", transient=True):
        replace_weights(dense, peer, original)
        rows.append(_row(peer.family, peer.name, peer.bits, dense, reference))
    del dense, original
    candidates = [(asked, name) for asked in bits for name in policies]
    for asked, name in track(candidates, description="Ciuic", transient=True):
        candidate = _load(path, quantization_config=CiuicConfig(bits=asked, **policies[name]))
        report = candidate.ciuic_report
        stored = report.bits_per_weight((*LINEAR_ROLES, "experts"))
        label = f"{OURS} {asked:g}, {name}"
        rows.append(_row(f"{OURS}, {name}", label, stored, candidate, reference, report.seconds))
    return rows


def _ids(path: Path, tokens: int, model: str) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(path)
    if model != "demo":
        return text_ids(tokenizer, tokens)
    found = tokenizer(heldout_text(), add_special_tokens=False, truncation=True, max_length=tokens)
    return torch.tensor([found["input_ids"]])


def _load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def _row(
    family: str,
    name: str,
    bits: float,
    model: Any,
    reference: ReferenceLogprobs,
    seconds: float | None = None,
) -> QualityRow:
    found = compare(reference, model)
    return QualityRow(
        name, bits, found.kl, found.perplexity, found.top1_agreement, found.tokens, family, found.accuracy,
        seconds,
    )  # fmt: skip


def table(rows: Sequence[QualityRow], model: str) -> Table:
    """KL also as a ratio to NF4, accuracy as what is lost of that of bf16; most bits first."""
    dense = next(row for row in rows if row.family == DENSE)
    nf4 = next(row for row in rows if row.family == YARDSTICK)
    shown = Table(
        title=f"{TITLES[model]}, {nf4.tokens} tokens",
        caption="vs NF4: KL. top-1: same as bf16. lost: of the next tokens that bf16 gets right, "
        f"{100 * dense.accuracy:.1f} %",
        caption_justify="left",
        box=box.ROUNDED,
    )
    for heading in ("weights", "bits", "KL", "vs NF4", "ppl", "top-1", "lost"):
        shown.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda r: (-round(r.bits_per_weight, 1), r.family.startswith(OURS), r.kl)):
        shown.add_row(
            row.name, f"{row.bits_per_weight:.2f}", f"{row.kl:.4f}", f"{row.kl / nf4.kl:.2f}x",
            f"{row.perplexity:.{2 if row.perplexity < 1000 else 0}f}", f"{100 * row.top1_agreement:.1f} %",
            f"{100 * (1 - row.accuracy / dense.accuracy):.1f} %",
        )  # fmt: skip
    return shown


def families(rows: Sequence[QualityRow]) -> dict[str, list[tuple[float, float]]]:
    """Family -> (bits per weight, KL) by rising bits, for plots; without the reference."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: r.bits_per_weight):
        if row.family != DENSE:
            found.setdefault(row.family, []).append((row.bits_per_weight, row.kl))
    return found
