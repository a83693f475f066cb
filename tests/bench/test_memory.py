"""`ciuic bench memory`: the search, the rows, the table and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ciuic_hf.bench import memory
from ciuic_hf.bench.memory import MemoryRow, measure_memory, measure_row, table
from ciuic_hf.bench.memory_search import largest_measured, largest_within
from ciuic_hf.bench.memory_settings import BATCH, LENGTH, MODEL, Setting, settings
from ciuic_hf.bench.plot import draw_memory
from ciuic_hf.errors import CiuicError


class Silent:
    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, what: str, total: int | None) -> None:
        self.said.append(what)

    def step(self, what: str) -> None:
        self.said.append(what)


@given(
    fixed=st.integers(0, 1000),
    slope=st.integers(1, 60),
    bend=st.integers(0, 3),
    budget=st.integers(1, 4000),
    step=st.sampled_from([1, 3]),
)
def test_the_search_ends_beside_what_does_not_fit(
    fixed: int, slope: int, bend: int, budget: int, step: int
) -> None:
    calls: list[int] = []

    def measure(size: int) -> int:
        calls.append(size)
        return fixed + slope * size + bend * size * size // 8

    seen = largest_within(measure, budget, start=4, step=step, cap=40, runs=40)
    fits = [size for size in range(4, 41, step) if measure(size) <= budget]
    assert largest_measured(seen, budget) == (max(fits) if fits else None)
    assert all((size - 4) % step == 0 and 4 <= size <= 40 for size in seen)


@given(slope=st.floats(0.1, 50), fixed=st.floats(0, 500))
def test_a_line_takes_four_runs(slope: float, fixed: float) -> None:
    calls: list[int] = []

    def measure(size: int) -> int:
        calls.append(size)
        return round(1000 * (fixed + slope * size))

    budget = round(1000 * (fixed + slope * 17.5))
    seen = largest_within(measure, budget, start=4, step=1, cap=32)
    assert largest_measured(seen, budget) == 17 and len(calls) == len(set(calls)) <= 4


def test_noise_and_a_budget_of_runs_never_give_a_size_that_was_not_measured() -> None:
    peaks = iter([100, 99, 180, 101, 120])
    seen = largest_within(lambda _: next(peaks), 110, start=4, step=1, cap=1000, runs=5)
    largest = largest_measured(seen, 110)
    assert largest is not None and seen[largest] <= 110 and len(seen) <= 5


def _rows() -> list[MemoryRow]:
    """Peaks of a formula: weights, and bytes a token that each piece makes fewer."""
    rows: list[MemoryRow] = []
    budget: dict[str, int] = {}
    for setting in settings():

        def peak(batch: int, length: int, of: Setting = setting) -> int:
            weights = 10 if of.weight_bits else 40
            share = 1 + (of.activation_bits or 16)
            return 2**20 * weights + batch * length * share * 512

        rows.append(measure_row(setting, peak, budget.get(setting.work)))
        budget.setdefault(setting.work, rows[-1].budget_nbytes)
    return rows


def test_rows_fit_the_budget_of_the_plain_one_and_are_shown() -> None:
    rows = _rows()
    assert all(row.batch is not None and row.batches[row.batch] <= row.budget_nbytes for row in rows)
    train = [row for row in rows if row.setting.work == "train"]
    assert train[0].batch == BATCH and train[0].length == LENGTH and 4 * BATCH in train[0].batches
    assert [row.batch for row in train] == sorted(row.batch or 0 for row in train)
    console = Console(width=160, record=True)
    console.print(table(rows, "train"))
    shown = console.export_text()
    assert "in 57.0 MiB" in shown and "+ activations at 4 bits" in shown
    assert f" {train[-1].batch} " in shown
    assert json.loads(json.dumps([row.to_dict() for row in rows]))[3]["batch"] == train[-1].batch


def test_what_does_not_fit_is_said() -> None:
    row = measure_row(Setting("big", "train"), lambda batch, length: batch * length, 100)
    assert row.batch is None and row.length is None
    console = Console(width=160, record=True)
    console.print(table([*_rows(), row], "train"))
    assert console.export_text().count("does not fit") == 2


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_memory(tmp_path / "memory.png", _rows())
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_without_peft_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CiuicError, match="PEFT: pip install"):
        measure_memory(tmp_path, Silent())
    assert not list(tmp_path.iterdir())


def test_keys_are_as_wide_as_values() -> None:
    """Else torch's attention forms scores on a CPU, and sequences grow with the square."""
    assert MODEL["qk_nope_head_dim"] + MODEL["qk_rope_head_dim"] == MODEL["v_head_dim"]
