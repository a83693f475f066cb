"""The rate-distortion plan: which codec each block of many parameters gets, so that together they take some bytes.

What a block costs is its sensitivity times the relative error of its codec; :mod:`ciuic_hf.planning.allocate`
minimises the sum. Sizes follow from shapes and sensitivities alone, so a plan is ready before a weight is read.
Of weights that were pruned it also takes how many of each block are not zero (:mod:`ciuic_hf.planning.census`): such
blocks may become sparse ones, and blocks of zeros are dropped. No other block ever loses weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.allocate import Units, allocate
from ciuic_hf.planning.distortion import DENSE, MENU, menu_of, relative_errors
from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.codecs.sparse import CAPACITIES, CAPACITY_UNIT, WIDTHS
from ciuic_kernels.format import aligned

_COLUMNS = len(MENU) + len(WIDTHS)


@dataclass(frozen=True)
class Weighed:
    """One parameter and how much its blocks matter.

    Attributes:
        shape: ``(N, K)`` or ``(E, N, K)``.
        sensitivity: of the whole parameter, spread over its weights; or of each block, float32
            ``[strips, kblocks]`` or ``[E, strips, kblocks]``. See :mod:`ciuic_hf.planning.sensitivity`.
        nonzeros: int32 like the blocks, how many weights of each are not zero; None counts none as zero.
    """

    name: str
    shape: tuple[int, ...]
    sensitivity: float | Tensor
    nonzeros: Tensor | None = None

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
    units, spans, ids = _units(parameters)
    smallest = units.smallest_nbytes() + tags
    if smallest > budget:
        raise CiuicError(
            f"{len(parameters)} weights are to be stored in {budget:,} bytes, {8 * budget / weights:.2f} bits each, "
            f"and need {smallest:,} ({8 * smallest / weights:.2f}) without dropping blocks; ask for more bits, or for "
            'policy="uniform", which drops some.'
        )
    found = allocate(units, budget - tags)
    low, high = (ids[units.kind, column] for column in (found.low, found.high))
    chosen = {
        p.name: Chosen(low[span], high[span], found.upgraded[span])
        for p, span in zip(parameters, spans, strict=True)
    }
    return RateDistortionPlan(chosen, found.nbytes + tags, found.error)


def codec_ids_of(parameter: Weighed, chosen: Chosen) -> Tensor:
    """uint8 ``[strips, kblocks]`` or ``[E, strips, kblocks]``. In a group the richer blocks are spread evenly."""
    grid = parameter.grid
    if _by_block(parameter):
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


def _by_block(parameter: Weighed) -> bool:
    return parameter.nonzeros is not None or isinstance(parameter.sensitivity, Tensor)


@dataclass(frozen=True)
class _Kind:
    """What the codecs offer blocks of one size and density: ``_COLUMNS`` of each, the first repeated at the end."""

    ids: tuple[int, ...]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]


@lru_cache(maxsize=4096)
def _kind(rows: int, cols: int, nonzero: int) -> _Kind:
    menu = menu_of(nonzero)
    menu = menu + menu[:1] * (_COLUMNS - len(menu))
    errors = relative_errors(nonzero)
    codecs = [codec_by_name(name) for name in menu]
    return _Kind(
        tuple(c.id for c in codecs),
        tuple(aligned(c.record_nbytes(rows, cols)) for c in codecs),
        tuple(errors[name] for name in menu),
    )


class _Kinds:
    """The kinds seen so far, numbered."""

    def __init__(self) -> None:
        self.numbers: dict[_Kind, int] = {}

    def of(self, rows: int, cols: int, nonzero: int = DENSE) -> int:
        return self.numbers.setdefault(_kind(rows, cols, nonzero), len(self.numbers))

    def table(self, field: str, dtype: torch.dtype) -> Tensor:
        values = [getattr(kind, field) for kind in self.numbers]
        return torch.tensor(values, dtype=dtype).view(-1, _COLUMNS)


def _units(parameters: Sequence[Weighed]) -> tuple[Units, list[slice], Tensor]:
    """The allocator's units, which of them belong to each parameter, and the codec ids ``[S, C]`` of their columns.

    Units are blocks where each has its sensitivity or count, areas of equal blocks where they share one.
    """
    kinds, spans, end = _Kinds(), [], 0
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for parameter in parameters:
        columns.append((_per_block if _by_block(parameter) else _per_area)(parameter, kinds))
        spans.append(slice(end, end + len(columns[-1][0])))
        end = spans[-1].stop
    kind, weight, count = (
        torch.cat([torch.empty(0, dtype=dtype), *(column[i] for column in columns)])
        for i, dtype in enumerate((torch.int64, torch.float64, torch.int64))
    )
    units = Units(
        kind, weight, kinds.table("nbytes", torch.int64), kinds.table("errors", torch.float64), count
    )
    return units, spans, kinds.table("ids", torch.int64)


def _per_block(parameter: Weighed, kinds: _Kinds) -> tuple[Tensor, Tensor, Tensor]:
    grid, nonzeros = parameter.grid, parameter.nonzeros
    blocks = (grid.matrices, grid.strips, grid.kblocks)
    sizes = torch.zeros(blocks, dtype=torch.int64)
    for rows, cols in _areas(grid):
        sizes[:, rows, cols] = grid.strip_rows(rows.start) * grid.block_cols(cols.start)
    counts = sizes if nonzeros is None else nonzeros.reshape(blocks).long()
    nonzero = nonzero_32nds(counts, sizes)
    kind = torch.zeros(blocks, dtype=torch.int64)
    for rows, cols in _areas(grid):
        here, numbers = nonzero[:, rows, cols], torch.zeros(DENSE + 1, dtype=torch.int64)
        for n in here.unique().tolist():
            numbers[n] = kinds.of(grid.strip_rows(rows.start), grid.block_cols(cols.start), n)
        kind[:, rows, cols] = numbers[here]
    weight = parameter.sensitivity
    if not isinstance(weight, Tensor):
        weight = weight * counts.double() / counts.sum().clamp(min=1)
    flat = weight.reshape(-1).double()
    return kind.flatten(), flat, torch.ones(len(flat), dtype=torch.int64)


def nonzero_32nds(counts: Tensor, sizes: Tensor) -> Tensor:
    """The capacity that holds ``counts`` of ``sizes`` weights, 0 for none and ``DENSE`` where no sparse codec does.

    ``ceil(size D / 32) >= count`` is the same as ``D > 32 (count - 1) / size``.
    """
    capacity = CAPACITY_UNIT * (counts - 1).clamp(min=0) // sizes + 1
    capacity = torch.where(capacity > max(CAPACITIES), DENSE, capacity)
    return torch.where(counts == 0, 0, capacity)


def _per_area(parameter: Weighed, kinds: _Kinds) -> tuple[Tensor, Tensor, Tensor]:
    grid, sensitivity = parameter.grid, parameter.sensitivity
    assert isinstance(sensitivity, float | int)
    rows_of = []
    for rows, cols in _areas(grid):
        height, width = grid.strip_rows(rows.start), grid.block_cols(cols.start)
        blocks = (rows.stop - rows.start) * (cols.stop - cols.start) * grid.matrices
        rows_of.append((kinds.of(height, width), sensitivity * height * width / grid.numel, blocks))
    kind, weight, count = zip(*rows_of, strict=True)
    return torch.tensor(kind), torch.tensor(weight, dtype=torch.float64), torch.tensor(count)
