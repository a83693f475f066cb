"""The rate-distortion curve of a model: the least predicted error at every size, and where a choice lies.

The error is that of :mod:`ciuic_hf.planning.rate_distortion`: sensitivity times relative error of the codec, summed
over the blocks of Linears and experts. Measured sensitivities make it a KL divergence in nats per token. Those by kind
of weight give ratios only; then the error of all blocks in ``grid4_g64`` is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ciuic_hf.modules.allocation import TABLES
from ciuic_hf.pictures.blocks import ModelBlocks, ParameterBlocks
from ciuic_hf.planning.distortion import MENU, relative_errors
from ciuic_hf.planning.priors import prior_sensitivity
from ciuic_hf.planning.rate_distortion import Weighed, plan_blocks
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_kernels import BlockGrid, codec_by_name

UNIT = "grid4_g64"
_POINTS = 40
_NO_ERROR = "raw_fp16"  # not on the menu; like raw_bf16 it keeps weights


@dataclass(frozen=True)
class Point:
    """Bits per weight, everything counted, and the predicted error."""

    bits: float
    error: float


@dataclass(frozen=True)
class Curve:
    """What there is to choose from, and what was chosen.

    Attributes:
        best: the least error at rising sizes.
        uniform: codec name -> all blocks in that codec.
        chosen: where each model lies, in the order given.
        measured: whether errors are KL in nats per token.
        left_out: weights with sparse or zero blocks, whose error depends on values that tags do not tell.
    """

    best: tuple[Point, ...]
    uniform: dict[str, Point]
    chosen: tuple[Point, ...]
    measured: bool
    left_out: int

    @property
    def unit(self) -> str:
        return "predicted KL in nats per token" if self.measured else f"predicted error ({UNIT} = 1)"


def trace_curve(models: Sequence[ModelBlocks], sensitivity: Sensitivity | None = None) -> Curve | None:
    """The curve of Linears and experts that all models have in common; None when nothing is left.

    Args:
        models: of one architecture, such as two budgets of it.
        sensitivity: of its blocks; without it by kind of weight.

    Raises:
        CiuicError: when the sensitivities belong to another model.
    """
    by_name = [{p.name: p for p in model.parameters} for model in models]
    common = [
        p.name for p in models[0].parameters if p.role not in TABLES and all(p.name in m for m in by_name)
    ]
    errors = _errors_by_id()
    drawn = [name for name in common if all(_is_known(m[name], errors) for m in by_name)]
    if not drawn:
        return None
    parameters = [by_name[0][name] for name in drawn]
    weighed = _weigh(parameters, sensitivity)
    weights = sum(p.grid.numel for p in parameters)
    everything = sum(float(torch.as_tensor(w.sensitivity).double().sum()) for w in weighed)
    uniform = {
        name: (sum(_filled_nbytes(p.shape, name) for p in parameters), everything * relative_errors()[name])
        for name in MENU
        if codec_by_name(name).bits < 16
    }
    sizes = [nbytes for nbytes, _ in uniform.values()]
    budgets = torch.linspace(min(sizes), max(sizes), _POINTS, dtype=torch.float64).long().tolist()
    best = [(plan.nbytes, plan.error) for plan in (plan_blocks(weighed, int(budget)) for budget in budgets)]
    chosen = [_total([model[name] for name in drawn], weighed, errors) for model in by_name]
    scale = 1.0 if sensitivity is not None else 1 / uniform[UNIT][1]

    def point(found: tuple[int, float]) -> Point:
        return Point(8 * found[0] / weights, found[1] * scale)

    return Curve(
        tuple(map(point, best)),
        {name: point(found) for name, found in uniform.items()},
        tuple(map(point, chosen)),
        sensitivity is not None,
        len(common) - len(drawn),
    )


def _errors_by_id() -> Tensor:
    """float64 ``[256]``: relative error by codec id, NaN where it is not known."""
    table = torch.full((256,), torch.nan, dtype=torch.float64)
    for name, error in relative_errors().items():
        table[codec_by_name(name).id] = error
    table[codec_by_name(_NO_ERROR).id] = table[codec_by_name("raw_bf16").id]
    return table


def _is_known(parameter: ParameterBlocks, errors: Tensor) -> bool:
    return bool(errors[parameter.codecs.unique().long()].isfinite().all())


def _weigh(parameters: Sequence[ParameterBlocks], sensitivity: Sensitivity | None) -> list[Weighed]:
    shapes = {p.name: p.shape for p in parameters}
    if sensitivity is None:
        prior = prior_sensitivity(shapes)
        return [Weighed(name, shape, prior[name]) for name, shape in shapes.items()]
    sensitivity.check(shapes)
    return [Weighed(name, shape, sensitivity.blocks[name]) for name, shape in shapes.items()]


@lru_cache(maxsize=1024)  # the layers of a model repeat a few shapes
def _filled_nbytes(shape: tuple[int, ...], codec: str) -> int:
    grid = BlockGrid(shape)
    ids = torch.full((grid.strips, grid.kblocks), codec_by_name(codec).id, dtype=torch.uint8)
    return ParameterBlocks("", "", shape, ids).nbytes


def _total(
    parameters: Sequence[ParameterBlocks], weighed: Sequence[Weighed], errors: Tensor
) -> tuple[int, float]:
    """Bytes and predicted error of some parameters; ``errors`` by codec id."""
    total = 0.0
    for parameter, weigh in zip(parameters, weighed, strict=True):
        relative = errors[parameter.codecs.long()]
        if isinstance(weigh.sensitivity, Tensor):
            total += float((weigh.sensitivity.double() * relative).sum())
        else:
            share = parameter.block_weights().double() / parameter.grid.numel
            total += weigh.sensitivity * parameter.copies * float((share * relative).sum())
    return sum(p.nbytes for p in parameters), total
