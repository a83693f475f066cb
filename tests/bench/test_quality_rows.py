"""`ciuic bench quality` some rows at a time, and the model whose weights lie on no grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ciuic_hf import CiuicError
from ciuic_hf.bench.quality_rows import Comparison, QualityRow, measure_quality, merged, table
from ciuic_hf.bench.smollm2 import Q4_1_GROUP, Q4_1_LEVELS, dither
from ciuic_hf.demo import bf16_path


def row(name: str, kl: float, perplexity: float = 10.0) -> QualityRow:
    return QualityRow(name, 4.0, kl, perplexity, 0.5, 64, name, 0.5)


def test_rows_are_added_to_those_of_the_same_model_and_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first = [row("bf16", 0.0), row("NF4", 0.2), row("Ciuic 4", 0.3)]
    assert merged(first, file) == first
    file.write_text(json.dumps([vars(r) for r in first]))
    again = [row("bf16", 0.0), row("Ciuic 4", 0.1)]
    assert [(r.name, r.kl) for r in merged(again, file)] == [("NF4", 0.2), ("bf16", 0.0), ("Ciuic 4", 0.1)]
    with pytest.raises(CiuicError, match="rows of another model or text"):
        merged([row("bf16", 0.0, perplexity=11.0)], file)
    file.write_text('{"a": 1}')
    with pytest.raises(CiuicError, match="no rows of `ciuic bench quality`"):
        merged(first, file)


def test_some_rows_alone_on_equal_terms(tmp_path: Path) -> None:
    """Names say when embeddings are untouched; then a model at 16 bits is the reference."""
    wanted = Comparison(tmp_path, [16], 64, "demo", raw_tables=True, only=["16, uniform"])
    rows = measure_quality(wanted)
    assert [r.name for r in rows] == ["bf16", "Ciuic 16, uniform*"]
    assert abs(rows[1].kl) < 1e-6 and abs(rows[0].kl) < 1e-6
    assert table(rows, "demo").row_count == 2
    assert bf16_path().is_dir() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 32), (5, 96)])
def test_dithered_weights_stay_in_their_interval_and_leave_the_grid(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(Q4_1_LEVELS, shape, generator=generator).view(-1, Q4_1_GROUP)
    codes[:, 0], codes[:, 1] = 0, Q4_1_LEVELS - 1
    steps = torch.rand(len(codes), 1, generator=generator)
    weight = (codes * steps - 1).view(shape)
    moved = dither(weight, 3)
    distance = ((moved - weight).view(-1, Q4_1_GROUP) / steps).abs()
    assert torch.equal(moved, dither(weight, 3)) and not torch.equal(moved, dither(weight, 4))
    assert 0.2 < float(distance.mean()) < 0.3 and float(distance.max()) <= 0.5001
