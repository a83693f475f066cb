"""``rounding.c`` on tensors: rounding by inputs of the grid blocks in one column of blocks."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from torch import Tensor

from ciuic_kernels.codecs.grid import GRIDS, HEADROOM
from ciuic_kernels.cpu import native

CODECS = {grid.id for grid in GRIDS.values()}  # what rounding.c has code for


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    library, _ = native.build_library("rounding.c")
    if library is None:
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.ciuic_round_grids.argtypes = (p, n, n, n, p, p, n, p, i, p, p)
    library.ciuic_round_grids.restype = None
    return library


def available() -> bool:
    return _load() is not None


def round_grids(panel: Tensor, tags: Tensor, starts: Tensor, upper: Tensor, arena: Tensor) -> None:
    """Write records and exponents of the blocks in CODECS; their weights in ``panel`` become errors ``e``.

    Args:
        panel: float32 ``[rows, cols]``, at most 128 columns, the last dimension contiguous.
        tags: uint8 ``[strips, 2]``, the last dimension contiguous; codec ids, and the exponents that are written.
        starts: int64 ``[strips]``, where each record begins in ``arena``.
        upper: float32 ``[cols, cols]``, the feedback between these columns.
    """
    library = _load()
    assert library is not None
    across, starts = upper.T.contiguous(), starts.contiguous()
    library.ciuic_round_grids(
        panel.data_ptr(), panel.stride(0), *panel.shape, across.data_ptr(), tags.data_ptr(), tags.stride(0),
        starts.data_ptr(), HEADROOM, native.tables(), arena.data_ptr(),
    )  # fmt: skip
