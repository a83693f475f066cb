"""Colours that people with any colour vision can tell apart, as ``#rrggbb``.

Bits run along viridis (Smith and van der Walt, matplotlib 2.0, CC0), which rises evenly in lightness. Differences run
from orange over white to purple, the PuOr scheme of ColorBrewer (Harrower and Brewer 2003), Apache-2.0.
"""

from __future__ import annotations

VIRIDIS = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26838f", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
PUOR = ("#b35806", "#f1a340", "#fee0b6", "#f7f7f7", "#d8daeb", "#998ec3", "#542788")

LOW_BITS, HIGH_BITS = 2.0, 8.0
OVER = "#f4b6c8"  # more than HIGH_BITS: not compressed much, whatever it is
LINE, GREY, MARK, SECOND_MARK = "#26838f", "#6b7280", "#d1495b", "#440154"


def along(scale: tuple[str, ...], place: float) -> str:
    """The colour at ``place``, 0 to 1, of a scale."""
    place = min(1.0, max(0.0, place)) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    share = place - low
    pairs = zip(_rgb(scale[low]), _rgb(scale[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def of_bits(bits: float) -> str:
    """The colour of bits per weight, the same in every picture."""
    if bits > HIGH_BITS + 0.5:
        return OVER
    return along(VIRIDIS, (bits - LOW_BITS) / (HIGH_BITS - LOW_BITS))


def of_difference(bits: float, largest: float) -> str:
    """The colour of a difference: orange for fewer bits, purple for more."""
    return along(PUOR, 0.5 + bits / (2 * largest))


def of_rank(rank: float, ranks: int) -> str:
    """One of ``ranks`` colours, spread evenly; fractions lie between two."""
    return along(VIRIDIS, (rank + 0.5) / ranks if ranks < 3 else rank / (ranks - 1))


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better (relative luminance of WCAG 2, without gamma)."""
    red, green, blue = _rgb(colour)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 120 else "#ffffff"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
