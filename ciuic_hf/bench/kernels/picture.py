"""The picture of a run: bandwidth of decoding by weight, and speed against cuBLAS by number of tokens."""

from __future__ import annotations

from pathlib import Path

from ciuic_hf.bench.kernels.result import Result
from ciuic_hf.errors import CiuicError

COLOURS = {2: "#f59e0b", 3: "#10b981", 4: "#2563eb", 4.25: "#60a5fa", 8: "#6b7280"}


def require_matplotlib() -> None:
    """Raises CiuicError when no picture could be drawn: better before measuring than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CiuicError("Drawing needs matplotlib: pip install 'ciuic-hf[bench]'.") from None


def draw(result: Result, path: Path) -> None:
    """Write the picture. Raises CiuicError when matplotlib is not installed."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_bandwidth(left, result)
    _draw_ratios(right, result)
    machine = result.machine
    figure.suptitle(f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}", fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_bandwidth(axes, result: Result) -> None:  # type: ignore[no-untyped-def]
    """Share of the copy bandwidth at one token, a bar for each weight and number of bits."""
    rows = [row for row in result.products if row.tokens == 1 and result.share(row) is not None]
    names = list(dict.fromkeys(row.name for row in rows))
    bits = sorted({row.bits for row in rows})
    height = 0.8 / max(1, len(bits))
    for place, width in enumerate(bits):
        chosen = [row for row in rows if row.bits == width]
        at = [names.index(row.name) + (place - (len(bits) - 1) / 2) * height for row in chosen]
        shares = [result.share(row) for row in chosen]
        axes.barh(at, shares, height=height, label=f"{width:g} bits", color=COLOURS.get(width))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.axvline(1.0, color="#6b7280", linestyle="--")
    axes.set_xlabel("stored bytes per second / measured copy bandwidth, 1 token")
    if bits:
        axes.legend(fontsize=8)


def _draw_ratios(axes, result: Result) -> None:  # type: ignore[no-untyped-def]
    """Times faster than cuBLAS bf16 against tokens, a line for each weight at 4 bits."""
    rows = [row for row in result.products if row.bits == 4 and row.ratio() is not None]
    for name in dict.fromkeys(row.name for row in rows):
        line = sorted((row.tokens, row.ratio()) for row in rows if row.name == name)
        axes.plot([t for t, _ in line], [r for _, r in line], "o-", markersize=3, linewidth=1, label=name)
    axes.axhline(1.0, color="#6b7280", linestyle="--")
    if rows:
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=6, ncols=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("times faster than cuBLAS bf16, 4 bits in groups of 64")
    axes.grid(True, alpha=0.25)
