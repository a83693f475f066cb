"""What another budget changes: bits and bytes by role, and which blocks became richer or poorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.pictures.blocks import ModelBlocks, ParameterBlocks
from ciuic_hf.pictures.layers import LayerMap, map_bits, subtract
from ciuic_hf.report import ROLE_ORDER


@dataclass(frozen=True)
class RoleChange:
    """One role, before and after.

    Attributes:
        nbytes: arenas and tags, before and after.
        up, down, same: blocks that take more, fewer and as many bytes.
    """

    role: str
    weights: int
    nbytes: tuple[int, int]
    up: int
    down: int
    same: int

    @property
    def bits(self) -> tuple[float, float]:
        before, after = self.nbytes
        return 8 * before / self.weights, 8 * after / self.weights


@dataclass(frozen=True)
class Comparison:
    """Two choices of codecs for the weights of one model.

    Attributes:
        roles: the last one is all together.
        difference: bits per weight after less before, by layer.
        only_before, only_after: weights that only one of the two compresses; not counted in the rest.
    """

    sources: tuple[str, str]
    roles: tuple[RoleChange, ...]
    difference: LayerMap
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "before": self.sources[0],
            "after": self.sources[1],
            "roles": [vars(change) | {"bits": change.bits} for change in self.roles],
            "only_before": self.only_before,
            "only_after": self.only_after,
        }


def compare_models(before: ModelBlocks, after: ModelBlocks) -> tuple[Comparison, ModelBlocks, ModelBlocks]:
    """The comparison, and both models cut down to the weights that both compress.

    Raises:
        CiuicError: when the two are not one model.
    """
    names = [{p.name: p for p in model.parameters} for model in (before, after)]
    common = [name for name in names[0] if name in names[1]]
    for name in common:
        shapes = [list(known[name].shape) for known in names]
        if shapes[0] != shapes[1]:
            raise CiuicError(
                f"{before.source} and {after.source} are different models: {name} is {shapes[0]} and {shapes[1]}."
            )
    if not common:
        raise CiuicError(f"{before.source} and {after.source} have no compressed weight in common.")
    # Roles of a plan are read off names: for both the same ones, or rows would not match.
    pairs = [(names[0][name], _with_role(names[1][name], names[0][name].role)) for name in common]
    cut = ModelBlocks(before.source, [b for b, _ in pairs]), ModelBlocks(after.source, [a for _, a in pairs])
    comparison = Comparison(
        (before.source, after.source),
        tuple(_by_role(pairs)),
        subtract(map_bits(cut[1]), map_bits(cut[0])),
        tuple(name for name in names[0] if name not in names[1]),
        tuple(name for name in names[1] if name not in names[0]),
    )
    return comparison, *cut


def _with_role(parameter: ParameterBlocks, role: str) -> ParameterBlocks:
    return ParameterBlocks(parameter.name, role, parameter.shape, parameter.codecs)


def _by_role(pairs: Sequence[tuple[ParameterBlocks, ParameterBlocks]]) -> list[RoleChange]:
    parts = [_change(before, after) for before, after in pairs]
    roles = sorted(
        {part.role for part in parts}, key=lambda role: (ROLE_ORDER.get(role, len(ROLE_ORDER)), role)
    )
    return [*(_sum(role, [p for p in parts if p.role == role]) for role in roles), _sum("total", parts)]


def _change(before: ParameterBlocks, after: ParameterBlocks) -> RoleChange:
    # [strips, kblocks] and [E, strips, kblocks] broadcast where only one of the two differs by expert.
    growth = after.block_nbytes() - before.block_nbytes()
    copies = min(before.copies, after.copies)
    counts = [int(chosen.sum()) * copies for chosen in (growth > 0, growth < 0, growth == 0)]
    return RoleChange(before.role, before.grid.numel, (before.nbytes, after.nbytes), *counts)


def _sum(role: str, parts: Sequence[RoleChange]) -> RoleChange:
    return RoleChange(
        role,
        sum(p.weights for p in parts),
        (sum(p.nbytes[0] for p in parts), sum(p.nbytes[1] for p in parts)),
        sum(p.up for p in parts),
        sum(p.down for p in parts),
        sum(p.same for p in parts),
    )
