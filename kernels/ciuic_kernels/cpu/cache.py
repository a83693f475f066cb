"""``cache.c`` on tensors: records of a compressed cache as float32. The tables of codes are the caller's."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

import torch
from torch import Tensor

from ciuic_kernels.cpu.native import build_library


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    library, _ = build_library("cache.c")
    if library is None:
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.ciuic_cache_channels.argtypes = (p, p, p, p, p, p, n, n, i, i, n, p)
    library.ciuic_cache_tokens.argtypes = (p, p, p, p, p, n, n, i, i, i, n, p)
    library.ciuic_cache_channels.restype = library.ciuic_cache_tokens.restype = None
    return library


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled code serves these; ``CIUIC_IMPL=reference`` says no."""
    if device.type != "cpu" or dtype != torch.float32 or os.environ.get("CIUIC_IMPL") == "reference":
        return False
    return _load() is not None


def decode_channels(
    planes: tuple[Tensor, ...],
    scale: Tensor,
    low: Tensor,
    table: Tensor | None,
    scale_table: Tensor,
    bits: int,
    group: int,
    out: Tensor,
) -> None:
    """Fills ``out`` float32 ``[B, H, D, t]`` with ``low + scale * code``.

    Args:
        planes: uint8 ``[B, H, D, t * width / 8]``.
        scale, low: uint8 and float16 ``[B, H, D, t / group]``.
        table: the values of the codes in each byte of the first plane; None at 8 bits.
        scale_table: float32 ``[256]``.
        out: channels one stride apart, tokens next to each other.
    """
    library = _load()
    assert library is not None
    codes, third = _contiguous(planes)
    scale, low = scale.contiguous(), low.float().contiguous()
    library.ciuic_cache_channels(
        codes.data_ptr(), _address(third), scale.data_ptr(), low.data_ptr(), _address(table),
        scale_table.data_ptr(), out.shape[:3].numel(), out.shape[3], bits, group, out.stride(2), out.data_ptr(),
    )  # fmt: skip


def decode_tokens(
    planes: tuple[Tensor, ...],
    scale: Tensor,
    table: Tensor | None,
    scale_table: Tensor,
    bits: int,
    group: int,
    out: Tensor,
) -> None:
    """Fills ``out`` float32 ``[B, H, t, D]`` with ``scale * level(code)``; channels next to each other, tokens too.

    Args:
        planes: uint8 ``[B, H, t, P * width / 8]``.
        scale: uint8 ``[B, H, t, ceil(D / group)]``.
        table, scale_table: as for channels.
    """
    library = _load()
    assert library is not None
    codes, third = _contiguous(planes)
    scale = scale.contiguous()
    library.ciuic_cache_tokens(
        codes.data_ptr(), _address(third), scale.data_ptr(), _address(table), scale_table.data_ptr(),
        out.shape[:2].numel(), out.shape[2], out.shape[3], bits, group, out.stride(1), out.data_ptr(),
    )  # fmt: skip


def _contiguous(planes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return planes[0].contiguous(), planes[1].contiguous() if len(planes) > 1 else None


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
