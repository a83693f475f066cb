"""Quality against bits on a trained model, beside the formats of others on the same text.

Reference: the bf16 weights computed in float32. Candidates are computed in float32 as well, so that only the weights
differ. Every Linear and expert is compressed. Embeddings and lm_head are untouched for peers; for Ciuic they are at 8
bits as in any load, or untouched too, which is the comparison on equal terms at 6 bits and more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
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
from ciuic_hf.bench.smollm2 import materialize, materialize_dithered
from ciuic_hf.config import LINEAR_ROLES, RAW
from ciuic_hf.demo import bf16_path, heldout_text
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.config import CiuicConfig

TITLES = {
    "smollm2": "SmolLM2 135M, English technical prose",
    "dithered": "SmolLM2 135M off its grid, English technical prose",
    "demo": "the demo's DeepSeek-V3 4 M, held-out verses",
}
DENSE, OURS, YARDSTICK = "bf16", "Ciuic", "NF4"
UNTOUCHED = "*"
"""Ends the names of Ciuic's rows in which embeddings and lm_head are untouched."""
_WINDOWS = {"smollm2": 512, "dithered": 512, "demo": 256}
_PATHS: dict[str, Callable[[Path], Path]] = {
    "smollm2": lambda cache: materialize(cache / "smollm2"),
    "dithered": lambda cache: materialize_dithered(cache / "smollm2", cache / "smollm2-dithered"),
    "demo": lambda _cache: bf16_path(),
}


@dataclass(frozen=True)
class Comparison:
    """What is measured.

    Attributes:
        cache: directory of the models.
        bits: of Ciuic's rows.
        tokens: of the text.
        model: a key of ``TITLES``.
        sensitivity, calibration: measurements of the model, for rows of their own.
        raw_tables: embeddings and lm_head are untouched in Ciuic's rows too.
        only: parts of the names of rows; none measures all. The reference is always measured.
    """

    cache: Path
    bits: Sequence[float]
    tokens: int
    model: str = "smollm2"
    sensitivity: Path | None = None
    calibration: Path | None = None
    raw_tables: bool = False
    only: Sequence[str] = ()

    def wants(self, name: str) -> bool:
        """Whether a row is among those asked for."""
        return not self.only or any(part in name for part in self.only)

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """Policy, as rows call it -> options of CiuicConfig."""
        found: dict[str, dict[str, Any]] = {"uniform": {"policy": "uniform"}, "by kind": {}}
        if self.sensitivity is not None:
            found["measured"] = {"sensitivity": self.sensitivity}
        if self.calibration is not None:
            found["calibrated"] = {"calibration": self.calibration}
        return found


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


def measure_quality(wanted: Comparison) -> list[QualityRow]:
    """The reference, every peer, and Ciuic at each of the bits by every policy."""
    logging.disable_progress_bar()
    path = _PATHS[wanted.model](wanted.cache)
    dense = _load(path)
    ids = _ids(path, wanted.tokens, wanted.model)
    reference = reference_logprobs(dense, ids, _WINDOWS[wanted.model])
    rows = [_row(DENSE, DENSE, 16.0, dense, reference)]
    original = {name: parameter.detach().clone() for name, parameter in matrices(dense).items()}
    peers = [peer for peer in PEERS if wanted.wants(peer.name)]
    for peer in track(peers, description="Peers", transient=True):
        replace_weights(dense, peer, original)
        rows.append(_row(peer.family, peer.name, peer.bits, dense, reference))
    del dense, original
    tables = UNTOUCHED if wanted.raw_tables else ""
    modules = {"embeddings": RAW, "lm_head": RAW} if wanted.raw_tables else {}
    labels = {f"{OURS} {b:g}, {p}{tables}": (b, p) for b in wanted.bits for p in wanted.policies}
    labels = {label: what for label, what in labels.items() if wanted.wants(label)}
    for label, (bits, policy) in track(labels.items(), description="Ciuic", transient=True):
        config = CiuicConfig(bits=bits, modules=modules, **wanted.policies[policy])
        candidate = _load(path, quantization_config=config)
        report = candidate.ciuic_report
        stored = report.bits_per_weight((*LINEAR_ROLES, "experts"))
        family = f"{OURS}, {policy}{tables}"
        rows.append(_row(family, label, stored, candidate, reference, report.seconds))
    return rows


def merged(rows: Sequence[QualityRow], file: Path) -> list[QualityRow]:
    """These rows and those of an earlier run with other names; a file that is not there has none.

    Raises:
        CiuicError: when the file holds something else, or rows of another model or text.
    """
    if not file.exists():
        return list(rows)
    try:
        before = [QualityRow(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        raise CiuicError(
            f"{file} holds no rows of `ciuic bench quality` to add to; name another file."
        ) from None
    here, there = ([r for r in some if r.family == DENSE] for some in (rows, before))
    same = [(r.tokens, round(r.perplexity, 2)) for r in here] == [
        (r.tokens, round(r.perplexity, 2)) for r in there
    ]
    if not same:
        raise CiuicError(f"{file} holds rows of another model or text; name another file.")
    names = {row.name for row in rows}
    return [row for row in before if row.name not in names] + list(rows)


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
    nf4 = next((row.kl for row in rows if row.family == YARDSTICK), math.nan)
    shown = Table(
        title=f"{TITLES[model]}, {dense.tokens} tokens",
        caption="vs NF4: KL. top-1: same as bf16. lost: of the next tokens that bf16 gets right, "
        f"{100 * dense.accuracy:.1f} %. {UNTOUCHED}: embeddings and lm_head untouched, as for the others; else 8 bits",
        caption_justify="left",
        box=box.ROUNDED,
    )
    for heading in ("weights", "bits", "KL", "vs NF4", "ppl", "top-1", "lost"):
        shown.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda r: (-round(r.bits_per_weight, 1), r.family.startswith(OURS), r.kl)):
        shown.add_row(
            row.name, f"{row.bits_per_weight:.2f}", f"{row.kl:.4f}", _ratio(row.kl, nf4),
            f"{row.perplexity:.{2 if row.perplexity < 1000 else 0}f}", f"{100 * row.top1_agreement:.1f} %",
            f"{100 * (1 - row.accuracy / dense.accuracy):.1f} %",
        )  # fmt: skip
    return shown


def _ratio(kl: float, yardstick: float) -> str:
    return "-" if math.isnan(yardstick) else f"{kl / yardstick:.2f}x"


def families(rows: Sequence[QualityRow]) -> dict[str, list[tuple[float, float]]]:
    """Family -> (bits per weight, KL) by rising bits, for plots; without the reference."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: r.bits_per_weight):
        if row.family != DENSE:
            found.setdefault(row.family, []).append((row.bits_per_weight, row.kl))
    return found
