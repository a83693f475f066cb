"""The codec of every block of a model: from the tags of a checkpoint, or from a plan file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.inspection import read_tags
from ciuic_hf.modules.targets import role_of_name
from ciuic_hf.planning.plan import ModelPlan
from ciuic_hf.report import CompressedParameter, Report, printable
from ciuic_kernels import BlockGrid, codec_by_id
from ciuic_kernels.layout import block_nbytes

BF16_NBYTES = 2


@dataclass(frozen=True)
class ParameterBlocks:
    """The blocks of one compressed parameter.

    Attributes:
        shape: ``(N, K)`` or ``(E, N, K)``.
        codecs: uint8 ``[strips, kblocks]``, the same for every expert, or ``[E, strips, kblocks]``.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    codecs: Tensor

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(self.shape)

    @property
    def experts_differ(self) -> bool:
        return self.codecs.dim() == 3

    @property
    def copies(self) -> int:
        """How many matrices each entry of ``codecs`` stands for."""
        return 1 if self.experts_differ else self.grid.matrices

    def block_nbytes(self) -> Tensor:
        """int64, shaped as ``codecs``: bytes of each record, without its tags."""
        grid = self.grid if self.experts_differ else BlockGrid(self.shape[-2:])
        return block_nbytes(self.codecs, grid).view(self.codecs.shape)

    def block_weights(self) -> Tensor:
        """int64 ``[strips, kblocks]``: weights of each block."""
        rows = torch.tensor([self.grid.strip_rows(strip) for strip in range(self.grid.strips)])
        cols = torch.tensor([self.grid.block_cols(kblock) for kblock in range(self.grid.kblocks)])
        return rows[:, None] * cols

    @cached_property
    def nbytes(self) -> int:
        """Everything stored: arena and tags."""
        return int(self.block_nbytes().sum()) * self.copies + self.grid.tags_nbytes

    def codec_counts(self) -> dict[str, int]:
        """Codec name -> number of blocks, most first."""
        ids, counts = self.codecs.unique(return_counts=True)
        found = {
            codec_by_id(i).name: n * self.copies for i, n in zip(ids.tolist(), counts.tolist(), strict=True)
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class ModelBlocks:
    """All compressed parameters of a checkpoint or plan, tied ones once.

    Attributes:
        source: where it was read from.
    """

    source: str
    parameters: Sequence[ParameterBlocks]

    def find(self, name: str) -> ParameterBlocks:
        """The parameter of this name, or the only one whose name contains it. Raises CiuicError."""
        exact = [p for p in self.parameters if p.name == name]
        found = exact or [p for p in self.parameters if name in p.name]
        if len(found) == 1:
            return found[0]
        some = ", ".join(printable(p.name) for p in (found or self.parameters)[:3])
        if not found:
            raise CiuicError(f"{self.source} has no compressed weight {name!r}; there is {some}, ...")
        raise CiuicError(
            f"{len(found)} weights of {self.source} have {name!r} in their name: {some}, ...; name one."
        )

    def report(self) -> Report:
        """The table by role, with bf16 weights as what is compressed."""
        return Report(
            [
                CompressedParameter(
                    p.name,
                    p.role,
                    p.shape,
                    p.grid.numel,
                    p.nbytes,
                    BF16_NBYTES * p.grid.numel,
                    p.codec_counts(),
                )
                for p in self.parameters
            ],
            [],
            source=self.source,
        )


def read_blocks(path: Path | str) -> ModelBlocks:
    """The blocks of a checkpoint directory, from headers and tags; or of a plan file.

    Raises:
        CiuicError: when it is neither, or is incomplete, damaged or inconsistent.
    """
    path = Path(path)
    if path.is_dir():
        stored = read_tags(path)
        parameters = [
            ParameterBlocks(name, entry.role, entry.shape, entry.tags[..., 0])
            for name, entry in stored.items()
        ]
    elif path.suffix == ".json" and path.is_file():
        parameters = _planned(ModelPlan.load(path))
    else:
        raise CiuicError(
            f"{path} is not a model: it is neither the directory of a checkpoint nor a plan.json."
        )
    if not parameters:
        raise CiuicError(f"{path} lists no compressed weights.")
    return ModelBlocks(str(path), parameters)


def _planned(plan: ModelPlan) -> list[ParameterBlocks]:
    """A plan names tied tables twice and counts them once: then the size tells, and the head is left out."""
    parameters = [
        ParameterBlocks(name, role_of_name(name, len(shape)), shape, plan.codecs[name])
        for name, shape in plan.shapes.items()
    ]
    heads = [p for p in parameters if p.role == "lm_head"]
    surplus = sum(p.nbytes for p in parameters) - plan.nbytes
    if heads and surplus == sum(p.nbytes for p in heads):
        return [p for p in parameters if p.role != "lm_head"]
    return parameters
