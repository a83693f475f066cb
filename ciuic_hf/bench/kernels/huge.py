"""The part of the gate that needs memory: parameters of over 2^31 bytes and results of over 2^31 elements.

There a 32-bit offset would wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ciuic_hf.bench.kernels.checks import wrong_product
from ciuic_hf.bench.kernels.gate import Failure
from ciuic_hf.bench.kernels.operands import Operand, activations, operand_of, random_packed
from ciuic_hf.planning.uniform import codec_ids
from ciuic_kernels import ops
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.packing import decode_strips
from ciuic_kernels.tolerances import exact_product, product_bound

MATRIX = (16448, 131200)
EXPERTS = (74, 4096, 7168)
TOKENS, ROUTED = 65_600, 8
"""Rows of x whose routed results are over 2^31 elements; so are all rows of MATRIX as a table."""

CODEC = "grid8_g64"


def needed_nbytes(shape: tuple[int, ...] = EXPERTS) -> int:
    """Device memory that the larger of the two takes, with room to work."""
    return int(1.25 * torch.Size(shape).numel()) + (7 << 30)


def check_huge(
    device: torch.device,
    dtype: torch.dtype,
    matrix: tuple[int, int] = MATRIX,
    experts: tuple[int, int, int] = EXPERTS,
    tokens: int = TOKENS,
) -> Iterator[Failure]:
    """Every operator on the first and last rows and experts of parameters of over 2^31 bytes."""
    for shape in (matrix, experts):
        operand = operand_of(random_packed(shape, codec_ids(shape[-2:], CODEC), device))
        name = f"{CODEC} of {operand.packed.nbytes / 2**31:.2f} x 2^31 bytes, {str(dtype).removeprefix('torch.')}"
        found = _experts(operand, dtype, tokens) if len(shape) == 3 else _matrix(operand, dtype)
        yield from (Failure(f"{at}, {name}", what) for at, what in found)
        del operand


def _band(operand: Operand, strips: range, which: int = 0) -> Tensor:
    """Some strips by the reference, float32."""
    arena, tags, offsets = operand.stored[:3]
    count = operand.packed.grid.strips
    own = tags.view(-1, *tags.shape[-3:])[which]
    return decode_strips(
        arena, own, offsets[which * count :], (operand.rows, operand.cols), strips, torch.float32
    )


def _columns(run: Callable[[], Tensor], place: slice) -> Tensor:
    return run()[:, place]


def _every_second_row(run: Callable[[], Tensor], first: int) -> Tensor:
    return run()[first::2]


def _row(out: Tensor, row: int) -> Tensor:
    return out[row][None]


def _matrix(operand: Operand, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    rows, cols, strips = operand.rows, operand.cols, operand.packed.grid.strips
    device = operand.packed.arena.device
    for tokens in (1, 40):
        x = activations(tokens, cols, dtype, device)
        run = partial(ops.linear, x, *operand.stored, None, rows, cols)
        for strip in (0, strips // 2, strips - 1):
            dense, place = (
                _band(operand, range(strip, strip + 1)),
                slice(strip * BLOCK_ROWS, (strip + 1) * BLOCK_ROWS),
            )
            bounds = exact_product(x, dense), product_bound(x, dense)
            for what in wrong_product(partial(_columns, run, place), *bounds, dtype):
                yield f"linear, {tokens} tokens, strip {strip}", what
    last = range(strips - 1, strips)
    if not torch.equal(operand.matrix().decode(last, dtype), _band(operand, last).to(dtype)):
        yield "dequantize, last strip", "values differ from the reference"
    table = ops.embedding(torch.arange(rows, device=device), *operand.stored, rows, cols, dtype)
    for strip in (0, strips - 1):
        band = _band(operand, range(strip, strip + 1)).to(dtype)
        if not torch.equal(table[strip * BLOCK_ROWS :][: band.shape[0]], band):
            yield f"embedding of all rows, strip {strip}", "rows differ from the reference"


def _experts(operand: Operand, dtype: torch.dtype, many: int) -> Iterator[tuple[str, str]]:
    grid = operand.packed.grid
    for tokens in (1, 40):
        ids = torch.tensor([[0, grid.matrices - 1]], device=operand.packed.arena.device).expand(tokens, 2)
        x = activations(tokens, grid.cols, dtype, ids.device)
        run = partial(ops.expert_linear, x, ids.contiguous(), *operand.stored, grid.rows, grid.cols)
        for place, expert in enumerate((0, grid.matrices - 1)):
            dense = _band(operand, range(grid.strips), expert)
            bounds = exact_product(x, dense), product_bound(x, dense)
            for what in wrong_product(partial(_every_second_row, run, place), *bounds, dtype):
                yield f"experts, {tokens} tokens, expert {expert}", what
    x = activations(many, grid.cols, dtype, operand.packed.arena.device)
    drawn = torch.arange(many * ROUTED, device=x.device) * 7 % grid.matrices
    out = ops.expert_linear(x, drawn.view(many, ROUTED), *operand.stored, grid.rows, grid.cols)
    for pair in (0, many * ROUTED - 1):
        row, dense = x[pair // ROUTED][None], _band(operand, range(grid.strips), int(drawn[pair]))
        bounds = exact_product(row, dense), product_bound(row, dense)
        for what in wrong_product(partial(_row, out, pair), *bounds, dtype):
            yield f"experts, {many} tokens x {ROUTED}, pair {pair}", what
