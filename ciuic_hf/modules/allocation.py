"""The rate-distortion policy over the weights of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ciuic_hf.compressor.adaptive import adaptive_codecs_for
from ciuic_hf.config import CompressionIntent
from ciuic_hf.modules.targets import Target
from ciuic_hf.planning.priors import prior_sensitivity
from ciuic_hf.planning.rate_distortion import Weighed, codec_ids_of, plan_blocks
from ciuic_hf.planning.sensitivity import Sensitivity

Place = str | int
"""A device, as the keys of max_memory name it."""

Survey = Callable[[Sequence[Target], bool], Mapping[str, Tensor]]
"""Counts the weights of each block that are not zero: name -> int32 ``[..., strips, kblocks]``, of those targets that
have blocks worth storing sparsely. The flag says to count even where a sample shows no zeros."""

TABLES = ("embeddings", "lm_head")


def is_pooled(target: Target, intent: CompressionIntent) -> bool:
    """Whether the codecs of a target are chosen by importance, together with others."""
    return isinstance(intent.setting(target.name, target.role), float) and target.role not in TABLES


def allocate_targets(
    targets: Sequence[Target],
    intent: CompressionIntent,
    measured: Sensitivity | None = None,
    budgets: Mapping[Place, int] | None = None,
    place: Callable[[str], Place] = lambda _: "",
    nonzeros: Mapping[str, Tensor] | None = None,
) -> tuple[list[Target], float | None]:
    """The same targets with codecs by importance, and the predicted KL in nats per token of those, if measured.

    Weights that one setting decides for share its bits. Embeddings and lm_head, and weights for which a codec was
    named, stay as they are.

    Args:
        targets: with the codecs of the uniform plan.
        measured: how much each block matters; without it the kind of each weight decides.
        budgets: bytes for the weights that no key of ``modules`` decides for, in place of ``intent.bits``, by where
            they are.
        place: where a parameter is, by its name.
        nonzeros: parameter name -> weights of each block that are not zero, int32 ``[..., strips, kblocks]``, of
            those that were pruned.

    Raises:
        CiuicError: when ``measured`` belongs to another model, or a setting is below the smallest plan.
    """
    pools: dict[str | None, list[Target]] = defaultdict(list)
    for target in targets:
        if is_pooled(target, intent):
            pools[intent.key(target.name, target.role)].append(target)
    if measured is not None:
        measured.check({t.name: t.shape for pool in pools.values() for t in pool})
    chosen: dict[str, Tensor] = {}
    error = 0.0
    for key, pool in pools.items():
        bits = intent.setting(pool[0].name, pool[0].role)
        assert isinstance(bits, float)
        weighed = _weigh(pool, measured, nonzeros or {})
        for budget, part in _parts(weighed, bits, budgets if key is None else None, place):
            plan = plan_blocks(part, budget)
            chosen |= {p.name: codec_ids_of(p, plan.chosen[p.name]) for p in part}
            error += plan.error
    allocated = [replace(t, codec_ids=chosen[t.name]) if t.name in chosen else t for t in targets]
    return allocated, error if measured is not None else None


def adapt_targets(targets: Sequence[Target], survey: Survey) -> list[Target]:
    """The same targets with the codecs of those that are ``adaptive``, by their weights."""
    adaptive = [t for t in targets if t.adaptive]
    if not adaptive:
        return list(targets)
    nonzeros = survey(adaptive, True)
    chosen = {t.name: adaptive_codecs_for(t.shape, nonzeros.get(t.name)) for t in adaptive}
    return [replace(t, codec_ids=chosen.get(t.name, t.codec_ids)) for t in targets]


def _parts(
    pool: list[Weighed], bits: float, budgets: Mapping[Place, int] | None, place: Callable[[str], Place]
) -> list[tuple[int, list[Weighed]]]:
    """Weights that share bytes, with these: all of them, or those of one place."""
    if budgets is None:
        return [(sum(int(bits * p.grid.numel / 8) for p in pool), pool)]
    parts: dict[Place, list[Weighed]] = defaultdict(list)
    for parameter in pool:
        parts[place(parameter.name)].append(parameter)
    return [(budgets[where], part) for where, part in parts.items()]


def _weigh(pool: list[Target], measured: Sensitivity | None, nonzeros: Mapping[str, Tensor]) -> list[Weighed]:
    weight: Mapping[str, float | Tensor]
    weight = measured.blocks if measured is not None else prior_sensitivity({t.name: t.shape for t in pool})
    return [Weighed(t.name, t.shape, weight[t.name], nonzeros.get(t.name)) for t in pool]
