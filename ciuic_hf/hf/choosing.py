"""From a model on the meta device and a CiuicConfig to the codec of every block: what loads and plans start with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.config import ADAPTIVE, MAX_BITS, MIN_BITS
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.cache import can_compress_cache
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.placing import TooSmallError, layers_on, place_of, split_beside
from ciuic_hf.hf.prefill import is_automatic
from ciuic_hf.modules.allocation import TABLES, Place, Survey, adapt_targets, allocate_targets, is_pooled
from ciuic_hf.modules.targets import Kept, Target, find_targets
from ciuic_hf.planning.cache_formats import CACHE_BITS
from ciuic_hf.planning.memory import Footprint, Run, footprint, largest_fitting
from ciuic_hf.planning.moments import InputMoments
from ciuic_hf.planning.plan import ModelPlan
from ciuic_hf.planning.prefill_chunk import fastest_run, leanest_run
from ciuic_hf.planning.rate_distortion import MENU
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_kernels import BlockGrid, codec_by_name
from ciuic_kernels.layout import arena_nbytes
from ciuic_kernels.work import work_nbytes

OFFSET_NBYTES = 8  # of a strip, derived at load


@dataclass(frozen=True)
class Choice:
    """What becomes of a model.

    Attributes:
        kept_nbytes: parameter or buffer that is not compressed -> bytes.
        error: predicted KL in nats per token, None unless sensitivities were measured.
        beside: what generation takes beside the weights, None when it was not asked for.
        run: how that is generated.
        tied: names of targets that share their bytes with another.
    """

    targets: list[Target]
    kept: list[Kept]
    kept_nbytes: Mapping[str, int]
    error: float | None
    beside: Footprint | None
    run: Run
    tied: frozenset[str]

    @property
    def compressed_nbytes(self) -> int:
        """Arenas and tags, tied ones once."""
        return sum(stored_nbytes(t) for t in self.stored)

    @property
    def weights_nbytes(self) -> int:
        """Everything but generation: compressed and kept, without the tables that loading derives."""
        return self.compressed_nbytes + sum(self.kept_nbytes.values())

    @property
    def stored(self) -> list[Target]:
        """Targets with bytes of their own."""
        return [t for t in self.targets if t.name not in self.tied]

    @property
    def bits(self) -> float:
        """Bits per weight of all that is not embeddings or lm_head, everything counted."""
        counted = [t for t in self.targets if t.role not in TABLES] or self.targets
        weights = sum(BlockGrid(t.shape).numel for t in counted)
        bits = 8 * sum(map(stored_nbytes, counted)) / max(1, weights)
        return min(MAX_BITS, max(MIN_BITS, round(bits, 4)))

    def budget(self) -> dict[str, int]:
        """Bytes by purpose, of the whole model on one device."""
        purposes = {
            "compressed weights": self.compressed_nbytes,
            "kept weights": sum(self.kept_nbytes.values()),
        }
        purposes["block tables"] = sum(derived_nbytes(t) for t in self.stored)
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
    device: str = "cuda",
    device_map: Mapping[str, Place] | None = None,
    survey: Survey | None = None,
    ties: Mapping[str, str] | None = None,
) -> Choice:
    """Decide the codec of every block.

    Args:
        model: its weights are not looked at, they may be on the meta device.
        dtype: that the model will compute in.
        context, batch: what generation is counted for where the config does not say.
        device: type of the device that the model will run on.
        device_map: prefix of a name -> device, where memory is given for each.
        survey: looks at the weights, to find those that were pruned; by default none were.
        ties: as ``find_targets`` takes them.

    Raises:
        CiuicError: for settings, sensitivities or a plan that do not fit the model, a budget that is too small, or
            ``adaptive`` without a survey.
    """
    choice = uniform_choice(model, config, dtype, context, batch, device, ties)
    choice = replace(choice, targets=adapt_targets(choice.targets, survey or _blind))
    if config.plan is not None:
        plan = ModelPlan.load(config.plan)
        plan.check({t.name: tuple(t.shape) for t in choice.targets})
        followed = [replace(t, codec_ids=plan.codecs[t.name]) for t in choice.targets]
        return replace(choice, targets=followed, error=plan.error)
    if config.policy == "uniform":
        return choice
    file = config.sensitivity or config.calibration
    measured = Sensitivity.load(file) if file else None
    if measured is not None and config.calibration is not None:
        measured = measured.rounded(InputMoments(config.calibration))
    rooms, place = None, place_of(device_map or {"": ""})
    if config.memory is not None:
        text = model.config.get_text_config().to_dict()
        bits = CACHE_BITS if can_compress_cache(model.config) else ()
        choice, rooms = _with_pieces(model, choice, config, text, device_map or {"": ""}, bits)
    nonzeros = survey([t for t in choice.targets if is_pooled(t, config.intent)], False) if survey else None
    allocated, error = allocate_targets(choice.targets, config.intent, measured, rooms, place, nonzeros)
    return replace(choice, targets=allocated, error=error)


def _blind(_targets: Sequence[Target], _thorough: bool) -> Mapping[str, Tensor]:
    raise CiuicError(
        f"{ADAPTIVE!r} looks at the weights, and a plan is made without them; leave it out, or load the model with it."
    )


def uniform_choice(
    model: Any,
    config: CiuicConfig,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    batch: int = 1,
    device: str = "cuda",
    ties: Mapping[str, str] | None = None,
) -> Choice:
    """What is compressed and what is kept, with the codecs of the uniform plan; arguments as in :func:`choose`."""
    in_float32 = kept_in_float32(model)
    targets, kept = find_targets(model, config.intent, in_float32, ties)
    names = {t.name for t in targets}
    tied = frozenset(names & set(getattr(model, "all_tied_weights_keys", {}) if ties is None else ties))
    kept_nbytes = {
        name: p.numel() * (4 if any(part in name for part in in_float32) else p.element_size())
        for name, p in [*model.named_parameters(), *model.named_buffers()]
        if name not in names
    }
    if config.context is not None:
        context, batch = config.context, config.batch
    run = run_of(model, dtype, device, config.cache_bits)
    if isinstance(config.prefill_chunk, int):
        run = replace(run, prefill_chunk=config.prefill_chunk)
    text = model.config.get_text_config().to_dict()
    beside = footprint(text, context, batch, run) if context is not None else None
    return Choice(targets, kept, kept_nbytes, None, beside, run, tied)


def run_of(model: Any, dtype: torch.dtype | None, device: str, cache_bits: int | None = None) -> Run:
    """How a model will generate on a type of device."""
    eager = model.config._attn_implementation == "eager"
    element = (dtype or torch.get_default_dtype()).itemsize
    kind = "cpu" if device == "cpu" else "cuda"
    return Run(element, cache_bits, kind, "eager" if eager else None)


def stored_nbytes(target: Target) -> int:
    """Arena and tags of a target."""
    grid = BlockGrid(target.shape)
    return target.arena_nbytes + grid.tags_nbytes


def derived_nbytes(target: Target) -> int:
    """Strip offsets, and the work table that a GPU needs."""
    grid = BlockGrid(target.shape)
    return OFFSET_NBYTES * (grid.matrices * grid.strips + 1) + work_nbytes(grid)


@lru_cache(maxsize=1024)  # the layers of a model repeat a few shapes
def _smallest_arena(shape: tuple[int, ...]) -> int:
    grid = BlockGrid(shape)
    ids = torch.full(grid.tags_shape[:-1], codec_by_name(MENU[0]).id, dtype=torch.uint8)
    return arena_nbytes(ids, grid)


def smallest_nbytes(target: Target) -> int:
    """Arena and tags of a target when every block takes the cheapest codec of the menu."""
    grid = BlockGrid(target.shape)
    return grid.matrices * _smallest_arena(target.shape[-2:]) + grid.tags_nbytes


def kept_in_float32(model: Any) -> list[str]:
    """Parts of the names of parameters that the model keeps in float32."""
    names = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]
    return sorted(set(names))


def fixed_and_smallest(
    choice: Choice, config: CiuicConfig, device_map: Mapping[str, Place]
) -> tuple[dict[Place, int], dict[Place, int]]:
    """Bytes on each device that no budget can change, weights only; and the least that the others can take."""
    place, intent = place_of(device_map), config.intent
    fixed: dict[Place, int] = dict.fromkeys(device_map.values(), 0)
    smallest = dict(fixed)
    for name, nbytes in choice.kept_nbytes.items():
        fixed[place(name)] += nbytes
    for target in choice.stored:
        where = place(target.name)
        fixed[where] += derived_nbytes(target)
        if is_pooled(target, intent) and intent.key(target.name, target.role) is None:
            smallest[where] += smallest_nbytes(target)
        else:
            fixed[where] += stored_nbytes(target)
    return fixed, smallest


def _with_pieces(
    model: Any,
    choice: Choice,
    config: CiuicConfig,
    text: Mapping[str, Any],
    device_map: Mapping[str, Place],
    cache_bits: Sequence[int],
) -> tuple[Choice, dict[Place, int]]:
    """The choice with the size of pieces that the prompt goes in by, and what :func:`_rooms` says of it.

    Where it is to be chosen and the best does not fit, the leanest may.
    """
    assert config.context is not None
    if not is_automatic(model, config):
        return choice, _rooms(choice, config, text, device_map, cache_bits)
    asked = text, config.context, config.batch
    memory = min(map(config.memory_of, set(device_map.values())))
    fastest = fastest_run(text, memory, config.context, config.batch, choice.run)
    try:
        fast = replace(choice, run=fastest, beside=footprint(*asked, fastest))
        return fast, _rooms(fast, config, text, device_map, cache_bits)
    except TooSmallError:
        leanest = leanest_run(*asked, choice.run)
        lean = replace(choice, run=leanest, beside=footprint(*asked, leanest))
        return lean, _rooms(lean, config, text, device_map, cache_bits)


def _rooms(
    choice: Choice,
    config: CiuicConfig,
    text: Mapping[str, Any],
    device_map: Mapping[str, Place],
    cache_bits: Sequence[int],
) -> dict[Place, int]:
    """Bytes that the budgets leave for the weights chosen by importance. Raises TooSmallError when too few.

    Args:
        cache_bits: that the model's cache could be compressed to.
    """
    assert choice.beside is not None
    fixed, smallest = fixed_and_smallest(choice, config, device_map)
    least = {where: fixed[where] + smallest[where] for where in fixed}
    layers = layers_on([t.name for t in choice.targets], device_map)
    beside = split_beside(choice.beside, layers)
    rooms = {where: config.memory_of(where) - fixed[where] - beside[where] for where in fixed}
    for where, room in rooms.items():
        if room >= smallest[where]:
            continue
        memory, context = config.memory_of(where), 0
        if len(fixed) == 1:
            context = largest_fitting(text, memory - least[where], choice.run, batch=config.batch)
        enough = (
            n for n in cache_bits if _fits(config, text, replace(choice.run, cache_bits=n), least, layers)
        )
        bits, several = next(enough, 0), len(fixed) > 1
        raise TooSmallError(
            where, memory, least[where], beside[where], config.context, config.batch, context, several, bits
        )
    return rooms


def _fits(
    config: CiuicConfig,
    text: Mapping[str, Any],
    run: Run,
    weights: Mapping[Place, int],
    layers: Mapping[Place, int],
) -> bool:
    """Whether these weights leave every device enough to generate so."""
    assert config.context is not None
    beside = split_beside(footprint(text, config.context, config.batch, run), layers)
    return all(nbytes + beside[where] <= config.memory_of(where) for where, nbytes in weights.items())


def describe(targets: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """What config.json says of each compressed parameter."""
    return {t.name: {"shape": list(t.shape), "arena_nbytes": t.arena_nbytes, "role": t.role} for t in targets}
