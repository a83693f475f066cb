"""A compressed parameter as operators take it, with its decoded weights to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ciuic_kernels.derived import Derived, derive
from ciuic_kernels.packing import decode_tensor
from tests.kernels.samples import generator, implementation, packed_sample

SHAPES = [(64, 128), (150, 576), (70, 300), (5, 40), (129, 192)]
EXPERT_SHAPES = [(4, 70, 300), (6, 64, 192), (3, 5, 40)]


@dataclass(frozen=True)
class Operand:
    """What an operator needs of a parameter ``[N, K]`` or ``[E, N, K]``; ``dense`` is float32, from the reference."""

    arena: Tensor
    tags: Tensor
    derived: Derived
    dense: Tensor

    @property
    def rows(self) -> int:
        return self.dense.shape[-2]

    @property
    def cols(self) -> int:
        return self.dense.shape[-1]

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        return self.arena, self.tags, *self.derived


@cache
def operand(shape: tuple[int, ...]) -> Operand:
    """A parameter with blocks of every codec; do not write to it."""
    with implementation("reference"):
        packed = packed_sample(shape)
        derived = derive(packed.tags, packed.grid, packed.arena.numel())
        return Operand(packed.arena, packed.tags, derived, decode_tensor(packed))


def together(operands: Sequence[Operand]) -> tuple[list[Tensor] | list[int], ...]:
    """What ``linears`` takes of several parameters, from the arenas to the number of kinds."""
    arenas, tags, offsets, works, kinds = zip(*(o.stored for o in operands), strict=True)
    tensors = (list(arenas), list(tags), list(offsets), list(works))
    return *tensors, [kind for own in kinds for kind in own], [len(own) for own in kinds]


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)
