"""``MemoryCalculator``: the highest fidelity that fits, and an error with numbers where none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.compressor.compressor import CiuicCompressor
from ciuic_hf.errors import CiuicError
from ciuic_hf.memory_calculator import COMPRESSION_LEVELS, MemoryCalculator


@given(
    total=st.integers(0, 10**12),
    used=st.floats(0, 1),
    size=st.integers(0, 10**12),
    levels=st.sets(st.floats(0.01, 1.0), min_size=1),
)
def test_the_largest_level_that_fits(total: int, used: float, size: int, levels: set[float]) -> None:
    calculator = MemoryCalculator(total, levels)
    calculator.update_usage(int(total * used))
    assert calculator.used_mem + calculator.free_mem == total
    fitting = [level for level in levels if size * level <= calculator.free_mem]
    if fitting:
        assert calculator.get_optimal_level(size) == max(fitting)
    else:
        with pytest.raises(CiuicError, match="lowest level"):
            calculator.get_optimal_level(size)


def test_levels_by_hand() -> None:
    calculator = MemoryCalculator(1000)
    assert calculator.compression_levels == list(COMPRESSION_LEVELS)
    assert calculator.get_optimal_level(1000) == 1.0
    assert calculator.get_optimal_level(1001) == 0.7
    calculator.update_usage(900)
    assert calculator.get_optimal_level(1000) == 0.1
    with pytest.raises(CiuicError, match=r"1001 B needs 101 B .* 100 B of 1000 B are free; free 1 B more"):
        calculator.get_optimal_level(1001)
    calculator.update_usage(-900)
    assert calculator.used_mem == 0 and "0 B of 1000 B" in repr(calculator)


def test_levels_are_ratios_of_the_compressor() -> None:
    calculator, tensor, levels = MemoryCalculator(500_000), torch.randn(256, 256), []
    with pytest.raises(CiuicError, match="lowest level"):
        while True:
            levels.append(calculator.get_optimal_level(tensor.nbytes))
            calculator.update_usage(CiuicCompressor(levels[-1]).compress_tensor(tensor).nbytes)
    assert levels == [1.0, 0.7, 0.3, 0.1]
    assert 0 <= calculator.free_mem < 0.1 * tensor.nbytes


@pytest.mark.parametrize("total", [-1, 1.5, True, "1GiB", None])
def test_bad_totals(total: Any) -> None:
    with pytest.raises(CiuicError, match="whole number of bytes"):
        MemoryCalculator(total)


@pytest.mark.parametrize("levels", [[], [0.0], [1.1], [float("nan")]])
def test_bad_levels(levels: Any) -> None:
    with pytest.raises(CiuicError, match="compression_levels"):
        MemoryCalculator(10, levels)


@pytest.mark.parametrize("change", [11, -1, 0.5, True])
def test_bad_usage_counts_nothing(change: Any) -> None:
    calculator = MemoryCalculator(10)
    with pytest.raises(CiuicError):
        calculator.update_usage(change)
    assert calculator.used_mem == 0


def test_following_the_cpu() -> None:
    calculator = MemoryCalculator.from_device("cpu")
    assert calculator.is_live and 0 < calculator.free_mem <= calculator.total_mem
    assert calculator.get_optimal_level(1000) == 1.0
    with pytest.raises(CiuicError, match="follows a device"):
        calculator.update_usage(1)
    with pytest.raises(CiuicError, match="meta cannot be asked"):
        MemoryCalculator.from_device("meta")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_following_a_gpu() -> None:
    calculator = MemoryCalculator.from_device()
    before = calculator.free_mem
    held = torch.ones(64 << 20, device="cuda")
    assert before - calculator.free_mem >= 256 << 20
    del held  # stays reserved by torch, which would use it for the next tensor
    assert calculator.free_mem >= before - (16 << 20)
    assert calculator.get_optimal_level(calculator.total_mem * 2) <= 0.5


def test_a_limit_of_a_container_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 50\n")
    monkeypatch.setattr("ciuic_hf.memory._CGROUP", tmp_path)
    calculator = MemoryCalculator.from_device("cpu")
    assert (calculator.total_mem, calculator.free_mem) == (1000, 600)
    (tmp_path / "memory.max").write_text("max\n")
    assert calculator.total_mem > 1 << 20
