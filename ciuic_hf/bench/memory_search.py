"""The largest size whose measured peak stays within a budget, in few measurements."""

from __future__ import annotations

from collections.abc import Callable


def largest_within(
    measure: Callable[[int], int], budget: int, start: int, step: int, cap: int, runs: int = 5
) -> dict[int, int]:
    """Everything that was measured, ``{size: bytes}``; the largest key within the budget is the answer.

    Peaks grow about linearly with the size. A line through the two measurements nearest to the budget says which
    size to measure next, until a size that fits and one ``step`` larger that does not are both known, the cap fits,
    or ``runs`` measurements were made. A size that was only predicted is never an answer.

    Args:
        measure: bytes that one size takes.
        start: first size; when it does not fit, nothing larger is tried.
        step: sizes tried are ``start`` plus multiples of it, and at most ``cap``.
        runs: most measurements, at least 2.
    """
    seen = {start: measure(start)}
    ceiling = start + (cap - start) // step * step
    if seen[start] > budget or ceiling == start:
        return seen
    following = min(start + -(-start // step) * step, ceiling)  # about twice as large
    while following not in seen and len(seen) < runs:
        seen[following] = measure(following)
        low, high = _bracket(seen, budget)
        if low == ceiling or (high is not None and high - low <= step):
            break
        following = _predicted(seen, budget, start, step)
        following = max(following, low + step)
        following = min(following, ceiling if high is None else high - step)
    return seen


def largest_measured(seen: dict[int, int], budget: int) -> int | None:
    """The largest size that was measured and fits."""
    return max((size for size, nbytes in seen.items() if nbytes <= budget), default=None)


def _bracket(seen: dict[int, int], budget: int) -> tuple[int, int | None]:
    """The largest size that fits, and the smallest above it that does not."""
    low = max(size for size, nbytes in seen.items() if nbytes <= budget)
    return low, min((size for size in seen if size > low), default=None)


def _predicted(seen: dict[int, int], budget: int, start: int, step: int) -> int:
    """The size at which a line through the two measurements nearest to the budget meets it, rounded down."""
    one, other = sorted(sorted(seen, key=lambda size: abs(seen[size] - budget))[:2])
    slope = (seen[other] - seen[one]) / (other - one)
    if slope <= 0:
        return 1 << 60  # nothing grows: as far as the caller allows
    return start + int((one + (budget - seen[one]) / slope - start) // step) * step
