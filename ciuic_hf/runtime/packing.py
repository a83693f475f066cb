"""How one activation is packed: codes, probabilities, or exactly in fewer bytes; and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ciuic_hf.runtime.exact import Narrow, narrow, widen
from ciuic_hf.runtime.logarithms import PackedLogarithms, pack_logarithms, unpack_logarithms
from ciuic_hf.runtime.purpose import Purpose
from ciuic_hf.runtime.stochastic import PackedGroups, pack, packed_nbytes, unpack

# Values that share a step and a low, four bytes: 8.25, 4.25 and 2.5 bits in all.
GROUPS = {8: 128, 4: 128, 2: 64}
PACKABLE = (torch.float32, torch.float16, torch.bfloat16)
MIN_NUMEL = 1024

Packed = PackedGroups | PackedLogarithms | Narrow


def bits_for(purpose: Purpose, bits: int) -> int:
    """Bits that a tensor gets where others get ``bits``."""
    least = {Purpose.PRODUCT: 2, Purpose.LOGARITHM: 4, Purpose.QUADRATIC: 8}
    return max(bits, least[purpose])


def stored_nbytes(shape: Sequence[int], bits: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that ``compress_activations(bits=bits)`` holds for one saved activation.

    For tensors that a product uses, inputs of Linears say. What softmax saves and statistics are counted with
    ``bits=8``. 0 bits stand for no compression.

    Args:
        shape: of the tensor.
        dtype: of the tensor; other types than float32, float16 and bfloat16 are counted as they are.
    """
    numel = prod(shape)
    if not bits or numel < MIN_NUMEL or dtype not in PACKABLE:
        return numel * dtype.itemsize
    return packed_nbytes(numel, bits, GROUPS[bits], signed=False, seeded=True)


def pack_activation(values: Tensor, purpose: Purpose, bits: int, seed: int) -> Packed | None:
    """Packs ``[n]`` of a type in PACKABLE, or bools or integers; None where it has to be kept as it is.

    Args:
        bits: of this tensor.
        seed: of its rounding.
    """
    if values.dtype not in PACKABLE:
        return narrow(values)
    if purpose is Purpose.LOGARITHM:
        return pack_logarithms(values, bits, GROUPS[bits], seed)
    return pack(values, bits, GROUPS[bits], None, seed=seed)


def unpack_activation(packed: Packed) -> Tensor:
    """A new tensor ``[n]``."""
    if isinstance(packed, Narrow):
        return widen(packed)
    return unpack_logarithms(packed) if isinstance(packed, PackedLogarithms) else unpack(packed)
