"""Compressed parameters for measurements: real ones for the gate, bytes that look like real ones for times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.planning.uniform import codec_ids
from ciuic_kernels import BlockGrid, PackedTensor
from ciuic_kernels.derived import Derived, derive
from ciuic_kernels.ops._products import Matrix
from ciuic_kernels.packing import allocate

EXPONENT = 112
"""Of random blocks: scales of 2^-15 to 2^-7, so weights are about as large as a model's."""


@dataclass(frozen=True)
class Operand:
    """A compressed parameter with what operators need besides.

    Attributes:
        stored: arena, tags, offsets, work, kinds, in the order of the operators' arguments.
    """

    packed: PackedTensor
    derived: Derived

    @property
    def rows(self) -> int:
        return self.packed.grid.rows

    @property
    def cols(self) -> int:
        return self.packed.grid.cols

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        return self.packed.arena, self.packed.tags, *self.derived

    def matrix(self, which: int = 0) -> Matrix:
        return Matrix(self.packed.arena, self.packed.tags, *self.derived, self.rows, self.cols, which)


def operand_of(packed: PackedTensor) -> Operand:
    """A parameter with what is derived from it on its device."""
    return Operand(packed, derive(packed.tags, packed.grid, packed.arena.numel()))


def together(operands: Sequence[Operand]) -> tuple[list[Tensor] | list[int], ...]:
    """What ``ciuic::linears`` takes of several parameters, from the arenas to the number of kinds."""
    arenas, tags, offsets, works, kinds = zip(*(o.stored for o in operands), strict=True)
    tensors = (list(arenas), list(tags), list(offsets), list(works))
    return *tensors, [kind for own in kinds for kind in own], [len(own) for own in kinds]


def random_packed(shape: tuple[int, ...], ids: Tensor, device: torch.device, seed: int = 0) -> PackedTensor:
    """A parameter on a device whose records are random bytes; in grid codecs any bytes are weights.

    Args:
        shape: ``(N, K)`` or ``(E, N, K)``.
        ids: uint8 ``[strips, kblocks]``, the grid codec of every block, the same for every expert.
    """
    grid = BlockGrid(shape)
    packed, _ = allocate(ids.expand(grid.tags_shape[:-1]), grid, device)
    packed.arena.random_(0, 256, generator=torch.Generator(device).manual_seed(seed))
    packed.tags[..., 1] = EXPONENT
    return packed


def random_operand(shape: WeightShape, setting: float | str, device: torch.device) -> Operand:
    """``random_packed`` of a weight of a model, in a codec or at some bits per weight."""
    return operand_of(random_packed(shape.shape, codec_ids(shape.shape[-2:], setting), device))


def random_weight(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    """Dense bfloat16 weights of a model's size, for what is compared with."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 0.02, generator=generator)


def activations(tokens: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """Gaussian x ``[tokens, cols]``."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, cols, generator=generator, device=device).to(dtype)


def routing(tokens: int, shape: WeightShape, device: torch.device, seed: int = 2) -> Tensor:
    """Different experts for each token, uniformly drawn: int64 ``[tokens, routed]``."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
    return scores.topk(shape.routed, dim=1).indices
