"""Logarithms of probabilities, packed as probabilities: their backward pass exponentiates them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.runtime.stochastic import PackedGroups, pack, unpack

# Values that are exponentiated at a time: the probabilities never exist in full.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackedLogarithms:
    """What log_softmax saves. Unbiased is what its backward pass computes with, the exponential.

    A probability that rounds to zero comes back as the logarithm -inf, whose exponential is zero.
    """

    chunks: tuple[PackedGroups, ...]
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of all chunks."""
        return sum(chunk.nbytes for chunk in self.chunks)


def pack_logarithms(flat: Tensor, bits: int, group: int, seed: int) -> PackedLogarithms | None:
    """Packs logarithms ``[n]`` of a float dtype, -inf included; None if one of them is NaN or above 83."""
    chunks = []
    for place, values in enumerate(flat.split(_CHUNK)):
        packed = pack(values.float().exp(), bits, group, None, seed=seed + place)
        if packed is None:
            return None
        chunks.append(packed)
    return PackedLogarithms(tuple(chunks), flat.numel(), flat.dtype)


def unpack_logarithms(packed: PackedLogarithms) -> Tensor:
    """A new tensor ``[n]`` of the source's dtype."""
    device = packed.chunks[0].codes.device if packed.chunks else None
    out = torch.empty(packed.numel, dtype=packed.dtype, device=device)
    for values, chunk in zip(out.split(_CHUNK), packed.chunks, strict=False):
        values.copy_(unpack(chunk).log_())
    return out
