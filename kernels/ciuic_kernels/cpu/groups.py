"""``groups.c`` on tensors: packing and unpacking groups of codes. The layout is told by the caller."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

import torch
from torch import Tensor

from ciuic_kernels.cpu.native import build_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LANES, MAX_GROUP = 16, 256  # of groups.c


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    library, _ = build_library("groups.c")
    if library is None:
        return None
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.ciuic_groups_pack.argtypes = (p, i, n, i, i, f, f, f, f, i, ctypes.c_uint64, p, p, p)
    library.ciuic_groups_unpack.argtypes = (p, p, p, n, i, i, f, i, ctypes.c_uint64, i, p)
    library.ciuic_groups_unpack.restype = None
    return library


def usable(device: torch.device, dtype: torch.dtype, group: int) -> bool:
    """Whether the compiled code serves these; ``CIUIC_IMPL=reference`` says no."""
    if device.type != "cpu" or dtype not in DTYPES or group % LANES or group > MAX_GROUP:
        return False
    return os.environ.get("CIUIC_IMPL") != "reference" and _load() is not None


def pack(
    flat: Tensor,
    bits: int,
    per_interval: float,
    middle: int,
    limit: float,
    smallest_step: float,
    seed: int | None,
    codes: Tensor,
    step: Tensor,
    low: Tensor | None,
) -> bool:
    """Fills ``codes`` uint8 ``[groups, group * bits / 8]``, ``step`` and ``low`` bfloat16 ``[groups]``.

    Args:
        flat: float32 or bfloat16 ``[n]``, contiguous.
        per_interval: step / range of a group, slack included.
        middle: code of zero where ``low`` is None, else 0.
        limit: magnitudes beyond it are told, by False.
        seed: of the stochastic rounding; None rounds to the nearest.
    """
    library = _load()
    assert library is not None
    beyond: int = library.ciuic_groups_pack(
        flat.data_ptr(), DTYPES[flat.dtype], flat.numel(), bits, codes.shape[1] * 8 // bits, per_interval,
        middle, limit, smallest_step, seed is not None, (seed or 0) % 2**64,
        codes.data_ptr(), step.data_ptr(), low.data_ptr() if low is not None else None,
    )  # fmt: skip
    return beyond == 0


def unpack(
    codes: Tensor, step: Tensor, low: Tensor | None, bits: int, middle: int, seed: int | None, out: Tensor
) -> None:
    """Fills ``out`` float32 or bfloat16 ``[n]``.

    Args:
        seed: that ``pack`` had, to take its dither off in groups with both signs; None where it stays.
    """
    library = _load()
    assert library is not None
    library.ciuic_groups_unpack(
        codes.data_ptr(), step.data_ptr(), low.data_ptr() if low is not None else None, out.numel(), bits,
        codes.shape[1] * 8 // bits, middle, seed is not None, (seed or 0) % 2**64, DTYPES[out.dtype],
        out.data_ptr(),
    )  # fmt: skip
