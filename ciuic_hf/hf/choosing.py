"""From a model on the meta device and a CiuicConfig to the codec of every block: what loads and plans start with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ciuic_hf.config import MAX_BITS, MIN_BITS
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.modules.allocation import TABLES, allocate_targets, is_pooled
from ciuic_hf.modules.targets import Kept, Target, find_targets
from ciuic_hf.planning.memory import Footprint, footprint, largest_fitting
from ciuic_hf.planning.plan import ModelPlan
from ciuic_hf.planning.rate_distortion import MENU
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_hf.report import human_bytes
from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.format import ceil_div
from ciuic_kernels.work import work_nbytes

OFFSET_NBYTES = 8  # of a strip, derived at load


@dataclass(frozen=True)
class Choice:
    """What becomes of a model.

    Attributes:
        kept_nbytes: of all parameters and buffers that are not compressed.
        error: predicted KL in nats per token, None unless sensitivities were measured.
        beside: what generation takes beside the weights, None when it was not asked for.
        tied: names of targets that share their bytes with another.
    """

    targets: list[Target]
    kept: list[Kept]
    kept_nbytes: int
    error: float | None
    beside: Footprint | None
    tied: frozenset[str]

    @property
    def compressed_nbytes(self) -> int:
        """Arenas and tags, tied ones once."""
        return sum(stored_nbytes(t) for t in self.targets if t.name not in self.tied)

    @property
    def bits(self) -> float:
        """Bits per weight of all that is not embeddings or lm_head, everything counted."""
        counted = [t for t in self.targets if t.role not in TABLES] or self.targets
        weights = sum(BlockGrid(t.shape).numel for t in counted)
        bits = 8 * sum(map(stored_nbytes, counted)) / max(1, weights)
        return min(MAX_BITS, max(MIN_BITS, round(bits, 4)))

    def budget(self) -> dict[str, int]:
        """Bytes by purpose, of the whole model on one device."""
        purposes = {"compressed weights": self.compressed_nbytes, "kept weights": self.kept_nbytes}
        purposes["block tables"] = sum(_derived_nbytes(t) for t in self.targets if t.name not in self.tied)
        return purposes | (dict(vars(self.beside)) if self.beside else {})

    def plan(self, settings: dict[str, Any]) -> ModelPlan:
        shapes = {t.name: tuple(t.shape) for t in self.targets}
        codecs = {t.name: t.codec_ids for t in self.targets}
        return ModelPlan(shapes, codecs, self.compressed_nbytes, self.error, self.budget(), settings)


def choose(
    model: Any,
    config: CiuicConfig,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    batch: int = 1,
) -> Choice:
    """Decide the codec of every block.

    Args:
        model: on the meta device.
        dtype: that the model will compute in.
        context, batch: what generation is counted for where the config does not say.

    Raises:
        CiuicError: for settings, sensitivities or a plan that do not fit the model, or a budget that is too small.
    """
    in_float32 = kept_in_float32(model)
    targets, kept = find_targets(model, config.intent, in_float32)
    tied = frozenset(set(getattr(model, "all_tied_weights_keys", None) or {}) & {t.name for t in targets})
    names = {t.name for t in targets}
    kept_nbytes = sum(
        p.numel() * (4 if any(part in name for part in in_float32) else p.element_size())
        for name, p in [*model.named_parameters(), *model.named_buffers()]
        if name not in names
    )
    if config.context is not None:
        context, batch = config.context, config.batch
    text, element = model.config.get_text_config().to_dict(), (dtype or torch.get_default_dtype()).itemsize
    beside = footprint(text, context, batch, element) if context is not None else None
    choice = Choice(targets, kept, kept_nbytes, None, beside, tied)
    if config.plan is not None:
        plan = ModelPlan.load(config.plan)
        plan.check({t.name: tuple(t.shape) for t in targets})
        followed = [replace(t, codec_ids=plan.codecs[t.name]) for t in targets]
        return replace(choice, targets=followed, error=plan.error)
    if config.policy == "uniform":
        return choice
    file = config.sensitivity or config.calibration
    measured = Sensitivity.load(file) if file else None
    budget = None if config.memory is None else _room(choice, config, text, element)
    allocated, error = allocate_targets(targets, config.intent, measured, budget)
    return replace(choice, targets=allocated, error=error)


def stored_nbytes(target: Target) -> int:
    """Arena and tags of a target."""
    grid = BlockGrid(target.shape)
    return target.arena_nbytes + grid.tags_nbytes


def _derived_nbytes(target: Target) -> int:
    """Strip offsets, and the work table that a GPU needs."""
    grid = BlockGrid(target.shape)
    return OFFSET_NBYTES * (grid.matrices * grid.strips + 1) + work_nbytes(grid)


def kept_in_float32(model: Any) -> list[str]:
    """Parts of the names of parameters that the model keeps in float32."""
    names = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]
    return sorted(set(names))


def _room(choice: Choice, config: CiuicConfig, text: dict[str, Any], element: int) -> int:
    """Bytes that a memory budget leaves for the weights chosen by importance. Raises CiuicError when too few."""
    assert config.memory is not None
    intent = config.intent
    pool = [t for t in choice.targets if is_pooled(t, intent) and intent.key(t.name, t.role) is None]
    pooled = {t.name for t in pool}
    taken = sum(choice.budget().values()) - choice.compressed_nbytes
    taken += sum(stored_nbytes(t) for t in choice.targets if t.name not in pooled | choice.tied)
    room = config.memory - taken
    smallest = sum(_smallest_nbytes(t) for t in pool)
    if room < smallest:
        raise CiuicError(_too_small(choice, config, taken + smallest, text, element))
    return room


def _smallest_nbytes(target: Target) -> int:
    ids = torch.full(
        BlockGrid(target.shape[-2:]).tags_shape[:-1], codec_by_name(MENU[0]).id, dtype=torch.uint8
    )
    return stored_nbytes(replace(target, codec_ids=ids))


def _too_small(choice: Choice, config: CiuicConfig, needed: int, text: dict[str, Any], element: int) -> str:
    """Why a budget does not do, and what would."""
    assert config.memory is not None and choice.beside is not None
    beside, weights = choice.beside.total, needed - choice.beside.total
    ways = [f'memory="{ceil_div(needed, 1 << 20)}MiB"']
    context = largest_fitting(text, config.memory - weights, element, batch=config.batch)
    if context > 0:
        ways.append(f"context={context}")
    return (
        f"The smallest plan needs {human_bytes(needed)} and memory is {human_bytes(config.memory)}: "
        f"{human_bytes(weights)} for weights and {human_bytes(beside)} for generating with context={config.context} "
        f"and batch={config.batch}; use {' or '.join(ways)}, or bits with a device_map that offloads modules."
    )


def describe(targets: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """What config.json says of each compressed parameter."""
    return {t.name: {"shape": list(t.shape), "arena_nbytes": t.arena_nbytes, "role": t.role} for t in targets}
