"""The policy ``adaptive``: one look at a tensor's statistics says how it is stored.

More than 80 % zeros: sparsely. Else, a standard deviation below a tenth of the mean's magnitude: 4 bits. Else 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_hf.compressor.blocks import filled, nonzeros_of
from ciuic_hf.compressor.compressed import CompressedTensor
from ciuic_hf.compressor.compressor import BLOCK_DTYPES, CiuicCompressor, Source, as_torch
from ciuic_kernels import BlockGrid, codec_by_name

SPARSE_ABOVE, NARROW_BELOW = 0.8, 0.1
NARROW_BITS, WIDE_BITS = 4, 8


def adaptive_choice(tensor: Tensor) -> int | None:
    """4 or 8 bits, or None for sparse storage, by the rule of this module."""
    if int(torch.count_nonzero(tensor)) < (1 - SPARSE_ABOVE) * tensor.numel():
        return None
    mean = float(tensor.mean(dtype=torch.float64))
    spread = float(tensor.to(torch.promote_types(tensor.dtype, torch.float32)).std(correction=0))
    return NARROW_BITS if spread < NARROW_BELOW * abs(mean) else WIDE_BITS


def adaptive_compress(tensor: Source, compressor: CiuicCompressor) -> CompressedTensor:
    """Compress by the rule of this module; the compressor's ``compression_ratio`` is not consulted.

    Narrow tensors are stored as differences from their mean, so that 4 bits cover the spread and not the mean.

    Raises:
        CiuicError: as ``CiuicCompressor.compress_tensor``.
    """
    source, _ = as_torch(tensor)
    if source.dtype not in BLOCK_DTYPES or source.numel() == 0:
        return compressor.compress_quant(tensor, WIDE_BITS)  # kept as it is
    bits = adaptive_choice(source)
    return compressor.compress_sparse(tensor) if bits is None else compressor.compress_quant(tensor, bits)


def adaptive_codecs(weight: Tensor) -> Tensor:
    """Codecs of a model's weight ``[N, K]`` or ``[E, N, K]``, matrix by matrix: uint8 ``[..., strips, kblocks]``.

    Blocks of zeros cost nothing, those with few weights are stored sparsely, and all get 8 bits. A model keeps no
    mean beside its blocks, and a grid around zero would lose a narrow spread at 4 bits (docs/tensors.md), so that
    rule is not applied to weights of models.
    """
    return adaptive_codecs_for(tuple(weight.shape), nonzeros_of(weight))


def adaptive_codecs_for(shape: tuple[int, ...], nonzeros: Tensor | None) -> Tensor:
    """The same from the count of every block (``nonzeros_of``)."""
    grid, dense = BlockGrid(shape), f"grid{WIDE_BITS}_g32"
    if nonzeros is None:
        return torch.full(grid.tags_shape[:-1], codec_by_name(dense).id, dtype=torch.uint8)
    ids = [
        filled(counts, BlockGrid(shape[-2:]), dense)
        for counts in nonzeros.view(-1, grid.strips, grid.kblocks)
    ]
    return torch.stack(ids).view(grid.tags_shape[:-1])
