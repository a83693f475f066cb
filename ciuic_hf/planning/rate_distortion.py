"""The rate-distortion plan: which codec each block of many parameters gets, so that together they take some bytes.

What a block costs is its sensitivity times the relative error of its codec; :mod:`ciuic_hf.planning.allocate`
minimises the sum. Sizes follow from shapes and sensitivities alone, so a plan is ready before a weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.allocate import Units, allocate
from ciuic_hf.planning.distortion import MENU, relative_errors
from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.format import aligned


@dataclass(frozen=True)
class Weighed:
    """One parameter and how much its blocks matter.

    Attributes:
        shape: ``(N, K)`` or ``(E, N, K)``.
        sensitivity: of the whole parameter, spread over its weights; or of each block, float32
            ``[strips, kblocks]`` or ``[E, strips, kblocks]``. See :mod:`ciuic_hf.planning.sensitivity`.
    """

    name: str
    shape: tuple[int, ...]
    sensitivity: float | Tensor

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(self.shape)


@dataclass(frozen=True)
class Chosen:
    """The codecs of one parameter, as runs: ``codec[upgraded[i]]`` ... see :func:`codec_ids_of`.

    Attributes:
        low, high: int64 ``[U]``, codec ids of each group of blocks.
        upgraded: int64 ``[U]``, how many blocks of the group take ``high``.
    """

    low: Tensor
    high: Tensor
    upgraded: Tensor


@dataclass(frozen=True)
class RateDistortionPlan:
    """A plan for some parameters.

    Attributes:
        chosen: parameter name -> its codecs.
        nbytes: arenas and tags together, at most the budget.
        error: predicted KL in nats per token, if the sensitivities were measured; else a relative number.
    """

    chosen: dict[str, Chosen]
    nbytes: int
    error: float


def plan_blocks(parameters: Sequence[Weighed], budget: int) -> RateDistortionPlan:
    """Choose codecs for all blocks of some parameters within ``budget`` bytes, tags included.

    Raises:
        CiuicError: when not even the smallest codecs fit.
    """
    tags = sum(p.grid.tags_nbytes for p in parameters)
    weights = sum(p.grid.numel for p in parameters)
    units, spans = _units(parameters)
    smallest = units.smallest_nbytes() + tags
    if smallest > budget:
        raise CiuicError(
            f"{len(parameters)} weights are to be stored in {budget:,} bytes, {8 * budget / weights:.2f} bits each, "
            f"and need {smallest:,} ({8 * smallest / weights:.2f}) without dropping blocks; ask for more bits, or for "
            'policy="uniform", which drops some.'
        )
    found = allocate(units, budget - tags)
    ids = torch.tensor([codec_by_name(name).id for name in MENU])
    chosen = {
        p.name: Chosen(ids[found.low[span]], ids[found.high[span]], found.upgraded[span])
        for p, span in zip(parameters, spans, strict=True)
    }
    return RateDistortionPlan(chosen, found.nbytes + tags, found.error)


def codec_ids_of(parameter: Weighed, chosen: Chosen) -> Tensor:
    """uint8 ``[strips, kblocks]`` or ``[E, strips, kblocks]``. In a group the richer blocks are spread evenly."""
    grid = parameter.grid
    if isinstance(parameter.sensitivity, Tensor):
        return chosen.low.to(torch.uint8).view(grid.tags_shape[:-1])
    ids = torch.zeros(grid.matrices, grid.strips, grid.kblocks, dtype=torch.uint8)
    for i, (rows, cols) in enumerate(_areas(grid)):
        low, high, upgraded = (int(values[i]) for values in (chosen.low, chosen.high, chosen.upgraded))
        area = ids[:, rows, cols]
        if not upgraded:
            area.fill_(low)
            continue
        place = torch.arange(area.numel())
        richer = (place + 1) * upgraded // area.numel() > place * upgraded // area.numel()
        area.copy_(torch.where(richer, high, low).view(area.shape))
    return ids.view(grid.tags_shape[:-1])


def _areas(grid: BlockGrid) -> list[tuple[slice, slice]]:
    """Where the blocks of a matrix have one size: all of it, or apart its last strip and last blocks of columns."""
    strips, kblocks = grid.rows // 64, grid.cols // 128
    bands = [slice(0, strips), slice(strips, grid.strips)]
    panels = [slice(0, kblocks), slice(kblocks, grid.kblocks)]
    return [(b, p) for b in bands for p in panels if b.stop > b.start and p.stop > p.start]


@lru_cache(maxsize=1024)
def _record_nbytes(rows: int, cols: int) -> tuple[int, ...]:
    return tuple(aligned(codec_by_name(name).record_nbytes(rows, cols)) for name in MENU)


class _Kinds:
    """The sizes of blocks seen so far, numbered."""

    def __init__(self) -> None:
        self.sizes: dict[tuple[int, ...], int] = {}

    def of(self, rows: int, cols: int) -> int:
        return self.sizes.setdefault(_record_nbytes(rows, cols), len(self.sizes))


def _units(parameters: Sequence[Weighed]) -> tuple[Units, list[slice]]:
    """The allocator's units: blocks where each has its sensitivity, areas of equal blocks where they share one."""
    kinds, spans, end = _Kinds(), [], 0
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for parameter in parameters:
        sensitivity = parameter.sensitivity
        columns.append(
            _per_block(parameter.grid, sensitivity, kinds)
            if isinstance(sensitivity, Tensor)
            else _per_area(parameter.grid, sensitivity, kinds)
        )
        spans.append(slice(end, end + len(columns[-1][0])))
        end = spans[-1].stop
    kind, weight, count = (
        torch.cat([torch.empty(0, dtype=dtype), *(column[i] for column in columns)])
        for i, dtype in enumerate((torch.int64, torch.float64, torch.int64))
    )
    nbytes = torch.tensor(list(kinds.sizes), dtype=torch.int64).view(-1, len(MENU))
    errors = relative_errors()
    error = torch.tensor([errors[name] for name in MENU], dtype=torch.float64).expand(len(nbytes), -1)
    return Units(kind, weight, nbytes, error, count), spans


def _per_block(grid: BlockGrid, sensitivity: Tensor, kinds: _Kinds) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.zeros(grid.strips, grid.kblocks, dtype=torch.int64)
    for rows, cols in _areas(grid):
        kind[rows, cols] = kinds.of(grid.strip_rows(rows.start), grid.block_cols(cols.start))
    flat = sensitivity.reshape(-1).double()
    return kind.flatten().repeat(grid.matrices), flat, torch.ones(len(flat), dtype=torch.int64)


def _per_area(grid: BlockGrid, sensitivity: float, kinds: _Kinds) -> tuple[Tensor, Tensor, Tensor]:
    rows_of = []
    for rows, cols in _areas(grid):
        height, width = grid.strip_rows(rows.start), grid.block_cols(cols.start)
        blocks = (rows.stop - rows.start) * (cols.stop - cols.start) * grid.matrices
        rows_of.append((kinds.of(height, width), sensitivity * height * width / grid.numel, blocks))
    kind, weight, count = zip(*rows_of, strict=True)
    return torch.tensor(kind), torch.tensor(weight, dtype=torch.float64), torch.tensor(count)
