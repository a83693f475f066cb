"""What is derived from a compressed parameter at load, passed to its operators, and never saved."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ciuic_kernels.device import device_facts
from ciuic_kernels.dispatch import use_triton
from ciuic_kernels.format import BlockGrid
from ciuic_kernels.layout import strip_offsets
from ciuic_kernels.work import build_work, item_nbytes


class Derived(NamedTuple):
    """Arguments of every operator on a compressed parameter, after its arena and tags.

    Attributes:
        offsets: int64 ``[matrices * strips + 1]``, byte offset of every strip in the arena, its size last.
        work: int32 table that the GPU kernels follow (``work.py``); empty where they do not run.
        kinds: the kinds of its items.
    """

    offsets: Tensor
    work: Tensor
    kinds: list[int]


def derive(tags: Tensor, grid: BlockGrid, nbytes: int) -> Derived:
    """Check tags uint8 ``[..., strips, kblocks, 2]`` against an arena of ``nbytes`` and derive what operators need.

    Raises:
        FormatError: when they do not describe that arena. Nothing that passes lets a kernel read outside it.
    """
    offsets = strip_offsets(tags, grid, nbytes)
    if not use_triton(tags.device):
        return Derived(offsets, torch.empty(0, dtype=torch.int32, device=tags.device), [])
    target = item_nbytes(nbytes, grid.matrices, device_facts(tags.device).processors)
    return Derived(offsets, *build_work(tags, grid, target))
