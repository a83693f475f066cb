"""What else than a plan could be chosen, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import choosing, prefill
from ciuic_hf.hf.cache import can_compress_cache
from ciuic_hf.hf.choosing import fixed_and_smallest, uniform_choice
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.placing import TooSmallError, layers_on, split_beside, split_layers
from ciuic_hf.hf.planner import Outlook, Request
from ciuic_hf.modules.allocation import Place
from ciuic_hf.planning.forecast import reference_quality
from ciuic_hf.planning.memory import Footprint, footprint, largest
from ciuic_hf.planning.prefill_chunk import NONE, leanest_run
from ciuic_hf.presets import card_nbytes, read_preset

COUNTS = (1, 2, 4, 8, 16)
"""Cards of one kind that are tried."""


def alternatives(outlook: Outlook) -> list[dict[str, Any]]:
    """The next cheaper and dearer choices: a bit less and more, another cache, the next smaller and larger card.

    Each with memory of one device, bits, what the quality would be, the longest context and the bound on speed. A
    bit less or more is of the asked memory, if there is one; a card is filled at the asked context.
    """
    request, bits = outlook.request, outlook.choice.bits
    rows = []
    for name, step in (("1 bit less", -1.0), ("this plan", 0.0), ("1 bit more", 1.0)):
        if outlook.exists(bits + step) or not step:
            other = bits + step if step else None
            row = _row(outlook, name, outlook.needed(other), bits + step, other, request.card)
            memory = row["memory"] if request.memory is None else request.memory
            rows.append(row | {"longest_context": outlook.longest_context(memory, other)})
    rows += _cache_rows(outlook)
    sizes = sorted((card_nbytes(card), card) for card in read_preset("cards")["cards"])
    here = request.memory if request.memory is not None else outlook.needed()
    smaller = [entry for entry in sizes if entry[0] < 0.95 * here]
    larger = [entry for entry in sizes if entry[0] > (1.05 * here if request.memory else here)]
    for nbytes, card in (*smaller[-1:], *larger[:1]):
        fitting = outlook.bits_in(nbytes)
        name = f"{request.count} x {card}" if request.count > 1 else card
        if fitting is None:
            rows.append({"choice": name, "memory": nbytes, "bits": None})
        else:
            row = _row(outlook, name, nbytes, fitting, fitting, card)
            rows.append(row | {"longest_context": request.context})
    return rows


def _cache_rows(outlook: Outlook) -> list[dict[str, Any]]:
    """The plan's weights with the cache in full, at 8 and at 4 bits, where it is not so already."""
    rows = []
    for bits, name in ((None, "cache in full"), (8, "cache at 8 bits"), (4, "cache at 4 bits")):
        request = outlook.request
        if bits == request.cache_bits or (bits and not can_compress_cache(outlook.model.config)):
            continue
        other = outlook.with_cache(bits)
        row = _row(other, name, other.needed(), outlook.choice.bits, None, request.card)
        memory = outlook.needed() if request.memory is None else request.memory
        rows.append(row | {"longest_context": other.longest_context(memory)})
    return rows


def _row(
    outlook: Outlook, name: str, memory: int, bits: float, other: float | None, card: str | None
) -> dict[str, Any]:
    """One choice; ``other`` are its bits where they are not the plan's."""
    return {
        "choice": name,
        "memory": memory,
        "bits": bits,
        "predicted_kl": outlook.kl(other),
        "reference": reference_quality(bits),
        "tokens_per_second": outlook.speed(card, other),
    }


def setups_that_fit(model: Any, request: Request) -> list[str]:
    """At most three cards, as few as possible of each, that the smallest plan fits on; first the one asked for."""
    found: list[tuple[bool, int, str]] = []
    weights = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    config = CiuicConfig(bits=request.bits, cache_bits=request.cache_bits)
    choice = uniform_choice(model, config, model.dtype, request.context, request.batch, request.device)
    beside = _least_beside(model, request)
    for card in read_preset("cards")["cards"]:
        for count in COUNTS:
            try:
                places: Mapping[str, Place] = {"": 0} if count == 1 else split_layers(model, weights, count)
            except CiuicError:
                break
            fixed, smallest = fixed_and_smallest(choice, config, places)
            taken = split_beside(beside, layers_on([t.name for t in choice.targets], places))
            if all(fixed[d] + smallest[d] + taken[d] <= card_nbytes(card) for d in fixed):
                found.append((card != request.card, count * card_nbytes(card), f"{count} x {card}"))
                break
    return [name for *_, name in sorted(found)[:3]]


def _least_beside(model: Any, request: Request) -> Footprint:
    """What the request takes beside the weights, with the leanest pieces of the prompt if they are to be chosen."""
    text = model.config.get_text_config().to_dict()
    run = choosing.run_of(model, model.dtype, request.device, request.cache_bits)
    if isinstance(request.prefill_chunk, int):
        run = replace(run, prefill_chunk=request.prefill_chunk)
    elif request.memory is not None and request.prefill_chunk != NONE and prefill.why_whole(model) is None:
        run = leanest_run(text, request.context, request.batch, run)
    return footprint(text, request.context, request.batch, run)


def smaller_requests(model: Any, request: Request, error: TooSmallError) -> dict[str, int]:
    """What fits into the memory of a request that was refused: a context, a batch, or a cache of so many bits."""
    ways = {}
    if error.context:
        ways["context"] = error.context
    if request.batch > 1 and request.count == 1 and request.memory is not None:
        room = request.memory - error.weights
        batch = largest(
            lambda n: _least_beside(model, replace(request, batch=n)).total <= room, request.batch - 1
        )
        if batch:
            ways["batch"] = batch
    if error.cache_bits:
        ways["cache_bits"] = error.cache_bits
    return ways
