"""``ciuic plan``: everything that can be said of a model, a memory and a context before a weight is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ciuic_hf.config import MAX_BITS
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import choosing, fp8, prefill
from ciuic_hf.hf.cache import CiuicCache
from ciuic_hf.hf.choosing import Choice, choose, fixed_and_smallest, stored_nbytes
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.fitting import check_headers
from ciuic_hf.hf.placing import layers_on, place_of, split_beside, split_layers
from ciuic_hf.hf.source import Source
from ciuic_hf.hf.writers import refusal
from ciuic_hf.modules.allocation import TABLES, Place
from ciuic_hf.planning.forecast import active_share, tokens_per_second
from ciuic_hf.planning.memory import Footprint, Sizes, footprint, largest
from ciuic_hf.presets import read_preset
from ciuic_kernels import BlockGrid


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        memory: bytes of each device, None to go by ``bits``.
        card: its name in ``configs/cards.json``, None when only a size was given.
        count: devices of that memory.
        device: ``"cuda"`` or ``"cpu"``.
        cache_bits: of a CiuicCache, None for transformers' own.
        prefill_chunk: as ``CiuicConfig`` takes it.
    """

    context: int
    batch: int = 1
    memory: int | None = None
    card: str | None = None
    count: int = 1
    bits: float = 4.25
    sensitivity: Path | None = None
    device: str = "cuda"
    cache_bits: int | None = None
    prefill_chunk: int | str | None = None


