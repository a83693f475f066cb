"""Other ways to multiply with the same matrix: bfloat16 by cuBLAS, and 4-bit libraries that happen to be installed.

Each peer is made from a dense weight by its own quantizer and called as its own modules call it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
GROUP = 64


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        name: as shown.
        module: what has to be importable.
        prepare: from a bfloat16 weight ``[N, K]`` to ``x [M, K] -> [M, N]``.
    """

    name: str
    module: str
    prepare: Callable[[Tensor], Product]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def cublas(weight: Tensor) -> Product:
    """What the uncompressed model does."""
    return lambda x: torch.nn.functional.linear(x, weight)


def _bitsandbytes(weight: Tensor) -> Product:
    import bitsandbytes  # type: ignore[import-not-found,unused-ignore]

    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def _gemlite(weight: Tensor) -> Product:
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found,unused-ignore]

    rows, cols = weight.shape
    groups = weight.float().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = ((high - low) / 15).clamp_min(1e-8)
    zeros = -low / scales
    codes = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8).reshape(rows, cols)
    layer = GemLiteLinearTriton(
        4,
        group_size=GROUP,
        in_features=cols,
        out_features=rows,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(codes, scales.to(torch.bfloat16), zeros.to(torch.bfloat16), bias=None)
    product: Product = layer
    return product


def _torchao(weight: Tensor) -> Product:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found,unused-ignore]

    rows, cols = weight.shape
    linear: Any = nn.Linear(cols, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model = nn.Sequential(linear)
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    return lambda x: model(x)


PEERS = (
    Peer("bitsandbytes NF4", "bitsandbytes", _bitsandbytes),
    Peer("gemlite int4", "gemlite", _gemlite),
    Peer("torchao int4", "torchao", _torchao),
)
