"""How often a property is tried whose examples take long: a share of the profile's, so `make test-all` tries more."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def few(examples: int, **options: Any) -> settings:
    """Settings with ``examples`` where the profile has 100, and more where it has more."""
    return settings(max_examples=examples * settings().max_examples // 100, **options)
