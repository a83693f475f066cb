"""The error of each codec on weights of normal distribution, as a share of their energy.

Blocks of a trained model differ little in it: group scales take up their spread, and what a plan needs beyond it is
how much each block matters. On SmolLM2 the measured error of every block led to no better plans than these
constants (docs/adr/011).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ciuic_hf.planning.uniform import LADDER
from ciuic_kernels import codec_by_name
from ciuic_kernels.packing import decode_tensor, encode_tensor

NEVER_MIXED = ("zero", "sparse")
"""Dropping weights is no small error: one block in 600, dropped by the same rule, made the KL of SmolLM2 nine times."""

MENU = [name for name in LADDER if not name.startswith(NEVER_MIXED)]
"""The codecs among which a plan chooses, by rate."""

_ROWS, _COLS = 1024, 1024


@lru_cache(maxsize=1)
def relative_errors() -> dict[str, float]:
    """Codec name -> ``|W - Q|^2 / |W|^2`` on a million normal weights in bfloat16, the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights = torch.randn(_ROWS, _COLS, generator=generator, device="cpu").bfloat16()
    energy = float(weights.float().square().sum())
    errors = {}
    for name in MENU:
        ids = torch.full((_ROWS // 64, _COLS // 128), codec_by_name(name).id, dtype=torch.uint8)
        decoded = decode_tensor(encode_tensor(weights, ids))
        errors[name] = float((decoded - weights.float()).square().sum()) / energy
    return errors
