"""Which codec each block of a single matrix gets, when its weights are at hand and a number of bytes is given.

Like the uniform plan of a model (``planning/uniform.py``) this mixes two neighbouring codecs, but it may look at the
weights: blocks of zeros cost nothing, and where not even two bits fit, the blocks that matter least are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_kernels import BlockGrid, codec_by_id, codec_by_name
from ciuic_kernels.codecs.grid import GRIDS, PLANES, GridCodec
from ciuic_kernels.codecs.sparse import CAPACITIES, CAPACITY_UNIT, sparse_codec_for
from ciuic_kernels.codecs.zero import ZERO
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS
from ciuic_kernels.layout import block_nbytes

GRID_LADDER = [codec.name for codec in sorted(GRIDS.values(), key=lambda c: c.bits)]
_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class BlockStatistics:
    """What the choice of codecs asks of a matrix ``[N, K]``.

    Attributes:
        nonzeros: int64 ``[strips, kblocks]`` on the CPU, weights that count as not zero.
        energy: float64 ``[strips, kblocks]`` on the CPU, sum of squares.
    """

    grid: BlockGrid
    nonzeros: Tensor
    energy: Tensor

    @property
    def sizes(self) -> Tensor:
        return block_sizes(self.grid)


def block_sizes(grid: BlockGrid) -> Tensor:
    """int64 ``[strips, kblocks]``: weights of each block of a matrix."""
    rows = torch.tensor([grid.strip_rows(strip) for strip in range(grid.strips)])
    cols = torch.tensor([grid.block_cols(kblock) for kblock in range(grid.kblocks)])
    return rows[:, None] * cols


def any_pruned(nonzeros: Tensor, grid: BlockGrid) -> bool:
    """Whether a sparse codec would hold any block, given the counts ``[..., strips, kblocks]``."""
    return bool((nonzeros * CAPACITY_UNIT <= block_sizes(grid) * max(CAPACITIES)).any())


def measure_blocks(matrix: Tensor, sparse_threshold: float = 0.0) -> BlockStatistics:
    """Count and sum every block of ``matrix [N, K]``, a band of strips at a time.

    Args:
        sparse_threshold: magnitudes up to this share of the largest one in their block count as zero.
    """
    grid = BlockGrid(tuple(matrix.shape))
    strips_at_once = max(1, _CHUNK_WEIGHTS // (grid.cols * BLOCK_ROWS))
    counts, energies = [], []
    for first in range(0, grid.strips, strips_at_once):
        band = matrix[first * BLOCK_ROWS : (first + strips_at_once) * BLOCK_ROWS].float().abs()
        margins = (0, -grid.cols % BLOCK_COLS, 0, -band.shape[0] % BLOCK_ROWS)
        blocks = torch.nn.functional.pad(band, margins)
        blocks = blocks.unflatten(1, (-1, BLOCK_COLS)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
        floor = blocks.amax(dim=(2, 3), keepdim=True) * sparse_threshold
        counts.append((blocks > floor).sum(dim=(2, 3)).cpu())
        energies.append(blocks.double().square().sum(dim=(2, 3)).cpu())
    return BlockStatistics(grid, torch.cat(counts), torch.cat(energies))


def nonzeros_of(weight: Tensor) -> Tensor | None:
    """Weights of each block that are not zero, int32 ``[..., strips, kblocks]``; None where no block was pruned.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``.
    """
    matrices = weight.flatten(0, -3) if weight.dim() > 2 else weight[None]
    counts = torch.stack([measure_blocks(matrix).nonzeros.to(torch.int32) for matrix in matrices])
    grid = BlockGrid(tuple(weight.shape))
    return counts.view(grid.tags_shape[:-1]) if any_pruned(counts, grid) else None


def filled(nonzeros: Tensor, grid: BlockGrid, name: str) -> Tensor:
    """One codec for all blocks of a matrix that need it: uint8 ``[strips, kblocks]``.

    Blocks without weights get ``zero``, and blocks with few the sparse codec of the same width that holds them all,
    where it is smaller (8 bits in place of raw codecs).
    """
    codec = codec_by_name(name)
    ids = torch.full(tuple(nonzeros.shape), codec.id, dtype=torch.uint8)
    width = codec.width if isinstance(codec, GridCodec) else max(PLANES)
    few = nonzeros * CAPACITY_UNIT <= block_sizes(grid) * max(CAPACITIES)
    for strip, kblock in few.nonzero().tolist():
        rows, cols = grid.strip_rows(strip), grid.block_cols(kblock)
        sparse = sparse_codec_for(int(nonzeros[strip, kblock]), rows, cols, width)
        if sparse and sparse.record_nbytes(rows, cols) < codec.record_nbytes(rows, cols):
            ids[strip, kblock] = sparse.id
    ids[nonzeros == 0] = ZERO.id
    return ids


def within_budget(statistics: BlockStatistics, budget: int, raw: str) -> Tensor:
    """The most accurate codecs whose records and tags take at most ``budget`` bytes.

    Args:
        raw: the codec above the 8-bit grids, ``raw_fp16`` or ``raw_bf16``.

    Returns:
        uint8 ``[strips, kblocks]``; all ``zero`` when nothing else fits.
    """
    grid = statistics.grid
    budget -= grid.tags_nbytes
    rungs = [filled(statistics.nonzeros, grid, name) for name in (ZERO.name, *GRID_LADDER, raw)]
    sizes = [block_nbytes(ids, grid)[0] for ids in rungs]
    best = max(i for i, nbytes in enumerate(sizes) if i == 0 or int(nbytes.sum()) <= budget)
    if best == len(rungs) - 1:
        return rungs[best]
    extra, left = sizes[best + 1] - sizes[best], budget - int(sizes[best].sum())
    upgrade = _by_energy(extra, left, statistics.energy) if best == 0 else _evenly(extra, left)
    return torch.where(upgrade, rungs[best + 1], rungs[best])


def _evenly(extra: Tensor, budget: int) -> Tensor:
    """bool ``[strips, kblocks]``: blocks to upgrade, spread over the matrix, that cost at most ``budget``."""
    running = extra.flatten().double().cumsum(0)
    due = (running / running[-1].clamp_min(1) * budget).long()  # what may have been spent by each block
    chosen, spent = [], 0
    for cost, allowed in zip(extra.flatten().tolist(), due.tolist(), strict=True):
        take = spent + cost <= min(allowed, budget)
        spent += cost if take else 0
        chosen.append(take)
    return torch.tensor(chosen).view_as(extra)


def _by_energy(extra: Tensor, budget: int, energy: Tensor) -> Tensor:
    """bool ``[strips, kblocks]``: the blocks of largest energy for each byte, that cost at most ``budget``."""
    costs = extra.flatten()
    order = (energy.flatten() / costs.clamp_min(1)).argsort(descending=True, stable=True)
    chosen = torch.zeros(costs.numel(), dtype=torch.bool)
    chosen[order] = costs[order].cumsum(0) <= budget
    return chosen.view_as(extra)


def codec_counts(tags: Tensor) -> dict[str, int]:
    """Codec name -> number of blocks of tags ``[..., 2]``; empty for tags that are offloaded."""
    if tags.device.type == "meta":
        return {}
    ids, counts = tags[..., 0].unique(return_counts=True)
    return {codec_by_id(i).name: n for i, n in zip(ids.tolist(), counts.tolist(), strict=True)}
