"""What transformers calls the cache in keywords and outputs: ``cache`` from 5.24 on, ``past_key_values`` before."""

from __future__ import annotations

from functools import cache


@cache
def cache_name() -> str:
    """The keyword of ``generate``, of a model's ``forward`` and of what that returns."""
    from transformers.generation.utils import ALL_CACHE_NAMES  # late: slow to import

    return "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
