"""``CiuicCompressor``: any torch tensor or numpy array into compressed blocks and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciuic_hf.compressor.blocks import BlockStatistics, filled, measure_blocks, within_budget
from ciuic_hf.compressor.compressed import MEAN_NBYTES, CompressedTensor
from ciuic_hf.errors import CiuicError
from ciuic_kernels import BlockGrid
from ciuic_kernels.codecs.grid import GRIDS, PLANES
from ciuic_kernels.codecs.raw16 import RAW_BF16, RAW_FP16
from ciuic_kernels.codecs.zero import ZERO
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS, MAX_MATRIX_BYTES, ceil_div
from ciuic_kernels.layout import FormatError, arena_nbytes, block_nbytes
from ciuic_kernels.packing import allocate, decode_tensor, encode_matrix

Source = Tensor | np.ndarray
Choose = Callable[[BlockStatistics], Tensor]

BLOCK_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPARSE_BITS = 8


class CiuicCompressor:
    """Compresses tensors of any shape; floats into blocks, everything else exactly as it is.

    Args:
        compression_ratio: stored bytes / original bytes, everything counted, above 0 and up to 1. 0.5 gives float16
            8 bits and float32 16; 1 keeps every tensor exactly. Tensors of a few elements, whose tags alone would
            exceed the ratio, are kept as they are.
        sparse_threshold: magnitudes up to this share of the largest one in their block of 64 x 128 count as zero
            when a block is stored sparsely. 0 counts exact zeros only.

    A tensor that is not a matrix is cut into rows of at most 128 elements, in row-major order. Where its values
    spread little around a mean far from zero, the mean is stored once and its differences in the blocks.

    Raises:
        CiuicError: for a ratio or threshold out of range.
    """

    def __init__(self, compression_ratio: float = 0.5, sparse_threshold: float = 1e-3) -> None:
        if not _is_number(compression_ratio) or not 0 < compression_ratio <= 1:
            raise CiuicError(
                f"compression_ratio is stored bytes / original bytes, above 0 and up to 1, got {compression_ratio!r}."
            )
        if not _is_number(sparse_threshold) or not 0 <= sparse_threshold < 1:
            raise CiuicError(
                "sparse_threshold is a share of the largest magnitude of a block, from 0 to below 1, got "
                f"{sparse_threshold!r}."
            )
        self.compression_ratio, self.sparse_threshold = float(compression_ratio), float(sparse_threshold)

    def __repr__(self) -> str:
        return (
            f"CiuicCompressor(compression_ratio={self.compression_ratio:g}, "
            f"sparse_threshold={self.sparse_threshold:g})"
        )

    def compress_tensor(self, tensor: Source) -> CompressedTensor:
        """The most accurate blocks that ``compression_ratio`` allows.

        Args:
            tensor: torch tensor or numpy array of any shape, layout and number type; gradients are not kept.

        Raises:
            CiuicError: for something else, for NaN and infinity, and for a float64 beyond the range of float32.
        """
        if self.compression_ratio == 1:
            return _keep(*as_torch(tensor), "compression_ratio is 1")
        return self._compress(tensor)

    def compress_quant(self, tensor: Source, bits: int) -> CompressedTensor:
        """All blocks on one grid of ``bits`` bits (2, 3, 4, 5, 6 or 8) with a scale byte for each 32 elements.

        ``compression_ratio`` is not consulted. Raises CiuicError.
        """
        if isinstance(bits, bool) or bits not in PLANES:
            raise CiuicError(f"A grid has {', '.join(map(str, PLANES))} bits, got {bits!r}.")
        return self._compress(
            tensor, lambda statistics: filled(statistics.nonzeros, statistics.grid, f"grid{bits}_g32")
        )

    def compress_sparse(self, tensor: Source) -> CompressedTensor:
        """8 bits for everything that is not zero, and one bit a weight to say what is zero; nothing for empty blocks.

        Blocks with too few zeros for that to pay are stored densely, at 8 bits too. ``compression_ratio`` is not
        consulted. Raises CiuicError.
        """
        return self.compress_quant(tensor, SPARSE_BITS)

    def decompress_tensor(self, compressed: CompressedTensor) -> Any:
        """A new tensor or array of the original's kind, shape, dtype and device, contiguous."""
        return decompress(compressed)

    def _compress(self, tensor: Source, choose: Choose | None = None) -> CompressedTensor:
        source, kind = as_torch(tensor)
        if source.dtype not in BLOCK_DTYPES:
            return _keep(source, kind, f"{_name(source.dtype)} is never rounded")
        if source.numel() == 0:
            return _keep(source, kind, "it is empty")
        mean = _check_values(source)
        matrix = _as_matrix(source, mean)
        statistics = measure_blocks(matrix, self.sparse_threshold)
        ids = choose(statistics) if choose else self._within_ratio(statistics, source, mean)
        if ids is None:
            return _keep(source, kind, "too small for blocks")
        if arena_nbytes(ids, statistics.grid) > MAX_MATRIX_BYTES:
            raise CiuicError(
                f"A tensor {list(source.shape)} needs more than {MAX_MATRIX_BYTES >> 30} GiB at this rate, the limit "
                "of one arena; split it, or use fewer bits."
            )
        packed, offsets = allocate(ids, statistics.grid, source.device)
        encode_matrix(packed, offsets, 0, matrix)
        return CompressedTensor(tuple(source.shape), _name(source.dtype), kind, packed, mean=mean)

    def _within_ratio(self, statistics: BlockStatistics, source: Tensor, mean: float) -> Tensor | None:
        """Codecs within ``compression_ratio``, or None where blocks of a small tensor cannot reach it."""
        budget = int(self.compression_ratio * source.numel() * source.itemsize) - (MEAN_NBYTES if mean else 0)
        exact = source.dtype == torch.float16 and not mean
        ids = within_budget(statistics, budget, (RAW_FP16 if exact else RAW_BF16).name)
        dropped = bool(((ids == ZERO.id) & (statistics.nonzeros > 0)).any())
        small = source.numel() <= BLOCK_ROWS * BLOCK_COLS
        over = arena_nbytes(ids, statistics.grid) + statistics.grid.tags_nbytes > budget
        return None if over or (dropped and small) else ids