def meta_model(source: Source) -> Any:
    """The model without weights, after checking that its files fit it.

    Raises:
        CiuicError: for a model that does not write text, and files that do not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    other = refusal(source.name, source.config)
    if other is not None and type(source.config) not in AutoModelForCausalLM._model_mapping:
        raise other
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=source.config.dtype or torch.bfloat16)
    if source.headers is not None:
        block = None if source.quantization is None else fp8.block_size(source.quantization)
        try:
            check_headers(model, source.headers, block, complete=not source.absent)
        except CiuicError as error:
            raise other or error from None  # an encoder or a classifier has no head to predict tokens
    return model


class Outlook:
    """A plan for a model, and what else could be chosen.

    Raises:
        TooSmallError: when the memory of the request is below the smallest plan.
        CiuicError: for a request that does not fit the model.
    """

    def __init__(self, source: Source, model: Any, request: Request) -> None:
        self.source, self.model, self.request = source, model, request
        self.text: dict[str, Any] = model.config.get_text_config().to_dict()
        self.limit: int | None = self.text.get("max_position_embeddings")
        memory: dict[str, Any] = {}
        if request.cache_bits is not None:
            CiuicCache(model.config, request.cache_bits)  # refuses a model that has nothing to cache
        self.device_map: dict[str, Place] = {"": 0}
        if request.count > 1:
            self.device_map = dict(split_layers(model, self._weights(), request.count))
        if request.memory is not None:
            memory = {
                "memory": dict.fromkeys(range(request.count), request.memory),
                "context": request.context,
                "batch": request.batch,
            }
        self.config = CiuicConfig(
            **(memory or {"bits": request.bits}),
            sensitivity=request.sensitivity,
            cache_bits=request.cache_bits,
            prefill_chunk=request.prefill_chunk,
        )
        prefill.check(model, self.config)
        self.choice: Choice = choose(
            model,
            self.config,
            model.dtype,
            request.context,
            request.batch,
            request.device,
            self.device_map,
        )

    def _weights(self) -> dict[str, int]:
        shapes: dict[str, tuple[int, ...]] = {
            name: tuple(p.shape) for name, p in self.model.named_parameters()
        }
        return {name: BlockGrid(shape).numel for name, shape in shapes.items() if len(shape) > 1}

    @property
    def beside(self) -> Footprint:
        assert self.choice.beside is not None
        return self.choice.beside

    def with_cache(self, bits: int | None) -> Outlook:
        """The same weights with a cache of other bits, None for transformers' own."""
        other, run = copy(self), replace(self.choice.run, cache_bits=bits)
        beside = footprint(self.text, self.request.context, self.request.batch, run)
        other.request = replace(self.request, cache_bits=bits)
        other.choice = replace(self.choice, run=run, beside=beside)
        return other

    @cached_property
    def _pooled(self) -> dict[Place, int]:
        """Weights on each device whose codecs the plan chooses."""
        place, counted = place_of(self.device_map), dict.fromkeys(self.device_map.values(), 0)
        for target in self.choice.stored:
            if target.role not in TABLES:
                counted[place(target.name)] += BlockGrid(target.shape).numel
        return counted

    @cached_property
    def _bounds(self) -> tuple[dict[Place, int], dict[Place, int]]:
        return fixed_and_smallest(self.choice, self.config, self.device_map)

    @cached_property
    def _layers(self) -> dict[Place, int]:
        return layers_on([t.name for t in self.choice.targets], self.device_map)

    def _beside(self, context: int, batch: int) -> dict[Place, int]:
        return split_beside(footprint(self.text, context, batch, self.choice.run), self._layers)

    def weights_on(self, bits: float | None = None) -> dict[Place, int]:
        """Bytes of everything but generation on each device: of this plan, or at other bits."""
        own, step = self._own_weights, 0.0 if bits is None else bits - self.choice.bits
        return {device: own[device] + int(step * n / 8) for device, n in self._pooled.items()}

    @cached_property
    def _own_weights(self) -> dict[Place, int]:
        place, nbytes = place_of(self.device_map), dict.fromkeys(self.device_map.values(), 0)
        for name, kept in self.choice.kept_nbytes.items():
            nbytes[place(name)] += kept
        for target in self.choice.stored:
            nbytes[place(target.name)] += stored_nbytes(target) + choosing.derived_nbytes(target)
        return nbytes

    def needed(self, bits: float | None = None) -> int:
        """Bytes that the fullest device needs."""
        beside = self._beside(self.request.context, self.request.batch)
        return max(nbytes + beside[device] for device, nbytes in self.weights_on(bits).items())

    def bits_in(self, memory: int) -> float | None:
        """Bits per weight that fill devices of this memory, None when not even the smallest plan fits."""
        beside = self._beside(self.request.context, self.request.batch)
        fixed, smallest = self._bounds
        total = 0.0
        for device, weights in self._pooled.items():
            room = memory - fixed[device] - beside[device]
            if room < smallest[device]:
                return None
            total += min(8 * room, MAX_BITS * weights)
        return total / max(1, sum(self._pooled.values()))

    def exists(self, bits: float) -> bool:
        """Whether there is a plan of these bits."""
        fixed, smallest = self._bounds
        weights = self.weights_on(bits)
        return bits <= MAX_BITS and all(weights[d] >= fixed[d] + smallest[d] for d in weights)

    def longest_context(self, memory: int, bits: float | None = None) -> int:
        """Tokens that fit beside these weights, no more than the model was made for; 0 when none do."""
        weights = self.weights_on(bits)
        return largest(lambda n: self._fits(memory, weights, n, self.request.batch), self.limit)

    def largest_batch(self, memory: int) -> int:
        """Sequences of the asked context that fit beside the plan's weights."""
        weights = self.weights_on()
        return largest(lambda n: self._fits(memory, weights, self.request.context, n), 1 << 16)

    def _fits(self, memory: int, weights: Mapping[Place, int], context: int, batch: int) -> bool:
        beside = self._beside(context, batch)
        return all(nbytes + beside[device] <= memory for device, nbytes in weights.items())

    @cached_property
    def step_parts(self) -> tuple[float, float]:
        """Weights that one decoding step reads, in bytes: those whose bits the plan chooses, and all others."""
        batch, routed = self.request.batch, int(self.text.get("num_experts_per_tok") or 0)
        table = _input_embedding(self.model)
        chosen, other = 0.0, float(sum(n for name, n in self.choice.kept_nbytes.items() if name != table))
        for target in self.choice.stored:
            share = active_share(target.shape[0], routed, batch) if len(target.shape) == 3 and routed else 1.0
            if target.name == table and not self.choice.tied:
                continue  # a row for each token
            if target.role in TABLES:
                other += stored_nbytes(target)
            else:
                chosen += share * stored_nbytes(target)
        return chosen, other

    @property
    def history_nbytes(self) -> float:
        """What the attention of one decoding step reads and writes at the asked context."""
        return self.request.batch * Sizes(self.text).step_nbytes(self.choice.run, self.request.context)

    def speed(self, card: str | None, bits: float | None = None) -> float | None:
        """Tokens per second that the bandwidth of one card allows; layers on several cards work in turn."""
        if card is None:
            return None
        chosen, other = self.step_parts
        scale = 1.0 if bits is None else bits / self.choice.bits
        bandwidth = read_preset("cards")["cards"][card]["gb_per_s"]
        return tokens_per_second(scale * chosen + other + self.history_nbytes, self.request.batch, bandwidth)

    def kl(self, bits: float | None = None) -> float | None:
        """KL that measured sensitivities predict, at these bits in place of the plan's; None without them."""
        if self.request.sensitivity is None or bits is None:
            return self.choice.error
        config = CiuicConfig(bits=bits, sensitivity=self.request.sensitivity)
        return choose(self.model, config, self.model.dtype, device=self.request.device).error

    def roles(self) -> dict[str, dict[str, Any]]:
        weights: dict[str, int] = defaultdict(int)
        nbytes: dict[str, int] = defaultdict(int)
        for target in self.choice.stored:
            weights[target.role] += BlockGrid(target.shape).numel
            nbytes[target.role] += stored_nbytes(target)
        return {
            role: {"weights": count, "nbytes": nbytes[role], "bits": 8 * nbytes[role] / count}
            for role, count in weights.items()
        }

    def budget(self) -> dict[str, int]:
        """Bytes by purpose, all devices together."""
        purposes = self.choice.budget()
        beside = sum(self._beside(self.request.context, self.request.batch).values())
        more = beside - self.beside.total
        return purposes | ({"on each further device": more} if more > 0 else {})


def _input_embedding(model: Any) -> str | None:
    """The name of the token table."""
    table = model.get_input_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is table), None)
