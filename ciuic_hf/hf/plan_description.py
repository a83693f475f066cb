"""A plan as plain data: what ``ciuic plan`` prints and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ciuic_hf.hf.plan_alternatives import alternatives
from ciuic_hf.hf.planner import Outlook
from ciuic_hf.planning.forecast import reference_cache_kl, reference_quality


def describe(outlook: Outlook) -> dict[str, Any]:
    """Everything as plain data."""
    request, choice, source = outlook.request, outlook.choice, outlook.source
    budget = outlook.budget()
    memory = None if request.memory is None else request.count * request.memory
    chosen, other = outlook.step_parts
    found: dict[str, Any] = {
        "model": source.name,
        "fits": True,
        "memory": memory,
        "card": request.card,
        "count": request.count,
        "context": request.context,
        "batch": request.batch,
        "cache_bits": request.cache_bits,
        "prefill_chunk": choice.run.prefill_chunk,
        "reference_cache_kl": reference_cache_kl(request.cache_bits),
        "bits": choice.bits,
        "predicted_kl": choice.error,
        "reference_quality": reference_quality(choice.bits),
        "nbytes": sum(budget.values()),
        "budget": budget,
        "roles": outlook.roles(),
        "step_nbytes": int(chosen + other + outlook.history_nbytes),
        "step_history_nbytes": int(outlook.history_nbytes),
        "tokens_per_second": outlook.speed(request.card),
        "max_position_embeddings": outlook.limit,
        "alternatives": alternatives(outlook),
        "files": None,
        "device_map": None if request.count == 1 else outlook.device_map,
    }
    if source.headers is not None:
        found["files"] = {
            "count": source.files,
            "absent": list(source.absent),
            "nbytes": source.nbytes,
            "dtypes": source.dtype_nbytes,
        }
    if request.memory is not None:
        found["longest_context"] = outlook.longest_context(request.memory)
        found["largest_batch"] = outlook.largest_batch(request.memory)
    return found


def save(outlook: Outlook, found: Mapping[str, Any], path: Path) -> None:
    """Write the plan, for ``CiuicConfig(plan=...)``."""
    kept = ("memory", "context", "batch", "bits", "cache_bits", "prefill_chunk", "device_map")
    settings = {key: found[key] for key in kept}
    plan = outlook.choice.plan(settings)
    replace(plan, budget=found["budget"]).save(path)
