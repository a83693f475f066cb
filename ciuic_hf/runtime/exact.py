"""What is saved exactly in fewer bytes: bools as bits, integers in the smallest type that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NARROWER = {
    torch.int64: (torch.uint8, torch.int16, torch.int32),
    torch.int32: (torch.uint8, torch.int16),
    torch.int16: (torch.uint8,),
}


@dataclass(frozen=True)
class Narrow:
    """A flat tensor of bools or integers.

    Attributes:
        stored: integers ``[n]`` in a narrower type; or the bits of bools, uint8 ``[ceil(n / 8)]``, where bit i of byte
            j is value ``j + i * ceil(n / 8)``.
        numel, dtype: of the source.
    """

    stored: Tensor
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Stored."""
        return self.stored.nbytes


def narrow(flat: Tensor) -> Narrow | None:
    """Packs bools or integers ``[n]``; None for other types, and where no narrower type holds the values.

    On a GPU the range of integers is waited for.
    """
    if flat.dtype == torch.bool:
        return Narrow(_bits(flat), flat.numel(), flat.dtype)
    if flat.dtype not in _NARROWER or flat.numel() == 0:
        return None
    smallest, largest = (int(bound) for bound in flat.aminmax())
    for dtype in _NARROWER[flat.dtype]:
        if torch.iinfo(dtype).min <= smallest and largest <= torch.iinfo(dtype).max:
            return Narrow(flat.to(dtype), flat.numel(), flat.dtype)
    return None


def widen(packed: Narrow) -> Tensor:
    """A new tensor ``[numel]``, equal to the source."""
    if packed.dtype != torch.bool:
        return packed.stored.to(packed.dtype)
    width = len(packed.stored)
    whole = torch.empty(8, width, dtype=torch.bool, device=packed.stored.device)
    for place in range(8):
        torch.ne(packed.stored & (1 << place), 0, out=whole[place])
    return whole.flatten()[: packed.numel]


def _bits(flat: Tensor) -> Tensor:
    width = -(-flat.numel() // 8)
    packed = torch.zeros(width, dtype=torch.uint8, device=flat.device)
    whole = flat.contiguous().view(torch.uint8)
    for place in range(8):
        part = whole[place * width : (place + 1) * width]
        packed[: len(part)].bitwise_or_(part << place)
    return packed
