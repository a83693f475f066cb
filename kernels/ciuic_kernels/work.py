"""The work table of a compressed parameter: what the GPU kernels follow, derived at load and never saved.

The kernels read the arena of the checkpoint as it is; nothing is rearranged. They need to know where each block
lies, and which blocks to give to one program. One int32 tensor holds both, so that it moves and is passed as one:

    blocks      [matrices, strips, kblocks, 2]   (offset / 16, codec | exponent << 8 | kblock << 16)
    items       [matrices, items, 3]             (kind, first block, number of blocks)
    strips      [matrices, strips, 2]            (first item, number of items) of each strip
    counters    [slots, strips]                  zero between launches

The blocks of a strip are sorted by *kind*: the codec id of a full block on a grid, ``ANY`` or ``ANY_SPARSE`` for all
others, which take a slower path. A *work item* is a run of neighbouring blocks of one strip and kind, so that it is one
loop without branches; items are cut to about the same number of bytes. Empty blocks (``zero``) are in no item. The
items of a strip are shared by as many programs as a launch wants; each leaves its partial sum, and the last to arrive,
which ``counters`` tells, adds them up in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ciuic_kernels.codec import codec_by_id
from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.codecs.raw16 import RAW_BF16, RAW_FP16
from ciuic_kernels.codecs.sparse import FIRST_ID, SPARSE
from ciuic_kernels.codecs.zero import ZERO
from ciuic_kernels.format import ALIGNMENT, BLOCK_COLS, BLOCK_ROWS, BlockGrid
from ciuic_kernels.layout import FormatError, block_nbytes

CODECS = {ZERO.id, RAW_BF16.id, RAW_FP16.id}
CODECS |= {grid.id for grid in GRIDS.values()} | {sparse.id for sparse in SPARSE.values()}
"""What ``triton/_any.py`` and ``triton/_blocks.py`` can read."""

ANY = 255
"""Kind of the blocks that only the general decoder reads: raw, or at an edge."""

ANY_SPARSE = 254
"""The same for sparse blocks, whose decoder needs more registers."""

LINEAR_SLOTS = 8
"""Rows of counters of a matrix: up to so many tiles of tokens, programs share strips."""

ROUTED_SLOTS = 64
"""Rows of counters of fused experts: up to so many routed rows, programs share strips."""

MAX_EXACT = 2
"""Up to so many grids a kernel is compiled for exactly those."""

MAX_KBLOCKS = 1 << 15
MIN_ITEM_BYTES = 8 << 10
MAX_ITEM_BYTES = 64 << 10


@dataclass(frozen=True)
class WorkShape:
    """Where the parts of a work table begin, in int32 elements; a pure function of sizes the host knows."""

    matrices: int
    strips: int
    kblocks: int
    items: int
    slots: int

    @classmethod
    def of(cls, work: Tensor, tags: Tensor) -> WorkShape:
        """The shape of a table, from its length and the shape of the tags."""
        strips, kblocks = tags.shape[-3], tags.shape[-2]
        matrices = tags.shape[0] if tags.dim() == 4 else 1
        rows = slots(routed=tags.dim() == 4)
        fixed = 2 * matrices * strips * (kblocks + 1) + rows * strips
        return cls(matrices, strips, kblocks, (work.numel() - fixed) // (3 * matrices), rows)

    @property
    def items_at(self) -> int:
        return 2 * self.matrices * self.strips * self.kblocks

    @property
    def strips_at(self) -> int:
        return self.items_at + 3 * self.matrices * self.items

    @property
    def counters_at(self) -> int:
        return self.strips_at + 2 * self.matrices * self.strips

    @property
    def numel(self) -> int:
        return self.counters_at + self.slots * self.strips


def slots(routed: bool) -> int:
    """Rows of counters of a matrix, or of fused experts."""
    return ROUTED_SLOTS if routed else LINEAR_SLOTS


def work_nbytes(grid: BlockGrid) -> int:
    """Bytes of a work table at most: as if every block were an item of its own."""
    strips = grid.matrices * grid.strips
    counters = slots(routed=len(grid.shape) == 3) * grid.strips
    return 4 * (strips * (2 * grid.kblocks + 2 + 3 * grid.kblocks) + counters)


@cache
def compiled_kinds(kinds: tuple[int, ...]) -> tuple[int, ...]:
    """The kinds that a product of such items is compiled for: the same for all matrices that mix more than two grids.

    Plans that choose each block by itself give nearly every matrix another set, and each set would be compiled.
    """
    grids = [kind for kind in kinds if kind < ANY_SPARSE]
    if len(grids) > MAX_EXACT:
        grids = sorted(codec.id for codec in GRIDS.values())
    return (*grids, *(kind for kind in kinds if kind >= ANY_SPARSE))


def item_nbytes(nbytes: int, matrices: int, processors: int) -> int:
    """Bytes of one work item: about eight items for each processor, counting eight matrices of fused experts.

    Args:
        nbytes: size of the arena.
        processors: streaming multiprocessors of the device.
    """
    active = nbytes * min(matrices, 8) // matrices
    return max(MIN_ITEM_BYTES, min(MAX_ITEM_BYTES, active // (8 * processors)))


def build_work(tags: Tensor, grid: BlockGrid, target: int) -> tuple[Tensor, list[int]]:
    """The work table of a parameter whose tags have been validated.

    Args:
        tags: uint8 ``[..., strips, kblocks, 2]``; the table is built on their device.
        target: bytes of records that one item should have.

    Returns:
        int32 work table, and the kinds of its items in ascending order.

    Raises:
        FormatError: for a parameter over 32 GiB or over four million columns, which int32 cannot address.
    """
    if grid.kblocks > MAX_KBLOCKS:
        raise FormatError(f"A matrix has {grid.cols} columns; GPU kernels take {MAX_KBLOCKS * BLOCK_COLS}.")
    nbytes = block_nbytes(tags[..., 0], grid)
    if int(nbytes.sum()) // ALIGNMENT >= 1 << 31:
        raise FormatError("A parameter of more than 32 GiB cannot be addressed by the GPU kernels; split it.")
    ids = tags[..., 0].reshape(grid.matrices * grid.strips, grid.kblocks).long()
    _check_known(ids)
    order, kinds = _sorted_by_kind(ids, grid)
    blocks = _blocks(tags, ids, nbytes, grid).gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    sizes = nbytes.view_as(ids).gather(1, order)
    items, ranges = _items(kinds, sizes, target, grid)
    rows = slots(routed=len(grid.shape) == 3)
    counters = torch.zeros(rows * grid.strips, dtype=torch.int32, device=tags.device)
    work = torch.cat([blocks.flatten(), items.flatten(), ranges.flatten(), counters])
    present = sorted(set(kinds.unique().tolist()) - {_LAST})
    return work, present


def _check_known(ids: Tensor) -> None:
    """Raises FormatError for a codec that no GPU kernel reads."""
    for codec_id in ids.unique().tolist():
        if codec_id not in CODECS:
            raise FormatError(
                f"There is no GPU kernel for blocks of {codec_by_id(codec_id).name}; "
                "set CIUIC_IMPL=reference, or choose another codec."
            )


_LAST = 256  # the kind of empty blocks while sorting


def _sorted_by_kind(ids: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Per strip, the order of blocks by kind, empty ones last: int64 ``[S, kblocks]`` positions and kinds."""
    table = torch.full((256,), ANY, dtype=torch.int64, device=ids.device)
    for codec in GRIDS.values():
        table[codec.id] = codec.id
    kinds = table[ids]
    by_strip = kinds.view(grid.matrices, grid.strips, grid.kblocks)
    if grid.rows % BLOCK_ROWS:
        by_strip[:, -1] = ANY
    if grid.cols % BLOCK_COLS:
        by_strip[:, :, -1] = ANY
    kinds[ids >= FIRST_ID] = ANY_SPARSE
    kinds[ids == ZERO.id] = _LAST
    kinds, order = kinds.sort(dim=1, stable=True)
    return order, kinds


