"""What all launchers share: launch settings, and whether kernels are interpreted."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ciuic_kernels.format import ceil_div
from ciuic_kernels.work import WorkShape


@dataclass(frozen=True)
class Launch:
    """How a product kernel is launched.

    Attributes:
        block_m: tokens of a tile, a power of two, 8 at least.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline; two of its stages follow the work table.
        programs: how many programs a launch should have; strips are cut into parts to get there.
    """

    block_m: int
    num_warps: int
    num_stages: int
    programs: int

    def parts(self, shape: WorkShape, matrices: int) -> int:
        """Programs for each strip, when ``matrices`` matrices are multiplied at once; never more than its items."""
        items_of_strip = ceil_div(shape.items, shape.strips)
        return max(1, min(items_of_strip, ceil_div(self.programs, shape.strips * max(1, matrices))))


def interpreted() -> bool:
    """Whether Triton interprets its kernels (TRITON_INTERPRET=1), where PTX is not to be had."""
    return bool(triton.knobs.runtime.interpret)
