"""The error of each codec on weights of normal distribution, as a share of their energy.

Blocks of a trained model differ little in it: group scales take up their spread, and what a plan needs beyond it is
how much each block matters. On SmolLM2 the measured error of every block led to no better plans than these
constants (docs/adr/011). Pruned blocks do differ: the more zeros, the less there is to get wrong (docs/adr/008).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ciuic_hf.planning.uniform import LADDER
from ciuic_kernels import codec_by_name
from ciuic_kernels.codecs.sparse import CAPACITIES, CAPACITY_UNIT, SPARSE, WIDTHS
from ciuic_kernels.packing import decode_tensor, encode_tensor

NEVER_MIXED = ("zero", "sparse")
"""Dropping weights is no small error: one block in 600, dropped by the same rule, made the KL of SmolLM2 nine times."""

MENU = [name for name in LADDER if not name.startswith(NEVER_MIXED)]
"""The codecs among which a plan chooses, by rate."""

DENSE = CAPACITY_UNIT
"""Nonzero 32nds of a block to which no sparse codec applies."""

_ROWS, _COLS = 1024, 1024
_SPARSE_ROWS, _SPARSE_COLS = 128, 256


def menu_of(nonzero: int) -> list[str]:
    """The codecs for a block with at most ``nonzero`` 32nds of its weights not zero; none of them drops a weight."""
    if nonzero == 0:
        return ["zero"]
    return [*MENU, *(SPARSE[k, nonzero].name for k in WIDTHS)] if nonzero in CAPACITIES else MENU


@lru_cache(maxsize=CAPACITY_UNIT + 1)
def relative_errors(nonzero: int = DENSE) -> dict[str, float]:
    """Codec name -> ``|W - Q|^2 / |W|^2`` on normal weights in bfloat16, the same on every machine.

    Args:
        nonzero: 32nds of the weights that are left, those of largest magnitude; all of them by default.
    """
    if nonzero == 0:
        return {"zero": 0.0}
    weights = _weights(nonzero)
    energy = float(weights.float().square().sum())
    errors = {}
    for name in menu_of(nonzero):
        rows, cols = weights.shape
        ids = torch.full((rows // 64, cols // 128), codec_by_name(name).id, dtype=torch.uint8)
        decoded = decode_tensor(encode_tensor(weights, ids))
        errors[name] = float((decoded - weights.float()).square().sum()) / energy
    return errors


def _weights(nonzero: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    if nonzero not in CAPACITIES:
        return torch.randn(_ROWS, _COLS, generator=generator, device="cpu").bfloat16()
    weights = torch.randn(_SPARSE_ROWS, _SPARSE_COLS, generator=generator, device="cpu").bfloat16()
    blocks = weights.unflatten(0, (-1, 64)).unflatten(2, (-1, 128)).transpose(1, 2)
    flat = blocks.flatten(2).float().abs()
    kept = flat.argsort(dim=2, descending=True)[..., : flat.shape[2] * nonzero // CAPACITY_UNIT]
    mask = torch.zeros_like(flat).scatter_(2, kept, 1.0).view_as(blocks)
    return (blocks * mask).transpose(1, 2).reshape(_SPARSE_ROWS, _SPARSE_COLS).bfloat16()