def _blocks(tags: Tensor, ids: Tensor, nbytes: Tensor, grid: BlockGrid) -> Tensor:
    """int32 ``[S, kblocks, 2]`` in the order of the arena."""
    flat = nbytes.flatten()
    offsets = ((flat.cumsum(0) - flat) // ALIGNMENT).view_as(ids)
    exponents = tags[..., 1].reshape(ids.shape).long()
    kblocks = torch.arange(grid.kblocks, device=ids.device)
    return torch.stack([offsets, ids | exponents << 8 | kblocks << 16], dim=-1).to(torch.int32)


def _items(kinds: Tensor, sizes: Tensor, target: int, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Work items int32 ``[matrices, items, 3]`` and the range of each strip int32 ``[matrices, strips, 2]``."""
    strips, kblocks = kinds.shape
    starts = _item_starts(kinds, sizes, target)
    used = (kinds != _LAST).flatten()
    item = starts.flatten().cumsum(0) - 1
    strip, first = starts.nonzero(as_tuple=True)
    count = torch.bincount(item[used], minlength=strip.numel())
    rows = torch.stack([kinds[strip, first], strip * kblocks + first, count], dim=1)
    number = torch.bincount(strip, minlength=strips)
    of_matrix = number.view(grid.matrices, grid.strips)
    begin = of_matrix.cumsum(1) - of_matrix
    matrix = strip // grid.strips
    place = torch.arange(strip.numel(), device=kinds.device)
    place = place - (number.cumsum(0) - number)[matrix * grid.strips]
    items = torch.zeros(grid.matrices, int(of_matrix.sum(1).max()), 3, dtype=torch.int32, device=kinds.device)
    items[matrix, place] = rows.to(torch.int32)
    return items, torch.stack([begin, of_matrix], dim=-1).to(torch.int32)


def _item_starts(kinds: Tensor, sizes: Tensor, target: int) -> Tensor:
    """Where items begin, bool ``[S, kblocks]``: at each new kind, and every ``target`` bytes or so within it."""
    place = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
    new_kind = torch.ones_like(kinds, dtype=torch.bool)
    new_kind[:, 1:] = kinds[:, 1:] != kinds[:, :-1]
    run = new_kind.flatten().cumsum(0) - 1
    length = torch.bincount(run)[run].view_as(kinds)
    begin = torch.where(new_kind, place, 0).cummax(dim=1).values
    pieces = torch.minimum(((length * sizes + target // 2) // target).clamp_min(1), length)
    piece = (place - begin) * pieces // length
    starts = new_kind
    starts[:, 1:] |= piece[:, 1:] != piece[:, :-1]
    return starts & (kinds != _LAST)
