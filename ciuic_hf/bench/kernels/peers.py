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
MOST_OFF = 0.3
"""Four bits leave about a tenth of Gaussian weights as error."""


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


def _asymmetric(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[N, K]``, scale and lowest value float32 ``[N, K / GROUP]``: ``w = low + scale * code``."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_min(1e-8)
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15)
    return codes.to(torch.uint8).flatten(1), scales, low


def _tinygemm(weight: Tensor) -> Product:
    """The int4 product that comes with torch."""
    codes, scales, low = _asymmetric(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    pairs = torch.stack([scales, low + 8 * scales], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pairs)


def _gemlite(weight: Tensor) -> Product:
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found,unused-ignore]

    rows, cols = weight.shape
    codes, scales, low = _asymmetric(weight)
    layer = GemLiteLinearTriton(
        4,
        group_size=GROUP,
        in_features=cols,
        out_features=rows,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    columns = [part.reshape(-1, 1).to(torch.bfloat16) for part in (scales, -low / scales)]
    layer.pack(codes, *columns, bias=None)
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


def prepared(peer: Peer, weight: Tensor) -> Product:
    """A peer's product, after a look at whether it is one. Raises ValueError when not, and what the peer raises."""
    product = peer.prepare(weight)
    x = torch.linspace(-1, 1, 4 * weight.shape[1], device=weight.device).view(4, -1).sin().to(weight.dtype)
    exact = cublas(weight)(x).float()
    error = float((product(x).float() - exact).norm() / exact.norm())
    if not error < MOST_OFF:
        raise ValueError(f"its product is off by {error:.0%}, so it is not timed")
    return product


PEERS = (
    Peer("torch int4", "torch", _tinygemm),
    Peer("bitsandbytes NF4", "bitsandbytes", _bitsandbytes),
    Peer("gemlite int4", "gemlite", _gemlite),
    Peer("torchao int4", "torchao", _torchao),
)
