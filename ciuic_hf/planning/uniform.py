"""The uniform plan: every block of a matrix at the same rate, as near to the asked bits as whole blocks allow.

Two neighbouring codecs are mixed so that payload, scales, tags and padding together stay within the budget and
miss it by less than one block. The blocks of the richer codec are spread evenly over the matrix. No data is
looked at, so sizes are known before a file is opened.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ciuic_hf.config import Setting
from ciuic_hf.errors import CiuicError
from ciuic_kernels import BlockGrid, all_codecs, codec_by_name
from ciuic_kernels.codecs.sparse import SparseCodec
from ciuic_kernels.layout import block_nbytes

LADDER = [
    codec.name
    for codec in sorted(all_codecs(), key=lambda c: c.bits)
    if codec.name != "raw_fp16" and not isinstance(codec, SparseCodec)
]
"""The codecs that are mixed, by rate. raw_fp16 and sparse codecs, which drop weights, are for those who name them."""


@lru_cache(maxsize=1024)  # the layers of a model repeat a few shapes
def codec_ids(shape: tuple[int, ...], setting: Setting) -> Tensor:
    """The codec of every block of one matrix.

    Args:
        shape: ``(N, K)``.
        setting: bits per weight, everything counted, or the name of a codec for all blocks.

    Returns:
        uint8 ``[strips, kblocks]``, shared between calls: do not write to it.

    Raises:
        CiuicError: when not even the tags fit the bits (matrices of a few weights).
    """
    grid = BlockGrid(shape)
    if isinstance(setting, str):
        return _filled(grid, setting)
    budget = int(setting * grid.numel / 8) - grid.tags_nbytes
    if budget < 0:
        raise CiuicError(
            f"A weight of shape {list(shape)} cannot be stored in {setting} bits per weight, its tags alone need "
            f'{8 * grid.tags_nbytes / grid.numel:.1f}; set it to "raw" in modules.'
        )
    sizes = {name: block_nbytes(_filled(grid, name), grid)[0] for name in LADDER}
    fitting = [name for name in LADDER if int(sizes[name].sum()) <= budget]
    low = max(fitting, key=lambda name: (int(sizes[name].sum()), LADDER.index(name)))
    richer = LADDER[LADDER.index(low) + 1 :]
    if not richer:
        return _filled(grid, low)
    high = richer[0]
    upgrade = _spread(sizes[high] - sizes[low], budget - int(sizes[low].sum()))
    ids = _filled(grid, low)
    ids[upgrade] = codec_by_name(high).id
    return ids


def _filled(grid: BlockGrid, name: str) -> Tensor:
    return torch.full((grid.strips, grid.kblocks), codec_by_name(name).id, dtype=torch.uint8)


def _spread(cost: Tensor, budget: int) -> Tensor:
    """Which blocks to upgrade: evenly spread, total cost at most ``budget`` and less than one block under it.

    Args:
        cost: int64 ``[strips, kblocks]``, extra bytes of each block.
    """
    flat = cost.flatten().tolist()
    total, spent, passed, chosen = sum(flat), 0, 0, []
    for extra in flat:
        passed += extra
        take = spent + extra <= budget * passed // max(1, total)
        spent += extra if take else 0
        chosen.append(take)
    return torch.tensor(chosen).view_as(cost)
