"""Bits per weight by layer, role and kind of weight: the rows and columns of a heat map."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ciuic_hf.pictures.blocks import ModelBlocks, ParameterBlocks
from ciuic_hf.planning.priors import layer_of
from ciuic_hf.report import ROLE_ORDER, printable

_BEFORE_LAYER = re.compile(r"^(.*?)(?:layers|h|blocks|layer)\.\d+\.")


@dataclass(frozen=True)
class MapRow:
    """One row: a role, or under it a kind of weight.

    Attributes:
        is_kind: whether the row is a part of the role above it.
        values: one for each layer, NaN where the layer has no such weights.
        total: over all layers.
    """

    label: str
    is_kind: bool
    values: tuple[float, ...]
    total: float


@dataclass(frozen=True)
class LayerMap:
    """A heat map: rows down, layers across.

    Attributes:
        layers: their numbers, rising.
        outside: value of each weight that is in no layer, such as lm_head.
    """

    layers: tuple[int, ...]
    rows: tuple[MapRow, ...]
    outside: tuple[tuple[str, float], ...]


@dataclass
class _Sums:
    """Weights and bytes by layer."""

    weights: dict[int, int]
    nbytes: dict[int, int]

    def bits(self, layer: int) -> float:
        weights = self.weights.get(layer, 0)
        return 8 * self.nbytes[layer] / weights if weights else math.nan

    def total_bits(self) -> float:
        return 8 * sum(self.nbytes.values()) / sum(self.weights.values())


def map_bits(model: ModelBlocks) -> LayerMap:
    """Bits per weight, everything stored counted."""
    inside, layers, outside = _sum_up(model.parameters)
    rows = tuple(
        MapRow(label, is_kind, tuple(sums.bits(layer) for layer in layers), sums.total_bits())
        for label, is_kind, sums in inside
    )
    return LayerMap(layers, rows, tuple((p.name, 8 * p.nbytes / p.grid.numel) for p in outside))


def subtract(after: LayerMap, before: LayerMap) -> LayerMap:
    """The differences of two maps of the same weights."""
    rows = tuple(
        MapRow(
            a.label,
            a.is_kind,
            tuple(x - y for x, y in zip(a.values, b.values, strict=True)),
            a.total - b.total,
        )
        for a, b in zip(after.rows, before.rows, strict=True)
    )
    outside = tuple((name, x - y) for (name, x), (_, y) in zip(after.outside, before.outside, strict=True))
    return LayerMap(after.layers, rows, outside)


def _sum_up(
    parameters: Sequence[ParameterBlocks],
) -> tuple[list[tuple[str, bool, _Sums]], tuple[int, ...], list[ParameterBlocks]]:
    """Rows as (label, is a kind, sums), the layers there are, and what is in none."""
    sums: dict[tuple[str, str, str], _Sums] = defaultdict(lambda: _Sums(defaultdict(int), defaultdict(int)))
    layers, outside = set(), []
    for parameter in parameters:
        layer = layer_of(parameter.name)
        if layer is None:
            outside.append(parameter)
            continue
        layers.add(layer)
        match = _BEFORE_LAYER.match(parameter.name)
        stack = match[1].rstrip(".") if match else ""
        kind = parameter.name.removesuffix(".weight").rpartition(".")[2]
        for key in ((stack, parameter.role, ""), (stack, parameter.role, kind)):
            sums[key].weights[layer] += parameter.grid.numel
            sums[key].nbytes[layer] += parameter.nbytes
    stacks = list(dict.fromkeys(stack for stack, _, _ in sums))
    groups = sorted(
        dict.fromkeys((stack, role) for stack, role, _ in sums),
        key=lambda group: (stacks.index(group[0]), ROLE_ORDER.get(group[1], len(ROLE_ORDER))),
    )
    rows: list[tuple[str, bool, _Sums]] = []
    for stack, role in groups:
        kinds = [kind for s, r, kind in sums if (s, r) == (stack, role) and kind]
        prefix = f"{stack}: " if len(stacks) > 1 else ""
        rows.append((printable(prefix + role), False, sums[stack, role, ""]))
        if len(kinds) > 1:
            rows += [(printable(kind), True, sums[stack, role, kind]) for kind in kinds]
    return rows, tuple(sorted(layers)), outside
