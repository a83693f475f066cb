"""The codecs of one matrix as a map that fits a screen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.pictures.blocks import ParameterBlocks
from ciuic_kernels import codec_by_id
from ciuic_kernels.format import ceil_div


@dataclass(frozen=True)
class MatrixMap:
    """Which codec the blocks of one matrix ``[N, K]`` have.

    Attributes:
        title: name, expert, shape.
        codecs: names by rising bits.
        shares: of the blocks, for each of ``codecs``.
        bits: per weight of the matrix, everything stored counted.
        cells: int64 ``[down, across]``, index into ``codecs``: that of a block, or of several the most common.
        means: float32 ``[down, across]``, the mean of those indices, for colours.
        strips_a_cell, kblocks_a_cell: how many blocks a cell stands for.
    """

    title: str
    codecs: tuple[str, ...]
    shares: tuple[float, ...]
    bits: float
    cells: Tensor
    means: Tensor
    strips_a_cell: int
    kblocks_a_cell: int

    @property
    def scale(self) -> str:
        """What a cell is."""
        if self.strips_a_cell == self.kblocks_a_cell == 1:
            return "a cell is a block of 64 rows x 128 columns"
        blocks = f"{self.strips_a_cell} x {self.kblocks_a_cell} blocks"
        return f"a cell is {blocks}, in the mean of their colours"


def map_matrix(parameter: ParameterBlocks, expert: int | None, down: int, across: int) -> MatrixMap:
    """The map of a matrix, or of one expert, in at most ``down`` x ``across`` cells.

    Raises:
        CiuicError: for an expert that is not there.
    """
    ids, which = _matrix(parameter, expert)
    shape = list(parameter.shape[-2:])
    present = sorted(ids.unique().tolist(), key=lambda i: (codec_by_id(i).bits, i))
    index = torch.zeros(256, dtype=torch.int64)
    index[torch.tensor(present)] = torch.arange(len(present))
    places = index[ids.long()]
    counts = torch.bincount(places.flatten(), minlength=len(present))
    steps = ceil_div(ids.shape[0], down), ceil_div(ids.shape[1], across)
    one = ParameterBlocks(parameter.name, parameter.role, parameter.shape[-2:], ids)
    return MatrixMap(
        f"{parameter.name}{which}, {shape[0]} x {shape[1]}",
        tuple(codec_by_id(i).name for i in present),
        tuple((counts / ids.numel()).tolist()),
        8 * one.nbytes / one.grid.numel,
        *_summarize(places, *steps, len(present)),
        *steps,
    )


def _matrix(parameter: ParameterBlocks, expert: int | None) -> tuple[Tensor, str]:
    experts = parameter.grid.matrices
    if len(parameter.shape) == 2:
        if expert is not None:
            raise CiuicError(f"{parameter.name} is one matrix and has no experts; leave --expert out.")
        return parameter.codecs, ""
    if expert is not None and not 0 <= expert < experts:
        raise CiuicError(f"{parameter.name} has experts 0 to {experts - 1}, got {expert}.")
    if not parameter.experts_differ:
        return parameter.codecs, f", expert {expert or 0} of {experts}, all alike"
    same = bool((parameter.codecs == parameter.codecs[0]).all())
    ending = "all alike" if same else "no two need be alike, --expert chooses"
    return parameter.codecs[expert or 0], f", expert {expert or 0} of {experts}" + (
        f", {ending}" if same or expert is None else ""
    )


def _summarize(places: Tensor, rows: int, cols: int, kinds: int) -> tuple[Tensor, Tensor]:
    """``[down, across]`` each: of every ``rows`` x ``cols`` places the most frequent, and the mean."""
    one_hot = torch.nn.functional.one_hot(places, kinds).permute(2, 0, 1).float()
    margins = (0, -places.shape[1] % cols, 0, -places.shape[0] % rows)
    padded = torch.nn.functional.pad(one_hot, margins)
    shares = torch.nn.functional.avg_pool2d(padded[None], (rows, cols))[0]
    means = (shares * torch.arange(kinds)[:, None, None]).sum(dim=0) / shares.sum(dim=0)
    return shares.argmax(dim=0), means