def decompress(compressed: CompressedTensor) -> Any:
    """The tensor or array that was compressed: same kind, shape, dtype and device; raises CiuicError for damage."""
    dtype = compressed.torch_dtype
    if compressed.packed is None:
        assert compressed.raw is not None
        dense = compressed.raw.clone().view(dtype)
    else:
        widened = torch.float32 if compressed.mean or dtype == torch.float64 else dtype
        try:
            decoded = decode_tensor(compressed.packed, widened)
        except FormatError as error:
            raise CiuicError(f"This compressed tensor is damaged: {error}") from None
        dense = decoded.flatten()[: compressed.numel]
        if compressed.mean:
            dense = dense.to(torch.float64 if dtype == torch.float64 else torch.float32) + compressed.mean
        dense = dense.to(dtype)
        # A scale is rounded up, and so is bfloat16: the largest finite value can come out as infinity.
        limits = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
        dense = dense.clamp_(limits.min, limits.max)
    dense = dense.reshape(compressed.shape)
    return dense.cpu().numpy() if compressed.kind == "numpy" else dense


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_torch(tensor: object) -> tuple[Tensor, str]:
    """The source as a plain tensor without gradient, and its kind. Raises CiuicError."""
    if isinstance(tensor, np.ndarray) and not isinstance(tensor, np.ma.MaskedArray):
        # A copy where numpy's memory is not what torch can view: read only, or with negative strides.
        plain = tensor.flags.writeable and all(stride >= 0 for stride in tensor.strides)
        try:
            return torch.from_numpy(tensor if plain else np.array(tensor, order="C")), "numpy"
        except (TypeError, ValueError):
            raise CiuicError(
                f"An array of {tensor.dtype} cannot be compressed; convert it to a number type of this machine first."
            ) from None
    if not isinstance(tensor, Tensor):
        raise CiuicError(
            f"Only torch tensors and numpy arrays can be compressed, got {type(tensor).__name__}."
        )
    if type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        what = type(tensor.data).__name__ if type(tensor.data) is not Tensor else f"{tensor.layout} tensor"
        raise CiuicError(f"Only dense tensors can be compressed, got a {what}; make it dense first.")
    if tensor.device.type == "meta":
        raise CiuicError(f"A meta tensor {list(tensor.shape)} has no values to compress; load it first.")
    return tensor.detach().resolve_conj().resolve_neg(), "torch"


def _keep(source: Tensor, kind: str, why: str) -> CompressedTensor:
    raw = source.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return CompressedTensor(tuple(source.shape), _name(source.dtype), kind, raw=raw, why_raw=why)


def _check_values(source: Tensor) -> float:
    """The mean where it is to be stored, else 0. Raises CiuicError for values that blocks cannot hold."""
    low, high = (float(bound) for bound in torch.aminmax(source))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CiuicError(
            f"A tensor {list(source.shape)} holds NaN or infinity, which blocks cannot; replace them "
            "(torch.nan_to_num), or keep every value exactly with compression_ratio=1."
        )
    largest = max(-low, high)
    limits = torch.finfo(torch.float32)
    if source.dtype == torch.float64 and (largest > limits.max or 0 < largest < limits.tiny):
        raise CiuicError(
            f"The largest magnitude of this float64 tensor is {largest:g}, outside of float32 ({limits.tiny:.3g} to "
            f"{limits.max:.3g}), in which blocks are decoded; scale it first."
        )
    if low <= 0 <= high:
        return 0.0
    mean = float(source.mean(dtype=torch.float64).float())
    # Half the range is one bit. Around zero, where nearly all tensors are, this never holds.
    return mean if max(high - mean, mean - low) < largest / 2 else 0.0


def _as_matrix(source: Tensor, mean: float) -> Tensor:
    """The source ``[N, K]``, less its mean, in a dtype that blocks encode; zeros behind the last element."""
    if mean:
        source = source.to(torch.promote_types(source.dtype, torch.float32)) - mean
    if source.dtype == torch.float64:
        source = source.float()
    rows, cols = _matrix_shape(tuple(source.shape))
    if tuple(source.shape) == (rows, cols):
        return source
    flat = source.reshape(-1)
    return torch.nn.functional.pad(flat, (0, rows * cols - flat.numel())).view(rows, cols)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix keeps its shape unless rows of at most 128 elements take a tenth less, as with very narrow ones."""
    numel = math.prod(shape)
    rows = ceil_div(numel, BLOCK_COLS)
    cut = (rows, ceil_div(numel, rows))
    if len(shape) == 2 and _probe(cut) > 0.9 * _probe(shape):
        return shape[0], shape[1]
    return cut


def _probe(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix at 8 bits."""
    grid = BlockGrid(shape)
    ids = torch.full((grid.strips, grid.kblocks), GRIDS[8, 32].id, dtype=torch.uint8)
    return int(block_nbytes(ids, grid).sum()) + grid.tags_nbytes
