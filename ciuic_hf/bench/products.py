"""One matrix on the CPU by rows of x: the fused product, decode-then-GEMM, and bf16, on one thread in turn.

This is what ``NATIVE_ROWS`` in ``ciuic_kernels.ops._products`` is chosen from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich import box
from rich.progress import track
from rich.table import Table

from ciuic_hf.bench.machine import machine_name
from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.cpu import native
from ciuic_kernels.derived import derive
from ciuic_kernels.ops._products import Matrix, dense_product, fused_product
from ciuic_kernels.packing import encode_tensor

SHAPES = ((1536, 576), (4096, 1024), (4096, 7168))
ROWS = (1, 2, 4, 8, 10, 12, 16, 32)


@dataclass
class ProductRow:
    """Medians in microseconds of thread time for ``x [rows, K] @ W [N, K].T``."""

    shape: tuple[int, int]
    codec: str
    rows: int
    bf16: float
    fused: float
    decode_then_gemm: float
    machine: str


def measure_products(codec: str, repeats: int) -> list[ProductRow]:
    """Every shape and number of rows with one codec."""
    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for shape in track(SHAPES, description="Multiplying", transient=True):
            results += _measure_shape(shape, codec, repeats)
    finally:
        torch.set_num_threads(threads)
    return results


def _measure_shape(shape: tuple[int, int], codec: str, repeats: int) -> list[ProductRow]:
    grid = BlockGrid(shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids = torch.full((grid.strips, grid.kblocks), codec_by_name(codec).id, dtype=torch.uint8)
    packed = encode_tensor(weight, ids)
    derived = derive(packed.tags, grid, packed.arena.numel())
    matrix = Matrix(packed.arena, packed.tags, *derived, *shape)
    rows = []
    for count in ROWS:
        x = torch.randn(count, shape[1]).to(torch.bfloat16)
        works = (
            partial(torch.nn.functional.linear, x, weight),
            partial(fused_product, x, 1, native.groups_of_all(count), matrix),
            partial(dense_product, x, matrix),
        )
        bf16, fused, dense = _interleave(works, repeats)
        rows.append(ProductRow(shape, codec, count, bf16, fused, dense, machine_name()))
    return rows


def _interleave(works: tuple[Callable[[], object], ...], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, seconds in zip(works, times, strict=True):
            start = time.thread_time()
            work()
            seconds.append(time.thread_time() - start)
    return [1e6 * statistics.median(seconds[1:]) for seconds in times]


def table(rows: list[ProductRow]) -> Table:
    """Times in microseconds; speed-up of the faster of our two ways over bf16."""
    shown = Table(title=f"{rows[0].codec}, thread time in us\n{rows[0].machine}", box=box.ROUNDED)
    for heading in ("N x K", "rows", "bf16", "fused", "decode, GEMM", "best vs bf16"):
        shown.add_column(heading, justify="right")
    for row in rows:
        best = row.bf16 / min(row.fused, row.decode_then_gemm)
        times = (f"{row.bf16:.0f}", f"{row.fused:.0f}", f"{row.decode_then_gemm:.0f}")
        shown.add_row(f"{row.shape[0]} x {row.shape[1]}", str(row.rows), *times, f"{best:.2f}x")
    return shown
