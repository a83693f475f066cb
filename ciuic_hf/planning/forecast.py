"""What to expect of a plan: quality of a model that was measured at such bits, and a bound on speed."""

from __future__ import annotations

import math
from typing import Any

from ciuic_hf.presets import read_preset


def reference_quality(bits: float) -> dict[str, Any] | None:
    """KL and top-1 agreement that ``configs/quality.json`` measured at these bits, between its points.

    KL is interpolated in its logarithm, which is nearly straight in bits. Beyond the last point its values hold;
    None below the first, where nothing was measured.
    """
    preset = read_preset("quality")
    points = preset["points"]
    if bits < points[0]["bits"]:
        return None
    high = next((point for point in points if point["bits"] >= bits), points[-1])
    low = points[max(0, points.index(high) - 1)]
    span = high["bits"] - low["bits"]
    share = min(1.0, (bits - low["bits"]) / span) if span else 1.0
    logarithm = (1 - share) * math.log(low["kl"]) + share * math.log(high["kl"])
    top1 = (1 - share) * low["top1"] + share * high["top1"]
    return {"model": preset["model"], "kl": math.exp(logarithm), "top1": top1}


def reference_cache_kl(cache_bits: int | None) -> float | None:
    """KL that a cache of so many bits added by itself where ``configs/quality.json`` says; None without one."""
    return None if cache_bits is None else float(read_preset("quality")["cache_kl"][str(cache_bits)])


def active_share(experts: int, routed: int, batch: int) -> float:
    """The share of experts that one step of ``batch`` tokens reads on average, routed as if at random."""
    return 1 - (1 - min(1.0, routed / experts)) ** batch


def tokens_per_second(step_nbytes: float, batch: int, gb_per_s: float) -> float:
    """The bound that memory bandwidth sets: ``batch`` tokens for every ``step_nbytes`` that are read."""
    return batch * gb_per_s * 1e9 / step_nbytes
